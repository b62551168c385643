//! Learning rate and weight decay over a run.

use serde::{Deserialize, Serialize};

/// How learning rate and weight decay develop after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Cosine from the peak to a tenth of it, constant weight decay.
    Cosine,
    /// The b1.58 papers' two stages (2B4T report, arXiv 2504.12285, §2): to the middle of the run a cosine from the peak
    /// towards 60 % of it with weight decay; then a drop to 40 % of the peak, a cosine to zero and no weight decay.
    #[default]
    TwoStage,
}

impl Schedule {
    /// Learning rate and weight decay of step `step` (from 0) of `steps`, with a linear warm-up.
    pub fn at(self, step: u64, steps: u64, warmup: u64, peak: f64, weight_decay: f64) -> (f64, f64) {
        if step < warmup {
            return (peak * (step + 1) as f64 / warmup as f64, weight_decay);
        }
        let progress = (step - warmup) as f64 / (steps.saturating_sub(warmup)).max(1) as f64;
        let cosine = |from: f64, to: f64, x: f64| to + (from - to) * 0.5 * (1.0 + (std::f64::consts::PI * x).cos());
        match self {
            Self::Cosine => (cosine(peak, 0.1 * peak, progress.min(1.0)), weight_decay),
            Self::TwoStage if progress < 0.5 => (cosine(peak, 0.6 * peak, 2.0 * progress), weight_decay),
            Self::TwoStage => (cosine(0.4 * peak, 0.0, (2.0 * progress - 1.0).min(1.0)), 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_is_linear_and_ends_at_the_peak() {
        for schedule in [Schedule::Cosine, Schedule::TwoStage] {
            let rates: Vec<f64> = (0..11).map(|s| schedule.at(s, 100, 10, 1.0, 0.1).0).collect();
            for (i, lr) in rates.iter().take(10).enumerate() {
                assert!((lr - (i + 1) as f64 / 10.0).abs() < 1e-12);
            }
            assert_eq!(rates[10], 1.0);
        }
    }

    #[test]
    fn the_second_stage_drops_and_decays_no_weights() {
        let at = |step| Schedule::TwoStage.at(step, 1000, 0, 1.0, 0.1);
        assert!((at(499).0 - 0.6).abs() < 1e-4 && at(499).1 == 0.1);
        assert_eq!(at(500), (0.4, 0.0));
        assert!(at(999).0 < 1e-4);
        let cosine = Schedule::Cosine.at(1000, 1000, 0, 1.0, 0.1);
        assert!((cosine.0 - 0.1).abs() < 1e-12 && cosine.1 == 0.1);
    }
}
