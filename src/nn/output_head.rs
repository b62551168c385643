//! The output head: from hidden states to logits.

use crate::backend::cpu::{Bound, CpuInt8, CpuScreened, FAILURE, MAX_TOP};
use crate::backend::{Backend, DenseWeight};
use crate::ops::{self, HeadReads, Output};
use crate::{Error, Result};
use candle_core::Tensor;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a head from which on [`HeadChoice::Auto`] screens it: less than this, caches keep, and there is little to win.
const SCREENED_BYTES: usize = 32 << 20;
/// Columns, likewise: what is computed for each row does not pay for short rows.
const SCREENED_COLS: usize = 256;
/// Inputs of one pass that are screened one by one, at most. A pass over the stored rows serves all inputs, a screen one. In
/// milliseconds of a core of an EPYC 9004 for half of 2B-4T's head, screened and whole: 11 and 18 for two inputs, 16 and 20 for
/// three, 23 and 23 for four, 26 and 28 for five, 33 and 31 for six; with AVX2 17 and 24 for three, 26 and 28 for four.
const SCREENED_INPUTS: usize = 3;

/// How an output head is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadKind {
    /// Every row, from the stored weights.
    Full,
    /// Every row, from weights rounded to eight bits with a scale for each row. Approximate.
    Int8,
    /// Where only the largest logits are asked for, the rows that can be among them, from the stored weights; a bound that
    /// always holds tells which. The tokens are those of [`HeadKind::Full`].
    Screened,
    /// As [`HeadKind::Screened`] with fewer bits, and a bound that fails with a probability of at most [`FAILURE`] a token.
    ScreenedProbable,
}

impl HeadKind {
    /// The name, as `--head` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Int8 => "int8",
            Self::Screened => "screened",
            Self::ScreenedProbable => "screened-probable",
        }
    }
}

impl fmt::Display for HeadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which kind of output head to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadChoice {
    /// [`HeadKind::Screened`] on a CPU with AVX2, AVX-512 or NEON dotprod for a head of 32 MiB or more, in rows of
    /// 256 or more;
    /// [`HeadKind::Full`] otherwise. Without effect on tokens.
    #[default]
    Auto,
    /// This one.
    Kind(HeadKind),
}

impl HeadChoice {
    /// What [`HeadChoice::Auto`] stands for, in words.
    pub const AUTO: &str =
        "screened on a CPU with AVX2, AVX-512 or NEON dotprod where the head has 32 MiB or more, full otherwise";
}

impl From<HeadKind> for HeadChoice {
    fn from(kind: HeadKind) -> Self {
        Self::Kind(kind)
    }
}

impl FromStr for HeadChoice {
    type Err = Error;

    /// The names, `auto`, and `bf16` for `full`: the head of most checkpoints is stored so.
    fn from_str(s: &str) -> Result<Self> {
        Ok(Self::Kind(match s {
            "auto" => return Ok(Self::Auto),
            "full" | "bf16" => HeadKind::Full,
            "int8" => HeadKind::Int8,
            "screened" => HeadKind::Screened,
            "screened-probable" => HeadKind::ScreenedProbable,
            _ => {
                let reason = format!("'{s}' is not one of auto, full (or bf16), int8, screened, screened-probable");
                return Err(Error::request("--head", reason));
            }
        }))
    }
}

impl fmt::Display for HeadChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Kind(kind) => kind.fmt(f),
        }
    }
}

#[derive(Debug)]
enum Form {
    Full,
    Int8(CpuInt8),
    Screened(CpuScreened),
}

/// An output head `[vocab, hidden]`.
#[derive(Debug)]
pub struct OutputHead {
    weight: Arc<DenseWeight>,
    form: Form,
    reads: Mutex<HeadReads>,
}

impl OutputHead {
    /// A head in its stored form.
    pub fn new(weight: Arc<DenseWeight>) -> Self {
        Self { weight, form: Form::Full, reads: Mutex::default() }
    }

    /// The same head in another form.
    ///
    /// # Errors
    /// [`Error::Request`] for a form that the backend's device has no kernel for, or that the head's values do not fit;
    /// [`Error::Unavailable`] if memory is short. Not for [`HeadChoice::Auto`], which then is the stored form.
    pub fn with_form(self, backend: &Backend, choice: HeadChoice) -> Result<Self> {
        let kind = match choice {
            HeadChoice::Kind(kind) => kind,
            HeadChoice::Auto => {
                let pays = self.weight.bytes() >= SCREENED_BYTES && self.weight.cols() >= SCREENED_COLS;
                let fast = backend.is_cpu() && backend.cpu().screens_fast();
                let screened = (fast && pays).then(|| self.form(backend, HeadKind::Screened));
                let form = screened.and_then(|form| form.ok().flatten()).unwrap_or(Form::Full);
                return Ok(Self { form, ..self });
            }
        };
        if kind != HeadKind::Full && !backend.is_cpu() {
            let reason = format!(
                "{kind} is for the CPU, and this is {}, which reads the whole head; leave --head auto, or give --device cpu",
                backend.device_name()
            );
            return Err(Error::request("--head", reason));
        }
        match self.form(backend, kind)? {
            Some(form) => Ok(Self { form, ..self }),
            None => {
                let reason = format!(
                    "{kind} needs finite weights of a common size, and this model's head has others; give --head full"
                );
                Err(Error::request("--head", reason))
            }
        }
    }

    /// None if the values do not fit it.
    fn form(&self, backend: &Backend, kind: HeadKind) -> Result<Option<Form>> {
        let cpu = backend.cpu();
        let bound = match kind {
            HeadKind::Full => return Ok(Some(Form::Full)),
            HeadKind::Int8 => return Ok(cpu.int8(self.weight.cpu()?)?.map(Form::Int8)),
            HeadKind::Screened => Bound::Certain,
            HeadKind::ScreenedProbable => Bound::Probable(FAILURE),
        };
        Ok(cpu.screen(self.weight.cpu()?, bound)?.map(Form::Screened))
    }

    /// How the head is computed.
    pub fn kind(&self) -> HeadKind {
        match &self.form {
            Form::Full => HeadKind::Full,
            Form::Int8(_) => HeadKind::Int8,
            Form::Screened(screened) => match screened.bound() {
                Bound::Certain => HeadKind::Screened,
                Bound::Probable(_) => HeadKind::ScreenedProbable,
            },
        }
    }

    /// The stored weights.
    pub fn weight(&self) -> &DenseWeight {
        &self.weight
    }

    /// Bytes that a token reads of which the largest logit is asked for: of a screened head those of its screen, to which a
    /// few rows come.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::Full => self.weight.bytes(),
            Form::Int8(w) => w.bytes(),
            Form::Screened(w) => w.bytes(),
        }
    }

    /// Bytes in memory besides the stored weights.
    pub fn added_bytes(&self) -> usize {
        match &self.form {
            Form::Full => 0,
            Form::Int8(w) => w.bytes(),
            Form::Screened(w) => w.resident_bytes(),
        }
    }

    /// What [`Self::bytes`] counts, where this machine's memory holds it.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        match &self.form {
            Form::Full => self.weight.host_bytes(),
            Form::Int8(w) => Some(w.data()),
            Form::Screened(w) => Some(w.data()),
        }
    }

    /// What was read so far.
    pub fn reads(&self) -> HeadReads {
        *self.reads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logits of f32 `x` `[inputs, hidden]`: replaces `out` `[inputs, vocab]`. If only the `top` largest of each input are
    /// asked for, up to 64, a screened head may leave −∞ for others; it does so for up to three inputs.
    ///
    /// # Errors
    /// As [`ops::dense_linear`].
    pub fn forward(&self, backend: &Backend, x: &Tensor, top: Option<usize>, out: &Tensor) -> Result<()> {
        let inputs = x.dims().first().copied().unwrap_or(0);
        let top = top.filter(|k| *k <= MAX_TOP && inputs <= SCREENED_INPUTS);
        let read = match (&self.form, top) {
            (Form::Screened(screened), Some(k)) => ops::screened_linear(backend, screened, &self.weight, x, k, out)?,
            (Form::Int8(w), _) => ops::int8_linear(backend, w, x, out)?,
            _ => {
                ops::dense_linear(backend, &self.weight, x, Output::replace(out))?;
                HeadReads { passes: 1, bytes: self.weight.bytes(), ..HeadReads::default() }
            }
        };
        let mut reads = self.reads.lock().unwrap_or_else(PoisonError::into_inner);
        *reads = reads.and(read);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DenseType;
    use candle_core::{DType, Device};
    use half::bf16;

    /// A head whose values a function tells.
    fn head(backend: &Backend, rows: usize, cols: usize, value: impl Fn(usize) -> f32) -> OutputHead {
        let fill = |bytes: &mut [u8]| {
            for (i, b) in bytes.chunks_exact_mut(2).enumerate() {
                b.copy_from_slice(&bf16::from_f32(value(i)).to_le_bytes());
            }
        };
        OutputHead::new(Arc::new(backend.dense_filled(DenseType::BF16, rows, cols, fill).unwrap()))
    }

    fn wave(i: usize) -> f32 {
        (i as f32 * 0.37).sin() + (i as f32 * 0.0123).cos()
    }

    #[test]
    fn names_round_trip() {
        for kind in [HeadKind::Full, HeadKind::Int8, HeadKind::Screened, HeadKind::ScreenedProbable] {
            assert_eq!(kind.name().parse::<HeadChoice>().unwrap(), kind.into());
            assert_eq!(HeadChoice::from(kind).to_string(), kind.name());
        }
        assert_eq!("auto".parse::<HeadChoice>().unwrap(), HeadChoice::Auto);
        assert_eq!("bf16".parse::<HeadChoice>().unwrap(), HeadKind::Full.into());
        let error = "f8".parse::<HeadChoice>().unwrap_err();
        assert!(matches!(&error, Error::Request { what, .. } if what == "--head"), "{error}");
    }

    #[test]
    fn auto_screens_large_heads_of_finite_values() {
        let backend = Backend::for_device(&Device::Cpu).unwrap();
        let kind = |rows, cols, value: &dyn Fn(usize) -> f32| {
            head(&backend, rows, cols, value).with_form(&backend, HeadChoice::Auto).unwrap().kind()
        };
        let large = if backend.cpu().screens_fast() { HeadKind::Screened } else { HeadKind::Full };
        assert_eq!(kind(SCREENED_BYTES / 512, 256, &|_| 0.5), large);
        assert_eq!(kind(SCREENED_BYTES / 512, 256, &|i| if i == 77 { f32::NAN } else { 0.5 }), HeadKind::Full);
        assert_eq!(kind(SCREENED_BYTES / 512 - 1, 256, &|_| 0.5), HeadKind::Full);
        assert_eq!(kind(100, 300, &|_| 0.5), HeadKind::Full);
    }

    #[test]
    fn what_was_asked_for_is_refused_where_it_cannot_be() {
        let backend = Backend::for_device(&Device::Cpu).unwrap();
        for kind in [HeadKind::Int8, HeadKind::Screened, HeadKind::ScreenedProbable] {
            let bad = head(&backend, 30, 20, |i| if i == 77 { f32::INFINITY } else { 0.5 });
            let error = bad.with_form(&backend, kind.into()).unwrap_err();
            assert!(error.to_string().contains(kind.name()) && error.to_string().contains("--head full"), "{error}");
            let good = head(&backend, 30, 20, wave).with_form(&backend, kind.into()).unwrap();
            assert!(good.kind() == kind && good.added_bytes() >= good.bytes());
        }
    }

    #[test]
    fn few_inputs_of_which_few_logits_are_asked_for_are_screened() {
        let backend = Backend::for_device(&Device::Cpu).unwrap();
        let (rows, cols) = (3000, 96);
        let full = head(&backend, rows, cols, wave);
        let screened = head(&backend, rows, cols, wave).with_form(&backend, HeadKind::Screened.into()).unwrap();
        for inputs in 1..=SCREENED_INPUTS + 1 {
            let x: Vec<f32> = (0..inputs * cols).map(|i| wave(7 * i)).collect();
            let x = Tensor::from_vec(x, (inputs, cols), &Device::Cpu).unwrap();
            for top in [None, Some(1), Some(5), Some(64), Some(65)] {
                let logits = |head: &OutputHead| {
                    let out = Tensor::zeros((inputs, rows), DType::F32, &Device::Cpu).unwrap();
                    head.forward(&backend, &x, top, &out).unwrap();
                    out.to_vec2::<f32>().unwrap()
                };
                let before = screened.reads();
                let (got, want) = (logits(&screened), logits(&full));
                let reads = screened.reads().since(before);
                let expected = if inputs <= SCREENED_INPUTS && top.is_some_and(|k| k <= 64) { inputs } else { 0 };
                assert_eq!((reads.passes, reads.screened), (1, expected), "{inputs} inputs, {top:?}");
                let left = got.iter().flatten().filter(|v| v.is_finite()).count();
                assert_eq!(left, if expected > 0 { reads.rescored } else { inputs * rows });
                assert!(reads.bytes >= if expected > 0 { inputs * screened.bytes() } else { full.bytes() });
                for (got, want) in got.iter().zip(&want) {
                    let best = |v: &[f32]| (0..rows).rev().max_by(|a, b| v[*a].total_cmp(&v[*b])).unwrap();
                    assert_eq!(best(got), best(want));
                    assert!(got.iter().zip(want).all(|(g, w)| *g == f32::NEG_INFINITY || g.to_bits() == w.to_bits()));
                }
            }
        }
        assert_eq!(full.reads().screened, 0);
        assert!(screened.host_bytes().unwrap().len() <= screened.bytes());
    }
}
