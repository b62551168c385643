//! The program on a kind of GPU: a real one, or the emulator's (`kernels/emulator/with_driver.sh`, `with_metal.sh`), whose memory
//! and faults these tests choose. Without either they say so and pass.

use crate::{NO_GPUS, Ran, program};
use candle_bitnet::backend::Gpu;
use serde_json::Value;

/// What is set for the emulator.
pub type Settings<'a> = &'a [(&'a str, &'a str)];

/// A kind of GPU, and what the program says of it.
pub struct Kind {
    /// How `--device` names it.
    pub device: &'static str,
    /// How errors name it.
    pub name: &'static str,
    /// Its place in `doctor`'s list.
    pub place: usize,
    /// Those of this machine.
    pub found: fn() -> candle_bitnet::Result<Vec<Gpu>>,
    /// Whether `--device auto` takes it where it is there.
    pub is_auto: bool,
    /// Kernels that find the largest logit.
    pub argmax: f64,
    /// What errors about short memory say.
    pub short: &'static str,
    /// What errors about a fault of the device say.
    pub fault: &'static [&'static str],
}

pub fn run_where(settings: Settings<'_>, args: &[&str]) -> Ran {
    Ran::of(program(args).envs(settings.iter().copied()).output().unwrap())
}

pub fn run(args: &[&str]) -> Ran {
    run_where(&[], args)
}

pub fn generate<'a>(device: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "-p", "ROMEO:", "-n", "6", "--json", "--device", device], flags].concat()
}

impl Kind {
    /// The first that kernels run on.
    fn first(&self) -> Option<Gpu> {
        (self.found)().ok()?.into_iter().find(|g| g.problem.is_none())
    }

    /// Whether there is one to run on.
    pub fn is_there(&self) -> bool {
        let there = self.first().is_some();
        assert!(there || std::env::var_os("BITNET_REQUIRE_GPU").is_none(), "no {} device", self.name);
        if !there {
            eprintln!("there is no {} device here, nothing was run", self.name);
        }
        there
    }

    /// Whether it is the emulator's, which can be told to fail.
    pub fn is_emulated(&self) -> bool {
        self.is_there() && self.first().is_some_and(|g| g.name.contains("emulator"))
    }

    /// The first by its number.
    fn zero(&self) -> String {
        format!("{}:0", self.device)
    }

    pub fn answers_are_the_cpus_and_seeds_repeat_them(&self) {
        if !self.is_there() {
            return;
        }
        let tokens = |device: &str, flags: &[&str]| run(&generate(device, flags)).json()["tokens"].clone();
        let greedy = tokens(self.device, &["--greedy"]);
        assert_eq!(greedy, tokens("cpu", &["--greedy"]));
        let anew = tokens(&self.zero(), &["--greedy", "--no-graph"]);
        assert_eq!(greedy, anew, "replayed steps differ from those computed anew");
        let drawn = tokens(self.device, &["--temperature", "1.2", "--seed", "5"]);
        assert_eq!(drawn, tokens("auto", &["--temperature", "1.2", "--seed", "5"]));
        assert_ne!(drawn, tokens(self.device, &["--temperature", "1.2", "--seed", "6"]));
        let penalties =
            ["--greedy", "--repetition-penalty", "1.5", "--presence-penalty", "1", "--frequency-penalty", "0.5"];
        assert_eq!(tokens(self.device, &penalties), tokens("cpu", &penalties));
        // What a GPU does not draw, the host draws from its logits.
        let banned = format!("{}=-inf", greedy[0]);
        let biased = ["--greedy", "--logit-bias", &banned];
        assert_eq!(tokens(self.device, &biased), tokens("cpu", &biased));
        let said = run(&["generate", "-p", "ROMEO:", "-n", "4", "--greedy", "--device", self.device]);
        assert!(said.err.contains("ended by length") && !said.err.contains("warning"), "{said:?}");
    }

    pub fn bench_reports_the_device(&self) {
        if !self.is_there() {
            return;
        }
        let bench = ["bench", "--device", self.device, "--pp", "9", "--tg", "3", "--reps", "1"];
        let json = run(&[&bench[..], &["--json"]].concat()).json();
        for key in
            ["prefill_tps", "decode_tps", "bytes_per_token", "decode_gbps", "copy_gbps", "decode_share", "device_bytes"]
        {
            assert!(json[key].as_f64() > Some(0.0), "{key}: {json}");
        }
        assert!(json["threads"].is_null() && json["read_gbps"].is_null() && json.get("profile").is_none(), "{json}");
        assert!(json["device_total_bytes"].as_u64() > json["device_bytes"].as_u64(), "{json}");
        let named = format!("{} (", self.zero());
        assert!(json["device"].as_str().unwrap().starts_with(&named), "{json}");
        let share = json["decode_gbps"].as_f64().unwrap() / json["copy_gbps"].as_f64().unwrap();
        assert!((json["decode_share"].as_f64().unwrap() - share).abs() < 1e-9, "{json}");

        let both = [&bench[..], &["--batch", "2", "--profile"]].concat();
        let json = run(&[&both[..], &["--json"]].concat()).json();
        let bytes = |key: &str| json[key].as_u64().unwrap();
        let step = bytes("bytes_per_token") + bytes("bytes_per_token_kv");
        assert_eq!((bytes("batch"), bytes("bytes_per_step")), (2, step));
        let profile = json["profile"].as_array().unwrap();
        let calls = |kernel: &str| {
            let of = |o: &&Value| o["name"].as_str().unwrap().starts_with(kernel);
            profile.iter().filter(of).map(|o| o["calls_per_step"].as_f64().unwrap()).sum::<f64>()
        };
        let layers = run(&["inspect", "builtin", "--json"]).json()["layers"].as_f64().unwrap();
        assert_eq!((calls("bitnet_gemv"), calls("bitnet_argmax")), (4.0 * layers, self.argmax), "{json}");
        assert!(profile.iter().all(|o| o["ms_per_step"].as_f64() > Some(0.0)), "{json}");
        assert!(profile[0]["gbps"].as_f64() > Some(0.0), "{json}");
        let text = run(&[&both[..], &["--no-graph"]].concat()).ok();
        for part in [&named, "that a copy in its memory moves here", "a step", "2 × 3 tokens", "bitnet_gemv", "device "]
        {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
        assert!(!text.contains("thread"), "{text}");
    }

    /// What `doctor` says of the GPU where it is there, checked as far as that does not depend on the kind.
    pub fn doctor_describes_and_checks_the_gpu(&self) -> Option<Value> {
        if !self.is_there() {
            return None;
        }
        let zero = self.zero();
        let said = |asked: &str| {
            let json = run(&["doctor", "--json", "--device", asked]).json();
            let kind = &json["devices"][self.place];
            assert_eq!(
                (&kind["name"], &kind["built"], &kind["present"]),
                (&self.device.into(), &true.into(), &true.into())
            );
            let gpu = &kind["gpus"][0];
            assert_eq!((&gpu["device"], &gpu["usable"]), (&Value::from(zero.as_str()), &Value::from(true)));
            assert!(!gpu["name"].as_str().unwrap().is_empty() && gpu["memory_bytes"].as_u64() > Some(0), "{json}");
            assert!(json["gpu_check"]["copy_gbps"].as_f64() > Some(0.0), "{json}");
            assert!(json["gpu_check"]["self_check"].as_str().unwrap().contains("equal the reference"), "{json}");
            assert!(json["gpu_check"].get("self_test").is_none(), "{json}");
            if self.is_auto {
                assert_eq!(json["auto"]["device"], zero.as_str());
                assert!(json["auto"]["why"].as_str().unwrap().contains(gpu["name"].as_str().unwrap()), "{json}");
            }
            gpu.clone()
        };
        if self.is_auto {
            said("auto");
        }
        assert!(run(&["doctor", "--json", "--device", "cpu"]).json().get("gpu_check").is_none());
        Some(said(&zero))
    }

    pub fn without_a_gpu_the_cpu_runs_and_says_why(&self) {
        run_where(&NO_GPUS, &generate(self.device, &[])).fails(1, &[self.name, "--device cpu"]);
        run_where(&NO_GPUS, &["doctor", "--device", self.device]).fails(1, &[self.name, "--device cpu"]);
        let auto = run_where(&NO_GPUS, &generate("auto", &["--greedy"])).json();
        assert_eq!(auto["tokens"], run(&generate("cpu", &["--greedy"])).json()["tokens"]);
        let json = run_where(&NO_GPUS, &["doctor", "--json"]).json();
        let kind = &json["devices"][self.place];
        assert_eq!((&kind["built"], &kind["present"]), (&Value::from(true), &Value::from(false)));
        assert!(!kind["reason"].as_str().unwrap().is_empty() && kind.get("gpus").is_none(), "{json}");
        assert_eq!((&json["auto"]["device"], json.get("gpu_check")), (&Value::from("cpu"), None));
        if self.is_there() {
            let seventh = format!("{}:7", self.device);
            run(&generate(&seventh, &[])).fails(1, &["GPU 7", "--device cpu"]);
            run(&["doctor", "--device", &seventh]).fails(1, &["GPU 7"]);
        }
    }

    pub fn short_memory_and_faults_are_errors(&self) {
        if !self.is_emulated() {
            return;
        }
        for bytes in ["1000000", "3000000"] {
            let little: Settings<'_> = &[("BITNET_EMULATED_MEMORY", bytes)];
            run_where(little, &generate(self.device, &[])).fails(1, &["memory for", self.short, "GPU 0"]);
        }
        let bench = vec!["bench", "--device", self.device, "--pp", "8", "--tg", "3", "--reps", "1"];
        for launch in ["1", "9", "60"] {
            let lost: Settings<'_> = &[("BITNET_EMULATED_FAULT", launch)];
            for command in [generate(self.device, &[]), bench.clone()] {
                run_where(lost, &command).fails(1, self.fault);
            }
        }
        let lost: Settings<'_> = &[("BITNET_EMULATED_FAULT", "1")];
        run_where(lost, &["doctor", "--device", self.device]).fails(1, &self.fault[..1]);
        if self.is_auto {
            // Nobody asked for that GPU, so the rest is told, and what is wrong with it.
            let json = run_where(lost, &["doctor", "--json"]).json();
            assert!(json["gpu_check"]["self_check"].as_str().unwrap().contains("failed: "), "{json}");
        }
    }
}

/// The tests that every kind of GPU has, of the constant `KIND`.
macro_rules! tests_of_a_kind {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            KIND.$name();
        }
    )*};
}
pub(crate) use tests_of_a_kind;
