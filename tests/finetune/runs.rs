//! Whole runs in a directory.

use crate::common::fixture;
use crate::{CPU, flat, lora};
use candle_bitnet::checkpoint::adapter::{Adapter, AdapterMatrices, WEIGHTS_FILE, tensor_names, write_adapter};
use candle_bitnet::generate::GenerateOptions;
use candle_bitnet::model::convert::{Form, convert};
use candle_bitnet::text::Message;
use candle_bitnet::train::examples::{ExampleOptions, Examples, PromptFormat};
use candle_bitnet::train::finetune::{Batching, Finetune, FinetuneRecipe, RECIPE};
use candle_bitnet::train::{Event, LoraOptions, Masters, Optimization, Outcome, Schedule};
use candle_bitnet::{BitNet, Error, LoadOptions};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const COLOURS: [&str; 8] = ["red", "green", "blue", "black", "white", "yellow", "orange", "violet"];

/// Questions whose answers no model with random weights knows.
fn pairs(dir: &Path, count: usize) -> PathBuf {
    let line = |i: usize| {
        let answer = COLOURS[i % 8].to_uppercase();
        format!("{{\"instruction\":\"{} {}?\",\"output\":\"{answer}\"}}", i, COLOURS[i % 8])
    };
    let path = dir.join("pairs.jsonl");
    std::fs::write(&path, (0..count).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn recipe(lora: Option<LoraOptions>, steps: u64) -> FinetuneRecipe {
    let mut recipe = FinetuneRecipe::new("base", lora);
    recipe.examples = ExampleOptions { context: 64, validation: 0.0, ..ExampleOptions::default() };
    recipe.batches = Batching { sequences: 4, micro: 2 };
    let schedule = Schedule::Cosine;
    recipe.optimization = Optimization {
        steps,
        lr: 1e-2,
        warmup: 2,
        schedule,
        weight_decay: 0.0,
        eval_every: 0,
        save_every: 0,
        ..Optimization::default()
    };
    recipe
}

fn examples(base: &Path, data: &Path, recipe: &FinetuneRecipe) -> Examples {
    let format = PromptFormat::from_dir(base).unwrap();
    Examples::read(data, recipe.validation_file.as_deref(), &format, &recipe.examples).unwrap()
}

fn start(base: &Path, data: &Path, out: &Path, recipe: &FinetuneRecipe) -> Result<Finetune, Error> {
    Finetune::start(base, out, recipe, examples(base, data, recipe))
}

/// Runs to the end; the losses of the steps.
fn losses(run: &Finetune, threads: usize) -> Vec<f64> {
    let mut losses = Vec::new();
    let summary = run.run(&CPU, threads, &mut |event| {
        if let Event::Step(m) = event {
            losses.push(m.loss);
        }
        Ok(ControlFlow::Continue(()))
    });
    assert_eq!(summary.unwrap().outcome, Outcome::Finished);
    losses
}

fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn answer(model: &Path, adapter: Option<&Path>, question: &str) -> String {
    let options = LoadOptions::new(&CPU).threads(Some(1)).adapter(adapter.map(Path::to_owned));
    let mut model = BitNet::load(model.to_str().unwrap(), options).unwrap();
    let prompt = model.chat_prompt(&[Message::user(question)]).unwrap();
    model.generate(&prompt, &GenerateOptions::default().greedy().max_tokens(16)).unwrap().collect_all().unwrap().text
}

#[test]
fn lora_teaches_the_answers_and_leaves_every_byte_of_the_base() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_packed"));
    let (data, out, before) = (pairs(dir.path(), 16), dir.path().join("out"), snapshot(&base));
    let run = start(&base, &data, &out, &recipe(Some(lora(8, &["all-linear"])), 60)).unwrap();
    assert_eq!(
        run.trainable(),
        run.recipe().lora.as_ref().map_or(0, |_| 2 * 8 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 344)))
    );
    assert!(run.trainable_share() > 0.0 && run.trainable_share() < 0.3);
    let losses = losses(&run, 2);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..4]), mean(&losses[losses.len() - 4..]));
    assert!(last < 0.2 * first, "{first} to {last}");
    let known =
        |i: usize| answer(&base, Some(&out), &format!("{i} {}?", COLOURS[i % 8])) == COLOURS[i % 8].to_uppercase();
    let right = (0..8).filter(|i| known(*i)).count();
    assert!(right >= 6, "{right} of 8 answers, loss {last}");
    assert_ne!(answer(&base, None, "0 red?"), "RED");
    assert!(snapshot(&base) == before);
    let adapter = Adapter::open(&out).unwrap();
    assert_eq!((adapter.config().rank, adapter.config().alpha), (8, 16.0));
    assert_eq!((adapter.config().base_model.as_deref(), adapter.modules().len()), (Some("base"), 14));
    assert_eq!(run.output(), out);
    assert_eq!(adapter.parameters() as usize, run.trainable());
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    for (base, method) in [("a3_llama", Some(lora(2, &["q_proj", "down_proj"]))), ("a1_bf16", None)] {
        let (dir, base) = (tempfile::tempdir().unwrap(), fixture(base));
        let data = pairs(dir.path(), 12);
        let mut recipe = recipe(method, 6);
        recipe.examples.validation = 0.2;
        recipe.optimization = Optimization { eval_every: 2, save_every: 3, dropout: 0.1, ..recipe.optimization };
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        losses(&start(&base, &data, &one, &recipe).unwrap(), 1);
        // Stopped by the observer once, and killed once: what it wrote after the saved state does not count.
        let stop_at = |run: &Finetune, last: u64, kill: bool| {
            run.run(&CPU, 2, &mut |event| match event {
                Event::Step(m) if m.step == last && kill => Err(Error::Training("killed".into())),
                Event::Step(m) if m.step == last => Ok(ControlFlow::Break(())),
                _ => Ok(ControlFlow::Continue(())),
            })
        };
        let stopped = stop_at(&start(&base, &data, &two, &recipe).unwrap(), 1, false).unwrap();
        assert_eq!((stopped.outcome, stopped.steps), (Outcome::Interrupted, 1));
        let resume = |two: &Path| {
            let recipe = FinetuneRecipe::read(two).unwrap();
            let examples = examples(&base, &data, &recipe);
            Finetune::resume(&base, two, recipe, examples).unwrap()
        };
        assert!(stop_at(&resume(&two), 5, true).is_err());
        losses(&resume(&two), 2);
        let state = |dir: &Path| {
            let tensors = candle_core::safetensors::load(dir.join("state.safetensors"), &CPU).unwrap();
            let values = |(name, t): (String, Tensor)| {
                (name, t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap())
            };
            let mut all: HashMap<String, Vec<f64>> = tensors.into_iter().map(values).collect();
            // It holds the seconds.
            all.remove("progress").unwrap();
            all
        };
        assert!(state(&one) == state(&two));
        let metrics = |dir: &Path| -> Vec<String> {
            let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
            text.lines().map(|l| l.split(",\"tokens_per_second\"").next().unwrap().to_owned()).collect()
        };
        assert_eq!(metrics(&one), metrics(&two));
        let result = |dir: &Path| match dir.join("masters").is_dir() {
            true => std::fs::read(dir.join("masters/model.safetensors")).unwrap(),
            false => std::fs::read(dir.join(WEIGHTS_FILE)).unwrap(),
        };
        assert!(result(&one) == result(&two));
        // Other data is not what the run began with.
        let recipe = FinetuneRecipe::read(&two).unwrap();
        let other = examples(&base, &pairs(dir.path(), 13), &recipe);
        let e = Finetune::resume(&base, &two, recipe, other).unwrap_err().to_string();
        assert!(e.contains("not those that the run began with"), "{e}");
    }
}

#[test]
fn the_best_by_validation_is_kept_and_a_run_that_gets_worse_stops() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_packed"));
    let (data, out) = (pairs(dir.path(), 10), dir.path().join("out"));
    let mut recipe = recipe(Some(lora(4, &["o_proj", "down_proj"])), 80);
    // The same questions with other answers: what is learnt becomes wrong there.
    let wrong = dir.path().join("wrong.jsonl");
    let text = std::fs::read_to_string(&data).unwrap();
    std::fs::write(&wrong, text.replace("RED", "it").replace("GREEN", "so").replace("BLUE", "if")).unwrap();
    recipe.validation_file = Some(wrong);
    recipe.examples.max_samples = 3;
    recipe.optimization = Optimization { eval_every: 2, patience: 3, ..recipe.optimization };
    let run = start(&base, &data, &out, &recipe).unwrap();
    let mut seen: Vec<(u64, f64, bool)> = Vec::new();
    let mut best: HashMap<String, Vec<f32>> = HashMap::new();
    let summary = run
        .run(&CPU, 2, &mut |event| {
            match event {
                Event::Validated(v) => seen.push((v.step, v.loss, v.best)),
                // The optimiser goes on in place: values, not tensors, are kept.
                Event::Best(p) => best = p.list().iter().map(|p| (p.name.clone(), flat(&p.value))).collect(),
                _ => {}
            }
            Ok(ControlFlow::Continue(()))
        })
        .unwrap();
    assert_eq!(summary.outcome, Outcome::Stopped, "{seen:?}");
    let kept = summary.best.unwrap();
    assert_eq!(summary.steps, kept.step + 6);
    assert!(seen.iter().all(|(_, loss, _)| *loss >= kept.loss) && kept.best);
    assert!(seen[seen.len() - 3..].iter().all(|(.., best)| !best));
    let stored = Adapter::open(&out).unwrap();
    let (a, b) = stored.modules()[0].matrices().unwrap();
    let [a_name, b_name] = tensor_names(&stored.modules()[0].name);
    assert!(a == best[&a_name] && b == best[&b_name]);
}

#[test]
fn full_training_moves_the_masters_and_writes_a_checkpoint_with_its_text() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_bf16"));
    let (data, before) = (pairs(dir.path(), 8), snapshot(&base));
    let mut recipe = recipe(None, 30);
    recipe.optimization.lr = 3e-3;
    let run = start(&base, &data, &dir.path().join("out"), &recipe).unwrap();
    assert!((run.trainable_share() - 1.0).abs() < 1e-12 && run.trainable() as u64 == run.config().parameters());
    let losses = losses(&run, 2);
    assert!(losses[losses.len() - 1] < 0.6 * losses[0], "{losses:?}");
    let masters = run.output();
    assert!(snapshot(&base) == before && masters.ends_with("masters"));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert!(std::fs::read(masters.join(name)).unwrap() == std::fs::read(base.join(name)).unwrap(), "{name}");
    }
    assert_ne!(answer(&masters, None, "0 red?"), answer(&base, None, "0 red?"));

    // A Llama-style model too, from masters that a conversion made.
    let llama = dir.path().join("llama");
    convert(&fixture("a3_llama"), &llama, Form::Masters, &mut |_| ControlFlow::Continue(())).unwrap();
    recipe.optimization.steps = 2;
    recipe.masters = Masters::BF16;
    let run = start(&llama, &data, &dir.path().join("second"), &recipe).unwrap();
    assert_eq!(self::losses(&run, 1).len(), 2);
    answer(&run.output(), None, "0 red?");
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let (dir, base) = (tempfile::tempdir().unwrap(), fixture("a1_packed"));
    let (data, out) = (pairs(dir.path(), 8), dir.path().join("out"));
    let refused = |recipe: &FinetuneRecipe, out: &Path| match start(&base, &data, out, recipe).unwrap_err() {
        Error::Request { what, reason } => format!("{what}: {reason}"),
        other => panic!("{other}"),
    };
    let mut full = recipe(None, 4);
    let e = refused(&full, &out);
    assert!(e.starts_with("model: base is packed; full training needs masters: use the bf16 repository"), "{e}");
    assert!(e.contains("microsoft/bitnet-b1.58-2B-4T-bf16") && e.contains("leave --full out"), "{e}");
    full.model = "microsoft/bitnet-b1.58-2B-4T@main".into();
    assert!(refused(&full, &out).contains("use microsoft/bitnet-b1.58-2B-4T-bf16, or leave"));
    assert!(!out.exists());
    let adapter = recipe(Some(lora(2, &["q_proj"])), 4);
    let e = refused(&adapter, &base);
    assert!(e.starts_with("output directory: ") && e.ends_with("holds a model; name another directory"), "{e}");
    let mut long = adapter.clone();
    long.examples.context = 1000;
    assert!(refused(&long, &out).contains("context: 1000 is more than the model's 512 positions"));
    let mut bad = adapter.clone();
    bad.optimization.lr = -1.0;
    assert!(refused(&bad, &out).starts_with("lr: -1"));
    bad = adapter.clone();
    bad.batches.micro = 9;
    assert!(refused(&bad, &out).starts_with("batch: 9 at a time of 4 a step"));
    start(&base, &data, &out, &adapter).unwrap();
    let e = refused(&adapter, &out);
    assert!(e.ends_with("holds a run; resume it, or name another directory"), "{e}");
    let e = FinetuneRecipe::read(dir.path()).unwrap_err().to_string();
    assert!(e.contains("holds no run of finetune"), "{e}");
    let text = std::fs::read_to_string(out.join(RECIPE)).unwrap();
    std::fs::write(out.join(RECIPE), text.replace("steps", "stepz")).unwrap();
    assert!(FinetuneRecipe::read(&out).unwrap_err().to_string().contains("stepz"));
    std::fs::remove_file(out.join(RECIPE)).unwrap();
    write_adapter(&out, &lora(1, &["q_proj"]).config(0.0).unwrap(), one_matrix()).unwrap();
    assert!(refused(&adapter, &out).ends_with("holds an adapter; name another directory"));
}

fn one_matrix() -> Vec<AdapterMatrices> {
    let module = "model.layers.0.self_attn.q_proj".to_owned();
    vec![AdapterMatrices { module, rows: 1, cols: 1, a: vec![1.0], b: vec![1.0] }]
}
