//! The flags of every command that generates text.

use anyhow::Result;
use candle_bitnet::Error;
use candle_bitnet::generate::GenerateOptions;
use clap::Args;
use std::time::Duration;

/// How tokens are drawn and when generation ends. What is not given is as the model recommends.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Generation")]
pub struct SamplingArgs {
    /// Tokens to generate at most [default: until the model ends or the context is full]
    #[arg(short = 'n', long, value_name = "N", allow_negative_numbers = true)]
    pub max_tokens: Option<usize>,

    /// Randomness: 0 takes the most likely token, 1 draws by the model's own probabilities
    #[arg(short, long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,

    /// Always take the most likely token (as --temperature 0)
    #[arg(long, conflicts_with = "temperature")]
    pub greedy: bool,

    /// Draw only from the K most likely tokens; 0 draws from all
    #[arg(long, value_name = "K", allow_negative_numbers = true)]
    pub top_k: Option<usize>,

    /// Draw only from the most likely tokens that together have probability P
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,

    /// Draw only from tokens with at least P times the most likely token's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f32>,

    /// Make tokens of prompt and answer less likely (above 1)
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,

    /// Make tokens of the answer less likely (0 to 2), or more (down to -2)
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,

    /// Make tokens of the answer less likely with every occurrence (0 to 2), or more (down to -2)
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,

    /// Add BIAS to the logit of token ID; -inf forbids it. Can be repeated
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    pub logit_bias: Vec<(u32, f32)>,

    /// Draw the same tokens again
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<u64>,

    /// End where the answer contains TEXT. Can be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,

    /// Go on after end-of-sequence tokens
    #[arg(long)]
    pub ignore_eos: bool,

    /// End an answer after this time, prompt included
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub timeout: Option<f64>,
}

impl SamplingArgs {
    /// The flags as options of a generation.
    pub fn options(&self) -> Result<GenerateOptions> {
        let mut options = GenerateOptions::new().ignore_eos(self.ignore_eos);
        if let Some(n) = self.max_tokens {
            options = options.max_tokens(n);
        }
        if self.greedy {
            options = options.greedy();
        }
        if let Some(temperature) = self.temperature {
            options = options.temperature(temperature);
        }
        if let Some(k) = self.top_k {
            options = options.top_k(k);
        }
        if let Some(p) = self.top_p {
            options = options.top_p(p);
        }
        if let Some(p) = self.min_p {
            options = options.min_p(p);
        }
        if let Some(penalty) = self.repetition_penalty {
            options = options.repetition_penalty(penalty);
        }
        if let Some(penalty) = self.presence_penalty {
            options = options.presence_penalty(penalty);
        }
        if let Some(penalty) = self.frequency_penalty {
            options = options.frequency_penalty(penalty);
        }
        for &(token, bias) in &self.logit_bias {
            options = options.logit_bias(token, bias);
        }
        if let Some(seed) = self.seed {
            options = options.seed(seed);
        }
        for stop in &self.stop {
            options = options.stop(stop);
        }
        if let Some(seconds) = self.timeout {
            let timeout = Duration::try_from_secs_f64(seconds).ok().filter(|t| !t.is_zero());
            options = options.timeout(timeout.ok_or_else(|| {
                Error::request("--timeout", format!("is {seconds}; accepted: seconds, greater than 0"))
            })?);
        }
        // What needs no model is checked before one is loaded.
        options.validate(usize::MAX)?;
        Ok(options)
    }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("expected ID=BIAS, such as 128001=-5")?;
    let id = id.trim().parse().map_err(|_| format!("`{id}` is not a token id"))?;
    let bias = bias.trim().parse().map_err(|_| format!("`{bias}` is not a number"))?;
    Ok((id, bias))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn parse(args: &[&str]) -> Result<GenerateOptions, String> {
        let cli = Cli::try_parse_from(["x"].iter().chain(args)).map_err(|e| e.to_string())?;
        cli.sampling.options().map_err(|e| e.to_string())
    }

    #[test]
    fn flags_become_options() {
        let options = parse(&[
            "-n",
            "5",
            "-t",
            "0.5",
            "--top-k",
            "3",
            "--top-p",
            "0.9",
            "--min-p",
            "0.1",
            "--repetition-penalty",
            "1.2",
            "--presence-penalty",
            "-1",
            "--frequency-penalty",
            "0.5",
            "--logit-bias",
            "7=-inf",
            "--logit-bias=8=2.5",
            "--seed",
            "9",
            "--stop",
            "a",
            "--stop",
            "b",
            "--timeout",
            "1.5",
        ])
        .unwrap();
        let params = options.resolve(&Default::default(), 100).unwrap();
        let s = &params.sampling;
        assert_eq!((params.max_tokens, s.temperature, s.top_k, s.top_p, s.min_p), (Some(5), 0.5, 3, 0.9, 0.1));
        assert_eq!((s.repetition_penalty, s.presence_penalty, s.frequency_penalty), (1.2, -1.0, 0.5));
        assert_eq!((&s.logit_bias, s.seed), (&vec![(7, f32::NEG_INFINITY), (8, 2.5)], 9));
        assert_eq!((params.stop, params.timeout), (vec!["a".into(), "b".into()], Some(Duration::from_millis(1500))));
    }

    #[test]
    fn bad_flags_are_named() {
        for (args, part) in [
            (&["--temperature", "-1"][..], "temperature"),
            (&["--temperature", "nan"], "temperature"),
            (&["--top-p", "0"], "top_p"),
            (&["-n", "0"], "max_tokens"),
            (&["--timeout", "0"], "--timeout"),
            (&["--timeout", "inf"], "--timeout"),
            (&["--timeout", "-3"], "--timeout"),
            (&["--logit-bias", "x=1"], "`x` is not a token id"),
            (&["--logit-bias", "1"], "ID=BIAS"),
            (&["--greedy", "--temperature", "1"], "cannot be used with"),
        ] {
            let error = parse(args).unwrap_err();
            assert!(error.contains(part), "{args:?}: {error}");
        }
    }
}
