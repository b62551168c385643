//! The host side on a device: a GPU or, where there is none, the emulator (`kernels/emulator/run_metal.sh`, with
//! `BITNET_METAL_EMULATOR` naming its library); without either the tests say so and pass.

use super::*;
use crate::Error;
use crate::backend::attention::{AttentionShape, RopeTable, RowPosition};
use crate::backend::{Arrangement, DenseType};
use crate::ternary::{PackedTernary, Scale};
use candle_core::Device;

fn device() -> Option<Arc<Metal>> {
    if count() == 0 {
        assert!(std::env::var_os("BITNET_REQUIRE_GPU").is_none(), "no Metal device");
        eprintln!("there is no Metal device here, nothing was run");
        return None;
    }
    let Device::Metal(device) = open(0).unwrap() else { panic!("not a Metal device") };
    // One of its own for each test, as a profile is a device's.
    Some(Arc::new(Metal::new(&device).unwrap()))
}

#[test]
fn backends_of_a_device_share_its_kernels() {
    if count() == 0 {
        return;
    }
    let Device::Metal(device) = open(0).unwrap() else { panic!("not a Metal device") };
    let (first, second) = (Metal::shared(&device).unwrap(), Metal::shared(&device).unwrap());
    assert!(Arc::ptr_eq(&first, &second));
}

fn at(slot: usize, position: usize) -> RowPosition {
    RowPosition { slot, position }
}

#[test]
fn every_kernel_equals_the_cpus() {
    let Some(metal) = device() else { return };
    let mut names = Vec::new();
    let report = |part: &SelfTest| {
        eprintln!("{}: {} cases, {} aside, {:.1} s", part.name, part.cases, part.aside, part.time.as_secs_f64());
        names.push(part.name);
    };
    let parts = self_test(&metal, report).unwrap();
    for part in &parts {
        assert_eq!(part.problem, None, "{}", part.name);
        assert!(part.cases > 0, "{}", part.name);
    }
    assert_eq!(parts.iter().map(|p| p.name).collect::<Vec<_>>(), names);
}

#[test]
fn a_device_that_is_not_there() {
    let message = open(count()).unwrap_err().to_string();
    assert!(message.contains("GPU") || message.contains("Metal"), "{message}");
    assert!(message.contains("--device cpu"), "{message}");
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let Some(metal) = device() else { return };
    let weights = PackedTernary::from_weights(6, 8, &[1; 48], Scale::Multiply(1.0)).unwrap();
    let packed = metal.pack(&[weights], Arrangement::Stacked).unwrap();
    assert_eq!((packed.rows(), packed.cols(), packed.bytes(), packed.segments().len()), (6, 8, 1024, 1));
    let (x, out) = (metal.zeroed::<f32>(16, "x").unwrap(), metal.zeroed::<f32>(12, "out").unwrap());
    let run = |x: MetalSlice<'_>, out: MetalSlice<'_>, first, width| {
        metal.norm_linear(&packed, x, None, out, first, width, false)
    };
    run(x.as_slice(), out.as_slice(), 0, 6).unwrap();
    for (n, m, first, width) in [(15, 12, 0, 6), (16, 11, 0, 6), (16, 12, 1, 6), (16, 12, 0, 5), (8, 12, 0, 6)] {
        assert!(run(x.slice(..n), out.slice(..m), first, width).is_err(), "{n} {m} {first} {width}");
    }
    assert!(run(x.slice(1..9), out.slice(..6), 0, 6).is_err(), "rows that are not aligned");
    let norm = metal.zeroed::<f32>(7, "norm").unwrap();
    let bad = Some((norm.as_slice(), 1e-5));
    assert!(metal.norm_linear(&packed, x.as_slice(), bad, out.as_slice(), 0, 6, false).is_err());
    assert!(metal.gated_linear(crate::backend::cpu::Gate::Silu, &packed, x.as_slice(), None, out.as_slice()).is_err());
    assert!(metal.rms_norm(x.as_slice(), norm.as_slice(), 1e-5, out.as_slice()).is_err());
    assert!(metal.pack(&[], Arrangement::Stacked).is_err());
    let matrix = MetalDense::filled(&metal, DenseType::F32, 3, 8, |_| ()).unwrap();
    assert!(metal.dense_linear(&matrix, x.as_slice(), out.slice(..6), 0, 4, false).is_err());
    assert!(metal.select_rows(x.as_slice(), 8, &[2], out.slice(..8)).is_err());
    let mut batch = MetalBatch::new(&metal, 4).unwrap();
    batch.set(&[3], &[at(0, 0)]).unwrap();
    let message = metal.embed(&matrix, &batch, out.slice(..8)).unwrap_err().to_string();
    assert!(message.contains("vocabulary"), "{message}");
    let heads = AttentionShape::new(2, 1, 4).unwrap();
    let rope = MetalRope::new(&metal, &RopeTable::new(9, 4, 1e4).unwrap()).unwrap();
    let mut kv = MetalKv::new(&metal, DenseType::F16, heads, 1, 9).unwrap();
    assert_eq!((kv.bytes(), kv.slots(), kv.positions()), (2 * 9 * 4 * 2, 1, 9));
    let qkv = metal.zeroed::<f32>(heads.qkv_dim(), "qkv").unwrap();
    batch.set(&[0], &[at(0, 9)]).unwrap();
    let full = metal.attention(heads, qkv.as_slice(), &batch, &rope, &mut kv, out.slice(..8));
    assert!(matches!(full, Err(Error::ContextFull { needed: 10, available: 9 })));
    batch.set(&[0], &[at(1, 0)]).unwrap();
    assert!(metal.attention(heads, qkv.as_slice(), &batch, &rope, &mut kv, out.slice(..8)).is_err(), "no such slot");
}

/// A batch that kernels on their way may still read is not written over.
#[test]
fn batches_of_a_pass_that_still_runs_stay() {
    let Some(metal) = device() else { return };
    let table: Vec<u8> = (0..8).flat_map(|i| [i as f32; 4]).flat_map(f32::to_le_bytes).collect();
    let matrix = MetalDense::filled(&metal, DenseType::F32, 8, 4, |to| to.copy_from_slice(&table)).unwrap();
    let mut batch = MetalBatch::new(&metal, 2).unwrap();
    let outs: Vec<_> = (0..3).map(|_| metal.zeroed::<f32>(8, "out").unwrap()).collect();
    for (i, out) in outs.iter().enumerate() {
        batch.set(&[i as u32, 7 - i as u32], &[at(0, i), at(1, i)]).unwrap();
        metal.embed(&matrix, &batch, out.as_slice()).unwrap();
    }
    for (i, out) in outs.iter().enumerate() {
        let (a, b) = (i as f32, 7.0 - i as f32);
        assert_eq!(metal.download(out, 8).unwrap(), [a, a, a, a, b, b, b, b]);
    }
}

#[test]
fn times_and_memory_are_told() {
    let Some(metal) = device() else { return };
    assert!(metal.copy_bandwidth().unwrap() > 1e6);
    let (free, total) = metal.memory();
    assert!(free > 0 && free <= total && total == metal.chip().working_set);
    let x = metal.zeroed::<f32>(64, "x").unwrap();
    let run = || metal.gated(crate::backend::cpu::Gate::Silu, x.as_slice(), 32, metal.zeroed(32, "out")?.as_slice());
    metal.profile(true);
    run().unwrap();
    let times = metal.take_profile().unwrap();
    metal.profile(false);
    let gated = times.iter().find(|t| t.kernel == "bitnet_gated").unwrap();
    assert!(gated.launches == 1 && gated.seconds > 0.0 && gated.bytes == 3 * 4 * 32, "{gated:?}");
    let heads = AttentionShape::new(2, 1, 128).unwrap();
    let message = MetalKv::new(&metal, DenseType::F32, heads, 1 << 12, 1 << 20).unwrap_err().to_string();
    assert!(message.contains("KV cache") && message.contains("largest buffer"), "{message}");
    assert!(MetalKv::new(&metal, DenseType::F32, heads, usize::MAX, 2).is_err());
}
