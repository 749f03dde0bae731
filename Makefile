# Two commands do everything by themselves, on Debian or Ubuntu with Python 3.11 or newer:
#   make serve   opens Leanscope on http://127.0.0.1:5006 (ARGS="--port 8000" for another port)
#   make test    linters, types and every test

# The first Python that is new enough, of those with the venv module if there is one.
PYTHONS := .venv/bin/python python3.13 python3.12 python3.11 python3
PYTHON := $(shell for need in "import ensurepip" "pass"; do for python in $(PYTHONS); do \
	"$$python" -c "$$need; import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo "$$python" && exit; \
	done; done)
SETUP = $(or $(PYTHON),$(error Leanscope needs Python 3.11 or newer: apt-get install python3 python3-venv)) -m app.install
RUN := .venv/bin/python -m

# Two workers, each with one thread of arithmetic. One of them drives the browser (tests/conftest.py groups those tests).
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist loadgroup
LINT = $(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy

.DEFAULT_GOAL := help
.PHONY: help serve check test bench pins clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

serve:  ## install what is missing, then open the pages
	@$(SETUP) serve
	@.venv/bin/leanscope serve $(ARGS)

check:  ## linters, types and quick tests, in under a minute
	@$(SETUP) check
	$(LINT)
	$(PYTEST) -q -m "not slow and not browser and not real"

test:  ## linters, types and every test
	@$(SETUP) test
	$(LINT)
	$(PYTEST)

bench:  ## the speed budgets, measured on this machine
	@$(SETUP) test
	for file in tests/benchmarks/bench_*.py; do $(RUN) tests.benchmarks.$$(basename $$file .py) || exit 1; done

pins:  ## write the installed versions into constraints.txt, to be looked at before they are kept
	$(RUN) pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > constraints.new
	@echo "constraints.new is written; move what you want to keep into constraints.txt"

clean:  ## remove what make made (the model and the fonts stay in the cache folder)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info constraints.new
