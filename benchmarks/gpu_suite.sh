#!/usr/bin/env bash
# All that a GPU can tell, in stages of at most nine minutes, the most valuable first:
#
#     benchmarks/gpu_suite.sh tests            tests marked cuda
#     benchmarks/gpu_suite.sh verify           every zoo network under every policy, gradients against plain
#     benchmarks/gpu_suite.sh budgets          search and run under real caps of 2, 4 and 8 GB
#     benchmarks/gpu_suite.sh predict          predicted against allocator peak
#     benchmarks/gpu_suite.sh speed            plain, checkpointing, torch.compile and rowtune, TF32 and bf16
#     benchmarks/gpu_suite.sh host             launches, and host time against device time
#     benchmarks/gpu_suite.sh profile          what the device does a second
#     benchmarks/gpu_suite.sh all              one after another
#
# Needs Python with torch; where there is no package index, put wheels of what is missing into .whl/ first.
# Results: dated JSON in $OUT (./gpu-results without it), written after each step. A dry run, as CI does it:
#
#     PYTHON=.venv/bin/python benchmarks/gpu_suite.sh all --tiny --device cpu
set -euo pipefail
cd "$(dirname "$0")/.."
stage="${1:?which stage? see the head of this file}"
shift
python="${PYTHON:-python3}"
out="${OUT:-gpu-results}"
mkdir -p "$out"

if compgen -G '.whl/*.whl' >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/rowtune-site .whl/*.whl
  export PYTHONPATH="/tmp/rowtune-site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

stages="$stage"
[ "$stage" = all ] && stages="tests verify budgets predict speed host profile"
failed=0
for one in $stages; do
  echo "== $one"
  if [ "$one" = tests ]; then
    code=0
    "$python" -m pytest tests -q -m cuda -p no:cacheprovider || code=$?
    [ "$code" -eq 0 ] || [ "$code" -eq 5 ] || failed=1 # 5: none was selected
  else
    "$python" benchmarks/gpu_suite.py "$one" --out "$out" "$@" || failed=1
  fi
done
exit "$failed"
