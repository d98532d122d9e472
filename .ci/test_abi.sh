#!/usr/bin/env bash
# One compiled op library under another torch and another Python: test_abi.sh <python of the main venv> <python 3.11>
set -euo pipefail
main=$1 other=$2
library=$(pwd)/yoco_ext/libyoco_ext_ops.so
if nm -D --undefined-only "$library" | grep -E ' _?Py[A-Z_]'; then
  echo "the op library must not use Python symbols" >&2
  exit 1
fi
version=$("$other" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=.venv-abi
if [ ! -e $venv/.installed ]; then
  "$other" -m venv $venv
  # The newest tested release; the op library keeps to the stable interface of 2.11.
  $venv/bin/pip install --quiet torch==2.13.0 numpy==2.2.6 safetensors==0.7.0 tqdm==4.67.1 pytest==8.4.2 hypothesis==6.142.5
  touch $venv/.installed
fi
tests="python_tests/test_attention.py python_tests/test_gated_retention.py python_tests/test_attention_decode.py
       python_tests/test_opcheck.py python_tests/test_compile.py"
for python in "$main" $venv/bin/python; do
  "$python" -c 'import sys, torch; print("== Python %d.%d, torch %s" % (*sys.version_info[:2], torch.__version__))'
  YOCO_EXT_LIBRARY=$library PYTHONPATH=. "$python" -m pytest -q -p no:cacheprovider -k "not emulated" $tests
done
echo "one libyoco_ext_ops.so ran under both (second Python: $version)"
