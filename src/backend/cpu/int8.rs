//! An output head of eight bits: every row rounded to 255 levels of a scale of its own. Approximate: what it gives is not
//! what the stored head gives.
//!
//! `logit = s Σ c x` with `s = max|w| / 127`, `c = round(w / s)` and f32 inputs, each row one chain of 16 lanes as in `dense`,
//! so that logits do not depend on how many rows are computed together.

use super::dense::{CpuDense, TASK_ROWS, Target, products};
use super::isa::{Isa, per_isa};
use super::lanes::{Stored, round_to_int};
use super::output::OutputColumns;
use super::pool::{Pool, SendPtr};
use super::screened::largest;
use crate::backend::DenseType;
use crate::backend::host::AlignedBuffer;
use crate::{Error, Result};
use half::{bf16, f16};
use std::sync::atomic::{AtomicUsize, Ordering};

const LIMIT: f32 = 127.0;

/// An output head `[rows, cols]` of eight bits.
#[derive(Debug)]
pub struct CpuInt8 {
    rows: usize,
    cols: usize,
    /// i8, row-major.
    codes: AlignedBuffer,
    scales: Vec<f32>,
}

per_isa! {
    fn round<E: Stored>(w: &[E], scale: f32, codes: &mut [i8]) {
        for (w, code) in w.iter().zip(codes) {
            *code = round_to_int((w.widen() / scale).clamp(-LIMIT, LIMIT)) as i8;
        }
    }
}

impl CpuInt8 {
    /// Rounds the rows of `head`. None if a value is not finite.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub(super) fn new(isa: Isa, pool: &Pool, head: &CpuDense) -> Result<Option<Self>> {
        fn typed<E: Stored>(isa: Isa, pool: &Pool, head: &CpuDense) -> Result<Option<CpuInt8>> {
            let (rows, cols, values) = (head.rows(), head.cols(), head.values::<E>());
            // As many bytes as there are elements, which the head's own size bounds.
            let mut codes = AlignedBuffer::huge(values.len())?;
            let mut scales = vec![0f32; rows];
            let (codes_at, sound) = (SendPtr(codes.as_mut_ptr()), AtomicUsize::new(0));
            pool.for_each_chunk(&mut scales, TASK_ROWS, |task, scales| {
                let first = task * TASK_ROWS;
                // SAFETY: each task has rows of its own, and there are `cols` bytes for each.
                let codes =
                    unsafe { std::slice::from_raw_parts_mut(codes_at.get().add(first * cols), scales.len() * cols) };
                let rows = values[first * cols..].chunks_exact(cols).zip(codes.chunks_exact_mut(cols));
                for (scale, (w, codes)) in scales.iter_mut().zip(rows) {
                    let Some(largest) = largest(isa, w) else { continue };
                    // Rows of zeros and of what is hardly more are zeros.
                    *scale = Some(largest / LIMIT).filter(|s| s.is_normal()).unwrap_or(1.0);
                    round::<E>(isa, w, *scale, bytemuck::cast_slice_mut(codes));
                    sound.fetch_add(1, Ordering::Relaxed);
                }
            });
            Ok((sound.into_inner() == rows).then_some(CpuInt8 { rows, cols, codes, scales }))
        }
        match head.dtype() {
            DenseType::F32 => typed::<f32>(isa, pool, head),
            DenseType::F16 => typed::<f16>(isa, pool, head),
            DenseType::BF16 => typed::<bf16>(isa, pool, head),
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.scales[..])
    }

    /// The codes.
    pub fn data(&self) -> &[u8] {
        &self.codes
    }
}

/// `out[t][r] = s[r] Σ_k c[r][k] · x[t][k]`; replaces what is there.
pub(super) fn int8_linear(isa: Isa, pool: &Pool, w: &CpuInt8, x: &[f32], out: OutputColumns<'_>) -> Result<()> {
    let tokens = x.len() / w.cols;
    if x.len() != tokens * w.cols || out.add {
        let reason = format!("weight [{}, {}], input of {} elements, to be replaced", w.rows, w.cols, x.len());
        return Err(Error::Shape { op: "int8 head", reason });
    }
    let width = out.width;
    let at = &out.begin("int8 head", tokens, w.rows)?;
    let to = Target { at, width, add: false, scales: Some(&w.scales) };
    products::<i8>(isa, pool, bytemuck::cast_slice(&w.codes), w.cols, x, to);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(rows: usize, cols: usize, value: impl Fn(usize) -> f32) -> CpuDense {
        CpuDense::owned(DenseType::BF16, rows, cols, |bytes| {
            for (i, b) in bytes.chunks_exact_mut(2).enumerate() {
                b.copy_from_slice(&bf16::from_f32(value(i)).to_le_bytes());
            }
        })
        .unwrap()
    }

    proptest! {
        #[test]
        fn close_to_the_head_on_every_width_and_in_any_batch(
            rows in 1usize..90, cols in 1usize..150, tokens in 1usize..7, seed: u64,
        ) {
            let pool = Pool::new(2);
            let m = head(rows, cols, |i| ((i as u64).wrapping_mul(seed | 1) >> 40) as f32 / 8e6 - 1.0);
            let x: Vec<f32> = (0..tokens * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0).collect();
            let mut row = vec![0.0; cols];
            let mut first = None;
            for isa in Isa::available() {
                let w = CpuInt8::new(isa, &pool, &m).unwrap().unwrap();
                prop_assert_eq!((w.rows(), w.cols(), w.bytes()), (rows, cols, rows * cols + 4 * rows));
                let mut out = vec![f32::NAN; tokens * rows];
                int8_linear(isa, &pool, &w, &x, OutputColumns::whole(&mut out, rows)).unwrap();
                for t in 0..tokens {
                    let x = &x[t * cols..][..cols];
                    let mut alone = vec![f32::NAN; rows];
                    int8_linear(isa, &pool, &w, x, OutputColumns::whole(&mut alone, rows)).unwrap();
                    prop_assert_eq!(&alone[..], &out[t * rows..][..rows]);
                    for r in 0..rows {
                        m.row(r, &mut row);
                        let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
                        let exact: f32 = row.iter().zip(x).map(|(w, x)| w * x).sum();
                        let most: f32 = x.iter().map(|x| x.abs() * largest / 250.0).sum();
                        prop_assert!((alone[r] - exact).abs() <= most + 1e-4, "{} for {exact}", alone[r]);
                    }
                }
                prop_assert_eq!(first.get_or_insert(out.clone()), &out);
            }
        }
    }

    #[test]
    fn batches_of_any_size_have_the_bits_of_single_tokens() {
        let pool = Pool::new(2);
        for (rows, cols) in [(1, 1), (3, 64), (33, 201), (70, 63), (5, 700)] {
            let m = head(rows, cols, |i| ((i * 7919 % 1013) as f32 - 500.0) / 700.0);
            let x: Vec<f32> = (0..33 * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 23.0).collect();
            for isa in Isa::available() {
                let w = CpuInt8::new(isa, &pool, &m).unwrap().unwrap();
                let product = |x: &[f32]| {
                    let mut out = vec![f32::NAN; x.len() / cols * rows];
                    int8_linear(isa, &pool, &w, x, OutputColumns::whole(&mut out, rows)).unwrap();
                    out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
                };
                let alone: Vec<_> = x.chunks_exact(cols).flat_map(product).collect();
                for tokens in 1..=33 {
                    assert_eq!(product(&x[..tokens * cols]), alone[..tokens * rows], "{rows} {cols} {tokens} {isa:?}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_no_number_is_refused() {
        let (pool, isa) = (Pool::new(1), Isa::best());
        let zero = CpuInt8::new(isa, &pool, &head(3, 20, |_| 0.0)).unwrap().unwrap();
        let mut out = [1.0; 3];
        int8_linear(isa, &pool, &zero, &[5.0; 20], OutputColumns::whole(&mut out, 3)).unwrap();
        assert_eq!(out, [0.0; 3]);
        for bad in [f32::NAN, f32::INFINITY] {
            let m = head(3, 20, |i| if i == 47 { bad } else { 1.0 });
            assert!(CpuInt8::new(isa, &pool, &m).unwrap().is_none());
        }
        let error = int8_linear(isa, &pool, &zero, &[5.0; 21], OutputColumns::whole(&mut out, 3)).unwrap_err();
        assert!(error.to_string().contains("[3, 20]"), "{error}");
    }
}
