#!/usr/bin/env bash
# Runs a command on a machine without CUDA as if it had a GPU: builds the emulated driver (driver.cpp), and lets cargo find
# it, a stand-in for nvcc and everything else that building and running with `--features cuda` takes.
#   kernels/emulator/with_driver.sh cargo test --features cuda --test cuda
#   kernels/emulator/with_driver.sh cargo run --features cuda -- generate --device cuda -p "Enter"
# BITNET_EMULATED_CHIP and more: see driver.cpp. CXX: the C++ compiler (default g++).
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
toolkit="$root/kernels/emulator/toolkit"
driver="${BITNET_EMULATOR_BUILD:-$root/target/emulator}/driver"
cxx="${CXX:-g++}"
if ! command -v "$cxx" >/dev/null; then
    echo "with_driver.sh: no C++ compiler '$cxx'; install g++ 12 or later, or set CXX" >&2
    exit 2
fi
mkdir -p "$driver"
if [ -z "$(find "$driver/libcuda.so.1" -newer "$root/kernels/emulator/driver.cpp" 2>/dev/null)" ] ||
    [ -n "$(find "$root/kernels/cuda" "$root/kernels/emulator" -maxdepth 1 -newer "$driver/libcuda.so.1" \( -name '*.cu*' -o -name '*.cpp' -o -name '*.h' \))" ]; then
    # A machine of its own, where a process loads Metal's emulator too (with_metal.sh).
    "$cxx" -std=c++20 -O2 -DBITNET_EMULATOR -U_FORTIFY_SOURCE -w -shared -fPIC -fno-gnu-unique -Wl,-Bsymbolic,-soname,libcuda.so.1 \
        -o "$driver/libcuda.so.1.new" "$root/kernels/emulator/driver.cpp"
    "$cxx" -std=c++20 -O2 -shared -fPIC -Wl,-soname,libbitnet_libraries.so -o "$driver/libbitnet_libraries.so" \
        "$root/kernels/emulator/libraries.cpp"
    ln -sf libcuda.so.1 "$driver/libcuda.so"
    for library in cublas cublasLt curand nvrtc cudart; do ln -sf libbitnet_libraries.so "$driver/lib$library.so"; done
    mv "$driver/libcuda.so.1.new" "$driver/libcuda.so.1"
fi
export NVCC="$toolkit/bin/nvcc" CUDA_HOME="$toolkit" CUDA_PATH="$toolkit" PATH="$toolkit/bin:$PATH"
export CUDARC_CUDA_VERSION=13000 CUDA_COMPUTE_CAP=90
export LIBRARY_PATH="$driver${LIBRARY_PATH:+:$LIBRARY_PATH}" LD_LIBRARY_PATH="$driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$@"
