//! The command line: one file per subcommand, each with an `Args` and a `run`.

pub mod inspect;
pub mod model_args;
pub mod synth;
