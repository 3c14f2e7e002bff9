# Everything runs in .venv, which is made on first use. PYTHON=... names the interpreter to make it from.
PYTHON ?= python3
OPTIMIZER ?= AdamW
WORKERS ?= 2
TORCH ?= torch==2.13.0
TRITONS ?= 3.6.0 newest

VENV := .venv
PY := $(VENV)/bin/python
ENV := $(VENV)/.env-stamp
DEPS := $(VENV)/.deps-stamp
BUILT := $(VENV)/.built-stamp
PIP := $(PY) -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -q --no-build-isolation --no-deps -e .
# What a build depends on besides its sources, as the last one had it.
OPTIONS := $(VENV)/.build-options
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo lenet bench-check test test-all mutants test-triton-versions gpu gpu-dry build lint docs figures clean FORCE

help:
	@echo "make demo    train a small GPT with torch.optim.AdamW and with fusedstep.AdamW (OPTIMIZER=$(OPTIMIZER))"
	@echo "make lenet   train LeNet under six learning-rate schedules (ARGS=\"--data FOLDER\" for Fashion-MNIST)"
	@echo "make bench-check   measure again what bench/results has of this processor; says which ratio to torch fell"
	@echo "make test    run the tests that need no GPU"
	@echo "make test-all   the same with every optimizer and option in every test of a feature: the whole product"
	@echo "make mutants    put seeded faults into a copy of the tree, and see that the tests notice each"
	@echo "make test-triton-versions   compile the Triton kernels with each of TRITONS=\"$(TRITONS)\""
	@echo "make gpu     on a GPU machine, without network: all stages of make gpu-build, gpu-first, gpu-cuda, gpu-triton,"
	@echo "             gpu-memcheck, gpu-bench, gpu-profile; results in OUT=$(OUT)"
	@echo "make gpu-dry walk through these stages without a GPU"
	@echo "make build   compile what changed and install into $(VENV)"
	@echo "make lint    ruff and clang-format"
	@echo "make docs    the pages of docs/ and the API pages, in build/docs"
	@echo "make figures   write the tables and plots of README.md and docs/ anew from bench/results"
	@echo "make clean   remove $(VENV) and everything built"

# Where there is no GPU these two need no CUDA engine: they take what is built, or build without.
ifeq ($(FUSEDSTEP_CUDA)$(shell nvidia-smi -L 2>/dev/null),)
demo lenet: export FUSEDSTEP_CUDA := $(patsubst cuda=%,%,$(firstword $(shell cat $(OPTIONS) 2>/dev/null || echo cuda=0)))
endif

demo: $(DEPS) $(BUILT)
	$(PY) -m fusedstep.bench.train_gpt --optimizer $(OPTIMIZER)

lenet: $(DEPS) $(BUILT)
	$(PY) -m fusedstep.bench.lenet $(ARGS)

bench-check: $(DEPS) $(BUILT)
	$(PY) -m fusedstep.bench.compare $(ARGS)

test: $(DEPS) $(BUILT)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" $(ARGS)

test-all: export FUSEDSTEP_TEST_ALL := 1
test-all: test

mutants: $(DEPS)
	$(PY) tests/mutants/run.py --workers $(WORKERS) $(ARGS)

# Each Triton lies in a folder of its own that comes before all else; everything but Triton is borrowed from the
# environment.
test-triton-versions: $(DEPS) $(BUILT)
	@failed=; \
	for version in $(TRITONS); do \
	  folder=$(CURDIR)/$(VENV)/triton-$$version; \
	  if [ $$version = newest ]; then \
	    $(PIP) install -q --no-deps --upgrade --target $$folder triton; \
	  else \
	    [ -d $$folder/triton ] || $(PIP) install -q --no-deps --target $$folder triton==$$version; \
	  fi || exit 1; \
	  echo; echo "=== $$(PYTHONPATH=$$folder $(PY) -c 'import triton; print("Triton", triton.__version__, "in", triton.__path__[0])')"; \
	  PYTHONPATH=$$folder $(PY) -m pytest tests/test_triton_compile.py tests/test_triton_launch.py $(ARGS) \
	    || failed="$$failed $$version"; \
	done; \
	[ -z "$$failed" ] || { echo "FAILED with Triton$$failed"; exit 1; }

build: $(DEPS) $(OPTIONS)
	$(INSTALL)
	@touch $(BUILT)

# The package has no module to run, and its script may lie beside another interpreter.
CLANG_FORMAT := $(PY) -c 'import clang_format; clang_format.clang_format()'

lint: $(DEPS)
	@$(PY) -m ruff --version >/dev/null 2>&1 && $(CLANG_FORMAT) --version >/dev/null 2>&1 || \
	  { $(call requirements,p["optional-dependencies"]["lint"]) && $(PIP) install -q -r $(VENV)/requirements.txt; }
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(shell find csrc bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Neither torch nor a build: API pages come from the source's docstrings. Strict: a broken link is an error.
docs: $(ENV)
	@$(PY) -c 'import material, mkdocs, mkdocstrings_handlers.python' 2>/dev/null || \
	  { $(call requirements,p["optional-dependencies"]["docs"]) && $(PIP) install -q -r $(VENV)/requirements.txt; }
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

figures: $(DEPS) $(BUILT)
	$(PY) -m fusedstep.bench.pages

clean:
	rm -rf $(VENV) build dist *.egg-info python/fusedstep/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A torch that PYTHON already has is used through the new environment, and so is all that lies beside it: even where
# PYTHON is itself a virtual environment (which --system-site-packages would pass over), is read-only, or lacks
# ensurepip. Nothing is installed into it. Its pip is used too: ensurepip would put an old setuptools before its own.
# This checkout comes before whatever it may have of this package.
$(ENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fusedstep needs Python 3.11 or newer: make PYTHON=... names one")'
	@if $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)' 2>/dev/null; then \
	  echo "making $(VENV) with the torch of $(PYTHON)"; \
	  $(PYTHON) -c 'import pip' 2>/dev/null && without=--without-pip || without=; \
	  $(PYTHON) -m venv $$without $(VENV) && \
	  $(PYTHON) -c 'import sys; print("$(CURDIR)/python"); [print("import site; site.addsitedir(%r)" % p) for p in sys.path if p.endswith("-packages")]' \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer_packages.pth"; \
	else \
	  echo "making $(VENV)"; \
	  $(PYTHON) -m venv $(VENV); \
	fi
	@touch $@

# $(call requirements,EXPRESSION): writes what the expression over pyproject's [project] lists, one a line.
requirements = $(PY) -c 'import tomllib; t = tomllib.load(open("pyproject.toml", "rb")); p = t["project"]; print(*($1), sep="\n")' > $(VENV)/requirements.txt

# torch first and by version: a plain "torch" would fetch the newest, with gigabytes of CUDA libraries.
$(DEPS): pyproject.toml | $(ENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) install -q $(TORCH)
	@$(call requirements,t["build-system"]["requires"] + p["dependencies"] + p["optional-dependencies"]["test"])
	$(PIP) install -q -r $(VENV)/requirements.txt
	@touch $@

$(OPTIONS): FORCE | $(ENV)
	@echo 'cuda=$(FUSEDSTEP_CUDA) archs=$(FUSEDSTEP_CUDA_ARCHS) werror=$(FUSEDSTEP_WERROR) cxx=$(CXX) nvcc=$(CUDACXX) home=$(CUDA_HOME)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(BUILT): $(SOURCES) $(OPTIONS) | $(ENV)
	$(INSTALL)
	@touch $@

# The stages on a GPU, each under a time limit; their logs and results are in $(OUT), and all together in $(ARCHIVE).
# CARRIED=FILE: objects that another machine has compiled, packed by bench/gpu/carry.py.
STAGES := build first cuda triton memcheck bench profile
OUT ?= build/gpu
ARCHIVE ?= $(OUT)/gpu.tar.gz
RUN_STAGES := $(PYTHON) bench/gpu/stages.py --out $(OUT) --archive $(ARCHIVE) --python $(PYTHON) $(addprefix --carried ,$(CARRIED))

gpu:
	$(RUN_STAGES)

gpu-dry:
	$(RUN_STAGES) --dry

$(addprefix gpu-,$(STAGES)): gpu-%:
	$(RUN_STAGES) $*
