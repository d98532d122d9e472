#!/usr/bin/env bash
# What a machine with an NVIDIA GPU tells: gpu.sh OUTPUT_FOLDER [build|test|sanitize|bench|all]
# Uses the python3 on the PATH (torch with CUDA, pytest, ninja, cmake, nvcc); no network. Libraries are built only where
# they are missing: a build from elsewhere is taken from YOCO_EXT_LIBRARY (with libyoco_ext_cuda.so beside it) or build/gpu.
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:?usage: gpu.sh OUTPUT_FOLDER [stage]}
stage=${2:-all}
mkdir -p "$output"
output=$(realpath "$output")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} YOCO_TEST_REQUIRE_CUDA=1
export YOCO_EXT_LIBRARY=${YOCO_EXT_LIBRARY:-$PWD/build/gpu/libyoco_ext_ops.so}
summary=()
failed=0

# run NAME SECONDS COMMAND...: logs, times, remembers
run() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  if [ "$1" = build_in_shell ]; then build_in_shell; else timeout "$limit" "$@"; fi >"$output/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  summary+=("$(printf '%-12s %-7s %4d s  %s' "$name" "$([ $status -eq 0 ] && echo ok || echo "exit $status")" \
    $((SECONDS - begin)) "$(grep -v '^ *$' "$output/$name.log" | tail -1 | cut -c1-110)")")
}

build_in_shell() {
  [ -e "$YOCO_EXT_LIBRARY" ] && [ -e "$(dirname "$YOCO_EXT_LIBRARY")/libyoco_ext_cuda.so" ] && return 0
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v python3)" -DYOCO_EXT_CUDA=ON \
    -DYOCO_CUDA_ARCHS="${YOCO_CUDA_ARCHS:-80;90a}" ${CUTLASS_DIR:+-DCUTLASS_DIR=$CUTLASS_DIR} &&
    cmake --build build/gpu --parallel "${MAX_JOBS:-$(nproc)}"
}

if [ "$stage" = build ] || [ "$stage" = all ]; then run build 540 build_in_shell; fi
if [ "$stage" = test ] || [ "$stage" = all ]; then
  run test 300 python3 -m pytest -q -x --maxfail=20 -p no:cacheprovider -k "cuda" python_tests
fi
if [ "$stage" = sanitize ] || [ "$stage" = all ]; then
  for tool in memcheck racecheck; do
    run $tool 120 compute-sanitizer --tool $tool --error-exitcode 9 --kernel-regex kns=yoco \
      python3 -m pytest -q -p no:cacheprovider -k cuda python_tests/test_swiglu.py python_tests/test_gated_retention_step.py
  done
fi
if [ "$stage" = bench ] || [ "$stage" = all ]; then
  run bench 420 python3 -m yoco_ext bench --device cuda ${YOCO_BENCH_ARGS:---quick} --output "$output/bench.json"
  grep -E 'x  \(|bandwidth|ceilings' "$output/bench.log"
fi
printf '%s\n' "${summary[@]}"
exit $failed
