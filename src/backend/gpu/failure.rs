//! Errors that GPUs share: the thing, the reason and the remedy.

use crate::Error;

/// A device, kernel or memory that cannot be had.
pub(crate) fn unavailable(what: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Unavailable { what: what.into(), reason: reason.into() }
}

/// A GPU that is not among the `found` that `who` shows; `none` says more where there is none.
pub(crate) fn no_such_gpu(ordinal: usize, found: usize, who: &str, none: &str) -> Error {
    let there = match found {
        0 => format!("{who} shows no GPU to this process{none}"),
        1 => format!("{who} shows one GPU, number 0"),
        n => format!("{who} shows {n} GPUs, numbers 0 to {}", n - 1),
    };
    unavailable(format!("GPU {ordinal}"), format!("{there}; use --device cpu or another number"))
}

/// Bytes for people.
pub(crate) fn size(bytes: usize) -> String {
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
    fn gpus_that_are_not_there_are_told_with_those_that_are() {
        let said = |found| no_such_gpu(7, found, "Metal", " at all").to_string();
        for (found, part) in [(0, "no GPU to this process at all"), (1, "one GPU, number 0"), (3, "numbers 0 to 2")] {
            let message = said(found);
            assert!(
                message.contains("GPU 7") && message.contains(part) && message.contains("--device cpu"),
                "{message}"
            );
        }
    }
}
