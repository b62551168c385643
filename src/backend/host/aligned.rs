//! Memory for what kernels read.

use crate::{Error, Result};

const HUGE_PAGE: usize = 2 << 20;

/// Zero-initialised memory aligned to a cache line, resident only where it has been written.
pub struct AlignedBuffer {
    map: memmap2::MmapMut,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// Allocates `len` zero bytes on huge pages where the system gives them: for what is written whole and read in a
    /// stream. A tail of less than half a page of 2 MiB stays on small pages, so that little resident is wasted.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the system refuses the memory.
    pub fn huge(len: usize) -> Result<Self> {
        let pages = len / HUGE_PAGE + usize::from(len % HUGE_PAGE >= HUGE_PAGE / 2);
        if pages == 0 {
            return Self::zeroed(len);
        }
        // Room for the last page to be whole.
        let buffer = Self { len, ..Self::zeroed(len.max(pages * HUGE_PAGE))? };
        #[cfg(target_os = "linux")]
        {
            // Advice only: without huge pages everything works, slower.
            let _ = buffer.map.advise_range(memmap2::Advice::HugePage, buffer.start, pages * HUGE_PAGE);
        }
        Ok(buffer)
    }

    /// Allocates `len` zero bytes on small pages: for what is written here and there, like a KV cache.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the system refuses the memory.
    pub fn zeroed(len: usize) -> Result<Self> {
        let slack = if len >= HUGE_PAGE { HUGE_PAGE } else { 64 };
        let map = len.checked_add(slack).and_then(|n| memmap2::MmapMut::map_anon(n).ok());
        let Some(map) = map else {
            return Err(Error::Unavailable {
                what: format!("{len} bytes of memory"),
                reason: "the system refused the allocation; use a smaller model or context".into(),
            });
        };
        let start = map.as_ptr().align_offset(slack);
        Ok(Self { map, start, len })
    }
}

impl std::ops::Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.len)
    }
}
