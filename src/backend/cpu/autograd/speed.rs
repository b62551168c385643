//! How fast plain products are here: what training's speed is compared with.

use super::{Epilogue, Matrix, Operand, matmul, matmul_bf16};
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// Time that each thread multiplies.
const TIME: Duration = Duration::from_millis(250);

/// GFLOP/s of `[rows, inner] · [inner, cols]` on `threads` threads, each with matrices of its own, with operands in f32
/// or, with `bf16`, rounded to bf16.
///
/// # Errors
/// [`Error::Shape`] for an empty shape.
pub fn product_gflops(rows: usize, cols: usize, inner: usize, threads: usize, bf16: bool) -> Result<f64> {
    let run = || -> Result<f64> {
        let (a, b) = (vec![1.0f32; rows * inner], vec![1.0f32; cols * inner]);
        let (a, b) = (Matrix::new(&a, rows, inner, inner)?, Matrix::new(&b, cols, inner, inner)?);
        let mut out = vec![0.0f32; rows * cols];
        let mut once = || match bf16 {
            true => matmul_bf16(Operand::new(a), Operand::new(b).t(), Epilogue::default(), &mut out, cols),
            false => matmul(a, b.t(), 1.0, &mut out, cols, false),
        };
        once()?;
        let (begun, mut count) = (Instant::now(), 0u32);
        while begun.elapsed() < TIME {
            once()?;
            count += 1;
        }
        Ok(2e-9 * rows as f64 * cols as f64 * inner as f64 * f64::from(count) / begun.elapsed().as_secs_f64())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(run)).collect();
        let panicked = || Error::Shape { op: "matmul", reason: "a worker panicked".into() };
        workers.into_iter().map(|w| w.join().unwrap_or_else(|_| Err(panicked()))).sum()
    })
}
