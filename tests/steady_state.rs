//! What a decode step allocates once it is warm: no tensor where the logits are lent, one of them where they are not; and the
//! few bytes with which candle checks the output of every operation.

mod common;

use candle_bitnet::backend::DenseType;
use candle_bitnet::backend::cpu::KernelKind;
use candle_bitnet::model::{Logits, Sequence, read_logits};
use candle_bitnet::nn::HeadKind;
use candle_bitnet::{DeviceChoice, LoadOptions, LoadedDecoder, select_device};
use candle_core::Tensor;
use common::{FIXTURES, fixture};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Counts what the thread that calls the model allocates, and notes the sizes; what others do is counted apart, as a
/// worker that wakes for the first time allocates a little.
struct Counting;

thread_local!(static CALLER: Cell<bool> = const { Cell::new(false) });
static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static OTHERS: AtomicUsize = AtomicUsize::new(0);
static SIZES: [AtomicUsize; 8192] = [const { AtomicUsize::new(0) }; 8192];

fn count(bytes: usize) {
    if !CALLER.try_with(Cell::get).unwrap_or(false) {
        OTHERS.fetch_add(1, Relaxed);
        return;
    }
    let at = COUNT.fetch_add(1, Relaxed);
    BYTES.fetch_add(bytes, Relaxed);
    if let Some(size) = SIZES.get(at) {
        size.store(bytes, Relaxed);
    }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        unsafe { System.realloc(ptr, layout, size) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The counters are the process's, so one test counts at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Allocations and bytes of `f`.
fn counted(f: impl FnOnce()) -> (usize, usize) {
    COUNT.store(0, Relaxed);
    BYTES.store(0, Relaxed);
    CALLER.set(true);
    f();
    CALLER.set(false);
    (COUNT.load(Relaxed), BYTES.load(Relaxed))
}

fn options(threads: usize) -> LoadOptions {
    LoadOptions::new(&select_device(DeviceChoice::Cpu).unwrap()).threads(Some(threads))
}

#[test]
fn a_decode_step_allocates_no_tensor_but_the_one_that_it_returns() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = KernelKind::available();
    let cases = kernels.iter().flat_map(|kernel| [(kernel, 1), (kernel, 2)]);
    for (name, (kernel, threads)) in FIXTURES.iter().flat_map(|name| cases.clone().map(move |c| (name, c))) {
        let options = options(threads).kernel(Some(*kernel));
        let loaded = LoadedDecoder::load(fixture(name).to_str().unwrap(), &options).unwrap();
        let model = &loaded.decoder;
        let cache = model.kv_cache(DenseType::F32, 1).unwrap();
        let step = |position: usize| {
            let tokens = [position as u32 % 256];
            model.forward(&[Sequence { slot: 0, position, tokens: &tokens }], &cache, Logits::Last).unwrap();
        };
        let mut kept = Vec::new();
        let mut lent = |position: usize| {
            let tokens = [position as u32 % 256];
            let read = |logits: &Tensor| read_logits(logits, &mut kept);
            let sequence = Sequence { slot: 0, position, tokens: &tokens };
            model.forward_with(&[sequence], &cache, Logits::Last, read).unwrap();
        };
        // The last position too: attention's buffers grow with the longest sequence, once.
        (0..4).chain([model.context() - 1]).for_each(step);
        (0..4).for_each(&mut lent);
        OTHERS.store(0, Relaxed);
        // The first positions and the last: what grew with the position would show.
        let positions = (4..36).chain(model.context() - 32..model.context());
        let steps: Vec<_> = positions.clone().map(|position| counted(|| step(position))).collect();
        let lent: Vec<_> = positions.map(|position| counted(|| lent(position))).collect();
        let others = OTHERS.load(Relaxed);
        let (count, bytes) = steps[0];
        let context = format!("{name}, {kernel}, {threads} threads");
        println!("{context}: {count} allocations, {bytes} bytes; workers {others} in {} steps", 2 * steps.len());
        // `Tensor::inplace_op` sorts the strides of its output: once for each of five operations a layer, for the embedding,
        // the last norm and the head.
        let checks = 5 * model.config().num_layers + 3;
        assert!(lent.iter().all(|s| *s == (checks, 64 * checks)), "{context}: with lent logits: {lent:?}");
        assert!(steps.iter().all(|s| *s == steps[0]), "{context}: (allocations, bytes) of each step: {steps:?}");
        assert!(others < steps.len(), "{context}: {others} allocations of workers in {} steps", 2 * steps.len());
        // The logits, with their storage, shape and strides.
        assert!(count <= checks + 5, "{context}: {count} allocations, {checks} with lent logits");
        let most = 4 * model.config().vocab_size + 64 * checks + 512;
        assert!(bytes <= most, "{context}: {bytes} bytes, more than {most}");
    }
}

#[test]
fn no_kind_of_head_allocates_more() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for kind in [HeadKind::Int8, HeadKind::Screened, HeadKind::ScreenedProbable] {
        let loaded = LoadedDecoder::load(fixture(FIXTURES[0]).to_str().unwrap(), &options(2).head(kind)).unwrap();
        let model = &loaded.decoder;
        let cache = model.kv_cache(DenseType::F32, 1).unwrap();
        let mut kept = Vec::new();
        let mut step = |position: usize| {
            let tokens = [position as u32 % 256];
            let sequence = Sequence { slot: 0, position, tokens: &tokens };
            let read = |logits: &Tensor| read_logits(logits, &mut kept);
            model.forward_with(&[sequence], &cache, Logits::Top(40), read).unwrap();
        };
        (0..4).chain([model.context() - 1]).for_each(&mut step);
        let checks = 5 * model.config().num_layers + 3;
        for position in 4..36 {
            assert_eq!(counted(|| step(position)), (checks, 64 * checks), "{kind}, position {position}");
        }
    }
}

#[test]
fn passes_of_many_rows_keep_their_tensors() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = LoadedDecoder::load(fixture(FIXTURES[0]).to_str().unwrap(), &options(1)).unwrap();
    let model = &loaded.decoder;
    let cache = model.kv_cache(DenseType::F32, 1).unwrap();
    let ids: Vec<u32> = (0..64).collect();
    let prefill = |rows: usize| {
        let sequence = Sequence { slot: 0, position: 0, tokens: &ids[..rows] };
        counted(|| model.forward_with(&[sequence], &cache, Logits::Last, |_| Ok(())).unwrap())
    };
    let (_, first) = prefill(64);
    let row = 4 * model.config().hidden_size;
    assert!(first > 64 * row, "the first pass makes its tensors: {first} bytes");
    for rows in [64, 9, 60] {
        let (_, bytes) = prefill(rows);
        println!("{rows} rows: {bytes} bytes");
        assert!(bytes < 4096, "{rows} rows: {bytes} bytes, for views alone");
    }
}

/// cargo test --release --test steady_state -- --ignored --nocapture
#[test]
#[ignore = "a measurement on real shapes, with 1.2 GB"]
fn what_the_allocations_of_a_step_cost() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = LoadedDecoder::synthetic("2b4t", &options(2).context(Some(64))).unwrap();
    let model = &loaded.decoder;
    let cache = model.kv_cache(DenseType::F32, 1).unwrap();
    let step = |position: usize| {
        model.forward(&[Sequence { slot: 0, position, tokens: &[7] }], &cache, Logits::Last).unwrap();
    };
    (0..4).for_each(step);
    let (count, bytes) = counted(|| step(4));
    let sizes: Vec<usize> = SIZES.iter().take(count).map(|s| s.load(Relaxed)).collect();
    let start = Instant::now();
    (5..25).for_each(step);
    let decode = start.elapsed().as_secs_f64() / 20.0;
    // The same sizes once more, without the work between them: reserved only, and with every byte written once, which
    // is what clearing an op's output costs at most.
    let time = |make: &dyn Fn(usize) -> Vec<u8>| {
        let start = Instant::now();
        for _ in 0..100 {
            sizes.iter().for_each(|n| drop(std::hint::black_box(make(*n))));
        }
        start.elapsed().as_secs_f64() / 100.0
    };
    let (reserved, written) = (time(&Vec::with_capacity), time(&|n| vec![1; n]));
    println!(
        "{count} allocations, {:.2} MB a step of {:.2} ms; allocating alone {:.1} us ({:.3} %), with writing {:.1} us ({:.3} %)",
        bytes as f64 / 1e6,
        decode * 1e3,
        reserved * 1e6,
        100.0 * reserved / decode,
        written * 1e6,
        100.0 * written / decode,
    );
}
