# Every target works in a fresh clone: it makes its own .venv first.
#   make demo    trains a zoo of small networks and SANE on it, and writes runs/quickstart/report.html
#   make test    all tests: native kernels, references alone, Triton interpreted, CUDA compiled; every benchmark once
#   make bench   all benchmarks of this machine, rows to benchmarks/results
#   make fuzz    50,000 damaged files for all readers, in minutes
#   make sanitize  operators' tests and a fuzzer of them, with kernels that notice bad addresses and undefined behaviour
#   make lint    ruff and clang-format
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin
SOURCES = $(wildcard csrc/*.h csrc/*/*.* csrc/cpu/random/*)
# the architecture to compile CUDA kernels for, where nvcc is found; a GPU is not needed
export FASTWS_CUDA_ARCHS ?= 90a

.PHONY: demo test bench fuzz sanitize lint install clean

install: .venv/installed

# kernels are compiled while packages are fetched; files of Python are compiled when they are imported
.venv/installed: pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile "$(TORCH)" "setuptools>=77" wheel ninja
	$(BIN)/python setup.py -q build_ext --inplace & build=$$!; \
	FASTWS_BUILD=none $(BIN)/pip install -q --no-compile --no-build-isolation -e ".[dev]" && wait $$build
	touch $@

demo: install
	$(BIN)/fastws quickstart

test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal
	FASTWS_NATIVE=0 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -k "$(REFERENCES)" tests/test_house.py $(OP_TESTS)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal benchmarks --benchmark-disable

# what a machine without compilers runs: the references; Triton and device code on the host are the same without libraries
REFERENCES = not triton and not on_host
OP_TESTS = $(patsubst fastws/ops/%.py,tests/test_%.py,$(filter-out %/__init__.py,$(wildcard fastws/ops/*.py)))

bench: install
	$(BIN)/fastws bench --out benchmarks/results
	$(BIN)/python benchmarks/tables.py

fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --mutants 50000

# in a copy of the package, so that the checkout keeps its libraries; libstdc++ comes early for exceptions to be found
SANITIZED = CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined" FASTWS_BUILD=cpu
PRELOADED = $(foreach name,asan ubsan stdc++,$(shell $(or $(CXX),c++) -print-file-name=lib$(name).so))
SANITIZING = LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=build/sanitize PYTHONSAFEPATH=1 OMP_NUM_THREADS=1

sanitize: install
	$(SANITIZED) $(BIN)/python setup.py -q build --build-lib build/sanitize
	$(SANITIZING) $(BIN)/python tests/fuzz_operators.py --calls 20000
	$(SANITIZING) $(BIN)/python -m pytest -q $(OP_TESTS) tests/test_trust.py -k "not triton and not host and not compile"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(SOURCES))

clean:
	rm -rf .venv build fastws/*.so
