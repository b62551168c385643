#!/usr/bin/env bash
# Runs the CUDA kernels on this CPU: builds the sources of kernels/cuda with a C++20 compiler and the emulator's
# headers, then
#   1. every kernel against its oracle over odd shapes, small whole models against a naive one, and the library that
#      lets the host side launch kernels by name,
#   2. the same, thinned, with the race detector,
#   3. each planted bug (BITNET_BUG=n): the suites must fail, or the proof above proves nothing.
#   kernels/emulator/run.sh [c++ compiler]        CXX also works; default g++. BITNET_QUICK=1: step 1 only.
set -euo pipefail
cd "$(dirname "$0")/../.."
cxx="${1:-${CXX:-g++}}"
if ! command -v "$cxx" >/dev/null; then
    echo "kernels/emulator/run.sh: no C++ compiler '$cxx'; install g++ 12 or later, or name one: run.sh CXX" >&2
    exit 2
fi
build="${BITNET_EMULATOR_BUILD:-target/emulator}"
mkdir -p "$build"
suites="linear attention head main"
# _FORTIFY_SOURCE refuses the jumps between fiber stacks.
flags="-std=c++20 -DBITNET_EMULATOR -U_FORTIFY_SOURCE -w"
jobs=$(nproc)

pids=()
start() { # a compiler in the background, at most $jobs at a time
    "$cxx" "$@" &
    pids+=($!)
    if [ ${#pids[@]} -ge "$jobs" ]; then
        wait "${pids[0]}"
        pids=("${pids[@]:1}")
    fi
}
finish() {
    for p in "${pids[@]}"; do wait "$p"; done
    pids=()
}
# Whether a program is newer than all sources and this compiler's: a quick run before has left it.
fresh() {
    [ -e "$1" ] && [ "$(cat "$1.compiler" 2>/dev/null)" = "$cxx" ] &&
        [ -z "$(find kernels tests/emulator -type f -newer "$1" -print -quit)" ]
}
# compile NAME FLAGS...: objects under $build/NAME.
compile() {
    local name=$1
    shift
    mkdir -p "$build/$name"
    start $flags "$@" -c tests/emulator/model.cpp -o "$build/$name/model.o"
    for s in $suites; do start $flags "$@" -c "tests/emulator/$s.cpp" -o "$build/$name/$s.o"; done
    start $flags "$@" -DBITNET_WHOLE_MODEL -c tests/emulator/main.cpp -o "$build/$name/model_main.o"
    finish
}

mkdir -p "$build/mma75"
if ! fresh "$build/mma75/kernels"; then
    start $flags -O2 -DBITNET_MMA_75 -c tests/emulator/linear.cpp -o "$build/mma75/linear.o"
    compile plain -O2
    "$cxx" $(printf "$build/plain/%s.o " $suites) -o "$build/plain/kernels"
    "$cxx" "$build/plain/model.o" "$build/plain/model_main.o" -o "$build/plain/model"
    "$cxx" "$build/mma75/linear.o" $(printf "$build/plain/%s.o " attention head main) -o "$build/mma75/kernels"
    echo "$cxx" >"$build/mma75/kernels.compiler"
fi
start $flags -O2 -shared -fPIC -o "$build/libbitnet_emulator.so" kernels/emulator/library.cpp
start -std=c++20 -O1 -o "$build/library_check" tests/emulator/library_check.cpp -ldl
"$build/plain/kernels"
"$build/plain/model"
echo "products in the form of compute capability 7.5"
"$build/mma75/kernels" 3 linear
finish
"$build/library_check" "$build/libbitnet_emulator.so" $(nm -D --defined-only "$build/libbitnet_emulator.so" | awk '$3 ~ /^bitnet_/ && $3 !~ /^bitnet_emulator/ { print $3 }')
[ "${BITNET_QUICK:-0}" = 1 ] && exit 0

echo "race detector"
compile races -O1 -DBITNET_RACES -fsanitize=thread
"$cxx" -std=c++20 -O2 -DBITNET_RACES -c kernels/emulator/races.cpp -o "$build/races/races.o"
"$cxx" $(printf "$build/races/%s.o " $suites) "$build/races/races.o" -o "$build/races/kernels"
"$cxx" "$build/races/model.o" "$build/races/model_main.o" "$build/races/races.o" -o "$build/races/model"
"$build/races/kernels" 10
"$build/races/model" 10

# Bug n lives in the sources included by the suite named here. Each must be found by wrong results (the race detector is not
# needed).
planted="1:linear 2:linear 3:linear 4:linear 5:attention 6:attention 7:linear 8:attention 9:head 10:attention 11:linear 12:head 13:linear 14:linear 15:linear 16:head 17:head 18:head"
missed=0
for entry in $planted; do
    bug=${entry%%:*} suite=${entry##*:}
    if BITNET_BUG=$bug BITNET_STOP=1 "$build/plain/kernels" 4 "$suite" >/dev/null 2>&1; then
        echo "planted bug $bug ($suite): NOT FOUND"
        missed=1
    else
        echo "planted bug $bug ($suite): found"
    fi
done
exit $missed
