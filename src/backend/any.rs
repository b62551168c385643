//! What enums with a variant for each kind of device share.

#[cfg(any(feature = "cuda", feature = "metal"))]
use crate::Error;

/// The error for an operand of another device than the operation's.
#[cfg(any(feature = "cuda", feature = "metal"))]
pub(super) fn elsewhere(what: &'static str, device: &'static str) -> Error {
    Error::Shape { op: what, reason: format!("lies on another device than {device}, where the operation runs") }
}

/// An expression over what any variant holds.
macro_rules! on_any {
    ($value:expr, $inner:ident => $result:expr) => {
        match $value {
            Self::Cpu($inner) => $result,
            #[cfg(feature = "cuda")]
            Self::Cuda($inner) => $result,
            #[cfg(feature = "metal")]
            Self::Metal($inner) => $result,
        }
    };
}

/// What lies in this machine's memory, for operations that run there.
macro_rules! on_cpu {
    ($what:literal, $cpu:ty) => {
        /// What lies in this machine's memory.
        ///
        /// # Errors
        /// [`crate::Error::Shape`] if it lies elsewhere.
        pub(crate) fn cpu(&self) -> $crate::Result<&$cpu> {
            match self {
                Self::Cpu(inner) => Ok(inner),
                #[cfg(any(feature = "cuda", feature = "metal"))]
                _ => Err($crate::backend::any::elsewhere($what, "the CPU")),
            }
        }
    };
}

/// What lies on a GPU, for operations that run there.
macro_rules! on_gpu {
    ($what:literal, $cuda:ident, $metal:ident) => {
        /// What lies on an NVIDIA GPU.
        ///
        /// # Errors
        /// [`crate::Error::Shape`] if it lies elsewhere.
        #[cfg(feature = "cuda")]
        pub(crate) fn cuda(&self) -> $crate::Result<&$cuda> {
            match self {
                Self::Cuda(inner) => Ok(inner),
                _ => Err($crate::backend::any::elsewhere($what, "the GPU")),
            }
        }

        /// What lies on an Apple GPU.
        ///
        /// # Errors
        /// [`crate::Error::Shape`] if it lies elsewhere.
        #[cfg(feature = "metal")]
        pub(crate) fn metal(&self) -> $crate::Result<&$metal> {
            match self {
                Self::Metal(inner) => Ok(inner),
                _ => Err($crate::backend::any::elsewhere($what, "the GPU")),
            }
        }
    };
}

pub(super) use {on_any, on_cpu, on_gpu};
