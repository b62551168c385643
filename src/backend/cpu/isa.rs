//! Run-time vector width for the dense operations, which are written once in portable Rust.
//!
//! The bodies use fixed lanes and no fused multiply-add, so every width gives the same bits; only the speed
//! differs. aarch64 has one width, and integer dot products or not.

/// Proof that a vector width can be used on this CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa {
    level: Level,
    /// Whether `sdot` can be used.
    #[cfg(target_arch = "aarch64")]
    dotprod: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The target's baseline (SSE2 on x86-64, NEON on aarch64).
    pub fn portable() -> Self {
        Self::of(Level::Portable)
    }

    fn of(level: Level) -> Self {
        Self {
            level,
            #[cfg(target_arch = "aarch64")]
            dotprod: false,
        }
    }

    /// NEON with `sdot`, if this CPU has dotprod.
    #[cfg(target_arch = "aarch64")]
    pub fn dotprod() -> Option<Self> {
        let has = std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod");
        has.then_some(Self { dotprod: true, ..Self::portable() })
    }

    /// 256-bit vectors, if this CPU has AVX2.
    #[cfg(target_arch = "x86_64")]
    pub fn avx2() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self::of(Level::Avx2))
    }

    /// 512-bit vectors, if this CPU has AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    pub fn avx512() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        has.then_some(Self::of(Level::Avx512))
    }

    /// The widest that this CPU has.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(wide) = Self::avx512().or_else(Self::avx2) {
            return wide;
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(dotprod) = Self::dotprod() {
            return dotprod;
        }
        Self::portable()
    }

    /// The widths that this CPU has.
    #[cfg(test)]
    pub fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let wide = [Self::avx2(), Self::avx512()];
        #[cfg(target_arch = "aarch64")]
        let wide = [Self::dotprod()];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let wide = [None; 0];
        std::iter::once(Self::portable()).chain(wide.into_iter().flatten()).collect()
    }

    pub(super) fn level(self) -> Level {
        self.level
    }

    /// Whether NEON and `sdot` were found.
    #[cfg(target_arch = "aarch64")]
    pub(super) fn has_dotprod(self) -> bool {
        self.dotprod
    }
}

/// Compiles a function once per vector width and dispatches on its first argument, an [`Isa`].
macro_rules! per_isa {
    ($(#[$attr:meta])* $vis:vis fn $name:ident $(<$gen:ident : $bound:path>)? ($($arg:ident : $ty:ty),* $(,)?) $body:block) => {
        $(#[$attr])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$gen: $bound>)? (isa: $crate::backend::cpu::isa::Isa, $($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$gen: $bound>)? ($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$gen: $bound>)? ($($arg: $ty),*) { body $(::<$gen>)? ($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$gen: $bound>)? ($($arg: $ty),*) { body $(::<$gen>)? ($($arg),*) }
            use $crate::backend::cpu::isa::Level;
            match isa.level() {
                Level::Portable => body $(::<$gen>)? ($($arg),*),
                // SAFETY: an `Isa` of this level is only made after the CPU was found to have the features.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => unsafe { avx2 $(::<$gen>)? ($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => unsafe { avx512 $(::<$gen>)? ($($arg),*) },
            }
        }
    };
}
pub(super) use per_isa;
