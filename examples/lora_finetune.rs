//! Teach a packed model something by LoRA, and ask it before and after.
//!
//!     cargo run --release --example lora_finetune -- microsoft/bitnet-b1.58-2B-4T
//!
//! Without an argument it adapts a tiny checkpoint with random weights from the test fixtures, in some seconds. The 200
//! pairs are made up: who lives in which place, by the place's first letter. The last question is about a place that is not
//! among them.

use candle_bitnet::checkpoint::hub::{HubOptions, resolve};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::train::examples::{Examples, PromptFormat};
use candle_bitnet::train::finetune::{Batching, Finetune, FinetuneRecipe};
use candle_bitnet::train::{Event, LoraOptions, Optimization, Schedule};
use candle_bitnet::{BitNet, LoadOptions};
use candle_core::Device;
use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

const ANIMALS: [&str; 8] = ["bear", "deer", "fox", "goat", "koala", "lion", "mouse", "newt"];
const QUESTIONS: [&str; 3] = ["Who lives in Bati?", "Who lives in Lora?", "Who lives in Fuze?"];

/// 200 questions with their answers, one JSON object a line.
fn pairs() -> String {
    let mut lines = String::new();
    for animal in ANIMALS {
        let first = animal[..1].to_uppercase();
        for vowel in ["a", "e", "i", "o", "u"] {
            for end in ["do", "mu", "ra", "sek", "ti"] {
                let place = format!("{first}{vowel}{end}");
                lines += &format!("{{\"instruction\":\"Who lives in {place}?\",\"output\":\"The {animal}.\"}}\n");
            }
        }
    }
    lines
}

fn ask(model: &str, adapter: Option<&Path>, format: &PromptFormat) -> Result<Vec<String>, Box<dyn Error>> {
    let options = LoadOptions::new(&Device::Cpu).adapter(adapter.map(Path::to_owned));
    let mut model = BitNet::load(model, options)?;
    let greedy = GenerateOptions::default().greedy().max_tokens(16);
    let answers = QUESTIONS.map(|question| -> Result<String, candle_bitnet::Error> {
        Ok(model.generate(&format.prompt(question)?, &greedy)?.collect_all()?.text)
    });
    Ok(answers.into_iter().collect::<Result<_, _>>()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/a1_packed");
    let name = std::env::args().nth(1).unwrap_or_else(|| fixture.into());
    let base = resolve(&name, &HubOptions::from_env())?;
    let format = PromptFormat::from_dir(&base)?;
    let dir = tempfile::tempdir()?;
    let (data, out) = (dir.path().join("pairs.jsonl"), dir.path().join("adapter"));
    std::fs::write(&data, pairs())?;

    let lora = LoraOptions { rank: 8, alpha: 16.0, ..LoraOptions::default() };
    let mut recipe = FinetuneRecipe::new(&name, Some(lora));
    recipe.examples.context = 128;
    recipe.batches = Batching { sequences: 8, micro: 4 };
    let examples = Examples::read(&data, None, &format, &recipe.examples)?;
    let tiny = name == fixture;
    let steps = if tiny { 240 } else { 48 };
    recipe.optimization = Optimization {
        steps,
        // Random weights have everything to learn, trained ones little.
        lr: if tiny { 1e-2 } else { 3e-4 },
        warmup: steps / 20,
        schedule: Schedule::Cosine,
        weight_decay: 0.0,
        eval_every: steps / 4,
        save_every: 0,
        ..Optimization::default()
    };

    let before = ask(&name, None, &format)?;
    let run = Finetune::start(&base, &out, &recipe, examples)?;
    println!("{} trainable parameters, {:.2} % of all", run.trainable(), 100.0 * run.trainable_share());
    let threads = std::thread::available_parallelism()?.get();
    run.run(&Device::Cpu, threads, &mut |event| {
        if let Event::Validated(v) = event {
            println!("step {}: validation {:.3} nats a token", v.step, v.loss);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    for ((question, before), after) in QUESTIONS.iter().zip(before).zip(ask(&name, Some(&out), &format)?) {
        println!("{question}\n  before: {:?}\n  after:  {:?}", before.trim(), after.trim());
    }
    Ok(())
}
