#!/usr/bin/env bash
# Everything there is to do on a machine with an NVIDIA GPU, prepared on one without.
#   scripts/gpu.sh pack PACK.tar.xz          where there is a CUDA toolkit and Rust (scripts/cuda_toolkit.sh installs the former):
#                                            builds the program, its tests, the kernels' suites and bench, and packs them
#   scripts/gpu.sh run [PACK.tar.xz] [PART...]  where there is a GPU: runs the parts, by default all, in this order:
#       suites      every kernel, and small whole models, against naive oracles
#       tests       the Rust tests, for which there has to be a GPU
#       greedy      greedy text of the CPU, of the GPU and of the GPU without graphs: the same
#       sanitizer   compute-sanitizer over suites and program, if it is there
#       bench       kernels alone, then the program: batch 1 and 8, prefill 512 and 2048, by kernel, without graphs
# `run` without a pack takes what this very script was unpacked with. A part that fails does not stop the others; the exit
# status is 0 if all passed. Logs and JSON go to the folder $OUT (default gpu-results): machine.txt, tests.log, sanitizer.log,
# bench.log, bench.json (an object a line), summary.txt.
#   CUDA_COMPUTE_CAP  pack: the chip to build for, as candle's kernels are built for one (default 90)
#   GPU_SECONDS       run: after this time nothing is started or goes on (default 570)
#   GPU_LIBRARIES     run: a folder to be searched first for CUDA's libraries
set -euo pipefail

# The tests find their files by the path of the sources, which the compiler fixes. So both machines use this one.
root=/tmp/candle-bitnet-gpu
suites="linear attention head main"
tests="parity layers train finetune cli"
chip="${CUDA_COMPUTE_CAP:-90}"

say() { echo "gpu.sh: $*" >&2; }
usage() { sed -n '2,19s/^# \?//p' "$0" >&2; exit 2; }

# Makes way for a new $root: only what an earlier call left is removed.
clear_root() {
    if [ -L "$root" ] || [ -e "$root/PACKED" ]; then rm -rf "$root"; fi
    [ ! -e "$root" ] || { say "$root is in the way, and not of this script: remove it"; exit 2; }
}

# ---- pack

compile() { # compile SOURCE OBJECT FLAGS...
    "$nvcc" -std=c++20 -O3 -lineinfo -diag-suppress 177 -gencode "$gencode" -x cu -c "$1" -o "$build/$2.o" "${@:3}"
}

pack() {
    local out objects=() s pids=() p messages started=$SECONDS
    out="$(realpath "$1")"
    cd "$(dirname "$0")/.."
    nvcc="${NVCC:-${CUDA_HOME:+$CUDA_HOME/bin/}nvcc}"
    "$nvcc" --version >/dev/null || { say "no nvcc: set CUDA_HOME, or install one with scripts/cuda_toolkit.sh"; exit 2; }
    export CUDA_COMPUTE_CAP="$chip"
    gencode="arch=compute_$chip,code=sm_$chip"
    [ "$chip" != 90 ] || gencode="arch=compute_90a,code=sm_90a"
    local target="${CARGO_TARGET_DIR:-$PWD/target}"
    build="$target/gpu" stage="$target/gpu/stage"
    rm -rf "$stage"
    mkdir -p "$stage"/{bin,lib,scripts,tests,models}

    say "the program and its tests"
    clear_root
    ln -s "$PWD" "$root"
    messages="$build/messages.json"
    # shellcheck disable=SC2086,SC2046
    CARGO_TARGET_DIR="$target" cargo test --manifest-path "$root/Cargo.toml" --release --features cuda --no-run --lib --bin bitnet \
        $(printf -- '--test %s ' $tests) --message-format=json-render-diagnostics >"$messages"
    rm "$root"
    # Of each executable: its path, NAME or NAME-HASH. The program's own unit tests are called bitnet-HASH.
    grep -o '"executable":"[^"]*"' "$messages" | cut -d'"' -f4 | sort -u | while read -r file; do
        name="$(basename "$file")"
        case "$name" in
            bitnet) strip -o "$stage/bin/bitnet" "$file" ;;
            *) strip -o "$stage/bin/test_${name%-*}" "$file" ;;
        esac
    done
    for name in bitnet test_bitnet test_candle_bitnet $(printf 'test_%s ' $tests); do
        [ -x "$stage/bin/$name" ] || { say "cargo built no $name"; exit 1; }
    done
    say "built after $((SECONDS - started)) s; the kernels' suites and bench"

    for s in $suites; do compile "tests/emulator/$s.cpp" "$s" & pids+=($!); objects+=("$build/$s.o"); done
    for p in "${pids[@]}"; do wait "$p"; done
    pids=()
    compile tests/emulator/model.cpp model & pids+=($!)
    compile tests/emulator/main.cpp model_main -DBITNET_WHOLE_MODEL & pids+=($!)
    compile tests/gpu/bench.cu bench & pids+=($!)
    for p in "${pids[@]}"; do wait "$p"; done
    "$nvcc" -gencode "$gencode" "${objects[@]}" -o "$stage/bin/kernel_tests"
    "$nvcc" -gencode "$gencode" "$build/model.o" "$build/model_main.o" -o "$stage/bin/model_tests"
    "$nvcc" -gencode "$gencode" "$build/bench.o" -lcublasLt -o "$stage/bin/kernel_bench"

    cp -r tests/fixtures tests/texts "$stage/tests"
    cp -r models/shakespeare "$stage/models"
    cp scripts/gpu.sh "$stage/scripts"
    # The other libraries are hundreds of megabytes, and come with every toolkit and with PyTorch.
    cp -L "${CUDA_HOME:-$(dirname "$(command -v "$nvcc")")/..}"/lib64/libcudart.so.1[0-9] "$stage/lib"
    {
        echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ', with changes')"
        echo "packed $(date -u +%FT%TZ) for compute capability $chip"
        "$nvcc" --version | grep release
        rustc --version
    } >"$stage/PACKED"
    say "compressing $(du -sm "$stage" | cut -f1) MB after $((SECONDS - started)) s"
    # The programs hold the same kernels: a dictionary larger than a program finds them.
    tar -C "$stage" -c . | xz -T1 --lzma2=preset=4,dict=256MiB >"$out.new"
    mv "$out.new" "$out"
    say "$out: $(du -m "$out" | cut -f1) MB, after $((SECONDS - started)) s"
}

# ---- run

unpack() {
    local sum
    sum="$(sha256sum <"$1")"
    [ "$(cat "$root/UNPACKED" 2>/dev/null)" != "$sum" ] || return 0
    clear_root
    mkdir -p "$root"
    if command -v xz >/dev/null; then
        tar -C "$root" -xJf "$1"
    else
        python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$1" "$root"
    fi
    echo "$sum" >"$root/UNPACKED"
}

# Puts the folders of CUDA's libraries that the system's linker does not know into LD_LIBRARY_PATH.
find_libraries() {
    local name dir candidates=() site
    for dir in "${GPU_LIBRARIES:-}" "$root/lib" "${CUDA_HOME:-}"/lib64 /usr/local/cuda*/lib64 /usr/local/nvidia/lib64; do
        [ ! -d "$dir" ] || candidates+=("$dir")
    done
    # PyTorch's wheels bring the same libraries.
    for site in $(python3 -c 'import nvidia; print(*nvidia.__path__)' 2>/dev/null); do
        while read -r dir; do candidates+=("$dir"); done < <(find -L "$site" -maxdepth 4 -name 'lib*.so.*' -printf '%h\n' | sort -u)
    done
    export LD_LIBRARY_PATH="${GPU_LIBRARIES:-}${GPU_LIBRARIES:+${LD_LIBRARY_PATH:+:}}${LD_LIBRARY_PATH:-}"
    local driver="libcuda.so.1" # loaded by name when needed, so ldd does not list it
    [[ "$(ldconfig -p 2>/dev/null)" != *"$driver"* ]] || driver=""
    for _ in 1 2 3; do # a library found may need others
        for name in $driver $(ldd bin/bitnet bin/kernel_bench | awk '/not found/ { print $1 }' | sort -u); do
            for dir in "${candidates[@]}"; do
                if [ -e "$dir/$name" ]; then
                    case ":$LD_LIBRARY_PATH:" in *":$dir:"*) ;; *) LD_LIBRARY_PATH+="${LD_LIBRARY_PATH:+:}$dir" ;; esac
                    break
                fi
            done
        done
    done
    ldd bin/bitnet bin/kernel_bench | grep 'not found' | sort -u || true
}

describe_machine() {
    cat PACKED
    date -u +%FT%TZ
    nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv 2>&1 || echo "no nvidia-smi"
    grep -m1 'model name' /proc/cpuinfo || true
    echo "$(nproc) threads, $(awk '/MemTotal/ { print int($2 / 1048576) }' /proc/meminfo) GiB"
    echo "libraries: ${LD_LIBRARY_PATH:-of the system}"
    ldd bin/bitnet | grep -i 'cu\(da\|blas\|rand\)\|nvrtc' || true
    local found
    found="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)"
    grep -q "capability $found\$" PACKED || [ -z "$found" ] ||
        echo "WARNING: packed for another chip than this one, $found: pack with CUDA_COMPUTE_CAP=$found"
    timeout 60 bin/bitnet doctor 2>&1 || true
}

failed=0
record() { # record RESULT SECONDS NAME
    printf '%-12s %5s s  %s\n' "$@" >>"$OUT/summary.txt"
    case "$1" in ok | absent) ;; *) failed=1 ;; esac
}

# part LIMIT LOG NAME COMMAND...: its output goes to the log, and, if the log is bench.json, its standard output there as
# the field `report` of an object.
part() {
    local limit=$1 log="$OUT/$2" name=$3 left=$((GPU_SECONDS - SECONDS)) started=$SECONDS status=0 result
    shift 3
    [ "$left" -gt 5 ] || { record "no time" 0 "$name"; return; }
    [ "$limit" -lt "$left" ] || limit=$left
    echo "== $name" >&2
    if [ "${log##*/}" = bench.json ]; then
        printf '\n== %s: %s\n' "$name" "$*" >>"$OUT/bench.log"
        timeout -k 5 "$limit" "$@" 2>>"$OUT/bench.log" >"$OUT/.report" || status=$?
        if [ "$status" = 0 ]; then
            printf '{"name": "%s", "command": "%s", "report": %s}\n' "$name" "$*" "$(tr -d '\n' <"$OUT/.report")" >>"$log"
        fi
        cat "$OUT/.report" >>"$OUT/bench.log"
        rm "$OUT/.report"
    else
        printf '\n== %s: %s\n' "$name" "$*" >>"$log"
        timeout -k 5 "$limit" "$@" >>"$log" 2>&1 || status=$?
    fi
    case $status in 0) result=ok ;; 124 | 137) result="TIME" ;; *) result="FAILED $status" ;; esac
    record "$result" $((SECONDS - started)) "$name"
}

# The same text from the CPU, the GPU with graphs and the GPU without.
same_text() {
    local prompt=$1 want got flag status=0
    want="$(bin/bitnet generate --greedy -n 200 --device cpu -p "$prompt")" || return 1
    for flag in "" --no-graph; do
        # shellcheck disable=SC2086
        got="$(bin/bitnet generate --greedy -n 200 --device cuda $flag -p "$prompt")" || { status=1; continue; }
        if [ "$got" = "$want" ]; then
            echo "cuda $flag: ${#got} characters, the same as the CPU's"
        else
            printf 'cuda %s differs.\ncpu:  %s\ncuda: %s\n' "$flag" "$want" "$got"
            status=1
        fi
    done
    return $status
}

# A test program of Rust's; none chosen is no pass.
rust_tests() {
    local status
    # shellcheck disable=SC2086
    bin/test_$1 ${2:-} 2>&1 | tee "$OUT/.tests"
    status=${PIPESTATUS[0]}
    ! grep -q '^test result: ok. 0 passed' "$OUT/.tests" || { echo "no test was run"; status=1; }
    rm "$OUT/.tests"
    return "$status"
}

run_suites() {
    part 90 tests.log "suites: kernels" bin/kernel_tests
    part 60 tests.log "suites: models" bin/model_tests
}
run_tests() {
    local name filter
    export -f rust_tests
    for name in candle_bitnet bitnet $tests; do
        filter=""
        [ "$name" != cli ] || filter=cuda # the others take the device that `auto` picks, and know the CPU's answers
        # shellcheck disable=SC2016
        part 120 tests.log "tests: $name${filter:+, $filter}" bash -c 'rust_tests "$@"' - "$name" $filter
    done
}
run_greedy() {
    local prompt
    export -f same_text
    for prompt in "ROMEO:" "First Citizen:
Before we proceed any further, hear me speak." "x" "KING RICHARD III: Now is the winter"; do
        # shellcheck disable=SC2016
        part 60 tests.log "greedy: ${prompt%%:*}" bash -c 'same_text "$1"' - "$prompt"
    done
}
run_sanitizer() {
    local sanitizer tool
    sanitizer="$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin" command -v compute-sanitizer || true)"
    [ -n "$sanitizer" ] || { record absent 0 "sanitizer: no compute-sanitizer here"; return; }
    for tool in memcheck racecheck; do # 40: every fortieth case
        part 90 sanitizer.log "sanitizer: $tool, kernels" "$sanitizer" --tool $tool --error-exitcode 9 bin/kernel_tests 40
        part 60 sanitizer.log "sanitizer: $tool, models" "$sanitizer" --tool $tool --error-exitcode 9 bin/model_tests 40
    done
    part 90 sanitizer.log "sanitizer: memcheck, program" "$sanitizer" --tool memcheck --error-exitcode 9 \
        bin/bitnet generate --device cuda --greedy -n 16 -p "ROMEO:"
}
run_bench() {
    local bench="bin/bitnet bench --synthetic 2b4t --device cuda"
    part 120 bench.log "bench: kernels alone" bin/kernel_bench
    # shellcheck disable=SC2086
    {
        part 90 bench.json "bench: batch 1, prefill 512" $bench --pp 512 --tg 128 --json
        part 90 bench.json "bench: batch 8, prefill 512" $bench --batch 8 --pp 512 --tg 128 --json
        part 90 bench.json "bench: batch 1, prefill 2048" $bench --pp 2048 --tg 128 --json
        part 90 bench.json "bench: without graphs" $bench --no-graph --pp 512 --tg 128 --json
        part 90 bench.json "bench: by kernel" $bench --profile --pp 512 --tg 128 --json
        part 90 bench.json "bench: by kernel, batch 8" $bench --profile --batch 8 --pp 512 --tg 128 --json
    }
}

run() {
    local parts=() p
    GPU_SECONDS="${GPU_SECONDS:-570}"
    mkdir -p "${OUT:=gpu-results}"
    OUT="$(realpath "$OUT")"
    export OUT
    case "${1:-}" in
        *.tar.xz) unpack "$1"; shift ;;
        *) [ "$(cd "$(dirname "$0")/.." && pwd -P)" = "$root" ] || { say "run needs a pack, or to be started from $root, unpacked"; exit 2; } ;;
    esac
    parts=("$@")
    [ ${#parts[@]} -gt 0 ] || parts=(suites tests greedy sanitizer bench)
    for p in "${parts[@]}"; do declare -F "run_$p" >/dev/null || { say "no part is called $p"; usage; }; done
    cd "$root"
    set +e # from here on failures are recorded
    export BITNET_REQUIRE_GPU=1 CARGO_BIN_EXE_bitnet="$root/bin/bitnet"
    find_libraries >"$OUT/machine.txt" # not in a pipe: it exports
    rm -f "$OUT"/{tests.log,sanitizer.log,bench.log,bench.json,summary.txt}
    : >"$OUT/summary.txt"
    describe_machine >>"$OUT/machine.txt" 2>&1
    cat "$OUT/machine.txt"
    for p in "${parts[@]}"; do "run_$p"; done
    echo
    for p in tests.log sanitizer.log bench.log; do
        [ ! -e "$OUT/$p" ] || { echo "-- end of $p"; tail -25 "$OUT/$p"; }
    done
    echo "-- summary, after $SECONDS s"
    cat "$OUT/summary.txt"
    return $failed
}

case "${1:-}" in
    pack) [ $# = 2 ] || usage; pack "$2" ;;
    run) shift; run "$@" ;;
    *) usage ;;
esac
