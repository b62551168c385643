//! `bitnet train`: a b1.58 model from scratch, from a text file.

use super::print;
pub use super::train_args::Args;
use super::train_progress::{TrainingDisplay, device_and_threads, outcome_name, remarks};
use anyhow::Result;
use candle_bitnet::backend::cpu::autograd::product_gflops;
use candle_bitnet::backend::host;
use candle_bitnet::train::scratch::{HeldOut, MASTERS, Scratch, Summary};
use candle_bitnet::train::{Outcome, Precision, Recipe};
use serde_json::json;

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    // Before any thread: training keeps every core busy with micro-batches.
    host::prepare_for_training();
    let (device, threads) = device_and_threads(args.device, args.threads)?;
    let run = match args.resume {
        true => Scratch::resume(&args.text, &args.out)?,
        false => {
            let mut recipe = match &args.config {
                Some(path) => Recipe::read(path)?,
                None => {
                    let mut recipe = Recipe::default();
                    recipe.optimization.precision = Precision::fastest();
                    recipe
                }
            };
            args.recipe.apply(&mut recipe);
            Scratch::start(&args.text, &args.out, &recipe)?
        }
    };
    let o = run.recipe().optimization;
    let display = TrainingDisplay::start(o.steps)?;
    display.note(&describe(&run, threads)?);
    let plain = device.is_cpu().then(|| plain_product(&run, threads)).transpose()?;
    let mut observer = display.observer();
    let summary = run.run(&device, threads, &mut |event| observer(event))?;
    display.finish();
    let held_out = match (&args.held_out, summary.outcome) {
        (Some(path), Outcome::Finished | Outcome::Stopped) => Some(run.evaluate(path, &device, threads)?),
        _ => None,
    };
    report(&args, &run, &summary, plain, held_out)
}

/// GFLOP/s of products alone on the threads of a CPU, in the run's own precision and shapes.
fn plain_product(run: &Scratch, threads: usize) -> candle_bitnet::Result<f64> {
    let (m, r) = (run.recipe().model, run.recipe());
    let bf16 = r.optimization.precision == Precision::BF16;
    product_gflops(r.batches.micro * m.context, 2 * m.intermediate, m.hidden, threads, bf16)
}

/// What is about to be trained.
fn describe(run: &Scratch, threads: usize) -> Result<String> {
    let (r, tokens) = (run.recipe(), run.stream().tokens());
    let per_step = r.batches.sequences * r.model.context;
    let epochs = r.optimization.steps as f64 * per_step as f64 / tokens as f64;
    let plural = if threads == 1 { "" } else { "s" };
    Ok(format!(
        "{} parameters ({}), {tokens} training tokens; {} steps of {per_step} tokens, {epochs:.1} epochs, {threads} thread{plural}",
        run.config().parameters(),
        if r.optimization.quantize { "ternary layers" } else { "dense" },
        r.optimization.steps,
    ))
}

fn report(args: &Args, run: &Scratch, s: &Summary, plain: Option<f64>, held_out: Option<HeldOut>) -> Result<()> {
    let outcome = outcome_name(s.outcome);
    let speed = s.tokens as f64 / s.seconds.max(1e-9);
    // Two operations forward and four backward for each weight that multiplies; attention's own products are left out.
    let c = run.config();
    let embedding = if c.tied_embeddings { 0 } else { (c.vocab_size * c.hidden_size) as u64 };
    let gflops = 6.0 * (c.parameters() - embedding) as f64 * speed / 1e9;
    if args.json {
        return print(
            &json!({
                "outcome": outcome,
                "steps": s.steps,
                "tokens": s.tokens,
                "seconds": s.seconds,
                "tokens_per_second": speed,
                "gflops": gflops,
                "plain_product_gflops": plain,
                "skipped_steps": s.skipped,
                "validation": s.best,
                "held_out_bits_per_byte": held_out.map(|h| h.bits_per_byte()),
                "parameters": c.parameters(),
                "masters": args.out.join(MASTERS),
            })
            .to_string(),
        );
    }
    let mut text = format!(
        "{outcome} after {} steps, {} tokens in {:.0} s: {speed:.0} tokens/s, {gflops:.1} GFLOP/s{}\n",
        s.steps,
        s.tokens,
        s.seconds,
        plain.map_or(String::new(), |p| format!("; a plain product alone reaches {p:.1}")),
    );
    text += &remarks(s);
    if let (Some(h), Some(path)) = (held_out, &args.held_out) {
        text += &format!(
            "{}: {:.4} bits per byte ({} tokens, {} bytes)\n",
            path.display(),
            h.bits_per_byte(),
            h.score.tokens,
            h.bytes
        );
    }
    let out = args.out.display();
    text += &match s.outcome {
        Outcome::Interrupted => format!("go on with: bitnet train {} --out {out} --resume", args.text.display()),
        _ if run.recipe().optimization.quantize => {
            format!("try it with: bitnet generate -m {out}/{MASTERS} -p \"...\"")
        }
        _ => "a dense model, to compare with; the commands that run b1.58 models refuse it".into(),
    };
    print(&text)
}
