#!/usr/bin/env bash
# Checks the Metal kernels' address spaces, types and overloads with clang, without a Mac: as C++ for OpenCL, whose address
# spaces are Metal's, with no generic one; Metal's library is declared in opencl.h. Then makes sure that the check can fail.
#   kernels/emulator/address_spaces.sh [clang]       CLANG also works; default clang (14 or later)
# All files together, and common.metal with each of the others alone, as the host may compile them.
set -euo pipefail
cd "$(dirname "$0")/../.."
clang="${1:-${CLANG:-clang}}"
if ! command -v "$clang" >/dev/null; then
    echo "kernels/emulator/address_spaces.sh: no '$clang'; install clang 14 or later, or name one: address_spaces.sh CLANG" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
off=__opencl_c_generic_address_space
for feature in pipes device_enqueue program_scope_global_variables fp64; do off="$off,-__opencl_c_$feature"; done
# Attributes of kernels' parameters are unknown to OpenCL, and not all parameters are used by all kernels.
check() { # FOLDER FILE
    "$clang" -x clcpp -cl-std=clc++2021 -cl-no-stdinc -target spir64 -fsyntax-only -Xclang "-cl-ext=-$off,-cl_khr_fp64" \
        -DBITNET_ADDRESS_SPACES -Wall -Wextra -Wdouble-promotion -Werror -Wno-unknown-attributes -Wno-unused-parameter -Wno-unused-function \
        -Wno-unused-const-variable -Wno-pragma-once-outside-header -I"$1/kernels/metal" "$2"
}
check . kernels/emulator/metal_kernels.h
# C++14 (the target only needs to have a half type).
"$clang" -x c++ -std=c++14 -target aarch64-linux-gnu -fsyntax-only -DBITNET_ADDRESS_SPACES -Wall -Wextra -Werror -Wno-unknown-attributes \
    -Wno-unused-parameter -Wno-unused-function -Wno-unused-const-variable -Wno-pragma-once-outside-header -Wno-undefined-internal \
    -Wno-undefined-inline kernels/emulator/metal_kernels.h
for f in kernels/metal/*.metal; do
    name=$(basename "$f")
    [ "$name" = common.metal ] && continue
    printf '#include "common.metal"\n#include "%s"\n' "$name" >"$work/one.cl"
    check . "$work/one.cl"
done
# Each of these must be refused: FILE, what, and what instead.
refuse() {
    rm -rf "$work/bad"
    mkdir -p "$work/bad/kernels"
    cp -r kernels/metal kernels/emulator "$work/bad/kernels/"
    sed -i "s/$2/$3/" "$work/bad/kernels/metal/$1"
    if cmp -s "kernels/metal/$1" "$work/bad/kernels/metal/$1"; then
        echo "address spaces: nothing to change in $1: $2" >&2
        exit 1
    fi
    if check "$work/bad" "$work/bad/kernels/emulator/metal_kernels.h" 2>/dev/null; then
        echo "address spaces: '$3' in $1 was NOT refused" >&2
        exit 1
    fi
}
refuse gemv.metal 'threadgroup const Factor\* f = ' 'device const Factor* f = '
refuse gemm.metal 'device const uint4\* weights, device' 'threadgroup const uint4* weights, device'
refuse common.metal 'threadgroup float\* part_sum = (threadgroup float\*)' 'thread float* part_sum = (thread float*)'
refuse common.metal 'inline int segment(constant Scales' 'inline int segment(thread Scales'
refuse attention.metal 'E::load4_shared(new_v' 'E::load4(new_v'
refuse sample.metal 'constant constexpr uint kGenerated = 0x7fffffffu' 'constant constexpr uint kGenerated = 0.5'
echo "address spaces: all kernels clean, and C++14; 6 of 6 planted errors refused"
