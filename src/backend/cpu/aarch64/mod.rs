//! Ternary kernels for aarch64, one file per instruction set.

mod neon;
mod neon_dotprod;
mod neon_i8mm;

pub use neon::Neon;
pub use neon_dotprod::NeonDotprod;
pub use neon_i8mm::NeonI8mm;

pub(super) use neon_dotprod::{dot, dot_columns};

/// Runs `$pass::<N>` for the run-time token count `$tokens`, an integer from 1 to 12.
macro_rules! for_tokens {
    ($tokens:expr, [$($n:literal)*], $pass:ident $args:tt) => {
        match $tokens {
            // SAFETY: the caller's contract, stated where the macro is used.
            $($n => unsafe { $pass::<$n> $args },)*
            _ => unreachable!("checked by check_gemm"),
        }
    };
}
use for_tokens;

#[cfg(test)]
mod tests {
    use crate::backend::Arrangement;
    use crate::backend::cpu::{Cpu, CpuOptions, KernelKind};
    use crate::ternary::{PackedTernary, Scale};

    /// Prints its findings: `.ci/run arm` compares them with the CPU that qemu plays.
    #[test]
    fn kernels_are_found_and_chosen_at_run_time() {
        let available = KernelKind::available();
        let names: Vec<_> = available.iter().map(|k| k.name()).collect();
        println!("kernels: {}", names.join(" "));
        let dotprod = std::arch::is_aarch64_feature_detected!("dotprod");
        assert_eq!(available.contains(&KernelKind::NeonDotprod), dotprod);
        let i8mm = dotprod && std::arch::is_aarch64_feature_detected!("i8mm");
        assert_eq!(available.contains(&KernelKind::NeonI8mm), i8mm);
        let chosen = Cpu::new(CpuOptions::default()).unwrap().kernel();
        println!("chosen: {chosen}");
        assert_eq!(Some(&chosen), available.first());
        let weights: Vec<i8> = (0..33 * 333).map(|k| (k * k % 3) as i8 - 1).collect();
        let weight = PackedTernary::from_weights(33, 333, &weights, Scale::Multiply(1.0)).unwrap();
        for kernel in KernelKind::ALL {
            let forced = Cpu::new(CpuOptions { kernel: Some(kernel), threads: Some(1) });
            assert_eq!(forced.is_ok(), available.contains(&kernel), "{kernel}");
            if let Ok(cpu) = forced {
                let screens = matches!(kernel, KernelKind::NeonI8mm | KernelKind::NeonDotprod);
                assert_eq!(cpu.screens_fast(), screens, "{kernel}");
                // Its first products, checked by panels too.
                cpu.pack(std::slice::from_ref(&weight), Arrangement::Stacked).unwrap();
            }
        }
    }
}
