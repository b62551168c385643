//! The GPUs of this machine, and opening one. Without one these return; they never panic.

use super::chip::MetalChip;
use super::driver;
use crate::Result;
use crate::backend::gpu::no_such_gpu;
use candle_core::{Device, MetalDevice};

/// How many GPUs Metal shows; 0 where there is no Metal.
pub fn count() -> usize {
    chips().map_or(0, |chips| chips.len())
}

/// What Metal tells of every GPU, those that no kernel runs on too. `BITNET_METAL_DEVICES=0` hides them all.
///
/// # Errors
/// [`crate::Error::Unavailable`] where there is no Metal, or one that is too old.
pub fn chips() -> Result<Vec<MetalChip>> {
    match std::env::var_os("BITNET_METAL_DEVICES") {
        Some(hidden) if hidden == "0" => Ok(Vec::new()),
        _ => driver::found(),
    }
}

/// Opens a GPU as a candle device.
///
/// # Errors
/// [`crate::Error::Unavailable`] without Metal or such a GPU, saying what was found.
pub fn open(ordinal: usize) -> Result<Device> {
    let chips = chips()?;
    let Some(chip) = chips.get(ordinal) else {
        return Err(no_such_gpu(ordinal, chips.len(), "Metal", ""));
    };
    chip.usable()?;
    driver::open(ordinal)
}

/// What tells candle devices apart.
#[cfg(target_os = "macos")]
pub(super) type Identity = candle_core::metal_backend::DeviceId;
/// The emulator has one device, number 0.
#[cfg(not(target_os = "macos"))]
pub(super) type Identity = usize;

/// Of a candle device.
#[cfg(target_os = "macos")]
pub(super) fn identity(device: &MetalDevice) -> Identity {
    device.id()
}

/// Of the emulator's device.
#[cfg(not(target_os = "macos"))]
pub(super) fn identity(_: &MetalDevice) -> Identity {
    0
}
