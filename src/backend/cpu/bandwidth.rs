//! The read bandwidth of this machine's memory, which bounds decode.

use super::Cpu;
use super::isa::per_isa;
use super::lanes::LANES;
use super::prefetch;
use crate::Result;
use crate::backend::host::AlignedBuffer;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a task: what a decode task reads.
const TASK: usize = 128 << 10;

per_isa! {
    /// Reads all whole lines of `data`, at any alignment; the sum keeps the loads alive.
    fn read_all(data: &[u8], sum: &mut u32) {
        let mut acc = [[0u32; LANES]; 4];
        for chunk in data.as_chunks::<4>().0.as_chunks::<{ 4 * LANES }>().0 {
            prefetch::ahead(chunk);
            for a in 0..4 {
                for i in 0..LANES {
                    acc[a][i] = acc[a][i].wrapping_add(u32::from_ne_bytes(chunk[a * LANES + i]));
                }
            }
        }
        *sum = acc.as_flattened().iter().fold(0, |s, v| s.wrapping_add(*v));
    }
}

/// Reads `regions` with all threads, as often as fits into `time`: bytes a second, the median of the passes.
///
/// Short bursts can be far faster than what a machine sustains, so give it as long as what it is compared with. And
/// memory is not all equally fast (page sizes, and on a virtual machine where the host put it), so what bounds a
/// decode is how fast the same threads read the same weights.
pub fn read_bandwidth(cpu: &Cpu, regions: &[&[u8]], time: Duration) -> f64 {
    let tasks: Vec<&[u8]> = regions.iter().flat_map(|r| r.chunks(TASK)).collect();
    let bytes: usize = tasks.iter().map(|t| t.len()).sum();
    let pass = || {
        let (sink, start) = (AtomicU32::new(0), Instant::now());
        cpu.pool.run(tasks.len(), &|task| {
            let mut sum = 0;
            read_all(cpu.isa, tasks[task], &mut sum);
            sink.fetch_add(sum, Ordering::Relaxed);
        });
        std::hint::black_box(sink.into_inner());
        bytes as f64 / start.elapsed().as_secs_f64()
    };
    let (start, mut passes) = (Instant::now(), vec![pass()]);
    while start.elapsed() < time {
        passes.push(pass());
    }
    passes.sort_by(f64::total_cmp);
    passes[passes.len() / 2]
}

/// A buffer far larger than the caches, touched, for [`read_bandwidth`].
///
/// # Errors
/// [`crate::Error::Unavailable`] if memory is short.
pub fn bandwidth_buffer(cpu: &Cpu, bytes: usize) -> Result<AlignedBuffer> {
    let mut buffer = AlignedBuffer::huge(bytes)?;
    cpu.pool.for_each_chunk(&mut buffer, TASK, |i, chunk| chunk.fill(i as u8));
    Ok(buffer)
}
