#!/usr/bin/env bash
# Compiles every CUDA kernel with the real nvcc for every supported architecture, without a GPU, and reports
# registers and spills.
#   kernels/emulator/compile.sh [output folder]       nvcc from $NVCC, $CUDA_HOME/bin or PATH
# Where there is no CUDA toolkit: eval "$(scripts/cuda_toolkit.sh DIR)"
# The GPU test and bench programs (tests/emulator, tests/gpu) are compiled too, for 9.0, but not linked.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-target/cuda-compile}"
nvcc="${NVCC:-}"
[ -z "$nvcc" ] && [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ] && nvcc="$CUDA_HOME/bin/nvcc"
[ -z "$nvcc" ] && nvcc="$(command -v nvcc || true)"
if [ -z "$nvcc" ]; then
    echo "kernels/emulator/compile.sh: no nvcc; set NVCC or CUDA_HOME, or install one with scripts/cuda_toolkit.sh" >&2
    exit 2
fi
mkdir -p "$out"
status=0
gencode=""
for arch in 75 80 86 89 90; do gencode="$gencode -gencode arch=compute_$arch,code=sm_$arch"; done
for f in kernels/cuda/*.cu; do
    name=$(basename "$f" .cu)
    if "$nvcc" -std=c++17 -O3 -Xptxas -v $gencode -gencode arch=compute_90,code=compute_90 -fatbin -o "$out/$name.fatbin" "$f" >"$out/$name.log" 2>&1; then
        awk -v name="$name" '
            /Compiling entry function/ { arch = $NF; gsub(/[^0-9]/, "", arch) }
            /bytes stack frame/ { spill[arch] += $5 + $9 }
            /Used [0-9]+ registers/ { for (i = 1; i <= NF; ++i) if ($i == "Used" && $(i + 1) > top[arch]) top[arch] = $(i + 1); n[arch]++ }
            END { for (a in n) printf "%-20s sm_%s  %3d kernels, at most %3d registers, %4d bytes of spills\n", name, a, n[a], top[a], spill[a] }' "$out/$name.log" | sort
    else
        echo "$name: FAILED"
        cat "$out/$name.log"
        status=1
    fi
done
for f in tests/emulator/{linear,attention,head,model,main}.cpp tests/gpu/*.cu; do
    "$nvcc" -std=c++20 -O1 -diag-suppress 177 -gencode arch=compute_90,code=sm_90 -x cu -c "$f" -o "$out/$(basename "$f").o" || status=1
done
[ $status = 0 ] && echo "all kernels compile for 7.5, 8.0, 8.6, 8.9, 9.0 and as PTX"
exit $status
