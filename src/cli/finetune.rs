//! `bitnet finetune`: an adapter on a packed model, or all of a model's masters, from examples.

pub use super::finetune_args::Args;
use super::print;
use super::train_progress::{TrainingDisplay, device_and_threads, outcome_name, remarks};
use anyhow::Result;
use candle_bitnet::backend::host::prepare_for_training;
use candle_bitnet::checkpoint::hub::HubOptions;
use candle_bitnet::checkpoint::{BUILTIN, Checkpoint, ModelFiles};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::model::config::ModelConfig;
use candle_bitnet::train::examples::{Examples, PromptFormat};
use candle_bitnet::train::finetune::{Finetune, FinetuneRecipe};
use candle_bitnet::train::scratch::Summary;
use candle_bitnet::train::{Data, Outcome};
use candle_bitnet::{BitNet, DeviceChoice, Error, LoadOptions};
use candle_core::Device;
use serde_json::json;
use std::path::Path;

/// Tokens of the answers before and after.
const TEST_TOKENS: usize = 32;

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    // Before any thread: training keeps every core busy with micro-batches.
    prepare_for_training();
    let (device, threads) = args.device_and_threads()?;
    let (run, format) = prepare(&args)?;
    let prompt = match &args.test_prompt {
        Some(text) => format.prompt(text)?,
        None => run.first_prompt().to_vec(),
    };
    let base = args.base(run.recipe())?;
    let test = Test { prompt: &prompt, device: &device, threads };
    let before = test.answer(&base, None)?;

    let display = TrainingDisplay::start(run.recipe().optimization.steps)?;
    display.note(&describe(&run, threads));
    let mut observer = display.observer();
    let summary = run.run(&device, threads, &mut |event| observer(event))?;
    display.finish();

    let output = run.output();
    let after = match (summary.outcome, run.recipe().lora.is_some()) {
        (Outcome::Interrupted, _) => None,
        (_, true) => Some(test.answer(&base, Some(&output))?),
        (_, false) => Some(test.answer(&ModelFiles::Directory(output.clone()), None)?),
    };
    let question = format.tokenizer().decode(&prompt, true)?;
    report(&args, &run, &summary, &Answers { chat: format.has_template(), question, before, after })
}

impl Args {
    /// The device and its threads: for adapters the CPU, unless another device is named, which is refused.
    fn device_and_threads(&self) -> Result<(Device, usize)> {
        let adapter = match self.resume {
            true => FinetuneRecipe::read(&self.out)?.lora.is_some(),
            false => !self.recipe.full,
        };
        let choice = match self.device {
            DeviceChoice::Auto if adapter => DeviceChoice::Cpu,
            choice => choice,
        };
        let (device, threads) = device_and_threads(choice, self.threads)?;
        if adapter && !device.is_cpu() {
            return Err(Error::request("--device", "adapters are trained on the CPU for now; use --device cpu").into());
        }
        Ok((device, threads))
    }

    /// The base's files.
    fn base(&self, recipe: &FinetuneRecipe) -> Result<ModelFiles> {
        let revision = recipe.revision.clone();
        Ok(ModelFiles::find(&recipe.model, &HubOptions { revision, ..self.hub.options() })?)
    }
}

/// Reads the examples and the base, of a new run or of one that goes on.
fn prepare(args: &Args) -> Result<(Finetune, PromptFormat)> {
    if args.resume {
        let recipe = FinetuneRecipe::read(&args.out)?;
        let base = args.base(&recipe)?;
        let format = PromptFormat::open(&base)?;
        let examples = Examples::read(&args.data, recipe.validation_file.as_deref(), &format, &recipe.examples)?;
        return Ok((Finetune::resume(&base, &args.out, recipe, examples)?, format));
    }
    let model = args.model.clone().unwrap_or_else(|| BUILTIN.into());
    let named = FinetuneRecipe { revision: args.hub.revision.clone(), ..FinetuneRecipe::new(&model, None) };
    let base = args.base(&named)?;
    let checkpoint = Checkpoint::open(&base)?;
    let (path, text) = checkpoint.config();
    let positions = ModelConfig::parse(path, text)?.max_positions;
    let format = PromptFormat::open(&base)?;
    let options = args.recipe.examples(positions);
    let examples = Examples::read(&args.data, args.recipe.validation_file.as_deref(), &format, &options)?;
    let recipe = args.recipe.recipe(&model, options, examples.train.len())?;
    let recipe = FinetuneRecipe { revision: named.revision, ..recipe };
    Ok((Finetune::start(&base, &args.out, &recipe, examples)?, format))
}

/// What the model answers to the test prompt.
struct Test<'a> {
    prompt: &'a [u32],
    device: &'a Device,
    threads: usize,
}

impl Test<'_> {
    /// Greedily, with the adapter beside the weights if there is one. The model is gone afterwards.
    fn answer(&self, model: &ModelFiles, adapter: Option<&Path>) -> Result<String> {
        let options = LoadOptions::new(self.device).threads(Some(self.threads)).adapter(adapter.map(Path::to_owned));
        let context = self.prompt.len() + TEST_TOKENS;
        let mut model = match model {
            ModelFiles::Directory(path) | ModelFiles::Gguf { path, .. } => {
                BitNet::load(path.to_string_lossy(), options.i2s_layout(model.i2s_layout()))?
            }
            ModelFiles::Builtin => BitNet::load(BUILTIN, options)?,
        };
        let room = model.decoder().context();
        // A prompt that fills the context leaves room for fewer tokens, or is cut.
        let prompt = self.prompt.get(..self.prompt.len().min(room.saturating_sub(1))).unwrap_or_default();
        let tokens = if context <= room { TEST_TOKENS } else { room - prompt.len() };
        let options = GenerateOptions::default().greedy().max_tokens(tokens);
        Ok(model.generate(prompt, &options)?.collect_all()?.text)
    }
}

struct Answers {
    /// Whether the model has a chat template.
    chat: bool,
    question: String,
    before: String,
    after: Option<String>,
}

/// What is about to be trained, and on what.
fn describe(run: &Finetune, threads: usize) -> String {
    let (r, c) = (run.recipe(), run.counts());
    let o = r.optimization;
    let method = match &r.lora {
        Some(l) => format!("an adapter of rank {} and alpha {} on {}", l.rank, l.alpha, l.target_modules.join(", ")),
        None => "all weights".into(),
    };
    let mut text = format!(
        "{method}: {} trainable parameters, {:.3} % of {}\n{} examples of {} lines",
        run.trainable(),
        100.0 * run.trainable_share(),
        run.config().parameters() + if r.lora.is_some() { run.trainable() as u64 } else { 0 },
        c.used,
        c.lines,
    );
    for (count, what) in [
        (c.too_long, format!("longer than {} tokens and left out (--truncate cuts them)", r.examples.context)),
        (c.empty, "without anything to learn and left out".into()),
        (c.truncated, format!("cut to {} tokens", r.examples.context)),
    ] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    let train = run.batches().examples().len();
    let plural = if threads == 1 { "" } else { "s" };
    text += &format!(
        "; {train} to train on, {} to validate with; {} steps of {}, {:.1} epochs, {threads} thread{plural}",
        c.used - train,
        o.steps,
        r.batches.sequences,
        run.batches().epochs(o.steps),
    );
    text
}

fn report(args: &Args, run: &Finetune, s: &Summary, answers: &Answers) -> Result<()> {
    let outcome = outcome_name(s.outcome);
    let speed = s.tokens as f64 / s.seconds.max(1e-9);
    let (output, c) = (run.output(), run.counts());
    if args.json {
        return print(
            &json!({
                "outcome": outcome,
                "steps": s.steps,
                "tokens": s.tokens,
                "seconds": s.seconds,
                "tokens_per_second": speed,
                "skipped_steps": s.skipped,
                "examples": c,
                "training_examples": run.batches().examples().len(),
                "trainable_parameters": run.trainable(),
                "trainable_share": run.trainable_share(),
                "validation": s.best,
                "test": { "prompt": answers.question, "before": answers.before, "after": answers.after },
                "output": output,
            })
            .to_string(),
        );
    }
    let mut text = format!(
        "{outcome} after {} steps, {} learnt tokens in {:.0} s: {speed:.0} tokens/s\n",
        s.steps, s.tokens, s.seconds
    );
    text += &remarks(s);
    let out = args.out.display();
    let Some(after) = &answers.after else {
        let data = args.data.display();
        return print(&format!("{text}go on with: bitnet finetune {data} --out {out} --resume"));
    };
    text +=
        &format!("prompt: {}\nbefore: {}\nafter:  {}\n", answers.question.trim(), answers.before.trim(), after.trim());
    let model = match run.recipe().lora {
        Some(_) => format!("-m {} --adapter {out}", run.recipe().model),
        None => format!("-m {}", output.display()),
    };
    text += &match answers.chat {
        true => format!("try it with: bitnet chat {model}"),
        // The line break is part of how a pair is written without a template.
        false => format!("try it with: bitnet generate {model} -p $'...\\n'"),
    };
    print(&text)
}
