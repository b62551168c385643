# What run.sh and run_metal.sh share: building the suites and running them. Sourced there with `flags`, `prefix` (of the sources in
# tests/emulator) and `folder` (under the build's) set. $1 or CXX: the C++ compiler.
cd "$(dirname "$0")/../.."
cxx="${1:-${CXX:-g++}}"
if ! command -v "$cxx" >/dev/null; then
    echo "kernels/emulator/${0##*/}: no C++ compiler '$cxx'; install g++ 12 or later, or name one: ${0##*/} CXX" >&2
    exit 2
fi
build="${BITNET_EMULATOR_BUILD:-target/emulator}"
work="$build$folder"
mkdir -p "$work"
suites="linear attention head"
# _FORTIFY_SOURCE refuses the jumps between fiber stacks.
flags="-std=c++20 -DBITNET_EMULATOR -U_FORTIFY_SOURCE -w $flags"
jobs=$(nproc)

pids=()
start() { # a program in the background, at most $jobs at a time
    "$@" &
    pids+=($!)
    if [ ${#pids[@]} -ge "$jobs" ]; then
        wait "${pids[0]}"
        pids=("${pids[@]:1}")
    fi
}
finish() {
    local p
    for p in "${pids[@]}"; do wait "$p"; done
    pids=()
}
source_of() { case $1 in main) echo tests/emulator/main.cpp ;; *) echo "tests/emulator/$prefix$1.cpp" ;; esac; }
# compile NAME FLAGS...: objects under $work/NAME.
compile() {
    local name=$1 s
    shift
    mkdir -p "$work/$name"
    for s in model $suites main; do start "$cxx" $flags "$@" -c "$(source_of $s)" -o "$work/$name/$s.o"; done
    start "$cxx" $flags "$@" -DBITNET_WHOLE_MODEL -c tests/emulator/main.cpp -o "$work/$name/model_main.o"
    finish
}
# link NAME OBJECTS...: its programs, kernels and model.
link() {
    local name=$1
    shift
    "$cxx" $(printf "$work/$name/%s.o " $suites main) "$@" -o "$work/$name/kernels"
    "$cxx" "$work/$name/model.o" "$work/$name/model_main.o" "$@" -o "$work/$name/model"
}
# Whether what `built` stood behind is newer than all sources and this compiler's: a quick run has left it for the whole one.
fresh() {
    [ "$(cat "$work/compiler" 2>/dev/null)" = "$cxx" ] &&
        [ -z "$(find kernels tests/emulator -type f -newer "$work/compiler" -print -quit)" ]
}
built() { echo "$cxx" >"$work/compiler"; }
# The programs with the race detector.
build_races() {
    compile races -O1 -DBITNET_RACES -fsanitize=thread
    "$cxx" -std=c++20 -O2 -DBITNET_RACES -c kernels/emulator/races.cpp -o "$work/races/races.o"
    link races "$work/races/races.o"
}
# find_planted THIN BUG:SUITE...: bug n lives in the sources included by the suite named. Each must be found by wrong results (the
# race detector is not needed).
find_planted() {
    local thin=$1 missed=0 entry bug suite
    shift
    for entry in "$@"; do
        bug=${entry%%:*} suite=${entry##*:}
        if BITNET_BUG=$bug BITNET_STOP=1 "$work/plain/kernels" "$thin" "$suite" >/dev/null 2>&1; then
            echo "planted bug $bug ($suite): NOT FOUND"
            missed=1
        else
            echo "planted bug $bug ($suite): found"
        fi
    done
    return $missed
}
