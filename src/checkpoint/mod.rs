//! Opens checkpoints.
