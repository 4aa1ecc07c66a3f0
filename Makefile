# make demo and make test do all their own set-up in .venv; the other targets use $(PYTHON) as it is.
PYTHON ?= python3
WITH ?=          # more packages for .venv, such as WITH="torch jax"
ARGS ?=          # passed on to pytest
SECONDS ?= 60    # of the fuzzer
VENV = .venv/bin/python
C_FILES = $(shell git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: help demo test inplace gpu-test bench ctest asan tsan arm64 fuzz wheels wheel-cpu wheel-cuda \
    release-check format lint clean

help:
	@echo 'make demo      set up, build, and run the fused layer on real model shapes (WITH=torch: beside torch, too)'
	@echo 'make test      set up, build, and run all tests (WITH="torch==2.13.0 jax" tests those frameworks too)'
	@echo 'make inplace   build in place with $(PYTHON): no network, no set-up'
	@echo 'make gpu-test  build in place and run the GPU tests with $(PYTHON): no network, no set-up'
	@echo 'make bench     build in place and measure every op, JSON into build/bench'
	@echo 'make ctest     the kernels from plain C, without Python'
	@echo 'make arm64     the same for arm64 with NEON, cross-compiled and emulated by qemu'
	@echo 'make asan      the tests under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make tsan      the threads of the CPU backend under ThreadSanitizer'
	@echo 'make fuzz      SECONDS=60 of random calls, a quarter of it of hostile objects, in place with $(PYTHON)'
	@echo 'make wheels    wheels for the CPU and with CUDA, in dist/cpu and dist/cu13'
	@echo 'make release-check   what .ci/run leaves out: all architectures, other Pythons, long fuzz; log in build'
	@echo 'make format    format Python and C;  make lint checks both'
	@echo 'make clean     remove what was built'

# What pyproject.toml names, and nothing else. Packages that $(PYTHON) already has, such as torch, are seen.
.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "minivllm needs Python >= 3.11; set PYTHON="'
	@echo 'setting up .venv'
	@$(PYTHON) -m venv --system-site-packages .venv
	@$(VENV) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*p["build-system"]["requires"], \
	    *p["project"]["dependencies"], *p["project"]["optional-dependencies"]["test"], sep="\n")' > .venv/requirements.txt
	@$(VENV) -m pip install -q --disable-pip-version-check -r .venv/requirements.txt
	@touch $@

.venv/with: .venv/ready
	@$(if $(strip $(WITH)),$(VENV) -m pip install -q --disable-pip-version-check $(WITH))

.PHONY: .venv/with

demo: .venv/with
	@$(VENV) setup.py -q build_ext --inplace
	@$(VENV) -m examples.demo

test: .venv/with
	@$(VENV) setup.py -q build_ext --inplace
	$(VENV) -m pytest $(ARGS)

inplace:
	$(PYTHON) setup.py -q build_ext --inplace

gpu-test: inplace
	$(PYTHON) -m pytest -m gpu $(ARGS)

bench: inplace
	@mkdir -p build/bench
	for op in rms_norm add_rms_norm rms_norm_qkv; do $(PYTHON) -m benchmarks $$op --json build/bench/$$op.json || exit; done

ctest:
	$(PYTHON) setup.py -q build_c
	for run in 1 2 3 4 5 6 7 8 9 10; do build/c/test_first_call || exit; done
	build/c/test_rms_norm
	build/c/test_kernels
	build/c/test_act_and_mul
	build/c/test_act_and_mul_calls
	build/c/test_plan
	build/c/test_pool
	build/c/test_float_mode

fuzz: inplace
	PYTHONPATH=tests $(PYTHON) -m fuzz cpu --seconds $(SECONDS) $(ARGS)
	PYTHONPATH=tests $(PYTHON) -m fuzz objects --seconds $$(($(SECONDS) / 4)) $(ARGS)

# Without CUDA, and in a directory of its own. libstdc++ comes along because torch throws exceptions.
ASAN_LIB = $(CURDIR)/build/asan/lib
asan: .venv/with
	CC=gcc MINIVLLM_SANITIZE=address,undefined MINIVLLM_CUDA=0 $(VENV) setup.py -q build_py --build-lib $(ASAN_LIB) \
	    build_ext --build-lib $(ASAN_LIB) --build-temp build/asan/temp
	PYTHONPATH=$(ASAN_LIB) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    $(VENV) -P -m pytest $(ARGS)

# Without Python, and in a directory of its own.
tsan:
	CC=gcc MINIVLLM_SANITIZE=thread MINIVLLM_CUDA=0 $(PYTHON) setup.py -q build_c --build-temp build/tsan/temp \
	    --build-programs build/tsan
	for program in test_pool test_first_call; do TSAN_OPTIONS=halt_on_error=1 build/tsan/$$program || exit; done

# The C programs for arm64, under the user mode of qemu. ARM64=fast leaves out what takes minutes there.
ARM64_CC = aarch64-linux-gnu-gcc
QEMU = $(firstword $(shell command -v qemu-aarch64-static qemu-aarch64) qemu-aarch64-static)
RUN_ARM64 = $(QEMU) -L /usr/aarch64-linux-gnu build/arm64
arm64:
	@command -v $(ARM64_CC) >/dev/null || { echo 'make arm64: $(ARM64_CC) is missing: install gcc-aarch64-linux-gnu and libc6-dev-arm64-cross'; exit 1; }
	@command -v $(QEMU) >/dev/null || { echo 'make arm64: $(QEMU) is missing: install qemu-user-static'; exit 1; }
	CC=$(ARM64_CC) MINIVLLM_CUDA=0 MINIVLLM_WERROR=1 $(PYTHON) setup.py -q build_c --build-temp build/arm64/temp \
	    --build-programs build/arm64
	$(RUN_ARM64)/test_first_call
	$(RUN_ARM64)/test_plan
	$(RUN_ARM64)/test_act_and_mul_calls
	$(RUN_ARM64)/test_float_mode
	$(RUN_ARM64)/test_pool 4
ifeq ($(ARM64),fast)
	$(RUN_ARM64)/test_kernels neon
else
	$(RUN_ARM64)/test_kernels
	$(RUN_ARM64)/test_rms_norm
	$(RUN_ARM64)/test_act_and_mul
endif

.venv/wheels: .venv/ready tools/requirements.txt
	@$(VENV) -m venv .venv/wheels-env
	@.venv/wheels-env/bin/pip install -q --disable-pip-version-check -r tools/requirements.txt
	@touch $@

wheels: wheel-cpu wheel-cuda

wheel-cpu: .venv/wheels
	.venv/wheels-env/bin/python tools/wheels.py cpu

wheel-cuda: .venv/wheels
	.venv/wheels-env/bin/python tools/wheels.py cuda $(if $(ARCHS),--archs '$(ARCHS)')

release-check: .venv/wheels
	tools/release_check.sh

.venv/ruff: .venv/ready
	@$(VENV) -m pip install -q --disable-pip-version-check 'ruff==0.17.5'
	@touch $@

format: .venv/ruff
	$(VENV) -m ruff check --fix --quiet .
	$(VENV) -m ruff format --quiet .
	clang-format -i $(C_FILES)

lint: .venv/ruff
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	clang-format --dry-run -Werror $(C_FILES)

clean:
	rm -rf build dist *.egg-info minivllm/*.so
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
