#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# gpu_check.sh OUT_DIR: builds, proves, sanitizes, times and profiles on a machine with a GPU.
#
# At most 10 minutes. Every stage has its own limit and none stops the next, so that a stage that
# fails leaves the results of the others: a line each in OUT_DIR/summary.txt, and their output in
# logs.tgz. The exit status is the number of stages that failed or could not run. Uses the python3,
# torch, CMake, Ninja, pybind11 and scikit-build-core that are there, and no network.
set -u -o pipefail

readonly BUDGET=590
OUT=${1:?usage: tools/gpu_check.sh OUT_DIR}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.." || exit 1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
SITE=$WORK/site
LOGS=$WORK/logs
PYTHON=$(command -v "${PYTHON:-python3}")
mkdir -p "$LOGS"
export OUT WORK SITE PYTHON PYTHONUNBUFFERED=1
: >"$OUT/summary.txt"
failures=0

say() { printf '%s\n' "$*" | tee -a "$OUT/summary.txt"; }

left() { echo $((BUDGET - SECONDS)); }

# stage NAME SECONDS COMMAND: one line of the summary, with the last line of what it printed.
stage() {
  local name=$1 limit=$2 command=$3 rc began=$SECONDS
  ((limit > $(left))) && limit=$(left)
  if ((limit < 5)); then
    say "$name: NOT RUN: no time left"
    ((failures++))
    return
  fi
  timeout --kill-after=5 "$limit" bash -c "$command" >"$LOGS/$name.log" 2>&1
  rc=$?
  case $rc in
    0) say "$name: ok, $((SECONDS - began)) s: $(last_line "$name")" ;;
    124 | 137) say "$name: TIMED OUT after $limit s: $(last_line "$name")" ;;
    *) say "$name: FAILED ($rc), $((SECONDS - began)) s: $(last_line "$name")" ;;
  esac
  ((rc == 0)) || ((failures++))
}

last_line() { grep -v '^[[:space:]]*$' "$LOGS/$1.log" | tail -1 | cut -c1-160; }

missing() {
  say "$1: NOT RUN: $2"
  ((failures++))
}

# Whether the package that was built here can use this GPU.
usable() {
  (cd "$WORK" && PYTHONPATH=$SITE "$PYTHON" -m latte_ext info) 2>&1 | grep -Eq '^devices +[^ n]'
}

say "commit: $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%Y-%m-%dT%H:%MZ)"
# shellcheck disable=SC2016  # expanded by the shell of the stage
stage env 20 'nvcc --version | tail -1; command -v compute-sanitizer ncu cmake ninja
  "$PYTHON" -c "import torch; print(\"torch\", torch.__version__, \"CUDA\", torch.version.cuda)"
  nvidia-smi -L'

# One job per core; the architecture of this device alone.
if command -v nvcc >/dev/null; then
  # shellcheck disable=SC2016
  stage build 230 'CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$PYTHON" -m pip install --no-build-isolation \
    --no-deps --no-index --target "$SITE" -C build-dir="$WORK/build" -C cmake.define.LATTE_CUDA=ON \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES="${LATTE_CHECK_ARCHITECTURES:-native}" .'
else
  missing build "no nvcc here"
fi

# From a folder without the sources, so that what was built is what runs.
run="cd \"\$WORK\" && export PYTHONPATH=\"\$SITE\" &&"
if usable; then
  stage selftest 30 "$run \"\$PYTHON\" -m latte_ext selftest --device cuda"
  stage pytest 130 "PYTHONPATH=\$SITE CI=1 \"\$PYTHON\" -m pytest -q -m cuda --maxfail=30 \
    -p no:cacheprovider --continue-on-collection-errors --ignore-glob='*/test_hf*' \
    --junitxml=\"\$OUT/junit.xml\""
  if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache every tensor is an allocation, whose ends memcheck knows.
    for tool in memcheck racecheck initcheck synccheck; do
      stage "$tool" 35 "$run PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool $tool --error-exitcode 9 \
        \"\$PYTHON\" -m latte_ext selftest --device cuda --small"
    done
  else
    missing sanitizers "no compute-sanitizer here"
  fi
  # Bandwidth and matrix product, then every operator and its peers.
  stage bench 100 "$run \"\$PYTHON\" -m latte_ext bench --device cuda --json \"\$OUT/bench.json\""
  # How long sequences are best cut: what to commit as cuda/tuned.h, and the times behind it.
  stage tune 70 "$run \"\$PYTHON\" -m latte_ext bench --device cuda --tune \"\$OUT/tuned.h\""
  if command -v ncu >/dev/null; then
    stage ncu 60 "$run ncu --clock-control none --target-processes all --kernel-name \
      regex:'causal|bidirectional|key_summary|gradient|fold|step|recurrence|conv' --launch-count 16 --csv \
      --metrics gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,\
sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,\
sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,\
l1tex__data_bank_conflicts_pipe_lsu.sum,launch__registers_per_thread \
      \"\$PYTHON\" -m latte_ext bench --device cuda --once --size quick >\"\$OUT/ncu.csv\""
  else
    missing ncu "no Nsight Compute here"
  fi
else
  for name in selftest pytest sanitizers bench tune ncu; do
    missing "$name" "no package with a usable GPU; see env and build"
  done
fi

tar -czf "$OUT/logs.tgz" -C "$LOGS" .
say "$failures stages failed or did not run; $SECONDS s in all"
[ -f "$OUT/bench.md" ] && cat "$OUT/bench.md"
exit "$failures"
