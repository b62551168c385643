//! The kernel's own instructions on a CPU that lacks them: each raises SIGILL, whose handler does in software what the
//! bytes at the instruction pointer say, with the registers and memory that they name.
//!
//! So the assembled instructions are tested as they stand in the kernel: encodings, operands, addresses, order. What is
//! not: that a real CPU agrees with the manual, and the system's permission.

use super::model::Registers as Model;
use super::tiles::{Registers, Unit, is_there};
use super::{Amx, Avx512Vnni};
use std::cell::RefCell;
use std::sync::OnceLock;

/// Tile registers of instructions that trap.
#[derive(Debug, Clone, Copy)]
pub struct Trapped(());

impl Amx<Trapped> {
    /// The kernel as it is on a CPU with AMX, if this one has none but has the rest of what it needs.
    pub fn new() -> Option<Self> {
        static INSTALLED: OnceLock<bool> = OnceLock::new();
        let ready = !is_there() && Avx512Vnni::new().is_some();
        (ready && *INSTALLED.get_or_init(install)).then(|| Self::on(Trapped(())))?
    }
}

impl Unit for Trapped {
    type Tiles = Registers;

    fn open(self) -> Registers {
        Registers::unused()
    }
}

thread_local! {
    static MODEL: RefCell<Model> = const { RefCell::new(Model::new()) };
}

fn install() -> bool {
    // SAFETY: `sigaction` is plain data. The handler changes this thread's model and what the instruction may change; it
    // allocates nothing and takes no lock.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) == 0
    }
}

extern "C" fn handle(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes a context of this type to a handler with SA_SIGINFO.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize];
    // SAFETY: the longest of these instructions has 10 bytes, and more code follows each of them.
    let code = unsafe { std::slice::from_raw_parts(rip as *const u8, 10) };
    // SAFETY: the operands are those of an instruction of the kernel, which vouches for them.
    match unsafe { execute(code, registers) } {
        Ok(length) => registers[libc::REG_RIP as usize] = rip + length as i64,
        Err(why) => {
            let text = [why, "\n"].map(str::as_bytes);
            for text in text {
                // SAFETY: the text is as long as that.
                unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
            }
            // Nothing that this handler knows: as without it.
            // SAFETY: the call takes two numbers; the instruction is tried again and ends the process.
            unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        }
    }
}

/// A general register by its number in instructions.
fn general(registers: &[i64; 23], number: u8) -> i64 {
    use libc::*;
    let order = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11,
        REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    registers[order[usize::from(number)] as usize]
}

/// A memory operand: base with displacement, index, and the bytes from ModRM on.
struct Memory {
    base: i64,
    index: i64,
    length: usize,
}

/// The operand of ModRM and what follows it; `x` and `b` extend index and base.
fn memory(code: &[u8], x: u8, b: u8, registers: &[i64; 23]) -> Result<Memory, &'static str> {
    let (mode, rm) = (code[0] >> 6, code[0] & 7);
    let sib = rm == 4;
    let (mut base, mut index, mut at) = (rm, None, 1);
    if sib {
        if code[1] >> 6 != 0 {
            return Err("a scaled index");
        }
        (base, index, at) = (code[1] & 7, Some(code[1] >> 3 & 7 | x), 2);
    }
    if mode == 0 && base == 5 {
        return Err("an operand without a base");
    }
    let displacement = match mode {
        0 => 0,
        1 => i64::from(code[at] as i8),
        _ => i64::from(i32::from_le_bytes([code[at], code[at + 1], code[at + 2], code[at + 3]])),
    };
    let length = at + [0, 1, 4][usize::from(mode)];
    // Number 4 says that there is no index.
    let index = index.filter(|i| *i != 4).map_or(0, |i| general(registers, i));
    Ok(Memory { base: general(registers, base | b) + displacement, index, length })
}

/// Does what one instruction says; its length.
///
/// # Safety
/// The memory that it names can be read and written as it says.
unsafe fn execute(code: &[u8], registers: &[i64; 23]) -> Result<usize, &'static str> {
    let &[0xc4, extensions, prefix, opcode, modrm, ..] = code else { return Err("not a VEX instruction") };
    // R, X and B are inverted; map 0f38.
    let [r, x, b] = [7, 6, 5].map(|bit| (!extensions >> bit & 1) << 3);
    let (w_and_l, pp, third) = (prefix & 0x84, prefix & 3, !prefix >> 3 & 15);
    if extensions & 31 != 2 || w_and_l != 0 || r != 0 || third > 7 {
        return Err("not an AMX instruction");
    }
    let (reg, rm, direct) = (usize::from(modrm >> 3 & 7), usize::from(modrm & 7), modrm >> 6 == 3);
    const LENGTH: usize = 5;
    MODEL.with(|model| {
        let model = &mut *model.try_borrow_mut().map_err(|_| "the model is in use")?;
        let operand = || memory(&code[4..], x, b, registers);
        match (opcode, pp, direct) {
            (0x49, 0, true) if modrm == 0xc0 && third == 0 => {
                model.release();
                Ok(LENGTH)
            }
            (0x49, 0, false) if reg == 0 && third == 0 => {
                let at = operand()?;
                // SAFETY: the caller vouches for the 64 bytes.
                model.configure(unsafe { &*((at.base + at.index) as *const [u8; 64]) })?;
                Ok(4 + at.length)
            }
            (0x49, 3, true) if rm == 0 && third == 0 => model.zero(reg).map(|()| LENGTH),
            (0x4b, 3, false) if rm == 4 && third == 0 => {
                let at = operand()?;
                // SAFETY: the caller vouches for the rows.
                unsafe { model.load(reg, at.base as *const u8, at.index as isize) }?;
                Ok(4 + at.length)
            }
            (0x4b, 2, false) if rm == 4 && third == 0 => {
                let at = operand()?;
                // SAFETY: the caller vouches for the rows.
                unsafe { model.store(reg, at.base as *mut u8, at.index as isize) }?;
                Ok(4 + at.length)
            }
            (0x5e, 2, true) if b == 0 => model.dot(reg, rm, usize::from(third)).map(|()| LENGTH),
            _ => Err("an instruction that the kernel does not use"),
        }
    })
}
