//! The k largest of many numbers, of which only the least is asked for.

use super::MAX_TOP;

/// The k largest numbers so far, descending.
#[derive(Debug, Clone, Copy)]
pub(super) struct Largest {
    values: [f64; MAX_TOP],
    k: usize,
}

impl Largest {
    /// None yet; `k` is from 1 to [`MAX_TOP`].
    pub fn new(k: usize) -> Self {
        Self { values: [f64::NEG_INFINITY; MAX_TOP], k: k.clamp(1, MAX_TOP) }
    }

    pub fn offer(&mut self, value: f64) {
        let kept = &mut self.values[..self.k];
        if value > kept[kept.len() - 1] {
            let at = kept.partition_point(|v| *v >= value);
            kept[at..].rotate_right(1);
            kept[at] = value;
        }
    }

    pub fn merge(&mut self, other: &Self) {
        other.values[..other.k].iter().for_each(|v| self.offer(*v));
    }

    /// The k-th largest; −∞ if there were fewer.
    pub fn least(&self) -> f64 {
        self.values[self.k - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kth_largest_is_that_of_sorting() {
        let numbers: Vec<f64> = (0..500).map(|i| f64::from((i * 7919) % 257) - 100.0).collect();
        let mut sorted = numbers.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for k in [1, 2, 3, 17, 64] {
            let mut halves = [Largest::new(k); 2];
            numbers.iter().enumerate().for_each(|(i, v)| halves[i % 2].offer(*v));
            let [mut all, other] = halves;
            all.merge(&other);
            assert_eq!(all.least(), sorted[k - 1], "{k}");
        }
        assert_eq!(Largest::new(3).least(), f64::NEG_INFINITY);
    }
}
