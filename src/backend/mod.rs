//! What a device can do.
pub mod host;
