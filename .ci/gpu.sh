#!/usr/bin/env bash
# What a machine with an NVIDIA GPU tells: gpu.sh OUTPUT_FOLDER [build|test|sanitize|bench|all]
# Uses the python3 on the PATH (torch with CUDA, pytest, ninja, cmake) and, to build, nvcc; no network. Libraries are built
# only where they are missing: a build from elsewhere is taken from YOCO_EXT_LIBRARY (libyoco_ext_cuda.so beside it) or
# build/gpu. Logs and bench.json go to the folder; a short table comes last. The whole takes ten minutes at most: the
# limits of the stages behind the build add up to that, and what a build took is taken from the benchmark, which leaves
# the figures it has when its time is up. YOCO_BENCH_ARGS: other options of yoco-ext bench (default --quick --seconds 1).
set -uo pipefail
cd "$(dirname "$0")/.."
stages="build test sanitize bench"
output=${1:?usage: gpu.sh OUTPUT_FOLDER [build|test|sanitize|bench|all]}
stage=${2:-all}
[ "$stage" = all ] && chosen=$stages || chosen=$stage
case " $stages all " in
  *" $stage "*) ;;
  *) echo "gpu.sh: unknown stage '$stage'; there are: $stages all" >&2 && exit 2 ;;
esac
mkdir -p "$output"
output=$(realpath "$output")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} YOCO_TEST_REQUIRE_CUDA=1
export YOCO_EXT_LIBRARY=${YOCO_EXT_LIBRARY:-$PWD/build/gpu/libyoco_ext_ops.so}
cuda_library=$(dirname "$YOCO_EXT_LIBRARY")/libyoco_ext_cuda.so
summary=()
failed=0

needs() { # needs COMMAND STAGE WHAT
  command -v "$1" >/dev/null || { echo "gpu.sh: stage $2 needs $3 ('$1' is not on the PATH)" >&2 && exit 2; }
}
built() { [ -e "$YOCO_EXT_LIBRARY" ] && [ -e "$cuda_library" ]; }
needs python3 "$stage" "Python with PyTorch"
for s in $chosen; do
  case $s in
    build) built || needs nvcc build "the CUDA compiler, or libraries built elsewhere (YOCO_EXT_LIBRARY)" ;;
    sanitize) needs compute-sanitizer sanitize "compute-sanitizer of the CUDA toolkit" ;;
  esac
  if [ "$s" != build ] && ! python3 -c "import torch; assert torch.cuda.is_available()" >/dev/null 2>&1; then
    echo "gpu.sh: stage $s needs an NVIDIA GPU that PyTorch sees; torch.cuda.is_available() is False here" >&2
    exit 2
  fi
  if [ "$s" != build ] && [[ " $chosen " != *" build "* ]] && ! built; then
    echo "gpu.sh: $YOCO_EXT_LIBRARY or $cuda_library is missing; run stage build first or set YOCO_EXT_LIBRARY" >&2
    exit 2
  fi
done

# run NAME SECONDS COMMAND...: logs, times, remembers
run() {
  local name=$1 limit=$2 begin=$SECONDS left=$((595 - SECONDS)) status said
  shift 2
  [ "$stage" = all ] && [ "$name" != build ] && [ $left -lt "$limit" ] && limit=$((left > 1 ? left : 1))
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$output/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=1
  said=$([ $status -eq 0 ] && echo ok || { [ $status -ge 124 ] && echo "over ${limit}s" || echo "exit $status"; })
  summary+=("$(printf '%-10s %-10s %4d s  %s' "$name" "$said" $((SECONDS - begin)) \
    "$(grep -v '^ *$' "$output/$name.log" | tail -1 | cut -c1-110)")")
}

for s in $chosen; do
  case $s in
    build)
      if built; then
        summary+=("$(printf '%-10s %-10s %4d s  %s' build reused 0 "$YOCO_EXT_LIBRARY")")
        continue
      fi
      run configure 60 cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v python3)" -DYOCO_EXT_CUDA=ON \
        -DYOCO_CUDA_ARCHS="${YOCO_CUDA_ARCHS:-80;90a}" ${CUTLASS_DIR:+-DCUTLASS_DIR="$CUTLASS_DIR"}
      run build 900 cmake --build build/gpu --parallel "${MAX_JOBS:-$(nproc)}"
      built || break # nothing to test
      ;;
    test)
      # Several processes where pytest-xdist is installed: a kernel that faults ends the tests of one. A kernel that hangs
      # is named by the stack that faulthandler prints, and ended where pytest-timeout is installed.
      flags=(-o faulthandler_timeout=60)
      python3 -c "import xdist" >/dev/null 2>&1 && flags+=(-n 6)
      python3 -c "import pytest_timeout" >/dev/null 2>&1 && flags+=(--timeout 90 --timeout-method thread)
      run test 200 python3 -m pytest -q --maxfail=20 -p no:cacheprovider "${flags[@]}" -k cuda python_tests
      ;;
    sanitize)
      # One call of every op per head dimension, forward and backward; fp16 instances are the bf16 code. racecheck is
      # several times slower than memcheck.
      for tool in memcheck racecheck; do
        small='test_repeats and bf16'
        [ $tool = racecheck ] && small="$small and (64 or append or rms_norm or retention_output) and not rotary"
        run $tool 70 compute-sanitizer --tool $tool --error-exitcode 9 --kernel-regex kns=yoco \
          python3 -m pytest -q -p no:cacheprovider -k "$small" python_tests/test_cuda_schedules.py
      done
      ;;
    bench)
      # shellcheck disable=SC2086  # several arguments
      run bench 240 python3 -m yoco_ext bench --device cuda ${YOCO_BENCH_ARGS:---quick --seconds 1} \
        --output "$output/bench.json"
      grep -E 'x  \(|bandwidth|ceilings|FAILED|left out' "$output/bench.log"
      ;;
  esac
done
printf '%s\n' "${summary[@]}"
exit $failed
