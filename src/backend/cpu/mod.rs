//! This CPU: its ternary kernel, its vector width, its threads, and the operations of a decoder on them.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod attention;
pub mod autograd;
mod bandwidth;
mod dense;
mod generic;
mod int8;
mod isa;
mod kernel;
mod lanes;
mod linear;
mod low_rank;
mod norm;
mod output;
mod packing;
mod pool;
mod prefetch;
mod scratch;
mod screened;
mod self_check;
mod simd;
#[cfg(test)]
mod suite;
mod tiles;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use attention::CpuKv;
pub use bandwidth::{bandwidth_buffer, read_bandwidth};
pub use dense::CpuDense;
pub use int8::CpuInt8;
pub use kernel::{Block, KernelKind, Line, PanelGemm, TernaryKernel};
pub use low_rank::CpuLowRank;
pub use norm::Gate;
pub use output::OutputColumns;
pub use packing::Packing;
pub use pool::Pool;
pub use screened::{Bound, CpuScreened, FAILURE, MAX_TOP, Screening};
pub use tiles::{CpuTernary, MAX_COLS, Segment};

use super::activation::{QuantizedRows, row_stride};
use super::attention::{AttentionShape, RopeTable, RowPosition};
use super::host;
use super::layout::Arrangement;
use crate::ternary::PackedTernary;
use crate::{Error, Result};
use isa::Isa;
use linear::Epilogue;
use scratch::{Scratch, grown, with_scratch};
use self_check::self_check;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Most threads that `--threads` accepts.
pub const MAX_THREADS: usize = 1024;
/// Rows that one task normalises in a prefill.
const ROWS_PER_TASK: usize = 8;

/// What may be chosen about the CPU backend; `None` means: decided from this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Ternary kernel; by default the fastest that this CPU can run.
    pub kernel: Option<KernelKind>,
    /// Threads; by default the physical cores.
    pub threads: Option<usize>,
}

/// The CPU backend: kernel and threads, chosen once.
#[derive(Debug)]
pub struct Cpu {
    kind: KernelKind,
    kernel: Box<dyn TernaryKernel>,
    isa: Isa,
    pool: Pool,
    /// Buffers of the quantised linear in progress.
    scratch: Mutex<Scratch>,
}

impl Cpu {
    /// Chooses kernel and threads.
    ///
    /// # Errors
    /// [`Error::Unavailable`] for a kernel that this CPU cannot run, [`Error::Request`] for a thread count of
    /// zero or over [`MAX_THREADS`].
    pub fn new(options: CpuOptions) -> Result<Self> {
        let available = KernelKind::available();
        // Generic is always there and always last.
        let kind = options.kernel.or(available.first().copied()).unwrap_or(KernelKind::Generic);
        let kernel = kind.instance().ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|k| k.name()).collect();
            Error::Unavailable {
                what: format!("kernel {kind}"),
                reason: format!("it needs {}; this CPU can run: {}", kind.needs(), names.join(", ")),
            }
        })?;
        let threads = options.threads.unwrap_or_else(host::physical_cores);
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(Error::request("--threads", format!("{threads} is not between 1 and {MAX_THREADS}")));
        }
        let isa = match kind {
            #[cfg(target_arch = "x86_64")]
            KernelKind::AmxInt8 | KernelKind::Avx512Vnni | KernelKind::Avx512Vbmi => Isa::avx512().or_else(Isa::avx2),
            #[cfg(target_arch = "x86_64")]
            KernelKind::Avx2 | KernelKind::AvxVnni => Isa::avx2(),
            #[cfg(target_arch = "aarch64")]
            KernelKind::NeonI8mm | KernelKind::NeonDotprod => Isa::dotprod(),
            _ => None,
        };
        let isa = isa.unwrap_or_else(Isa::portable);
        Ok(Self { kind, kernel, isa, pool: Pool::new(threads), scratch: Mutex::default() })
    }

    /// The backend that is used where nobody chose one: fastest kernel, physical cores.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    pub fn shared() -> Result<std::sync::Arc<Self>> {
        static SHARED: OnceLock<std::sync::Arc<Cpu>> = OnceLock::new();
        if let Some(cpu) = SHARED.get() {
            return Ok(cpu.clone());
        }
        let cpu = std::sync::Arc::new(Self::new(CpuOptions::default())?);
        Ok(SHARED.get_or_init(|| cpu).clone())
    }

    /// The ternary kernel in use.
    pub fn kernel(&self) -> KernelKind {
        self.kind
    }

    /// The threads of this backend.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Packs weights that share their input, and checks the kernel on their first tiles.
    ///
    /// # Errors
    /// As [`CpuTernary::pack`]; [`Error::SelfCheck`] if the kernel and the reference disagree.
    pub fn pack(&self, weights: &[PackedTernary], arrangement: Arrangement) -> Result<CpuTernary> {
        let packed = CpuTernary::pack(weights, arrangement, self.kernel.packing(), &self.pool)?;
        self_check(&*self.kernel, &packed)?;
        Ok(packed)
    }

    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `W · quantise(x)` of rows of f32 `x`, after RMSNorm if `norm` (weight, epsilon) is given: rows of `w.rows()` outputs,
    /// replaced or added to.
    ///
    /// # Errors
    /// [`Error::Layout`] for a weight packed for another kernel, [`Error::Shape`] for operands that do not fit.
    pub fn norm_linear(
        &self,
        w: &CpuTernary,
        x: &[f32],
        norm: Option<(&[f32], f32)>,
        out: OutputColumns<'_>,
    ) -> Result<()> {
        let Scratch { rows, panel, .. } = &mut *self.scratch();
        let x = self.quantized(w, x, norm, rows)?;
        linear::linear(&*self.kernel, self.isa, &self.pool, panel, w, &x, Epilogue::Columns(out))
    }

    /// `act(gate) · up` with `[gate | up] = W · quantise(x)`, as [`Cpu::norm_linear`]: rows of half of `w.rows()` outputs.
    ///
    /// # Errors
    /// As [`Cpu::norm_linear`]; [`Error::Shape`] for a weight that is not [`Arrangement::GateUp`].
    pub fn gated_linear(
        &self,
        gate: Gate,
        w: &CpuTernary,
        x: &[f32],
        norm: Option<(&[f32], f32)>,
        out: &mut [f32],
    ) -> Result<()> {
        let Scratch { rows, panel, .. } = &mut *self.scratch();
        let x = self.quantized(w, x, norm, rows)?;
        linear::linear(&*self.kernel, self.isa, &self.pool, panel, w, &x, Epilogue::Gated(gate, out))
    }

    /// Rows of `x` as the quantised linear takes them, in a buffer.
    fn quantized<'a>(
        &self,
        w: &CpuTernary,
        x: &[f32],
        norm: Option<(&[f32], f32)>,
        rows: &'a mut Vec<u8>,
    ) -> Result<QuantizedRows<'a>> {
        let rows = grown(rows, x.len() / w.cols() * row_stride(w.cols()));
        self.quantize(x, w.cols(), norm, rows)?;
        QuantizedRows::new(rows, w.cols())
    }

    /// Quantised linear: `out[t] = W q[t] / s_x[t]`, scaled per segment, or that added to it.
    ///
    /// # Errors
    /// [`Error::Layout`] for a weight packed for another kernel, [`Error::Shape`] for operands that do not fit.
    pub fn linear(&self, w: &CpuTernary, x: &QuantizedRows, out: OutputColumns<'_>) -> Result<()> {
        let panel = &mut self.scratch().panel;
        linear::linear(&*self.kernel, self.isa, &self.pool, panel, w, x, Epilogue::Columns(out))
    }

    /// Quantises rows of `cols` activations, after RMSNorm if `norm` (weight, epsilon) is given.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub fn quantize(&self, x: &[f32], cols: usize, norm: Option<(&[f32], f32)>, out: &mut [u8]) -> Result<()> {
        let fits = cols > 0
            && x.len().is_multiple_of(cols)
            && out.len() == x.len() / cols * row_stride(cols)
            && norm.is_none_or(|(w, _)| w.len() == cols);
        if !fits {
            return Err(shape_error("quantize", x.len(), cols, out.len()));
        }
        self.each_row(out, row_stride(cols), |t, row| {
            let x = &x[t * cols..][..cols];
            match norm {
                None => norm::quantize(self.isa, x, row),
                Some((weight, eps)) => {
                    with_scratch(cols, |scratch| norm::norm_quantize(self.isa, x, weight, eps, scratch, row))
                }
            }
        });
        Ok(())
    }

    /// The gated activation of `[gate | up]` rows of `2 · cols`, in f32.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub fn gated(&self, gate: Gate, gate_up: &[f32], cols: usize, out: &mut [f32]) -> Result<()> {
        if cols == 0 || gate_up.len() != 2 * out.len() || !out.len().is_multiple_of(cols) {
            return Err(shape_error("gated activation", gate_up.len(), cols, out.len()));
        }
        self.each_row(out, cols, |t, out| {
            let (g, up) = gate_up[2 * t * cols..][..2 * cols].split_at(cols);
            norm::gated(self.isa, gate, g, up, out);
        });
        Ok(())
    }

    /// RMSNorm of rows as long as `weight`.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) -> Result<()> {
        let cols = weight.len();
        if cols == 0 || !x.len().is_multiple_of(cols) || out.len() != x.len() {
            return Err(shape_error("rms_norm", x.len(), cols, out.len()));
        }
        self.each_row(out, cols, |t, out| norm::rms_norm(self.isa, &x[t * cols..][..cols], weight, eps, out));
        Ok(())
    }

    /// Dense product: `out[t][r] = Σ_k w[r][k] · x[t][k]` in f32, or that added to it.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub fn dense_linear(&self, w: &CpuDense, x: &[f32], out: OutputColumns<'_>) -> Result<()> {
        dense::dense_linear(self.isa, &self.pool, w, x, out)
    }

    /// Whether screening has a kernel here: without one, it works and takes longer than the whole head.
    pub fn screens_fast(&self) -> bool {
        self.isa != Isa::portable()
    }

    /// Codes that screen an output head. None if its values cannot be bounded: they are not finite, say. The head's own
    /// pages are given back where they lie in a file.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn screen(&self, head: &CpuDense, bound: Bound) -> Result<Option<CpuScreened>> {
        let screened = CpuScreened::new(self.isa, &self.pool, head, bound)?;
        head.release();
        Ok(screened)
    }

    /// Logits of one input by a screened head: exactly those of `head` in every row that can be among its `k` largest, −∞
    /// in the others. `scanned` is called between looking at all rows and computing those. None if `x` is not finite or too
    /// large to be bounded: then `out` is as it was, and [`Cpu::dense_linear`] is the way.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub fn screened_linear(
        &self,
        screened: &CpuScreened,
        head: &CpuDense,
        x: &[f32],
        k: usize,
        out: &mut [f32],
        scanned: impl FnOnce(),
    ) -> Result<Option<Screening>> {
        let shape = (screened.rows(), screened.cols());
        if shape != (head.rows(), head.cols()) || shape != (out.len(), x.len()) || k > MAX_TOP {
            return Err(shape_error("screened head", x.len(), head.cols(), out.len()));
        }
        let scratch = &mut self.scratch().screen;
        Ok(screened.top(self.isa, &self.pool, head, x, k, scratch, out, scanned))
    }

    /// An output head rounded to eight bits. None if a value is not finite. The head's own pages are given back where they
    /// lie in a file.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if memory is short.
    pub fn int8(&self, head: &CpuDense) -> Result<Option<CpuInt8>> {
        let rounded = CpuInt8::new(self.isa, &self.pool, head)?;
        head.release();
        Ok(rounded)
    }

    /// Product with a head of eight bits.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub fn int8_linear(&self, w: &CpuInt8, x: &[f32], out: OutputColumns<'_>) -> Result<()> {
        int8::int8_linear(self.isa, &self.pool, w, x, out)
    }

    /// Adds low-rank updates of rows of `cols` inputs to rows of `stride` outputs, each from the row on that stands
    /// beside it; they are in order and do not overlap.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit.
    pub fn low_rank(
        &self,
        updates: &[(usize, &CpuLowRank)],
        x: &[f32],
        cols: usize,
        stride: usize,
        out: &mut [f32],
    ) -> Result<()> {
        if updates.iter().any(|(_, w)| w.cols() != cols) {
            return Err(shape_error("low-rank update", x.len(), cols, out.len()));
        }
        low_rank::low_rank(self.isa, &self.pool, updates, x, stride, out)
    }

    /// Rows `ids` of an embedding, widened to f32.
    ///
    /// # Errors
    /// [`Error::Request`] for an id outside the vocabulary.
    pub fn embed(&self, w: &CpuDense, ids: &[u32], out: &mut [f32]) -> Result<()> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= w.rows()) {
            return Err(Error::request("token id", format!("{id} is outside the vocabulary of {}", w.rows())));
        }
        if out.len() != ids.len() * w.cols() {
            return Err(shape_error("embedding", ids.len(), w.cols(), out.len()));
        }
        self.each_row(out, w.cols(), |t, out| w.row(ids[t] as usize, out));
        Ok(())
    }

    /// Copies rows `rows` of rows of `cols` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not fit or a row that does not exist.
    pub fn select_rows(&self, x: &[f32], cols: usize, rows: &[u32], out: &mut [f32]) -> Result<()> {
        let fits = cols > 0 && x.len().is_multiple_of(cols) && out.len() == rows.len() * cols;
        if !fits || rows.iter().any(|row| *row as usize >= x.len() / cols) {
            return Err(shape_error("select_rows", x.len(), cols, out.len()));
        }
        for (row, out) in rows.iter().zip(out.chunks_exact_mut(cols)) {
            out.copy_from_slice(&x[*row as usize * cols..][..cols]);
        }
        Ok(())
    }

    /// Attention over a batch: rotates queries and keys of the stacked rows `[q | k | v]`, appends keys and
    /// values to the cache at each row's slot and position, and attends to positions 0 … its own.
    ///
    /// # Errors
    /// [`Error::ContextFull`] for a position that does not fit, [`Error::Shape`] for operands that do not.
    pub fn attention(
        &self,
        shape: AttentionShape,
        qkv: &[f32],
        rows: &[RowPosition],
        rope: &RopeTable,
        kv: &mut CpuKv,
        out: &mut [f32],
    ) -> Result<()> {
        let scratch = &mut self.scratch().attention;
        attention::attention(self.isa, &self.pool, shape, qkv, rows, rope, kv, scratch, out)
    }

    /// Calls `row(t, out_t)` for every row of `stride` elements: here if there are few, else on all threads.
    fn each_row<T: Send>(&self, out: &mut [T], stride: usize, row: impl Fn(usize, &mut [T]) + Sync) {
        if out.len() <= ROWS_PER_TASK * stride {
            return out.chunks_exact_mut(stride).enumerate().for_each(|(t, out)| row(t, out));
        }
        self.pool.for_each_chunk(out, ROWS_PER_TASK * stride, |task, chunk| {
            for (i, out) in chunk.chunks_exact_mut(stride).enumerate() {
                row(task * ROWS_PER_TASK + i, out);
            }
        });
    }
}

fn shape_error(op: &'static str, input: usize, cols: usize, output: usize) -> Error {
    Error::Shape { op, reason: format!("{input} elements in rows of {cols} do not fit an output of {output}") }
}
