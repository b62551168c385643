//! Selecting the best of many candidates without sorting them.

use std::cmp::Ordering;

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub(super) score: f32,
    /// Unnormalised probability.
    pub(super) weight: f32,
    pub(super) id: u32,
}

/// Better candidates first: higher score, then lower id. Scores are never NaN here.
fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.partial_cmp(&a.score).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Fills `out` with the `k` best of `scores` (weights 0), in no order. One comparison per score once the best are
/// found: a buffer of 2k is thinned to k whenever it is full, and its worst member is the bar for what follows.
pub(super) fn top_k(scores: &[f32], k: usize, out: &mut Vec<Candidate>) {
    out.clear();
    let k = k.clamp(1, scores.len().max(1));
    let full = (2 * k).clamp(64, scores.len().max(64));
    let mut bar = f32::NEG_INFINITY;
    let mut thinned = false;
    for (id, &score) in (0u32..).zip(scores) {
        // Of equal scores the earlier id wins, so a later one must be strictly better than the bar.
        if thinned && score <= bar {
            continue;
        }
        out.push(Candidate { score, weight: 0.0, id });
        if out.len() == full && out.len() > k {
            bar = thin(out, k);
            thinned = true;
        }
    }
    if out.len() > k {
        thin(out, k);
    }
}

/// Keeps the `k` best (0 < k < length) and returns the lowest score among them.
fn thin(candidates: &mut Vec<Candidate>, k: usize) -> f32 {
    let (_, worst, _) = candidates.select_nth_unstable_by(k - 1, rank);
    let bar = worst.score;
    candidates.truncate(k);
    bar
}

/// Keeps the best candidates whose weights sum to `mass`: a candidate stays if those better than it sum to less. At
/// least one stays. Quickselect by weight: linear time, in no order.
pub(super) fn nucleus(candidates: &mut Vec<Candidate>, mass: f64) {
    let (mut low, mut high) = (0, candidates.len());
    let mut above = 0.0;
    // The answer is a count in low+1..=high; the first `low` candidates are the best and sum to `above`.
    while high > low + 1 {
        let middle = low + (high - low) / 2;
        if let Some(range) = candidates.get_mut(low..high) {
            range.select_nth_unstable_by(middle - low, rank);
        }
        let sum: f64 = candidates.iter().skip(low).take(middle - low).map(|c| f64::from(c.weight)).sum();
        if above + sum >= mass {
            high = middle;
        } else {
            above += sum;
            low = middle;
        }
    }
    candidates.truncate(high);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorted(scores: &[f32]) -> Vec<Candidate> {
        let mut all: Vec<Candidate> =
            (0..).zip(scores).map(|(id, &score)| Candidate { score, weight: 0.0, id }).collect();
        all.sort_by(rank);
        all
    }

    proptest! {
        // Few distinct scores: ties everywhere.
        #[test]
        fn top_k_is_the_head_of_the_sorted_list(scores in prop::collection::vec((-9i8..9).prop_map(f32::from), 1..400), k in 1usize..450) {
            let mut got = vec![];
            top_k(&scores, k, &mut got);
            got.sort_by(rank);
            prop_assert_eq!(got, sorted(&scores).into_iter().take(k).collect::<Vec<_>>());
        }

        #[test]
        fn nucleus_is_the_shortest_head_with_that_mass(scores in prop::collection::vec((-9i8..9).prop_map(f32::from), 1..200), share in 0.0f64..1.1) {
            let mut all = sorted(&scores);
            for c in &mut all {
                // Powers of two sum exactly in any order.
                c.weight = c.score.exp2();
            }
            let mass = share * all.iter().map(|c| f64::from(c.weight)).sum::<f64>();
            let mut above = 0.0;
            let want: Vec<Candidate> = all
                .iter()
                .enumerate()
                .take_while(|(i, c)| {
                    let keep = *i == 0 || above < mass;
                    above += f64::from(c.weight);
                    keep
                })
                .map(|(_, c)| *c)
                .collect();
            let mut got = all;
            got.sort_by_key(|c| c.id);
            nucleus(&mut got, mass);
            got.sort_by(rank);
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn top_k_of_ascending_scores() {
        let scores: Vec<f32> = (0..100_000).map(|i| i as f32).collect();
        let mut got = vec![];
        top_k(&scores, 3, &mut got);
        got.sort_by(rank);
        assert_eq!(got.iter().map(|c| c.id).collect::<Vec<_>>(), [99_999, 99_998, 99_997]);
        top_k(&[f32::NEG_INFINITY; 200], 5, &mut got);
        assert_eq!(got.len(), 5);
    }
}
