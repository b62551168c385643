//! The layer alone: replace a candle `Linear` by a ternary one.
//!
//!     cargo run --release --example bitlinear_layer

use candle_bitnet::nn::BitLinear;
use candle_bitnet::ternary::PackedTernary;
use candle_core::{D, Device, Module, Tensor};
use candle_nn::Linear;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::Cpu;
    // A layer of somebody's model. b1.58 masters are trained to sit near −s, 0 and s; random ones are not, so the
    // quantised layer differs from the dense one by what quantisation takes away.
    let (rows, cols) = (4096, 4096);
    let weight = Tensor::randn(0f32, 0.02, (rows, cols), &device)?;
    let dense = Linear::new(weight.clone(), None);
    let packed = PackedTernary::quantize(&weight)?;
    let [minus, zero, plus] = packed.histogram();
    println!("weights: {minus} × -1, {zero} × 0, {plus} × 1, scale {:?}", packed.scale());

    // What the ternary layer computes, in dense arithmetic: the reference for the kernel below.
    let reference = Linear::new(Tensor::from_vec(packed.dequantize(), (rows, cols), &device)?, None);
    let ternary = BitLinear::new(packed, &device)?;

    let x = Tensor::randn(0f32, 1.0, (1, 1, cols), &device)?;
    let relative = |a: &Tensor, b: &Tensor| -> candle_core::Result<f32> {
        let difference = (a - b)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
        Ok((difference / b.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt())
    };
    let y = ternary.forward(&x)?;
    println!("output {:?}; the last dimension of the input was {}", y.dims(), x.dim(D::Minus1)?);
    println!(
        "relative difference to the ternary weights in f32: {:.4} (8-bit activations)",
        relative(&y, &reference.forward(&x)?)?
    );
    println!(
        "relative difference to the dense layer:            {:.4} (ternary weights)",
        relative(&y, &dense.forward(&x)?)?
    );

    let time = |layer: &dyn Module| -> candle_core::Result<f64> {
        layer.forward(&x)?;
        let start = Instant::now();
        for _ in 0..50 {
            layer.forward(&x)?;
        }
        Ok(start.elapsed().as_secs_f64() / 50.0)
    };
    let (t, d) = (time(&ternary)?, time(&dense)?);
    println!("one token: ternary {:.0} µs, f32 {:.0} µs ({:.1}×)", t * 1e6, d * 1e6, d / t);
    Ok(())
}
