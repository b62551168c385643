//! Operands of RMSNorm alone and of the gated activation alone.

use super::shape;
use crate::Result;
use crate::backend::cpu::Gate;

/// The tokens of an RMSNorm with a weight of `cols` values.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit.
pub(crate) fn norm_tokens(op: &'static str, inputs: usize, cols: usize, outputs: usize) -> Result<usize> {
    if cols == 0 || !inputs.is_multiple_of(cols) || outputs != inputs {
        return Err(shape(op, format!("{inputs} elements in rows of {cols} into {outputs}")));
    }
    Ok(inputs / cols)
}

/// The tokens of a gated activation of rows `[gate | up]` of 2 · `cols`.
///
/// # Errors
/// [`crate::Error::Shape`] for operands that do not fit.
pub(crate) fn gated_tokens(op: &'static str, inputs: usize, cols: usize, outputs: usize) -> Result<usize> {
    if cols == 0 || !outputs.is_multiple_of(cols) || inputs != 2 * outputs {
        return Err(shape(op, format!("{inputs} elements in rows of 2 · {cols} into {outputs}")));
    }
    Ok(outputs / cols)
}

/// A gated activation as kernels know it.
pub(crate) fn activation(gate: Gate) -> i32 {
    match gate {
        Gate::Relu2 => 0,
        Gate::Silu => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_that_do_not_fit_are_refused() {
        assert_eq!((norm_tokens("n", 12, 4, 12).unwrap(), gated_tokens("g", 24, 4, 12).unwrap()), (3, 3));
        assert_eq!([Gate::Relu2, Gate::Silu].map(activation), [0, 1]);
        for (inputs, cols, outputs) in [(12, 0, 12), (12, 5, 12), (12, 4, 8)] {
            assert!(norm_tokens("n", inputs, cols, outputs).is_err());
        }
        for (inputs, cols, outputs) in [(24, 0, 12), (24, 5, 12), (20, 4, 12)] {
            assert!(gated_tokens("g", inputs, cols, outputs).is_err());
        }
    }
}
