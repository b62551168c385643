//! Identities of packed layouts, carried by every packed weight and checked at every kernel call.

/// The layout that a weight was packed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LayoutId {
    /// Read by no kernel; for tests of the check.
    #[cfg(test)]
    Unknown,
    /// 16 rows by 16 columns in a 64-byte line; see `backend/cpu/tiles.rs`.
    CpuRows16,
}

impl LayoutId {
    /// The layout's name in messages and reports.
    pub fn name(self) -> &'static str {
        match self {
            #[cfg(test)]
            Self::Unknown => "unknown",
            Self::CpuRows16 => "cpu-rows16",
        }
    }
}
