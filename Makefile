# make demo: the main job on real text.   make test: all tests.   Both make what they need and are quick when run again.
PYTHON ?= python3
VENV   ?= .venv
PYTHON311 ?= python3.11
OUTPUT ?= demo_output
PY     := $(VENV)/bin/python

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
CUDA_SOURCES := $(shell find csrc/cuda -type f 2>/dev/null) csrc/params.h csrc/mask.h

# The CUDA back end is built where there is a GPU to run it; elsewhere nobody waits for nvcc.
HAVE_GPU := $(wildcard /dev/nvidia0)
CUDA     := $(if $(HAVE_GPU),auto,0)

# The CUDA kernels also run on a PTX emulator: with nvcc and ptxsim at hand the tests include the back end "emulated".
PTXSIM_DIR ?= ../shared/ptxsim
NVCC       := $(shell command -v nvcc 2>/dev/null)
HAVE_EMULATOR := $(and $(NVCC),$(wildcard $(PTXSIM_DIR)/CMakeLists.txt))
EMULATED   := build/emulated/libyoco_ext_emulated.so

.PHONY: demo test skipped test-cpu test-emulated test-abi sanitize bench gpu lint format clean emulated

demo: $(VENV)/.built
	$(VENV)/bin/yoco-ext demo --output $(OUTPUT)

test: test-cpu test-emulated

# One thread per process: two processes whose threads wait for each other on two cores take ten times as long. What
# several threads do is tested by tests that set their number.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

test-cpu: $(VENV)/.built $(VENV)/.compat
	$(PYTEST) --dist loadfile $(PYTEST_FLAGS) -k "not emulated" python_tests

# ---- environment and build ----
$(VENV)/.installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'yoco_ext needs Python 3.10 or newer: make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

# the packages that yoco_ext.compat serves: without them the tests of test_compat_fla.py and test_compat_transformers*.py are skipped
$(VENV)/.compat: $(VENV)/.installed requirements-compat.txt
	$(PY) -m pip install --quiet -r requirements-compat.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" YOCO_EXT_CUDA=$(CUDA) $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# ---- the CUDA kernels on the emulator ----
# Twice where the code depends on the GPU: as a Hopper GPU (PTXSIM_CC=90, the default) everything, as an older one the
# kernels that Hopper has its own versions of.
BOTH_FAMILIES := $(wildcard python_tests/test_attention*.py python_tests/test_gated_retention*.py \
  python_tests/test_cuda_*.py python_tests/test_shared_kv.py)
EMULATED_PYTEST = YOCO_EXT_EMULATED_LIBRARY=$(abspath $(EMULATED)) $(PYTEST) --dist load $(PYTEST_FLAGS) -k emulated

ifeq ($(HAVE_EMULATOR),)
NO_EMULATOR := nvcc $(if $(NVCC),is at $(NVCC),was not found on the PATH); \
  ptxsim $(if $(wildcard $(PTXSIM_DIR)/CMakeLists.txt),is in,was not found in) $(PTXSIM_DIR) (PTXSIM_DIR)
test-emulated:
	@echo "SKIPPED: the CUDA kernels on the emulator. $(NO_EMULATOR)"
emulated:
	@echo "emulated back end not built: $(NO_EMULATOR)"; false
else
test-emulated: $(VENV)/.built $(EMULATED)
	$(EMULATED_PYTEST) python_tests
	PTXSIM_CC=80 $(EMULATED_PYTEST) $(BOTH_FAMILIES)
emulated: $(EMULATED)
$(EMULATED): $(VENV)/.installed $(CUDA_SOURCES)
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S csrc/cuda -B build/emulated -G Ninja -DYOCO_EMULATED=ON \
	  -DPTXSIM_DIR=$(abspath $(PTXSIM_DIR)) -DPython_EXECUTABLE=$(abspath $(PY)) -DCMAKE_CUDA_COMPILER=$(NVCC) \
	  -DYOCO_CUDA_ARCHS="80-virtual;90a-virtual"
	PATH="$(abspath $(VENV))/bin:$$PATH" ninja -C build/emulated yoco_ext_emulated
	touch $@
endif

# What `make test` leaves out on this machine.
skipped:
	@echo "GPU: $(if $(HAVE_GPU),tested,none here; cuda tests not run). Emulator: $(if $(HAVE_EMULATOR),tested,not run. $(NO_EMULATOR))"

# ---- one op library, several torch releases and Python versions ----
test-abi: $(VENV)/.built
	.ci/test_abi.sh $(abspath $(PY)) $(PYTHON311)

# ---- AddressSanitizer and UBSan over the op tests ----
sanitize: $(VENV)/.installed
	PATH="$(abspath $(VENV))/bin:$$PATH" cmake -S . -B build/sanitize -G Ninja -DYOCO_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(abspath $(PY)) -DYOCO_CPU_ISAS="avx2$(shell grep -q amx_bf16 /proc/cpuinfo && echo ';amx')"
	PATH="$(abspath $(VENV))/bin:$$PATH" ninja -C build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:strict_init_order=1 UBSAN_OPTIONS=print_stacktrace=1 \
	YOCO_EXT_LIBRARY=$(abspath build/sanitize/libyoco_ext_ops.so) PYTHONPATH=. \
	$(PYTEST) -p no:cacheprovider -k "cpu and not compile" python_tests/test_attention.py \
	  python_tests/test_attention_masks.py python_tests/test_attention_decode.py python_tests/test_append_kv.py \
	  python_tests/test_gated_retention.py python_tests/test_gated_retention_step.py python_tests/test_rms_norm.py \
	  python_tests/test_rotary.py python_tests/test_swiglu.py python_tests/test_retention_output.py \
	  python_tests/test_differential.py python_tests/test_gated_memory.py python_tests/test_threads.py \
	  python_tests/test_retention_rotary.py python_tests/test_retention_output_fused.py

bench: $(VENV)/.built
	$(VENV)/bin/yoco-ext bench

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	find csrc \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .
	find csrc \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) | xargs $(VENV)/bin/clang-format -i

clean:
	rm -rf build dist *.egg-info $(VENV)/.built yoco_ext/*.so

# ---- on a machine with a GPU: make gpu OUT=folder [STAGE=build|test|sanitize|bench] ----
OUT   ?= gpu_output
STAGE ?= all
gpu:
	.ci/gpu.sh $(OUT) $(STAGE)
