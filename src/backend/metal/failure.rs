//! Errors of a GPU: the thing, what Metal says, and the remedy.

use crate::Error;

/// A device, kernel or memory that cannot be had.
pub(super) fn unavailable(what: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Unavailable { what: what.into(), reason: reason.into() }
}

/// What a device took on and did not finish.
pub(super) fn device(what: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Device { what: format!("{} on the Metal device", what.into()), reason: reason.into() }
}

/// Memory that was needed for `what` beside what this process has, of what a GPU should be given.
pub(super) fn out_of_memory(what: &str, bytes: usize, allocated: usize, working_set: usize, ordinal: usize) -> Error {
    unavailable(
        format!("{} of memory for {what} on GPU {ordinal}", size(bytes)),
        format!(
            "{} of its recommended working set of {} are in use; use a smaller model or context, fewer sequences, or \
             --device cpu (on a Mac with memory to spare, `sudo sysctl iogpu.wired_limit_mb=N` raises the limit)",
            size(allocated),
            size(working_set)
        ),
    )
}

/// Bytes for people.
pub(super) fn size(bytes: usize) -> String {
    match bytes {
        usize::MAX => "more bytes than there are addresses".into(),
        0..1024 => format!("{bytes} bytes"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!([1000, 2048, 3 << 20].map(size), ["1000 bytes", "2.0 KiB", "3.0 MiB"]);
        assert_eq!(size(5 << 29), "2.50 GiB");
    }

    #[test]
    fn what_does_not_fit_is_told_with_what_there_is() {
        let message = out_of_memory("packed weights", 3 << 30, 4 << 30, 5 << 30, 0).to_string();
        for part in
            ["3.00 GiB", "packed weights", "4.00 GiB", "working set of 5.00 GiB", "smaller model", "--device cpu"]
        {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
    }
}
