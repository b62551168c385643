//! What the host's operating system can do for us: map files, give huge pages, tell figures, leave freed memory alone.

mod aligned;
mod machine;
mod mapped;
mod process;

pub use aligned::AlignedBuffer;
#[cfg(target_os = "macos")]
pub(super) use machine::sysctl_number;
pub use machine::{available_bytes, cpu_name, physical_cores, resident_bytes, total_bytes};
pub use mapped::MappedFile;
pub use process::prepare_for_training;
