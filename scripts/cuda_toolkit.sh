#!/usr/bin/env bash
# Installs what building with `--features cuda` takes, on a machine without a CUDA toolkit and without a GPU: NVIDIA's compiler
# and libraries from PyPI (1.2 GB in DIR), and a stand-in for the driver's library, which has no package. Prints the environment:
#   eval "$(scripts/cuda_toolkit.sh DIR)" && cargo build --release --features cuda
# A second run installs nothing. CUDA_COMPUTE_CAP: the chip that candle's own kernels are compiled for (default 90; this
# project's are compiled for all). PYTHON: a Python with pip (default python3).
# What is built needs these libraries to start, and a GPU and its driver to use it. The stand-in says "no device" to every call:
#   LD_LIBRARY_PATH=$CUDA_HOME/lib:$CUDA_HOME/lib/stubs bitnet ...
set -euo pipefail
packages="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35
    nvidia-cuda-cuobjdump==13.2.51"
[ $# = 1 ] || { sed -n '2,9s/^# \?//p' "$0" >&2; exit 2; }
mkdir -p "$1"
dir="$(cd "$1" && pwd)"
home="$dir/nvidia/cu13"
case "$dir" in *[\ \'\"\$]*) echo "cuda_toolkit.sh: $dir: nvcc cannot live in a path with spaces or quotes" >&2; exit 2 ;; esac

installed="$(cat "$dir/packages" 2>/dev/null || true)"
if [ "$installed" != "$packages" ]; then
    # shellcheck disable=SC2086
    PIP_ROOT_USER_ACTION=ignore "${PYTHON:-python3}" -m pip install --quiet --no-deps --no-compile --upgrade --target "$dir" $packages >&2
    ln -sfn lib "$home/lib64"
    for library in cublas cublasLt cudart nvrtc nvvm curand; do # the linker looks for names without a version
        file="$(cd "$home/lib" && ls lib$library.so.[0-9]* | head -1)"
        ln -sf "$file" "$home/lib/lib$library.so"
    done
    printf '%s' "$packages" >"$dir/packages"
fi

# The stand-in: every function that cuda.h declares, under its old and new names, answering CUDA_ERROR_NO_DEVICE (100).
stub="$home/lib/stubs/libcuda.so.1"
if [ ! -e "$stub" ]; then
    mkdir -p "${stub%/*}"
    {
        echo 'static int say(const char **to, const char *text) { *to = text; return 0; }'
        echo 'int cuGetErrorString(int e, const char **s) { return say(s, "no CUDA-capable device is detected"); }'
        echo 'int cuGetErrorName(int e, const char **s) { return say(s, "CUDA_ERROR_NO_DEVICE"); }'
        echo 'int cuProfilerStart(void) { return 100; }' # declared in a header that the packages lack
        echo 'int cuProfilerStop(void) { return 100; }'
        "${CC:-cc}" -E -P -D__CUDA_API_VERSION_INTERNAL -x c "$home/include/cuda.h" |
            grep -o 'CUresult *cu[A-Z][A-Za-z0-9_]* *(' | grep -o 'cu[A-Z][A-Za-z0-9_]*' | sort -u |
            grep -vx 'cuGetErrorString\|cuGetErrorName' | sed 's/.*/int &(void) { return 100; }/'
    } >"$dir/stub.c"
    "${CC:-cc}" -O1 -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$stub.new" "$dir/stub.c"
    mv "$stub.new" "$stub"
    ln -sf libcuda.so.1 "${stub%.1}"
fi

cat <<END
export CUDA_HOME='$home' CUDA_PATH='$home' NVCC='$home/bin/nvcc' PATH='$home/bin':"\$PATH"
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000 CUDAFORGE_THREADS=$(nproc)
export LIBRARY_PATH='$home/lib:$home/lib/stubs'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
END
