//! The tile registers: what the kernel does with them, and this CPU's own.
//!
//! Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and the instructions in volume 2.
//! The instructions are written in assembler: the compiler's own are not stable. It knows nothing of the registers, so that
//! it neither moves nor saves them; the system saves them with a thread.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Registers.
pub const REGISTERS: usize = 8;
/// Most rows of a register.
pub const REGISTER_ROWS: usize = 16;
/// A row of a register: 64 bytes.
pub type Row = [i32; 16];

/// Rows of each register, all of 64 bytes; a register of none cannot be used.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    rows: [u8; REGISTERS],
}

/// A configuration as `ldtilecfg` reads it.
#[repr(C, align(64))]
pub struct Image(pub [u8; 64]);

impl Config {
    /// # Panics
    /// If a register has more than 16 rows.
    pub fn new(rows: [u8; REGISTERS]) -> Self {
        assert!(rows.iter().all(|r| usize::from(*r) <= REGISTER_ROWS), "at most {REGISTER_ROWS} rows: {rows:?}");
        Self { rows }
    }

    /// Palette 1; bytes of a row at 16 (16 bits each), rows at 48.
    pub fn image(&self) -> Image {
        let mut image = [0; 64];
        image[0] = 1;
        for (i, rows) in self.rows.into_iter().enumerate() {
            if rows > 0 {
                image[16 + 2 * i] = size_of::<Row>() as u8;
                image[48 + i] = rows;
            }
        }
        Image(image)
    }
}

/// Where tile registers come from.
pub trait Unit: std::fmt::Debug + Copy + Send + Sync + 'static {
    /// The registers.
    type Tiles: Tiles;
    /// The registers of this thread.
    fn open(self) -> Self::Tiles;
}

/// Eight tile registers of a thread. Each holds rows of 64 bytes.
pub trait Tiles {
    /// Gives the registers their rows, all zero.
    fn configure(&mut self, config: &Config);

    /// Clears register T.
    fn zero<const T: usize>(&mut self);

    /// Loads the rows of register T.
    fn load<const T: usize>(&mut self, rows: &[Row]);

    /// Stores the rows of register T.
    fn store<const T: usize>(&self, rows: &mut [Row]);

    /// C += A · B: `c[m][n] += Σ_k Σ_i a[m][4k + i] · b[k][4n + i]`, bytes of A signed, of B unsigned, sums of 32 bits.
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// Proof that this CPU has AMX for bytes with registers as they are used here, and that the system saves them and lets
/// this process use them.
#[derive(Debug, Clone, Copy)]
pub struct Permission(());

impl Permission {
    /// Looks, and asks the system once.
    pub fn ask() -> Option<Self> {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        GRANTED.get_or_init(|| is_there() && granted()).then_some(Self(()))
    }
}

/// Whether this CPU has the instructions, and registers of palette 1's size in the system's care.
pub fn is_there() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    const CONFIG_AND_DATA: u64 = 1 << 17 | 1 << 18;
    let leaf = |leaf, sub| __cpuid_count(leaf, sub);
    if leaf(0, 0).eax < 0x1e || leaf(1, 0).ecx & OSXSAVE == 0 || leaf(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8 {
        return false;
    }
    // SAFETY: OSXSAVE was found: the system has turned on XGETBV.
    if unsafe { xcr0() } & CONFIG_AND_DATA != CONFIG_AND_DATA {
        return false;
    }
    let (palettes, palette, product) = (leaf(0x1d, 0).eax, leaf(0x1d, 1), leaf(0x1e, 0));
    palettes >= 1
        // Bytes of a register, of a row; registers; rows.
        && palette.eax >> 16 == 1024
        && palette.ebx & 0xffff == 64
        && palette.ebx >> 16 == REGISTERS as u32
        && palette.ecx & 0xffff == REGISTER_ROWS as u32
        // The largest k (rows of B) and n (bytes of its rows) of a product.
        && product.ebx & 0xff == REGISTER_ROWS as u32
        && product.ebx >> 8 & 0xffff == 64
}

/// # Safety
/// The system has set CR4.OSXSAVE.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: as the caller vouches; register 0 exists then.
    unsafe { _xgetbv(0) }
}

/// Asks Linux for the tile data of this process's threads, present and future (Documentation/arch/x86/xstate.rst).
#[cfg(target_os = "linux")]
fn granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes only what the system grants this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// How other systems are asked is not known here.
#[cfg(not(target_os = "linux"))]
fn granted() -> bool {
    false
}

impl Unit for Permission {
    type Tiles = Registers;

    fn open(self) -> Registers {
        Registers::unused()
    }
}

/// The text of an instruction with its operands' texts, for the kernel and for the test of its encoding.
macro_rules! instruction {
    (configure $image:literal) => {
        concat!("ldtilecfg [", $image, "]")
    };
    (release) => {
        "tilerelease"
    };
    (zero $t:literal) => {
        concat!("tilezero tmm", $t)
    };
    (load $t:literal $rows:literal $stride:literal) => {
        concat!("tileloadd tmm", $t, ", [", $rows, " + ", $stride, "*1]")
    };
    (store $t:literal $rows:literal $stride:literal) => {
        concat!("tilestored [", $rows, " + ", $stride, "*1], tmm", $t)
    };
    (dot $c:literal $a:literal $b:literal) => {
        concat!("tdpbsud tmm", $c, ", tmm", $a, ", tmm", $b)
    };
}

/// This thread's registers, in use from the first [`Tiles::configure`] until they are dropped: registers in use cost the
/// system time and memory whenever it saves the thread.
#[derive(Debug)]
pub struct Registers {
    rows: [u8; REGISTERS],
    /// They cannot go to another thread.
    here: PhantomData<*const ()>,
}

impl Registers {
    /// Unconfigured registers. Only for a [`Unit`] that knows that the instructions work.
    pub(super) fn unused() -> Self {
        Self { rows: [0; REGISTERS], here: PhantomData }
    }

    #[inline(always)]
    fn check<const T: usize>(&self, rows: usize) {
        assert!(self.rows[T] > 0 && rows >= usize::from(self.rows[T]), "register {T} has {} rows", self.rows[T]);
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: the `Unit` knows that the instruction works. It changes the registers alone.
        unsafe { asm!(instruction!(release), options(nomem, nostack, preserves_flags)) }
    }
}

impl Tiles for Registers {
    fn configure(&mut self, config: &Config) {
        let image = config.image();
        // SAFETY: the `Unit` knows that the instruction works. The image has the 64 bytes that it reads, and is valid.
        unsafe {
            asm!(instruction!(configure "{image}"), image = in(reg) &image, options(readonly, nostack, preserves_flags))
        }
        self.rows = config.rows;
    }

    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        self.check::<T>(REGISTER_ROWS);
        // SAFETY: the register is configured, which only `configure` does. It alone is changed.
        unsafe { asm!(instruction!(zero "{t}"), t = const T, options(nomem, nostack, preserves_flags)) }
    }

    #[inline(always)]
    fn load<const T: usize>(&mut self, rows: &[Row]) {
        self.check::<T>(rows.len());
        // SAFETY: the register is configured, and `rows` has the rows of 64 bytes that it reads.
        unsafe {
            asm!(
                instruction!(load "{t}" "{rows}" "{stride}"),
                t = const T,
                rows = in(reg) rows.as_ptr(),
                stride = in(reg) size_of::<Row>(),
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    #[inline(always)]
    fn store<const T: usize>(&self, rows: &mut [Row]) {
        self.check::<T>(rows.len());
        // SAFETY: the register is configured, and `rows` has the rows of 64 bytes that it writes.
        unsafe {
            asm!(
                instruction!(store "{t}" "{rows}" "{stride}"),
                t = const T,
                rows = in(reg) rows.as_mut_ptr(),
                stride = in(reg) size_of::<Row>(),
                options(nostack, preserves_flags)
            );
        }
    }

    #[inline(always)]
    fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        const { assert!(C != A && C != B && A != B, "three registers") }
        // The rows of B are what the 64 bytes of a row of A meet.
        let fits = self.rows[C] > 0 && self.rows[A] == self.rows[C] && usize::from(self.rows[B]) == REGISTER_ROWS;
        assert!(fits, "registers {C}, {A}, {B} of {:?} rows", self.rows);
        // SAFETY: the registers are configured in shapes that fit. C alone is changed.
        unsafe {
            asm!(
                instruction!(dot "{c}" "{a}" "{b}"),
                c = const C,
                a = const A,
                b = const B,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_os = "linux")]
    use std::arch::global_asm;

    // The kernel's instructions as data; they are not run.
    #[cfg(target_os = "linux")]
    global_asm!(
        ".pushsection .rodata",
        ".globl candle_bitnet_amx_instructions",
        "candle_bitnet_amx_instructions:",
        instruction!(configure "rax"),
        instruction!(release),
        instruction!(zero "5"),
        instruction!(load "3" "rsi" "r9"),
        instruction!(store "7" "r12" "rcx"),
        instruction!(dot "0" "4" "6"),
        instruction!(dot "3" "5" "7"),
        ".popsection",
    );

    #[cfg(target_os = "linux")]
    #[test]
    fn instructions_are_encoded_as_the_manual_says() {
        // VEX (c4), the inverted extensions of registers and opcode map 0f38 (e2: none; a2: the index, c2: the base is r8 … r15),
        // W0.vvvv.L0.pp, opcode, ModRM, SIB.
        let want: &[&[u8]] = &[
            &[0xc4, 0xe2, 0x78, 0x49, 0x00],       // LDTILECFG: NP 49 !(11):000:bbb
            &[0xc4, 0xe2, 0x78, 0x49, 0xc0],       // TILERELEASE: NP 49 c0
            &[0xc4, 0xe2, 0x7b, 0x49, 0xe8],       // TILEZERO: F2 49 11:rrr:000
            &[0xc4, 0xa2, 0x7b, 0x4b, 0x1c, 0x0e], // TILELOADD: F2 4b !(11):rrr:100
            &[0xc4, 0xc2, 0x7a, 0x4b, 0x3c, 0x0c], // TILESTORED: F3 4b !(11):rrr:100
            &[0xc4, 0xe2, 0x4a, 0x5e, 0xc4],       // TDPBSUD: F3 5e 11:rrr:bbb, the third operand in vvvv
            &[0xc4, 0xe2, 0x42, 0x5e, 0xdd],
        ];
        let want = want.concat();
        unsafe extern "C" {
            #[link_name = "candle_bitnet_amx_instructions"]
            static INSTRUCTIONS: [u8; 37];
        }
        // SAFETY: the section above has as many bytes, or what follows it; nothing writes there.
        let got = unsafe { &*std::ptr::addr_of!(INSTRUCTIONS) };
        assert_eq!(got[..], want);
    }

    #[test]
    fn a_configuration_is_the_image_of_the_manual() {
        let image = Config::new([9, 9, 8, 8, 9, 8, 16, 0]).image().0;
        let mut want = [0; 64];
        want[0] = 1;
        for (i, rows) in [9, 9, 8, 8, 9, 8, 16, 0].into_iter().enumerate() {
            want[16 + 2 * i] = if rows > 0 { 64 } else { 0 };
            want[48 + i] = rows;
        }
        assert_eq!(image, want);
    }
}
