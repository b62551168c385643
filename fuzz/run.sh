#!/bin/sh
# Runs one target: run.sh TARGET [EXECUTIONS]. Ends with a line for a table of runs. A panic, an error found by
# AddressSanitizer, a single allocation of 64 MiB, 1 GiB resident, or 5 s for one input ends it with an artifact.
# FUZZ_TIMEOUT sets other seconds, for machines that stop programs for a while.
set -eu
target=$1
runs=${2:-1000000}
cd "$(dirname "$0")"
host=$(rustc +nightly -vV | sed -n 's/^host: //p')
binary=target/$host/release/$target
[ -x "$binary" ] || cargo +nightly fuzz build "$target"
mkdir -p "corpus/$target" "artifacts/$target"
log=corpus/$target.log
# Short inputs find the grammar of a text sooner; what they build is what takes the time.
case $target in
    chat_template | gguf_tokenizer) most=512 ;;
    tokenizer_config | generation_config | hub_listing | training_examples) most=1024 ;;
    gguf_model) most=1024 ;;
    *) most=4096 ;;
esac
dictionary=dictionaries/$target.dict
[ -e "$dictionary" ] && set -- "-dict=$dictionary" || set --
status=0
ASAN_OPTIONS=detect_odr_violation=0:quarantine_size_mb=16:detect_leaks=0 \
    "$binary" "$@" -runs="$runs" -max_len=$most -malloc_limit_mb=64 -rss_limit_mb=1024 -timeout="${FUZZ_TIMEOUT:-5}" -report_slow_units=1 \
    -print_final_stats=1 -detect_leaks=0 -artifact_prefix="artifacts/$target/" "corpus/$target" "seeds/$target" >"$log" 2>&1 || status=$?
stat() { sed -n "s/^stat::$1: *//p" "$log"; }
last=$(grep -a '^#[0-9]' "$log" | tail -1)
word() { echo "$last" | sed -n "s/.* $1: \([0-9]*\).*/\1/p"; }
echo "| $target | $(stat number_of_executed_units) | $(stat average_exec_per_sec) | $(word cov) | $(word ft) |" \
    "$(stat peak_rss_mb) | $(stat slowest_unit_time_sec) | exit $status |"
exit $status
