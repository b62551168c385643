//! The angles of the rotary embedding where kernels read them.

use super::attention::RopeTable;

/// The angles of the rotary embedding on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum Rope {
    /// In this machine's memory.
    Cpu(RopeTable),
}

impl Rope {
    /// Positions that there are angles for.
    pub fn positions(&self) -> usize {
        match self {
            Self::Cpu(table) => table.positions(),
        }
    }

    /// Half the rotated elements of a head.
    pub fn half_dim(&self) -> usize {
        match self {
            Self::Cpu(table) => table.half_dim(),
        }
    }
}
