//! Values of flags that `train` and `finetune` share.

use candle_bitnet::train::{Masters, Precision, Schedule};
use clap::ValueEnum;

/// A type of masters, or of the operands of products.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum TypeArg {
    F32,
    Bf16,
}

impl From<TypeArg> for Masters {
    fn from(arg: TypeArg) -> Self {
        match arg {
            TypeArg::F32 => Self::F32,
            TypeArg::Bf16 => Self::BF16,
        }
    }
}

impl From<TypeArg> for Precision {
    fn from(arg: TypeArg) -> Self {
        match arg {
            TypeArg::F32 => Self::F32,
            TypeArg::Bf16 => Self::BF16,
        }
    }
}

/// How the learning rate develops.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ScheduleArg {
    TwoStage,
    Cosine,
}

impl From<ScheduleArg> for Schedule {
    fn from(arg: ScheduleArg) -> Self {
        match arg {
            ScheduleArg::TwoStage => Self::TwoStage,
            ScheduleArg::Cosine => Self::Cosine,
        }
    }
}
