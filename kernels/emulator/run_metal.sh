#!/usr/bin/env bash
# Runs the Metal kernels on this CPU: builds the sources of kernels/metal with a C++20 compiler and the emulator's headers, then
#   1. every kernel against its oracle (1000 cases and more each; 63000 in all), small whole models, and the library that lets the host
#      side launch kernels by name (target/emulator/libbitnet_metal.so),
#   2. the same, thinned, with the race detector,
#   3. each planted bug (BITNET_BUG=n): the suites must fail, or the proof above proves nothing.
#   kernels/emulator/run_metal.sh [c++ compiler]     CXX also works; default g++
# BITNET_QUICK=1: the library and a tenth of step 1. BITNET_LIBRARY=1: the library only. BITNET_REPEAT=n: n times the cases (nightly).
set -euo pipefail
flags="-DBITNET_METAL" prefix="metal_" folder="/metal"
source "$(dirname "$0")/suites.sh"

# Built beside and moved into place: a test may be loading it. A machine of its own, where a process loads CUDA's emulator too.
"$cxx" $flags -O2 -shared -fPIC -fno-gnu-unique -Wl,-Bsymbolic -o "$build/libbitnet_metal.so.$$" kernels/emulator/metal_library.cpp
mv "$build/libbitnet_metal.so.$$" "$build/libbitnet_metal.so"
[ "${BITNET_LIBRARY:-0}" = 1 ] && exit 0
"$cxx" -std=c++20 -O1 -o "$build/metal_library_check" tests/emulator/metal_library_check.cpp -ldl
kernels=$(nm -DC --defined-only "$build/libbitnet_metal.so" | grep -oE ' bitnet_[a-z0-9_]+\(' | tr -d ' (')
"$build/metal_library_check" "$build/libbitnet_metal.so" $kernels

if ! fresh; then
    compile plain -O2
    link plain
    built
fi
thin=1
[ "${BITNET_QUICK:-0}" = 1 ] && thin=10
for s in $suites; do start "$work/plain/kernels" "$thin" "$s"; done
start "$work/plain/model"
finish
[ "${BITNET_QUICK:-0}" = 1 ] && exit 0

echo "race detector"
build_races
for s in $suites; do start "$work/races/kernels" 50 "$s"; done
start "$work/races/model" 10
finish
# The detector sees a missing barrier whether or not a result is wrong.
if [ "$({ BITNET_BUG=2 "$work/races/kernels" 400 linear 2>&1 || true; } | grep -c 'data races')" = 0 ]; then
    echo "race detector: a missing barrier was NOT FOUND" >&2
    exit 1
fi
echo "race detector: a missing barrier was found"

find_planted 8 1:linear 2:linear 3:linear 4:linear 5:attention 6:attention 7:linear 8:attention 10:attention 11:linear 12:head \
    13:linear 14:linear 15:linear 16:head 17:head 18:head 19:head 20:linear 21:head 9:head
