# `make bench` and `make test` need nothing but Python >= 3.10 and a C++17 compiler: they create .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# How pip is called: quietly, and without telling us that there is a newer pip.
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

.PHONY: bench
bench: $(VENV)/built ## Train small models, measure against every rival, write a report (5 minutes)
	$(BIN)/python -m pysmooth.bench

.PHONY: bench-full
bench-full: $(VENV)/built ## The same with all models and all rivals (an hour)
	$(BIN)/python -m pysmooth.bench --full

.PHONY: report
report: $(VENV)/rivals ## One page for sceptics: also memory, scaling, other packages' optimizers (an hour; PARTS=)
	$(BIN)/python -m pysmooth.bench report $(if $(PARTS),--parts $(PARTS))

.PHONY: bench-compare
bench-compare: $(VENV)/built ## Which steps got slower since BASE=revision: times by turns, and instructions (valgrind)
	$(BIN)/python -m pysmooth.bench compare $(or $(BASE),$(error say BASE=revision))

# Optimizers of other packages. DeepSpeed is built here, beside the torch that it asks for, and compiles its kernels
# when they are first used.
$(VENV)/rivals: $(VENV)/built
	DS_BUILD_OPS=0 $(PIP) install --no-build-isolation --group rivals
	touch $@

.PHONY: papers
papers: $(VENV)/built ## Claims of papers, measured: figures and verdicts in docs/papers.md (DATA=folder, libsvm)
	$(BIN)/python -m pysmooth.bench papers --docs docs $(if $(DATA),--data $(DATA))

# Tests of the Triton backend, in its interpreter: these of all that take a backend.
BATTERY := $(wildcard tests/test_battery_*.py)
FAULTS := $(wildcard tests/test_faults_*.py)
INTERPRETED := $(BATTERY) $(FAULTS) $(addprefix tests/test_,$(addsuffix .py,triton triton_codec triton_launches triton_norms triton_words triton_absorb triton_select triton_plus triton_graphs absorb_accumulation absorb_copies agc bad_input_optim device_refusals grad_scaler sharded sharded_amp sharded_sizes sharded_tp sharded_training))

# The CUDA kernels on the host: the CUDA backend's part of these, and an engine below a stub runtime.
EMULATED := $(BATTERY) $(FAULTS) $(addprefix tests/test_,$(addsuffix .py,cuda_engine cuda_clip cuda_codec cuda_devices cuda_absorb absorb absorb_accumulation \
	absorb_copies clip_grad agc bad_input_optim device_refusals grad_scaler layouts low_precision param_storage sharded sharded_amp sharded_sizes sharded_tp sharded_training state_dict torch_integration typing))

# One process a core; the one that ends first takes tests from the other. Idle threads of OpenMP must not spin then.
WORKERS ?= 2
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --timeout 600 -n $(WORKERS) --dist worksteal

.PHONY: test
test: $(VENV)/checked lint tidy ## Lint, types, build with warnings as errors, all tests, lines and branches run, wheel smoke test
	$(MAKE) branches
	$(MAKE) coverage
	printf '%s\n' cuda:80 cuda:90 hip:gfx942 | xargs -P $(WORKERS) -n 1 $(BIN)/python -m pysmooth.triton_kernels.compile --targets
	.ci/wheel-smoke $(BIN)/python
	$(MAKE) docs

.PHONY: stages
stages: $(VENV)/checked
	$(PYTEST) tests bench --benchmark-disable $(addprefix --ignore ,$(KERNELS))
	PYSMOOTH_EMULATED=1 $(PYTEST) $(EMULATED)
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

# coverage.py, in all processes that tests start; what counts is in pyproject.toml: tool.coverage.
.PHONY: branches
branches: $(VENV)/checked ## Lines and branches of the Python that all tests run: less than 95 % fail
	rm -rf build/python && mkdir -p build/python
	COVERAGE_PROCESS_START=$(abspath pyproject.toml) $(MAKE) stages
	$(BIN)/python .ci/python-coverage 95

.PHONY: docs
docs: $(VENV)/built ## Build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -q -n -W --keep-going -d docs/_build/doctrees docs docs/_build/html

# Every CUDA kernel with every dtype, size and layout, and looked at for races.
KERNELS := $(wildcard tests/test_cuda_kernels_*.py)

.PHONY: test-cuda
test-cuda: $(VENV)/checked ## CUDA kernels against the CPU backend, emulated; nvcc for sm_80, sm_90, sm_100 (half an hour)
	$(BIN)/python -m pytest $(KERNELS) -q --timeout 600
	$(BIN)/python .ci/cuda-kernels

# Flower pins older versions of what `bench` uses, and brings ray: an environment of its own.
FEDERATED := .venv-federated
$(FEDERATED)/made: pyproject.toml
	$(PYTHON) -m venv $(FEDERATED)
	$(FEDERATED)/bin/python -m pip --disable-pip-version-check -q install -U 'pip>=25.1'
	$(FEDERATED)/bin/python -m pip --disable-pip-version-check -q install $(TORCH) --group federated
	touch $@

.PHONY: test-federated
test-federated: $(VENV)/built $(FEDERATED)/made ## Federated methods under Flower, its simulation engine included
	FLWR_TELEMETRY_ENABLED=0 PYTHONPATH=. $(FEDERATED)/bin/python -m pytest tests/flower -q

.PHONY: lint
lint: $(VENV)/built ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pysmooth bench triton_kernels
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'docs/*.h' 'tests/*.cu' 'tests/*.h' 'tests/*.cpp')

# What is compiled once; not the kernels, which are templates compiled once per instruction set.
TIDIED := $(wildcard csrc/bindings/*.cpp) $(addprefix csrc/cpu/,$(addsuffix .cpp,clients dispatch messages rows run select staged))
# Where the compiler keeps omp.h, which clang-tidy does not bring.
OMP_INCLUDE = $(shell $(or $(CXX),g++) -print-file-name=include)

.PHONY: tidy
tidy: $(VENV)/checked ## clang-tidy
	$(BIN)/ninja -C build/pysmooth._cpu-* -t compdb compile > build/compile_commands.json
	printf '%s\n' $(TIDIED) | xargs -P $$(nproc) -n 1 $(BIN)/clang-tidy -p build --quiet --extra-arg=-idirafter$(OMP_INCLUDE)

# The native core with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own.
SANITIZED := build/sanitize/lib
SANITIZERS := -fsanitize=address,undefined
$(SANITIZED)/built: $(VENV)/built $(SOURCES)
	PYSMOOTH_BUILD=sanitize PYSMOOTH_CUDA=0 PYSMOOTH_LDFLAGS="$(SANITIZERS)" \
	PYSMOOTH_CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer $(SANITIZERS) -fno-sanitize-recover=undefined" \
	$(BIN)/python setup.py -q build -b build/sanitize --build-lib $(SANITIZED)
	touch $@

# Python itself is not built for them: the library goes first, and what Python leaves is no leak of ours. Threads of
# OpenMP must not spin, or cases with three of them wait for each other where cores are few or busy.
UNDER = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" OMP_WAIT_POLICY=passive \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONDONTWRITEBYTECODE=1
# A case is a seed: FIRST=20000 goes on after the first 20,000.
CASES ?= 10000
FIRST ?= 0
# From a folder beside which there is no pysmooth: what is imported is what PYTHONPATH says, or is installed.
BESIDE = cd tests && env
FUZZ = $(abspath $(BIN))/python -W ignore -m fuzz --cases $(CASES) --first $(FIRST)

# With gcov's counters, and for one instruction set: levels are compiled from the same lines, and gcov adds them up.
COVERED := build/coverage/lib
$(COVERED)/built: $(VENV)/built $(SOURCES) $(shell find pysmooth triton_kernels -name '*.py')
	PYSMOOTH_BUILD=coverage PYSMOOTH_CUDA=0 PYSMOOTH_LEVELS=baseline PYSMOOTH_LDFLAGS=--coverage \
	PYSMOOTH_CXXFLAGS="-O1 --coverage" $(BIN)/python setup.py -q build -b build/coverage --build-lib $(COVERED)
	touch $@

# What calls the native core; then tensors read by `data_ptr()` alone, and what Triton's backend has of it.
COUNTED := $(addprefix tests/test_,$(addsuffix .py,battery_numbers battery_nonfinite battery_gradients layouts kernels norm_edges \
	clip_grad low_precision low_residual param_storage selection codec aggregate federated federated_clip21 absorb \
	absorb_accumulation absorb_copies agc norm_in_backward norm_in_backward_hooks norm_in_backward_stale direct compressors \
	feedback random functional swap state_dict clip21 memory_layouts diagnostics bad_input_optim arithmetic numerics watch sharded_alone))
# What draws thousands of times, converges, or is large runs no other lines than the rest.
LEFT_OUT = not eager and not leak and not compiled and not unbiased and not uniform and not converges and not budget \
	and not special_cases and not switches_it_off and not 2_to_the_31
# Processes that end by themselves, and add up their counts in files that they lock: xdist kills a worker that takes
# longer than ten seconds to end, and what it has counted is lost.
COUNT = env OMP_WAIT_POLICY=passive PYTHONPATH=$(COVERED) PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 \
	$(BIN)/python -m pytest -q --timeout 600 -p no:cacheprovider

.PHONY: coverage
coverage: $(COVERED)/built ## Lines of the native core that tests run, by gcov: less than 95 % fail
	find build/coverage -name '*.gcda' -delete
	printf '%s\n' $(COUNTED) | xargs -P $(WORKERS) -n 6 $(COUNT) -k "$(LEFT_OUT)"
	PYSMOOTH_DIRECT=0 PYSMOOTH_DLPACK=0 $(COUNT) tests/test_layouts.py tests/test_bad_input_optim.py -k "$(LEFT_OUT)"
	TRITON_INTERPRET=1 $(COUNT) tests/test_triton_launches.py
	.ci/cpp-coverage 95

.PHONY: mutants
mutants: $(VENV)/built ## Faults put into formulas of the native core: which ones do tests see? (half an hour)
	cd tests && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m mutants native

.PHONY: sanitize
sanitize: $(SANITIZED)/built ## Battery and fuzzing of the native core under ASan and UBSan (15 minutes; CASES=100000: 50)
	$(BESIDE) $(UNDER) PYTHONPATH=$(abspath $(SANITIZED)) $(abspath $(BIN))/python -m fuzz.overflow 2>&1 | \
		grep "SUMMARY: AddressSanitizer: heap-buffer-overflow .*pack_bits"
	$(BESIDE) $(UNDER) PYTHONPATH=$(abspath $(SANITIZED)) $(abspath $(BIN))/python -m pytest \
		$(notdir $(BATTERY)) test_layouts.py test_kernels.py test_norm_edges.py $(notdir $(FAULTS)) --capture=sys -q \
		-p no:cacheprovider -k "not eager and not leak and not native_memory and not compiled"
	$(BESIDE) $(UNDER) PYTHONPATH=$(abspath $(SANITIZED)) $(FUZZ)

.PHONY: fuzz
fuzz: $(VENV)/built ## Random lives of optimizers, native against eager: CASES=100000 takes ten minutes
	$(BESIDE) OMP_WAIT_POLICY=passive $(FUZZ)

.PHONY: soak
soak: $(VENV)/built ## 100,000 steps: memory must not grow
	$(BESIDE) $(abspath $(BIN))/python -m fuzz.soak

.PHONY: wheels
wheels: $(VENV)/built ## Build sdist and wheel into dist/, look into the wheel, use it in a clean environment
	.ci/wheel-smoke $(BIN)/python dist

.PHONY: build
build: $(VENV)/built ## Build the extension and install the package in .venv, editable

.PHONY: gpu
gpu: ## On a machine with a GPU: build with what is installed, GPU tests, GPU benchmarks (10 minutes; STEPS=, BUDGET=)
	$(if $(STEPS),STEPS=$(STEPS)) $(if $(BUDGET),BUDGET=$(BUDGET)) $(PYTHON) bench/gpu.py

.PHONY: clean
clean: ## Remove everything that was built, .venv included
	rm -rf $(VENV) $(FEDERATED) build dist *.egg-info pysmooth/*.so

# The environment, made again when its requirements change.
$(VENV)/made: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -U 'pip>=25.1' 'setuptools>=77' wheel
	$(PIP) install $(TORCH)
	$(PIP) install 'pybind11>=3.0' 'ninja>=1.11' 'apache-tvm-ffi>=0.1.5' --group dev --group docs --group integrations
	touch $@

# The package, editable. The extension is compiled incrementally by ninja (setup.py).
$(VENV)/built: $(VENV)/made $(SOURCES)
	$(PIP) install --no-build-isolation -e '.[bench]'
	touch $@

# The same with warnings as errors, and the CUDA module where there is an nvcc.
NVCC := $(shell command -v nvcc)
$(VENV)/checked: $(VENV)/made $(SOURCES)
	PYSMOOTH_WERROR=1 $(if $(NVCC),PYSMOOTH_CUDA=1 PYSMOOTH_CUDA_ARCHS=90) $(PIP) install --no-build-isolation -e '.[bench]'
	touch $(VENV)/built $@
