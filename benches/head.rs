//! The output head of 2B-4T (128 256 × 2560, bf16) in each of its forms: bytes read a second, beside the read bandwidth of the same
//! bytes, for one token of which the largest logit is asked for; tokens a second for batches.
//!
//! `cargo bench --bench head`; 1.1 GB of memory. A form that reads less wins by its time, whatever its GB/s.

mod common;

use candle_bitnet::backend::DenseType;
use candle_bitnet::model::presets::SyntheticWeights;
use candle_bitnet::nn::{HeadKind, OutputHead};
use candle_core::{DType, Device, Tensor};
use common::{activations, backend, beside_reads, shapes, thread_counts};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use std::sync::Arc;
use std::time::Duration;

const FORMS: [HeadKind; 4] = [HeadKind::Full, HeadKind::Int8, HeadKind::Screened, HeadKind::ScreenedProbable];
/// Inputs of a pass.
const BATCHES: [usize; 4] = [1, 2, 8, 32];

fn head(c: &mut Criterion) {
    let config = shapes();
    let (rows, cols) = (config.vocab_size, config.hidden_size);
    let weights = SyntheticWeights::new(&config, 0);
    for options in thread_counts() {
        let (backend, name) = backend(options);
        let fill = |out: &mut [u8]| weights.dense_bf16("lm_head.weight", cols, 0, out);
        let stored = Arc::new(backend.dense_filled(DenseType::BF16, rows, cols, fill).expect("memory"));
        let mut group = c.benchmark_group(format!("head {rows}x{cols}, {name}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
        for form in FORMS {
            let head = OutputHead::new(Arc::clone(&stored)).with_form(&backend, form.into()).expect("finite weights");
            let regions: Vec<&[u8]> = head.host_bytes().into_iter().collect();
            for inputs in BATCHES {
                // Larger batches take the whole head, which one of the forms shows.
                if inputs > 2 && matches!(form, HeadKind::Screened | HeadKind::ScreenedProbable) {
                    continue;
                }
                let x = activations(inputs, cols);
                let out = Tensor::zeros((inputs, rows), DType::F32, &Device::Cpu).expect("memory");
                let step = || head.forward(&backend, &x, Some(1), &out).expect("shapes fit");
                let before = head.reads();
                step();
                let bytes = head.reads().since(before).bytes;
                let id = BenchmarkId::new(form.name(), format!("{inputs} token{}", if inputs == 1 { "" } else { "s" }));
                beside_reads(&mut group, id, backend.cpu(), &regions, (bytes, inputs), step);
            }
        }
        group.finish();
    }
}

criterion_group!(benches, head);
criterion_main!(benches);
