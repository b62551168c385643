#!/usr/bin/env bash
# Runs a command on a machine without a Mac as if it had an Apple GPU: builds the emulator's library, and lets a build with
# `--features metal` find it.
#   kernels/emulator/with_metal.sh cargo test --features metal --test parity
#   kernels/emulator/with_metal.sh cargo run --features metal -- generate --device metal -p "ROMEO:"
# BITNET_METAL_GUARD=1: every buffer ends at memory that must not be touched. CXX: the C++ compiler (default g++).
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
build="${BITNET_EMULATOR_BUILD:-$root/target/emulator}"
library="$build/libbitnet_metal.so"
if [ -z "$(find "$library" -newer "$root/kernels/emulator/metal_library.cpp" 2>/dev/null)" ] ||
    [ -n "$(find "$root/kernels/metal" "$root/kernels/emulator" -maxdepth 1 -newer "$library" \( -name '*.metal' -o -name '*.cpp' -o -name '*.h' \))" ]; then
    BITNET_LIBRARY=1 BITNET_EMULATOR_BUILD="$build" bash "$root/kernels/emulator/run_metal.sh"
fi
export BITNET_METAL_EMULATOR="$library"
exec "$@"
