//! Train the built-in model again, with the recipe that lies beside it.
//!
//!     cargo run --release --example train_shakespeare -- TEXT OUT HELDOUT
//!
//! TEXT is the plays to train on, HELDOUT a text that is only scored at the end. What is in OUT is what `bitnet train`
//! writes, and `packed/`, the model as it is embedded. The same recipe, text and OUT go on where an interrupted run stopped.

use candle_bitnet::backend::host::{physical_cores, prepare_for_training};
use candle_bitnet::checkpoint::ScaleStyle;
use candle_bitnet::evaluate::{Windows, score};
use candle_bitnet::model::convert::{Form, convert};
use candle_bitnet::train::scratch::{MASTERS, RECIPE, Scratch};
use candle_bitnet::train::{Event, Recipe};
use candle_bitnet::{BitNet, DeviceChoice, LoadOptions, select_device};
use std::ops::ControlFlow;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    prepare_for_training();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [text, out, heldout] = args.as_slice() else {
        return Err("usage: train_shakespeare TEXT OUT HELDOUT".into());
    };
    let (text, out) = (Path::new(text), Path::new(out));
    let heldout = std::fs::read_to_string(heldout)?;
    let recipe = Recipe::read(concat!(env!("CARGO_MANIFEST_DIR"), "/models/shakespeare/recipe.toml").as_ref())?;
    let run = match out.join(RECIPE).exists() {
        true => Scratch::resume(text, out)?,
        false => Scratch::start(text, out, &recipe)?,
    };
    println!("{} parameters, {} training tokens", run.config().parameters(), run.stream().tokens());

    let device = select_device(DeviceChoice::Auto)?;
    let summary = run.run(&device, physical_cores(), &mut |event| {
        if let Event::Validated(v) = event {
            let bits = v.bits_per_byte.unwrap_or(f64::NAN);
            println!("step {}: validation {:.4} nats a token, {bits:.4} bits per byte", v.step, v.loss);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    println!("{} tokens in {:.0} s", summary.tokens, summary.seconds);

    // The masters of the best validation, quantised as they were trained, and read back as a user would run them.
    let packed = out.join("packed");
    if packed.exists() {
        std::fs::remove_dir_all(&packed)?;
    }
    let form = Form::Packed(ScaleStyle::Multiply);
    convert(&out.join(MASTERS), &packed, form, &mut |_| ControlFlow::Continue(()))?;
    let model = BitNet::load(packed.display().to_string(), LoadOptions::new(&device))?;
    let ids = model.tokenizer().encode(&heldout, false)?;
    let bos: Vec<u32> = model.tokenizer().bos_id().into_iter().collect();
    let windows = Windows::new(model.decoder().context());
    let result = score(model.decoder(), model.report().kv_dtype, &bos, &ids, &windows, &mut |_| ())?;
    println!(
        "held out: {:.4} bits per byte, perplexity {:.2}",
        result.bits_per_byte(heldout.len()),
        result.perplexity()
    );
    Ok(())
}
