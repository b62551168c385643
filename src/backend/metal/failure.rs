//! Errors of a GPU: the thing, what Metal says, and the remedy.

use crate::Error;
pub(super) use crate::backend::gpu::{size, unavailable};

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

#[cfg(test)]
mod tests {
    use super::*;

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
