//! Deterministic random weights, made about as fast as memory can be written.

use crate::Result;
use crate::model::config::{ModelConfig, Projection};
use crate::ternary::{CODES_PER_BYTE, PackedTernary};
use half::bf16;
use rayon::prelude::*;
use std::sync::LazyLock;

/// Bytes that one random stream fills; every block has its own, so that blocks can be filled in parallel.
const BLOCK: usize = 64 << 10;

/// Ternary codes in two bytes: 3⁸ combinations.
const PAIRS: u64 = 6561;

/// Two bytes of four valid codes each, by their base-3 number.
static CODE_PAIRS: LazyLock<Vec<[u8; 2]>> = LazyLock::new(|| {
    let byte = |n: u64| (0..4).fold((0, n), |(byte, n), i| (byte | ((n % 3) as u8) << (2 * i), n / 3)).0;
    (0..PAIRS).map(|n| [byte(n % 81), byte(n / 81)]).collect()
});

/// splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014).
#[derive(Debug, Clone)]
struct SplitMix(u64);

impl SplitMix {
    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Random weights for a configuration; the same seed gives the same weights on every machine.
///
/// Ternary codes are uniform over {−1, 0, 1}, scaled so that a layer keeps the variance of a normalised input.
#[derive(Debug, Clone)]
pub struct SyntheticWeights {
    config: ModelConfig,
    seed: u64,
}

impl SyntheticWeights {
    /// Weights for `config`.
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        Self { config: config.clone(), seed }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The stream of one block of a tensor.
    fn stream(&self, name: &str, block: usize) -> SplitMix {
        // FNV-1a over the name; splitmix64 then decorrelates neighbouring states.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut stream = SplitMix(hash ^ self.seed.rotate_left(32));
        SplitMix(stream.next() ^ (block as u64).wrapping_mul(0xd6e8_feb8_6659_fd93))
    }

    /// The number that stands in `weight_scale`, exact in bf16.
    pub fn stored_scale(&self, which: Projection) -> f32 {
        let (_, cols) = self.config.projection_shape(which);
        let multiplier = (1.5 / cols as f32).sqrt();
        let stored = match self.config.quantization.scale_style.scale(1.0) {
            crate::ternary::Scale::Multiply(_) => multiplier,
            crate::ternary::Scale::Divide(_) => 1.0 / multiplier,
        };
        bf16::from_f32(stored).to_f32()
    }

    /// A projection's weight.
    ///
    /// # Errors
    /// None for a valid configuration.
    pub fn linear(&self, layer: usize, which: Projection) -> Result<PackedTernary> {
        let (rows, cols) = self.config.projection_shape(which);
        let name = self.config.projection_name(layer, which);
        let mut codes = vec![0; rows * cols.div_ceil(CODES_PER_BYTE)];
        let pairs = CODE_PAIRS.as_slice();
        codes.par_chunks_mut(BLOCK).enumerate().for_each(|(block, out)| {
            let mut stream = self.stream(&name, block);
            for four in out.chunks_mut(4) {
                let word = stream.next();
                // Multiply-shift maps each half to [0, 3⁸) with a bias below 2⁻¹⁹.
                let pair = |half: u64| pairs[(((half & 0xffff_ffff) * PAIRS) >> 32) as usize];
                let ([a, b], [c, d]) = (pair(word), pair(word >> 32));
                four.iter_mut().zip([a, b, c, d]).for_each(|(out, byte)| *out = byte);
            }
        });
        let scale = self.config.quantization.scale_style.scale(self.stored_scale(which));
        PackedTernary::new(rows, cols, codes, scale)
    }

    /// A norm's weight: near 1, exact in bf16.
    pub fn vector(&self, name: &str, len: usize) -> Vec<f32> {
        let mut stream = self.stream(name, 0);
        let unit = |bits: u64| (bits >> 40) as f32 / (1u64 << 24) as f32;
        (0..len).map(|_| bf16::from_f32(0.9 + 0.2 * unit(stream.next())).to_f32()).collect()
    }

    /// Fills `out` with the bytes of a dense bf16 matrix of `cols` columns, from row `first_row` on: about
    /// N(0, 0.02), as b1.58 models initialise embeddings. `out` is cut after its last whole row.
    pub fn dense_bf16(&self, name: &str, cols: usize, first_row: usize, out: &mut [u8]) {
        if cols == 0 {
            return;
        }
        // The sum of four uniform 16-bit numbers has variance 4 · 2³² / 12.
        const MEAN: f32 = 4.0 * 32_767.5;
        const STEP: f32 = 0.02 / 37_837.0;
        out.par_chunks_exact_mut(2 * cols).enumerate().for_each(|(row, out)| {
            let mut stream = self.stream(name, first_row + row);
            for value in out.as_chunks_mut::<2>().0 {
                let bits = stream.next();
                let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
                *value = bf16::from_f32((sum as f32 - MEAN) * STEP).to_le_bytes();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::presets::Preset;

    fn weights() -> SyntheticWeights {
        SyntheticWeights::new(&Preset::find("3b").unwrap().config(), 7)
    }

    #[test]
    fn codes_are_uniform_deterministic_and_differ_between_tensors() {
        let a = weights().linear(3, Projection::Query).unwrap();
        assert_eq!(a, weights().linear(3, Projection::Query).unwrap());
        assert_ne!(a.codes(), weights().linear(4, Projection::Query).unwrap().codes());
        let n = (a.rows() * a.cols()) as f64;
        for count in a.histogram() {
            assert!((count as f64 / n - 1.0 / 3.0).abs() < 0.002, "{:?}", a.histogram());
        }
        let output_variance = a.scale().multiplier().powi(2) * a.cols() as f32 * 2.0 / 3.0;
        assert!((output_variance - 1.0).abs() < 0.01, "{output_variance}");
    }

    #[test]
    fn embeddings_are_normal_and_independent_of_how_they_are_cut() {
        let (w, cols) = (weights(), 64);
        let mut whole = vec![0; 2 * cols * 100];
        w.dense_bf16("e", cols, 0, &mut whole);
        let mut part = vec![0; 2 * cols * 10];
        w.dense_bf16("e", cols, 90, &mut part);
        assert_eq!(whole[2 * cols * 90..], part);
        let values: Vec<f32> = whole.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.001 && (variance.sqrt() - 0.02).abs() < 0.001, "{mean} {variance}");
    }

    #[test]
    fn norms_are_near_one() {
        let v = weights().vector("n", 1000);
        assert!(v.iter().all(|x| (0.89..=1.11).contains(x)));
    }
}
