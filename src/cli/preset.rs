//! `--preset`: settings for a kind of machine and use, which flags override. Not to be confused with the shapes of
//! `--synthetic` and of `bitnet synth`.

use candle_bitnet::backend::{DenseType, host};
use candle_bitnet::nn::{HeadChoice, HeadKind};
use candle_bitnet::{DEFAULT_CONTEXT, Error};
use serde::Serialize;
use std::str::FromStr;

/// What a preset sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    pub name: &'static str,
    /// What it is for.
    pub about: &'static str,
    /// Of the cores that this process may use, one in so many; and at most so many.
    cores: (usize, usize),
    /// Positions of a sequence, at most; the model may have fewer.
    pub context: usize,
    pub kv_type: DenseType,
    /// Sequences that `bench` decodes together.
    pub batch: usize,
    /// How the output head is computed: steps of many sequences read all of it, and a screen would only take memory.
    pub head: HeadChoice,
}

/// All presets, from the smallest machine to the largest.
pub const PRESETS: [Preset; 4] = [
    Preset {
        name: "mobile",
        about: "a phone or a small board with other work to do",
        cores: (2, 4),
        context: 1024,
        kv_type: DenseType::F16,
        batch: 1,
        head: HeadChoice::Auto,
    },
    Preset {
        name: "edge",
        about: "one user on a laptop, a desktop or a board of its own",
        cores: (1, usize::MAX),
        context: 2048,
        kv_type: DenseType::F16,
        batch: 1,
        head: HeadChoice::Auto,
    },
    Preset {
        name: "server",
        about: "a few users of one machine, at full precision",
        cores: (1, usize::MAX),
        context: DEFAULT_CONTEXT,
        kv_type: DenseType::F32,
        batch: 8,
        head: HeadChoice::Kind(HeadKind::Full),
    },
    Preset {
        name: "cloud",
        about: "as many tokens of many users as a large machine gives",
        cores: (1, usize::MAX),
        context: usize::MAX,
        kv_type: DenseType::F16,
        batch: 32,
        head: HeadChoice::Kind(HeadKind::Full),
    },
];

impl Preset {
    /// Threads where so many cores may be used.
    pub fn threads(&self, cores: usize) -> usize {
        let (part, most) = self.cores;
        (cores / part).clamp(1, most)
    }

    /// Threads on this machine.
    pub fn threads_here(&self) -> usize {
        self.threads(host::physical_cores())
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        PRESETS.into_iter().find(|p| p.name == s).ok_or_else(|| {
            let shape = candle_bitnet::model::presets::Preset::find(s).is_ok();
            let hint = if shape { "; for that shape with random weights, bench has --synthetic" } else { "" };
            let names = PRESETS.map(|p| p.name).join(", ");
            Error::request("--preset", format!("'{s}' is not one of {names}{hint}"))
        })
    }
}

/// A preset on this machine.
#[derive(Debug, Serialize)]
pub struct Explained {
    name: &'static str,
    about: &'static str,
    threads: usize,
    /// None for all positions of the model.
    context: Option<usize>,
    kv_type: &'static str,
    batch: usize,
    head: String,
    fits: bool,
}

/// All presets, and why one of them fits a machine with so many cores to use, so much memory and a GPU or not.
pub fn explain(cores: usize, memory: Option<u64>, gpu: bool) -> (Vec<Explained>, String) {
    let gb = memory.map_or(0.0, |bytes| bytes as f64 / 1e9);
    let fitting = match (cores, gb) {
        _ if gpu => "cloud",
        (32.., 64.0..) => "cloud",
        (8.., 16.0..) => "server",
        (2.., 3.5..) => "edge",
        _ => "mobile",
    };
    let memory = if memory.is_some() { format!("{gb:.1} GB of memory") } else { "unknown memory".into() };
    let gpu = if gpu { ", and a GPU" } else { "" };
    let why = format!("{fitting} fits: {cores} core{} to use, {memory}{gpu}", if cores == 1 { "" } else { "s" });
    let explained = PRESETS.map(|p| Explained {
        name: p.name,
        about: p.about,
        threads: p.threads(cores),
        context: (p.context != usize::MAX).then_some(p.context),
        kv_type: p.kv_type.name(),
        batch: p.batch,
        head: p.head.to_string(),
        fits: p.name == fitting,
    });
    (explained.into(), why)
}

/// The presets as a table.
pub fn describe(presets: &[Explained], why: &str) -> String {
    let mut text = format!(
        "\npresets ({why}):\n  {:8} {:>7} {:>8} {:>5} {:>6} {:>5}\n",
        "", "threads", "context", "KV", "batch", "head"
    );
    for p in presets {
        let context = p.context.map_or("model's".into(), |n| n.to_string());
        let (name, mark) = (p.name, if p.fits { "*" } else { " " });
        let settings = format!("{:>7} {context:>8} {:>5} {:>6} {:>5}", p.threads, p.kv_type, p.batch, p.head);
        text += &format!("{mark} {name:8} {settings}  {}\n", p.about);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_follow_the_cores() {
        let threads = |name: &str| [1, 2, 6, 64].map(|cores| name.parse::<Preset>().unwrap().threads(cores));
        assert_eq!(threads("mobile"), [1, 1, 3, 4]);
        assert_eq!(threads("edge"), [1, 2, 6, 64]);
        assert_eq!(threads("cloud"), [1, 2, 6, 64]);
    }

    #[test]
    fn one_preset_fits_every_machine() {
        for (cores, memory, gpu, fits) in [
            (1, Some(1_000_000_000), false, "mobile"),
            (8, None, false, "mobile"),
            (2, Some(25_000_000_000), false, "edge"),
            (16, Some(64_000_000_000), false, "server"),
            (64, Some(512_000_000_000), false, "cloud"),
            (4, Some(16_000_000_000), true, "cloud"),
        ] {
            let (presets, why) = explain(cores, memory, gpu);
            let fitting: Vec<_> = presets.iter().filter(|p| p.fits).map(|p| p.name).collect();
            assert!(fitting == [fits] && why.starts_with(fits), "{why}");
            let text = describe(&presets, &why);
            assert!(text.contains(&format!("\n* {fits}")) && text.contains("model's"), "{text}");
            assert!(text.contains(" 32  full  as many tokens"), "{text}");
        }
    }

    #[test]
    fn shapes_are_no_presets_of_settings() {
        let error = "2b4t".parse::<Preset>().unwrap_err().to_string();
        assert!(error.contains("mobile, edge, server, cloud") && error.contains("--synthetic"), "{error}");
        assert!(!"desktop".parse::<Preset>().unwrap_err().to_string().contains("--synthetic"));
    }
}
