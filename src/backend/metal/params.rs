//! What Metal's kernels alone take as parameters: mirrors of the structs of `kernels/metal`, as C lays them out.

use crate::backend::gpu::params::{Scales, Sizes, params};

params! {
    /// A norm.
    pub(super) struct Norm(20) {
        rows: i32,
        k: i32,
        eps: f32,
        has_add: i32,
        has_weight: i32,
    }

    /// A gated activation alone.
    pub(super) struct Gated(12) {
        tokens: i32,
        n: i32,
        activation: i32,
    }

    /// Columns on their way into wider rows.
    pub(super) struct Place(16) {
        tokens: i32,
        n: i32,
        ld_to: i32,
        add: i32,
    }

    /// A quantised product.
    pub(super) struct Product(56) {
        scales: Scales,
        eps: f32,
        sizes: Sizes,
        has_norm: i32,
    }

    /// Choosing tokens.
    pub(super) struct Choice(12) {
        vocab: i32,
        groups: i32,
        has_marks: i32,
    }

    /// Setting marks.
    pub(super) struct Marks(8) {
        count: i32,
        vocab: i32,
    }
}
