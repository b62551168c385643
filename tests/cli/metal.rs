//! The program on an Apple GPU: a real one, or the emulator's (`kernels/emulator/with_metal.sh`).

use crate::gpu::{Kind, Settings, generate, run, run_where, tests_of_a_kind};
use crate::{Ran, program};

const KIND: Kind = Kind {
    device: "metal",
    name: "Metal",
    place: 2,
    found: candle_bitnet::backend::metal_gpus,
    is_auto: cfg!(not(feature = "cuda")),
    argmax: 2.0,
    short: "recommended working set",
    fault: &["BITNET_EMULATED_FAULT", "kernel bitnet_", "Metal device"],
};

tests_of_a_kind! {
    answers_are_the_cpus_and_seeds_repeat_them
    bench_reports_the_device
    without_a_gpu_the_cpu_runs_and_says_why
    short_memory_and_faults_are_errors
}

#[test]
fn doctor_describes_and_checks_the_gpu() {
    let Some(gpu) = KIND.doctor_describes_and_checks_the_gpu() else { return };
    assert!(!gpu["architecture"].as_str().unwrap().is_empty() && gpu.get("compute_capability").is_none(), "{gpu}");
    let text = run(&["doctor", "--device", "metal", "--self-test"]).ok();
    for part in ["metal:0 ", "recommended working set", "GPU check    metal:0 (", "self-test", "gemv ", " equal\n"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains("WRONG"), "{text}");
    run(&["doctor", "--device", "cpu", "--self-test"]).fails(2, &["--self-test", "--device metal"]);
}

#[test]
fn without_metal_its_device_is_refused() {
    if cfg!(target_os = "macos") {
        return;
    }
    let none: Settings<'_> = &[("BITNET_METAL_EMULATOR", "/nonexistent")];
    run_where(none, &generate("metal", &[])).fails(1, &["Metal is not available", "cannot be loaded"]);
    let mut unset = program(&generate("metal", &[]));
    Ran::of(unset.env_remove("BITNET_METAL_EMULATOR").output().unwrap()).fails(1, &["macOS", "--device cpu"]);
}

#[test]
fn a_wrong_kernel_fails_the_self_test() {
    if !KIND.is_emulated() {
        return;
    }
    let wrong: Settings<'_> = &[("BITNET_EMULATED_FAULT", "300")];
    let tested = run_where(wrong, &["doctor", "--device", "metal", "--self-test"]);
    assert!(
        tested.code == Some(1) && tested.out.contains("WRONG: ") && tested.err.contains("error: self-test"),
        "{tested:?}"
    );
}
