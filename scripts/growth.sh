#!/usr/bin/env bash
# What a record of growth holds, as raw output: every shape, batch 1 to 32, context 128 to 4096.
#   cargo build --release && scripts/growth.sh [THREADS] > record.txt
# With BASELINE=1, the dense Llama of 2B-4T's and 0.7B's shapes as well, in f32 and bf16. What does not fit in memory is
# refused by the program, and its error is part of the record. SHAPES and BITNET name other shapes and another program.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bitnet=${BITNET:-target/release/bitnet}
threads=${1:-$(nproc)}
charts=${CHARTS:-target/growth}
read -ra shapes <<<"${SHAPES:-0.7b 2b4t 3b 8b 30b}"
[ -x "$bitnet" ] || { echo "$bitnet: not built; cargo build --release, or set BITNET" >&2; exit 1; }
mkdir -p "$charts"

# Prints a command, runs it, and goes on whatever it says.
run() {
    echo
    echo "\$ bitnet ${*}"
    "$bitnet" "$@" 2>&1
}

date -u '+%Y-%m-%d %H:%M UTC'
echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(rustc --version 2>/dev/null)"
run doctor --threads "$threads"
for shape in "${shapes[@]}"; do
    run bench --synthetic "$shape" --threads "$threads" --pp 128 --tg 64 --reps 3
done
run bench --synthetic 2b4t --threads "$threads" --pp 128 --tg 32 --reps 2 \
    --sweep batch=1,2,4,8,16,32 --chart "$charts/batch.svg"
run bench --synthetic 2b4t --threads "$threads" --tg 32 --reps 2 \
    --sweep context=128,256,512,1024,2048,4096 --chart "$charts/context.svg"
run bench --synthetic 2b4t --pp 128 --tg 32 --reps 2 --sweep threads --chart "$charts/threads.svg"
if [ "${BASELINE:-0}" = 1 ]; then
    for shape in 0.7b 2b4t; do
        run bench --synthetic "$shape" --threads "$threads" --pp 128 --tg 16 --reps 2 --baseline f32,bf16
    done
fi
exit 0
