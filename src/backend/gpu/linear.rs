//! Quantised products, but for how they run.

use super::norm::activation;
use super::params::Sizes;
use super::ternary::Ternary;
use super::{Memory, int, shape};
use crate::Result;
use crate::backend::Arrangement;
use crate::backend::cpu::Gate;

/// What becomes of a product's results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    Store,
    Add,
    Gated(Gate),
}

impl Epilogue {
    /// For products that replace what there is, or are added to it.
    pub(crate) fn adds(add: bool) -> Self {
        if add { Self::Add } else { Self::Store }
    }

    pub(crate) fn is_gated(self) -> bool {
        matches!(self, Self::Gated(_))
    }
}

/// One product, checked.
#[derive(Debug)]
pub(crate) struct Product<'a, M> {
    pub op: &'static str,
    pub weight: &'a Ternary<M>,
    pub tokens: usize,
    /// Output values of a token.
    pub n: usize,
    /// Input values of a token.
    pub k: usize,
    /// Elements between the outputs of two tokens.
    pub stride: usize,
    pub epilogue: Epilogue,
}

impl<'a, M: Memory> Product<'a, M> {
    /// A product of `inputs` values, with a norm of so many if there is one, whose results are columns `first_column ..` of
    /// rows of `width`.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for operands that do not fit.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn of(
        op: &'static str,
        weight: &'a Ternary<M>,
        epilogue: Epilogue,
        inputs: usize,
        norm: Option<usize>,
        outputs: usize,
        first_column: usize,
        width: usize,
    ) -> Result<Self> {
        let (rows, k) = (weight.rows(), weight.cols());
        let n = if epilogue.is_gated() { rows / 2 } else { rows };
        let tokens = inputs / k;
        let fits = epilogue.is_gated() == (weight.arrangement() == Arrangement::GateUp)
            && inputs == tokens * k
            && tokens.checked_mul(width) == Some(outputs)
            && first_column.checked_add(n).is_some_and(|end| end <= width)
            && norm.is_none_or(|len| len == k);
        if !fits {
            let arrangement = weight.arrangement();
            let reason = format!(
                "{arrangement:?} weight [{rows}, {k}], {inputs} inputs, norm of {norm:?}, {outputs} outputs in rows of \
                 {width} from column {first_column}"
            );
            return Err(shape(op, reason));
        }
        Ok(Self { op, weight, tokens, n, k, stride: width, epilogue })
    }

    /// What the kernels take of sizes, for some of the tokens.
    pub(crate) fn sizes(&self, tokens: usize) -> Result<Sizes> {
        Ok(Sizes {
            tokens: int(self.op, "tokens", tokens)?,
            n: int(self.op, "outputs", self.n)?,
            k: int(self.op, "columns", self.k)?,
            ld_out: int(self.op, "columns", self.stride)?,
            activation: match self.epilogue {
                Epilogue::Gated(gate) => activation(gate),
                Epilogue::Store | Epilogue::Add => 0,
            },
        })
    }

    /// Bytes that a launch for some of the tokens moves, each of them with so many of inputs.
    pub(crate) fn moved(&self, tokens: usize, inputs: usize) -> usize {
        self.weight.bytes() + tokens * (inputs + self.n * size_of::<f32>())
    }
}
