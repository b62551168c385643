#!/usr/bin/env bash
# Runs the Metal kernels on this CPU: builds the sources of kernels/metal with a C++20 compiler and the emulator's headers, then
#   1. every kernel against its oracle (1000 cases and more each; 63000 in all), small whole models, and the library that lets the host
#      side launch kernels by name (target/emulator/libbitnet_metal.so),
#   2. the same, thinned, with the race detector,
#   3. each planted bug (BITNET_BUG=n): the suites must fail, or the proof above proves nothing.
#   kernels/emulator/run_metal.sh [c++ compiler]     CXX also works; default g++
# BITNET_QUICK=1: the library and a tenth of step 1. BITNET_LIBRARY=1: the library only. BITNET_REPEAT=n: n times the cases (nightly).
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx="${1:-${CXX:-g++}}"
if ! command -v "$cxx" >/dev/null; then
    echo "kernels/emulator/run_metal.sh: no C++ compiler '$cxx'; install g++ 12 or later, or name one: run_metal.sh CXX" >&2
    exit 2
fi
build="${BITNET_EMULATOR_BUILD:-target/emulator}"
work="$build/metal"
mkdir -p "$work"
suites="linear attention head"
# _FORTIFY_SOURCE refuses the jumps between fiber stacks.
flags="-std=c++20 -DBITNET_EMULATOR -DBITNET_METAL -U_FORTIFY_SOURCE -w"
jobs=$(nproc)

pids=()
start() { # a program in the background, at most $jobs at a time
    "$@" &
    pids+=($!)
    if [ ${#pids[@]} -ge "$jobs" ]; then
        wait "${pids[0]}"
        pids=("${pids[@]:1}")
    fi
}
finish() {
    local p
    for p in "${pids[@]}"; do wait "$p"; done
    pids=()
}
source_of() { case $1 in main) echo tests/emulator/main.cpp ;; *) echo "tests/emulator/metal_$1.cpp" ;; esac; }
# Whether a program is newer than all sources and this compiler's: a quick run before has left it.
fresh() {
    [ -e "$1" ] && [ "$(cat "$1.compiler" 2>/dev/null)" = "$cxx" ] &&
        [ -z "$(find kernels tests/emulator -type f -newer "$1" -print -quit)" ]
}
# compile NAME FLAGS...: objects under $work/NAME.
compile() {
    local name=$1 s
    shift
    mkdir -p "$work/$name"
    for s in model $suites main; do start "$cxx" $flags "$@" -c "$(source_of $s)" -o "$work/$name/$s.o"; done
    start "$cxx" $flags "$@" -DBITNET_WHOLE_MODEL -c tests/emulator/main.cpp -o "$work/$name/model_main.o"
    finish
}
kernels_of() { printf "$work/$1/%s.o " $suites main; }

# Built beside and moved into place: a test may be loading it. A machine of its own, where a process loads CUDA's emulator too.
"$cxx" $flags -O2 -shared -fPIC -fno-gnu-unique -Wl,-Bsymbolic -o "$build/libbitnet_metal.so.$$" kernels/emulator/metal_library.cpp
mv "$build/libbitnet_metal.so.$$" "$build/libbitnet_metal.so"
[ "${BITNET_LIBRARY:-0}" = 1 ] && exit 0
"$cxx" -std=c++20 -O1 -o "$build/metal_library_check" tests/emulator/metal_library_check.cpp -ldl
kernels=$(nm -DC --defined-only "$build/libbitnet_metal.so" | grep -oE ' bitnet_[a-z0-9_]+\(' | tr -d ' (')
"$build/metal_library_check" "$build/libbitnet_metal.so" $kernels

if ! fresh "$work/plain/model"; then
    compile plain -O2
    "$cxx" $(kernels_of plain) -o "$work/plain/kernels"
    "$cxx" "$work/plain/model.o" "$work/plain/model_main.o" -o "$work/plain/model"
    echo "$cxx" >"$work/plain/model.compiler"
fi
thin=1
[ "${BITNET_QUICK:-0}" = 1 ] && thin=10
for s in $suites; do start "$work/plain/kernels" "$thin" "$s"; done
start "$work/plain/model"
finish
[ "${BITNET_QUICK:-0}" = 1 ] && exit 0

echo "race detector"
compile races -O1 -DBITNET_RACES -fsanitize=thread
"$cxx" -std=c++20 -O2 -DBITNET_RACES -c kernels/emulator/races.cpp -o "$work/races/races.o"
"$cxx" $(kernels_of races) "$work/races/races.o" -o "$work/races/kernels"
"$cxx" "$work/races/model.o" "$work/races/model_main.o" "$work/races/races.o" -o "$work/races/model"
for s in $suites; do start "$work/races/kernels" 50 "$s"; done
start "$work/races/model" 10
finish
# The detector sees a missing barrier whether or not a result is wrong.
if [ "$({ BITNET_BUG=2 "$work/races/kernels" 400 linear 2>&1 || true; } | grep -c 'data races')" = 0 ]; then
    echo "race detector: a missing barrier was NOT FOUND" >&2
    exit 1
fi
echo "race detector: a missing barrier was found"

# Bug n lives in the sources included by the suite named here. Each must be found by wrong results (the race detector is not
# needed).
planted="1:linear 2:linear 3:linear 4:linear 5:attention 6:attention 7:linear 8:attention 10:attention 11:linear 12:head 13:linear 14:linear 15:linear 16:head 17:head 18:head 19:head 20:linear 21:head 9:head"
missed=0
for entry in $planted; do
    bug=${entry%%:*} suite=${entry##*:}
    if BITNET_BUG=$bug BITNET_STOP=1 "$work/plain/kernels" 8 "$suite" >/dev/null 2>&1; then
        echo "planted bug $bug ($suite): NOT FOUND"
        missed=1
    else
        echo "planted bug $bug ($suite): found"
    fi
done
exit $missed
