//! Micro-batches on several threads, their results added in order: the same bits whatever the number of threads.

use crate::ops::grad;
use crate::{Error, Result};
use candle_core::Tensor;
use std::sync::{Condvar, Mutex, PoisonError};

/// A loss and its gradients.
pub(super) type Sums = (f64, Vec<Tensor>);

/// Runs `work` for each index on `threads` threads and adds the results in the order of the indices.
pub(super) fn in_order(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<Sums> + Sync,
) -> Result<Option<Sums>> {
    struct Shared {
        next: usize,
        turn: usize,
        sums: Option<Sums>,
        error: Option<Error>,
    }
    let shared = Mutex::new(Shared { next: 0, turn: 0, sums: None, error: None });
    let turned = Condvar::new();
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let add = |sums: &mut Option<Sums>, (loss, gradients): Sums| -> Result<()> {
        let Some((total, all)) = sums else {
            *sums = Some((loss, gradients));
            return Ok(());
        };
        *total += loss;
        for (sum, gradient) in all.iter_mut().zip(gradients) {
            *sum = grad::accumulate(sum, &gradient)?;
        }
        Ok(())
    };
    /// A worker that unwinds would leave the others waiting for its turn.
    struct OnPanic<'a>(&'a Mutex<Shared>, &'a Condvar);
    impl Drop for OnPanic<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                shared.error.get_or_insert_with(|| Error::Training("a worker panicked".into()));
                self.1.notify_all();
            }
        }
    }
    let worker = || {
        let _guard = OnPanic(&shared, &turned);
        loop {
            let index = {
                let mut s = lock();
                if s.error.is_some() || s.next == count {
                    return;
                }
                s.next += 1;
                s.next - 1
            };
            let result = work(index);
            let mut s = lock();
            while s.turn != index && s.error.is_none() {
                s = turned.wait(s).unwrap_or_else(PoisonError::into_inner);
            }
            if s.error.is_none() {
                let mut sums = s.sums.take();
                match result.and_then(|r| add(&mut sums, r)) {
                    Ok(()) => s.sums = sums,
                    Err(e) => s.error = Some(e),
                }
                s.turn += 1;
            }
            turned.notify_all();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(worker);
        }
        worker();
    });
    let s = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    match s.error {
        Some(e) => Err(e),
        None => Ok(s.sums),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::time::Duration;

    #[test]
    fn results_are_added_in_order_and_failures_end_the_wait() {
        let delayed = |i: usize| {
            std::thread::sleep(Duration::from_millis(8 - i as u64));
            // Sums that depend on their order.
            let value = [1e8f32, 1.0, -1e8, 1.0, 3.0, 1e8, 0.5][i];
            Ok((f64::from(value), vec![Tensor::new(value, &candle_core::Device::Cpu)?]))
        };
        let sum = |threads| {
            let (loss, tensors) = in_order(threads, 7, delayed).unwrap().unwrap();
            (loss, tensors[0].to_scalar::<f32>().unwrap())
        };
        let one = sum(1);
        assert_eq!((sum(2), sum(3), sum(9)), (one, one, one));
        assert!(in_order(3, 0, delayed).unwrap().is_none());
        for threads in 1..5 {
            let failing = |i| if i == 2 { Err(Error::Training("two".into())) } else { delayed(i) };
            assert_eq!(in_order(threads, 7, failing).unwrap_err().to_string(), "training: two");
            let panicking = |i| if i == 2 { panic!("two") } else { delayed(i) };
            assert!(catch_unwind(AssertUnwindSafe(|| in_order(threads, 7, panicking).map(drop))).is_err());
        }
    }
}
