//! The k largest of many numbers.

use super::MAX_TOP;

/// The k largest numbers so far, descending, and whose they are; of equal ones the first, in whichever order they come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Largest {
    values: [(f64, usize); MAX_TOP],
    k: usize,
}

impl Largest {
    /// None yet; `k` is from 1 to [`MAX_TOP`].
    pub fn new(k: usize) -> Self {
        Self { values: [(f64::NEG_INFINITY, usize::MAX); MAX_TOP], k: k.clamp(1, MAX_TOP) }
    }

    #[inline(always)]
    pub fn offer(&mut self, value: f64, row: usize) {
        if value >= self.values[self.k - 1].0 {
            self.insert(value, row);
        }
    }

    fn insert(&mut self, value: f64, row: usize) {
        let kept = &mut self.values[..self.k];
        let at = kept.partition_point(|(v, r)| *v > value || *v == value && *r < row);
        if let Some(less) = kept.get_mut(at..).filter(|less| !less.is_empty()) {
            less.rotate_right(1);
            less[0] = (value, row);
        }
    }

    pub fn merge(&mut self, other: &Self) {
        other.values[..other.k].iter().for_each(|(value, row)| self.offer(*value, *row));
    }

    /// Whose the i-th largest is; `i` is less than k, and k no more than there were.
    pub fn row(&self, i: usize) -> usize {
        self.values[i].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_those_of_sorting() {
        let numbers: Vec<f64> = (0..500).map(|i| f64::from((i * 7919) % 257) - 100.0).collect();
        let mut sorted: Vec<usize> = (0..500).collect();
        sorted.sort_by(|a, b| numbers[*b].total_cmp(&numbers[*a]));
        for k in [1, 2, 3, 17, 64] {
            let mut halves = [Largest::new(k); 2];
            numbers.iter().enumerate().rev().for_each(|(i, v)| halves[i % 2].offer(*v, i));
            let [mut all, other] = halves;
            all.merge(&other);
            assert_eq!((0..k).map(|i| all.row(i)).collect::<Vec<_>>(), sorted[..k], "{k}");
        }
    }
}
