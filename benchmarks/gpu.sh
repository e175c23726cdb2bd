#!/usr/bin/env bash
# Everything there is to do on a machine with an NVIDIA GPU, in one command and at most nine minutes: build, test,
# sanitise, benchmark, profile. No network, no change of GPU settings; results go to $OUT.
#
#   OUT=results benchmarks/gpu.sh            run all stages
#   OUT=results benchmarks/gpu.sh build test only these, in their order
#   benchmarks/gpu.sh --dry-run              print the commands
#   OPS="linear_attention" ...               only these operators (default: all)
#   CUTLASS=<folder or wheel> ...            build CUTLASS's int8 kernels as well; the benchmarks time both
#
# CUTLASS is a folder with include/cutlass or the wheel nvidia_cutlass-*-py3-none-any.whl (6 MB), brought along: `pip
# download --no-deps nvidia-cutlass`, on a machine that has network. Without it they are built where the environment has
# the package. `python -m effvit info` in the log says which.
#
# Stages: build test sanitize bench micro profile. A stage that fails or runs out of time does not stop the next; the
# exit code is the number of those that did not pass. LIMIT=seconds changes the total (default 530).
set -u -o pipefail
cd "$(dirname "$0")/.."

DRY=0
if [[ ${1:-} == --dry-run ]]; then DRY=1 OUT=${OUT:-build/gpu/out}; shift; fi
: "${OUT:?OUT must name the folder for the results}"
LIMIT=${LIMIT:-530}
PYTHON=${PYTHON:-python3}
WORK=build/gpu
mkdir -p "$OUT" "$WORK"
OUT=$(cd "$OUT" && pwd)
ALL_STAGES="build test sanitize bench micro profile"
WANTED=" ${*:-$ALL_STAGES} "
for name in $WANTED; do
  [[ " $ALL_STAGES " == *" $name "* ]] || { echo "unknown stage $name; stages: $ALL_STAGES" >&2; exit 64; }
done
OPS=${OPS:-$(cd benchmarks && ls bench_*.py | sed 's/^bench_//; s/\.py$//')}
START=$SECONDS
FAILED=0
SUMMARY=()
LOG=$OUT/log.txt
: >"$LOG"

# stage NAME SECONDS FUNCTION: runs it time-boxed, its output to the log.
stage() {
  local name=$1 box=$2 fn=$3 left=$((LIMIT - (SECONDS - START))) begin=$SECONDS rc
  [[ $WANTED == *" ${name%%-*} "* ]] || return 0
  if ((left < 10)); then
    rc=out-of-time
  else
    ((box = box < left ? box : left))
    echo "== $name (at most $box s)" | tee -a "$LOG"
    timeout --kill-after=5 "$box" bash -c "set -u -o pipefail; $(declare -f "$fn" run micros); $fn" 2>&1 | tee -a "$LOG"
    rc=${PIPESTATUS[0]}
  fi
  [[ $rc == 0 ]] || FAILED=$((FAILED + 1))
  SUMMARY+=("{\"stage\": \"$name\", \"exit\": \"$rc\", \"seconds\": $((SECONDS - begin))}")
}

run() {  # prints a command, and runs it unless this is a dry run
  local line
  printf -v line ' %q' "$@"
  echo "+$line"
  if ((DRY)); then return 0; fi
  "$@"
}

micros() {  # the microbenchmarks that `build` compiles
  local op
  for op in $OPS; do
    if [[ -f csrc/bench/bench_$op.cu ]]; then echo "$WORK/micro_$op"; fi
  done
}
export CUTLASS=${CUTLASS:-}
export EFFVIT_TEST_ALL=1 DRY OUT WORK PYTHON OPS PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=4

# ---- stages ---------------------------------------------------------------------------------------------------------

build() {
  local arch micro pid failed=0 pids=() options
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
  arch=${arch:-90}
  if [[ $arch == 90 ]]; then arch=90a; fi
  run nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader
  run rm -f "$WORK"/micro_*
  for micro in $(micros); do
    run nvcc -O3 -std=c++17 --expt-relaxed-constexpr -gencode "arch=compute_$arch,code=sm_$arch" -I csrc \
      -o "$micro" "csrc/bench/bench_${micro##*/micro_}.cu" &
    pids+=($!)
  done
  options="-DEFFVIT_CUDA_ARCHS=$arch"
  if [[ ${CUTLASS:-} == *.whl ]]; then
    run "$PYTHON" -m zipfile -e "$CUTLASS" "$WORK/cutlass"
    options+=" -DEFFVIT_CUTLASS=$PWD/$WORK/cutlass/cutlass_library/source"
  elif [[ -n ${CUTLASS:-} ]]; then
    options+=" -DEFFVIT_CUTLASS=$(cd "$CUTLASS" && pwd)"
  fi
  run env "EFFVIT_CMAKE_ARGS=$options" \
    "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --disable-pip-version-check -e . || failed=1
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  run "$PYTHON" -m effvit info || failed=1
  run "$PYTHON" -c 'import sys, effvit; from effvit import _backends; from effvit.ops._op import OPS
sys.exit([op for op in OPS if _backends.chosen(op, "cuda").name != "cuda"] or None)' || failed=1
  return $failed
}

tests() {  # every test on a CUDA device: C++ and Triton kernels, the primitives
  run "$PYTHON" -m pytest -q -n 6 --timeout 120 -p no:cacheprovider --junitxml "$OUT/tests.xml" \
    -k "(cuda or triton) and not cuda_build and not aot and not asan" tests
}

sanitize() {  # the bare kernels that have a microbenchmark, under each tool, all four at once
  local tool micro failed=0 pids=()
  for tool in memcheck racecheck initcheck synccheck; do
    (
      rc=0
      for micro in $(micros); do
        run timeout 75 compute-sanitizer --tool "$tool" --error-exitcode 9 "$micro" --smoke || rc=$?
      done >"$WORK/$tool.txt" 2>&1
      echo "$tool: exit $rc" >>"$WORK/$tool.txt"
    ) &
    pids+=($!)
  done
  wait "${pids[@]}"
  for tool in memcheck racecheck initcheck synccheck; do
    tail -c 200000 "$WORK/$tool.txt"
    grep -q "^$tool: exit 0$" "$WORK/$tool.txt" || failed=1
  done
  return $failed
}

sanitize_python() {  # every op and feature at small sizes, through PyTorch's own allocations; the ops at once
  local op pid failed=0 pids=()
  for op in $OPS; do
    if [[ -f tests/ops/test_$op.py && ( -f csrc/cuda/$op.cu || -f csrc/rows/$op.h ) ]]; then
      run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        --target-processes all "$PYTHON" -m pytest -q -x --timeout 60 -p no:cacheprovider \
        -k "test_results and small and cuda" "tests/ops/test_$op.py" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

bench() {
  local op failed=0
  for op in $OPS; do
    run "$PYTHON" "benchmarks/bench_$op.py" --device cuda --budget 0.4 --csv "$OUT/results.csv" || failed=1
  done
  return $failed
}

micro() {
  local micro failed=0
  : >"$OUT/micro.txt"
  for micro in $(micros); do
    run "$micro" | tee -a "$OUT/micro.txt" || failed=1
  done
  return $failed
}

profile() {  # hardware counters of the kernels themselves; the clocks stay as they are
  local micro failed=0
  for micro in $(micros); do
    : >"$WORK/ncu.csv"
    run ncu --clock-control none --csv --log-file "$WORK/ncu.csv" -k "regex:${micro##*/micro_}" --launch-count 12 \
      --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats \
      --section WarpStateStats "$micro" --profile || failed=1
    cat "$WORK/ncu.csv" >>"$OUT/ncu.csv"
  done
  return $failed
}

stage build 200 build
stage test 150 tests
stage sanitize-kernels 80 sanitize
stage bench-op 180 bench
stage micro 30 micro
stage profile 60 profile
stage sanitize-python 60 sanitize_python

# ---- summary --------------------------------------------------------------------------------------------------------

joined=$(IFS=,; echo "${SUMMARY[*]}")
printf '{"failed": %d, "seconds": %d, "stages": [%s]}\n' "$FAILED" $((SECONDS - START)) "$joined" >"$OUT/summary.json"
if [[ -s $OUT/results.csv ]]; then
  "$PYTHON" benchmarks/table.py --results "$OUT/results.csv" >"$OUT/table.md" 2>>"$LOG" && cat "$OUT/table.md"
  "$PYTHON" benchmarks/plot.py --results "$OUT/results.csv" --folder "$OUT" >>"$LOG" 2>&1
fi
for file in "$OUT"/*; do  # keep the end of anything too large to bring home
  if [[ -f $file && $(stat -c %s "$file") -gt 15000000 ]]; then
    tail -c 15000000 "$file" >"$WORK/tail" && mv "$WORK/tail" "$file"
  fi
done
printf '%s\n' "${SUMMARY[@]}"
exit "$FAILED"
