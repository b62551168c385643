//! The tile registers in software, after the manual's operation sections: for tests on CPUs without them.
//!
//! What would be an exception (#UD, #GP) is an error here, so that a kernel that passes never raises one.

use super::Amx;
use super::tiles::{Config, REGISTER_ROWS, REGISTERS, Row, Tiles, Unit};

/// Bytes of a row of palette 1.
const ROW_BYTES: usize = 64;

/// An exception, with the condition that raises it.
pub type Fault = &'static str;

/// Makes `Err(condition)` of a condition that holds.
fn fault(condition: bool, name: Fault) -> Result<(), Fault> {
    if condition { Err(name) } else { Ok(()) }
}

/// Registers of palette 1.
#[derive(Debug, Clone)]
pub struct Registers {
    configured: bool,
    rows: [usize; REGISTERS],
    row_bytes: [usize; REGISTERS],
    data: [[[u8; ROW_BYTES]; REGISTER_ROWS]; REGISTERS],
}

impl Registers {
    /// In their initial state.
    pub const fn new() -> Self {
        Self {
            configured: false,
            rows: [0; REGISTERS],
            row_bytes: [0; REGISTERS],
            data: [[[0; ROW_BYTES]; REGISTER_ROWS]; REGISTERS],
        }
    }

    /// LDTILECFG.
    pub fn configure(&mut self, image: &[u8; 64]) -> Result<(), Fault> {
        fault(image[0] > 1, "#GP: palette over 1")?;
        *self = Self::new();
        if image[0] == 0 {
            return Ok(());
        }
        fault(image[1] != 0, "start_row is for restarts after page faults alone")?;
        fault(image[2..16].iter().chain(&image[32..48]).chain(&image[56..]).any(|b| *b != 0), "#GP: reserved bytes")?;
        for i in 0..REGISTERS {
            let (bytes, rows) = (u16::from_le_bytes([image[16 + 2 * i], image[17 + 2 * i]]), image[48 + i]);
            (self.row_bytes[i], self.rows[i]) = (usize::from(bytes), usize::from(rows));
            fault(self.row_bytes[i] > ROW_BYTES || self.rows[i] > REGISTER_ROWS, "#GP: larger than palette 1 has")?;
            fault((bytes == 0) != (rows == 0), "a register of no rows or no bytes cannot be used, and should say so")?;
        }
        self.configured = true;
        Ok(())
    }

    /// TILERELEASE.
    pub fn release(&mut self) {
        *self = Self::new();
    }

    fn usable(&self, t: usize) -> Result<(), Fault> {
        fault(!self.configured, "#UD: TILES_CONFIGURED is 0")?;
        fault(self.rows[t] == 0 || self.row_bytes[t] == 0, "#UD: the register is not configured")
    }

    /// TILEZERO.
    pub fn zero(&mut self, t: usize) -> Result<(), Fault> {
        self.usable(t)?;
        self.data[t] = [[0; ROW_BYTES]; REGISTER_ROWS];
        Ok(())
    }

    /// TILELOADD.
    ///
    /// # Safety
    /// The register's rows, `stride` bytes apart from `base` on, can be read.
    pub unsafe fn load(&mut self, t: usize, base: *const u8, stride: isize) -> Result<(), Fault> {
        self.zero(t)?;
        for (row, to) in self.data[t][..self.rows[t]].iter_mut().enumerate() {
            // SAFETY: the caller vouches for the row.
            let from = unsafe { std::slice::from_raw_parts(base.offset(row as isize * stride), self.row_bytes[t]) };
            to[..from.len()].copy_from_slice(from);
        }
        Ok(())
    }

    /// TILESTORED.
    ///
    /// # Safety
    /// The register's rows, `stride` bytes apart from `base` on, can be written.
    pub unsafe fn store(&self, t: usize, base: *mut u8, stride: isize) -> Result<(), Fault> {
        self.usable(t)?;
        for (row, from) in self.data[t][..self.rows[t]].iter().enumerate() {
            // SAFETY: the caller vouches for the row.
            unsafe {
                std::ptr::copy_nonoverlapping(from.as_ptr(), base.offset(row as isize * stride), self.row_bytes[t])
            };
        }
        Ok(())
    }

    /// TDPBSUD.
    pub fn dot(&mut self, c: usize, a: usize, b: usize) -> Result<(), Fault> {
        fault(c == a || c == b || a == b, "#UD: a register twice")?;
        for t in [c, a, b] {
            self.usable(t)?;
            fault(!self.row_bytes[t].is_multiple_of(4), "#UD: bytes of a row are no multiple of 4")?;
        }
        fault(self.rows[c] != self.rows[a], "#UD: rows of C are not those of A")?;
        fault(self.row_bytes[a] / 4 != self.rows[b], "#UD: columns of A are not the rows of B")?;
        fault(self.row_bytes[c] != self.row_bytes[b], "#UD: columns of C are not those of B")?;
        for m in 0..self.rows[c] {
            let mut sums = [0i32; ROW_BYTES / 4];
            for k in 0..self.row_bytes[a] / 4 {
                let q: [i32; 4] = std::array::from_fn(|i| i32::from(self.data[a][m][4 * k + i] as i8));
                let codes = self.data[b][k].as_chunks::<4>().0;
                for (sum, w) in sums.iter_mut().zip(codes).take(self.row_bytes[c] / 4) {
                    *sum += (0..4).map(|i| q[i] * i32::from(w[i])).sum::<i32>();
                }
            }
            for (to, sum) in self.data[c][m].as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                *to = i32::from_le_bytes(*to).wrapping_add(sum).to_le_bytes();
            }
        }
        // Rows after those of C become zero.
        let rows = self.rows[c];
        self.data[c][rows..].fill([0; ROW_BYTES]);
        Ok(())
    }
}

/// Registers in software as a kernel's.
#[derive(Debug, Clone, Copy)]
pub struct Model;

impl Amx<Model> {
    /// The kernel on registers in software, if this CPU has the rest of what it needs.
    pub fn new() -> Option<Self> {
        Self::on(Model)
    }
}

impl Unit for Model {
    type Tiles = Box<Registers>;

    fn open(self) -> Box<Registers> {
        Box::new(Registers::new())
    }
}

impl Tiles for Box<Registers> {
    fn configure(&mut self, config: &Config) {
        Registers::configure(self, &config.image().0).unwrap();
    }

    fn zero<const T: usize>(&mut self) {
        Registers::zero(self, T).unwrap();
    }

    fn load<const T: usize>(&mut self, rows: &[Row]) {
        assert!(rows.len() >= self.rows[T]);
        // SAFETY: `rows` has the register's rows, of 64 bytes each.
        unsafe { Registers::load(self, T, rows.as_ptr().cast(), 64) }.unwrap();
    }

    fn store<const T: usize>(&self, rows: &mut [Row]) {
        assert!(rows.len() >= self.rows[T]);
        // SAFETY: `rows` has the register's rows, of 64 bytes each.
        unsafe { Registers::store(self, T, rows.as_mut_ptr().cast(), 64) }.unwrap();
    }

    fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        Registers::dot(self, C, A, B).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C of 2 × 3, A of 2 × 8 bytes, B of 2 × 3 quads.
    fn configured() -> Registers {
        let mut image = [0; 64];
        image[0] = 1;
        for (t, (rows, bytes)) in [(2, 12), (2, 8), (2, 12)].into_iter().enumerate() {
            (image[48 + t], image[16 + 2 * t]) = (rows, bytes);
        }
        let mut registers = Registers::new();
        registers.configure(&image).unwrap();
        registers
    }

    #[test]
    fn a_product_of_small_registers_is_that_of_the_definition() {
        let mut registers = configured();
        let a: Vec<u8> = (0..16).map(|i| (i * 37) as u8).collect();
        let b: Vec<u8> = (0..24).map(|i| (i * 11 + 200) as u8).collect();
        let before = [7i32, -1, 1 << 30, 0, 5, -9];
        // SAFETY: rows of 12, 8 and 12 bytes, two each.
        unsafe {
            registers.load(0, before.as_ptr().cast(), 12).unwrap();
            registers.load(1, a.as_ptr(), 8).unwrap();
            registers.load(2, b.as_ptr(), 12).unwrap();
        }
        registers.dot(0, 1, 2).unwrap();
        let mut after = [0i32; 6];
        // SAFETY: two rows of 12 bytes.
        unsafe { registers.store(0, after.as_mut_ptr().cast(), 12).unwrap() };
        for (m, n) in (0..2).flat_map(|m| (0..3).map(move |n| (m, n))) {
            let product = |k: usize, i: usize| i32::from(a[8 * m + 4 * k + i] as i8) * i32::from(b[12 * k + 4 * n + i]);
            let want = (0..8).map(|j| product(j / 4, j % 4)).sum::<i32>();
            assert_eq!(after[3 * m + n], before[3 * m + n] + want);
        }
    }

    #[test]
    fn what_the_manual_forbids_is_a_fault() {
        let mut image = [0; 64];
        image[0] = 1;
        for (at, value) in [(0, 2), (2, 1), (32, 1), (56, 1), (16, 65), (48, 17), (48, 1)] {
            let mut bad = image;
            bad[at] = value;
            assert!(Registers::new().configure(&bad).is_err(), "byte {at} = {value}");
        }
        assert!(Registers::new().zero(0).is_err());
        let registers = configured;
        assert!(registers().zero(3).is_err());
        for (c, a, b) in [(0, 0, 2), (0, 1, 1), (2, 1, 2), (1, 0, 2), (0, 2, 1), (0, 1, 3)] {
            assert!(registers().dot(c, a, b).is_err(), "{c} {a} {b}");
        }
        let mut released = registers();
        released.release();
        assert!(released.dot(0, 1, 2).is_err());
    }
}
