//! How weights that share their input lie together.

/// How several weights over one input are packed, on every device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// One below the other: outputs stand side by side (query, key and value; or one weight alone).
    Stacked,
    /// Gate and up of a gated MLP, two weights of one shape: devices may interleave their rows, so that the activation
    /// `act(gate) · up` is applied where the products are.
    GateUp,
}
