#!/usr/bin/env bash
# Runs the CUDA kernels on this CPU: builds the sources of kernels/cuda with a C++20 compiler and the emulator's
# headers, then
#   1. every kernel against its oracle over odd shapes, small whole models against a naive one, and the library that
#      lets the host side launch kernels by name,
#   2. the same, thinned, with the race detector,
#   3. each planted bug (BITNET_BUG=n): the suites must fail, or the proof above proves nothing.
#   kernels/emulator/run.sh [c++ compiler]        CXX also works; default g++. BITNET_QUICK=1: step 1 only.
set -euo pipefail
flags="" prefix="" folder=""
source "$(dirname "$0")/suites.sh"

if ! fresh; then
    mkdir -p "$work/mma75"
    start "$cxx" $flags -O2 -DBITNET_MMA_75 -c tests/emulator/linear.cpp -o "$work/mma75/linear.o"
    compile plain -O2
    link plain
    "$cxx" "$work/mma75/linear.o" $(printf "$work/plain/%s.o " attention head main) -o "$work/mma75/kernels"
    built
fi
start "$cxx" $flags -O2 -shared -fPIC -o "$build/libbitnet_emulator.so" kernels/emulator/library.cpp
start "$cxx" -std=c++20 -O1 -o "$build/library_check" tests/emulator/library_check.cpp -ldl
"$work/plain/kernels"
"$work/plain/model"
echo "products in the form of compute capability 7.5"
"$work/mma75/kernels" 3 linear
finish
"$build/library_check" "$build/libbitnet_emulator.so" $(nm -D --defined-only "$build/libbitnet_emulator.so" | awk '$3 ~ /^bitnet_/ && $3 !~ /^bitnet_emulator/ { print $3 }')
[ "${BITNET_QUICK:-0}" = 1 ] && exit 0

echo "race detector"
build_races
"$work/races/kernels" 10
"$work/races/model" 10

find_planted 4 1:linear 2:linear 3:linear 4:linear 5:attention 6:attention 7:linear 8:attention 9:head 10:attention 11:linear 12:head \
    13:linear 14:linear 15:linear 16:head 17:head 18:head
