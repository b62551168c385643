//! The read bandwidth of this machine's memory, which bounds decode.

use super::Cpu;
use super::isa::per_isa;
use super::lanes::LANES;
use crate::Result;
use crate::backend::host::AlignedBuffer;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a task: what a decode task reads.
const TASK: usize = 128 << 10;

/// A buffer far larger than the caches, read again and again.
#[derive(Debug)]
pub struct Bandwidth {
    buffer: AlignedBuffer,
}

per_isa! {
    /// Reads all of `data`; the sum keeps the loads alive.
    fn read_all(data: &[u32], sum: &mut u32) {
        let mut acc = [[0u32; LANES]; 4];
        for chunk in data.as_chunks::<{ 4 * LANES }>().0 {
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
                let ahead = chunk.as_ptr().cast::<i8>().wrapping_add(4096);
                for line in 0..4 {
                    // SAFETY: SSE is part of x86-64, and a prefetch may point anywhere.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64 * line)) };
                }
            }
            for a in 0..4 {
                for i in 0..LANES {
                    acc[a][i] = acc[a][i].wrapping_add(chunk[a * LANES + i]);
                }
            }
        }
        *sum = acc.as_flattened().iter().fold(0, |s, v| s.wrapping_add(*v));
    }
}

impl Bandwidth {
    /// Allocates and touches `bytes` (512 MiB is far beyond any cache that a CPU core can keep to itself).
    ///
    /// # Errors
    /// [`crate::Error::Unavailable`] if memory is short.
    pub fn new(cpu: &Cpu, bytes: usize) -> Result<Self> {
        let mut buffer = AlignedBuffer::zeroed(bytes.next_multiple_of(TASK))?;
        cpu.pool.for_each_chunk(&mut buffer, TASK, |i, chunk| chunk.fill(i as u8));
        Ok(Self { buffer })
    }

    /// One pass over the buffer with all threads: bytes a second.
    pub fn measure(&self, cpu: &Cpu) -> f64 {
        let words: &[u32] = bytemuck::cast_slice(&self.buffer);
        let sink = AtomicU32::new(0);
        let start = Instant::now();
        cpu.pool.run(self.buffer.len() / TASK, &|task| {
            let mut sum = 0;
            read_all(cpu.isa, &words[task * (TASK / 4)..][..TASK / 4], &mut sum);
            sink.fetch_add(sum, Ordering::Relaxed);
        });
        std::hint::black_box(sink.into_inner());
        self.buffer.len() as f64 / start.elapsed().as_secs_f64()
    }

    /// The median of passes over `time`: bytes a second. Short bursts can be far faster than what a machine sustains,
    /// so give it as long as what it is compared with.
    pub fn sustained(&self, cpu: &Cpu, time: Duration) -> f64 {
        let (start, mut passes) = (Instant::now(), vec![self.measure(cpu)]);
        while start.elapsed() < time {
            passes.push(self.measure(cpu));
        }
        passes.sort_by(f64::total_cmp);
        passes[passes.len() / 2]
    }
}
