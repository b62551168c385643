#!/usr/bin/env bash
# Builds the CUDA kernels' tests and bench with nvcc and runs them on the GPU of this machine.
#   scripts/gpu_kernels.sh [tests] [sanitizer] [bench]     (default: all three)
# CUDA_ARCH: compute capability without the dot, default that of GPU 0. OUT: where logs go, default target/gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
what="${*:-tests sanitizer bench}"
build=target/gpu
suites="linear attention head main"
out="${OUT:-$build}"
mkdir -p "$build" "$out"
arch="${CUDA_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)}"
gencode="arch=compute_${arch},code=sm_${arch}"
[ "$arch" = 90 ] && gencode="arch=compute_90a,code=sm_90a"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
nvcc --version | tail -2

compile() { nvcc -std=c++20 -O3 -lineinfo -diag-suppress 177 -gencode "$gencode" -x cu -c "$1" -o "$build/$2.o" "${@:3}"; }
started=$(date +%s)
pids=()
case "$what" in *tests* | *sanitizer*)
    for s in $suites; do compile "tests/emulator/$s.cpp" "$s" & pids+=($!); done
    compile tests/emulator/model.cpp model & pids+=($!)
    compile tests/emulator/main.cpp model_main -DBITNET_WHOLE_MODEL & pids+=($!) ;;
esac
case "$what" in *bench*) compile tests/gpu/bench.cu bench & pids+=($!) ;; esac
for p in "${pids[@]}"; do wait "$p"; done
echo "compiled in $(($(date +%s) - started)) s"

status=0
case "$what" in *tests* | *sanitizer*)
    objects=()
    for s in $suites; do objects+=("$build/$s.o"); done
    nvcc -gencode "$gencode" "${objects[@]}" -o "$build/kernel_tests"
    nvcc -gencode "$gencode" "$build/model.o" "$build/model_main.o" -o "$build/model_tests" ;;
esac
case "$what" in *tests*)
    "$build/kernel_tests" 2>&1 | tee "$out/tests.log" || status=1
    "$build/model_tests" 2>&1 | tee -a "$out/tests.log" || status=1 ;;
esac
case "$what" in *sanitizer*)
    for tool in memcheck racecheck; do
        echo "compute-sanitizer $tool"
        timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/kernel_tests" 40 2>&1 | tee "$out/$tool.log" | tail -15 || status=1
        timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 "$build/model_tests" 40 2>&1 | tee -a "$out/$tool.log" | tail -5 || status=1
    done ;;
esac
case "$what" in *bench*)
    nvcc -gencode "$gencode" "$build/bench.o" -lcublasLt -o "$build/kernel_bench"
    "$build/kernel_bench" 2>&1 | tee "$out/bench.log" || status=1 ;;
esac
exit $status
