//! `bitnet logits`: the logits of given token ids, for comparison with other programs.

use super::model_args::ModelArgs;
use anyhow::{Context, Result, bail};
use candle_bitnet::Error;
use candle_bitnet::backend::host::MappedFile;
use candle_bitnet::checkpoint::StoredType;
use candle_bitnet::checkpoint::header;
use candle_bitnet::checkpoint::write::{Entry, write_file};
use candle_bitnet::generate::Sampler;
use candle_bitnet::model::{Decoder, Logits, Sequence, read_logits};
use candle_bitnet::nn::KvCache;
use std::path::{Path, PathBuf};

/// Tokens that are given to the model at once.
const CHUNK: usize = 512;
/// Most tokens that --greedy accepts.
const MAX_GREEDY: usize = 1 << 20;

/// Write the logits of token ids
///
/// For every tensor input_ids_X (integers, [seq]) of the input, writes logits_X [seq, vocab] in f32, and with
/// --greedy N also greedy_X: N token ids, decoded step by step with the KV cache; end-of-sequence tokens do not stop
/// it. Ids are used as they are; no token is put in front.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// safetensors file with tensors input_ids_X
    #[arg(long, value_name = "FILE")]
    input: PathBuf,

    /// safetensors file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,

    /// Also decode N tokens greedily
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    greedy: Option<usize>,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    if args.greedy.is_some_and(|n| n == 0 || n > MAX_GREEDY) {
        return Err(Error::request("--greedy", format!("must be between 1 and {MAX_GREEDY}")).into());
    }
    check_output(&args.output)?;
    let prompts = read_prompts(&args.input)?;
    let loaded = args.model.for_all_logits().load_decoder()?;
    let decoder = &loaded.decoder;
    let cache = decoder.kv_cache(loaded.kv_dtype, 1)?;
    let mut tensors = Vec::new();
    for (name, ids) in &prompts {
        let rows = all_logits(decoder, &cache, ids).with_context(|| format!("input_ids_{name}"))?;
        let shape = [ids.len(), decoder.config().vocab_size];
        let bytes = rows.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push(Entry::from_bytes(format!("logits_{name}"), StoredType::F32, shape, bytes));
        if let Some(n) = args.greedy {
            let tokens = greedy(decoder, &cache, ids, n).with_context(|| format!("input_ids_{name}, --greedy {n}"))?;
            let bytes = tokens.iter().flat_map(|t| i64::from(*t).to_le_bytes()).collect();
            tensors.push(Entry::from_bytes(format!("greedy_{name}"), StoredType::I64, [n], bytes));
        }
    }
    write_file(&args.output, tensors, &mut |_| ())?;
    Ok(())
}

/// Refuses, before the work, what cannot be written after it.
fn check_output(path: &Path) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.is_dir() {
        bail!("--output {}: there is no directory {}; create it first", path.display(), dir.display());
    }
    if path.is_dir() {
        bail!("--output {}: is a directory; name a file", path.display());
    }
    Ok(())
}

/// The `input_ids_X` tensors of a file, by X.
fn read_prompts(path: &PathBuf) -> Result<Vec<(String, Vec<u32>)>> {
    let file = MappedFile::open(path)?;
    let mut prompts = Vec::new();
    for info in header::parse(path, file.bytes())? {
        let Some(name) = info.name.strip_prefix("input_ids_") else { continue };
        let bytes = file.bytes().get(info.range.clone()).unwrap_or_default();
        let bad = |reason: String| Error::tensor(path, &info.name, reason);
        if info.shape.len() != 1 || info.shape[0] == 0 {
            return Err(bad(format!("shape {:?} where [seq] is expected", info.shape)).into());
        }
        let width = match info.dtype {
            StoredType::I64 | StoredType::U64 => 8,
            StoredType::I32 | StoredType::U32 => 4,
            other => return Err(bad(format!("{other} where I64, I32, U64 or U32 is expected")).into()),
        };
        let id = |b: &[u8]| {
            let value = match *b {
                [a, b, c, d] if info.dtype == StoredType::I32 => i64::from(i32::from_le_bytes([a, b, c, d])),
                [a, b, c, d] => i64::from(u32::from_le_bytes([a, b, c, d])),
                _ => b.iter().rev().fold(0i64, |v, b| v << 8 | i64::from(*b)),
            };
            u32::try_from(value).map_err(|_| bad(format!("{value} is no token id")))
        };
        let ids = bytes.chunks_exact(width).map(id).collect::<Result<Vec<u32>, Error>>()?;
        prompts.push((name.to_owned(), ids));
    }
    if prompts.is_empty() {
        bail!("{}: holds no tensor input_ids_X", path.display());
    }
    Ok(prompts)
}

fn all_logits(decoder: &Decoder, cache: &KvCache, ids: &[u32]) -> Result<Vec<f32>> {
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for (i, tokens) in ids.chunks(CHUNK).enumerate() {
        let piece = Sequence { slot: 0, position: i * CHUNK, tokens };
        decoder.forward_with(&[piece], cache, Logits::All, |logits| read_logits(logits, &mut values))?;
        rows.extend_from_slice(&values);
    }
    Ok(rows)
}

fn greedy(decoder: &Decoder, cache: &KvCache, ids: &[u32], count: usize) -> Result<Vec<u32>> {
    let mut sampler = Sampler::greedy(decoder.config().vocab_size);
    let (mut position, mut next, mut tokens) = (0, ids.to_vec(), Vec::new());
    let mut values = Vec::new();
    for _ in 0..count {
        let sequence = Sequence { slot: 0, position, tokens: &next };
        decoder.forward_with(&[sequence], cache, Logits::Last, |logits| read_logits(logits, &mut values))?;
        position += next.len();
        let token = sampler.sample(&values)?.token;
        next = vec![token];
        tokens.push(token);
    }
    Ok(tokens)
}
