# Everything that a person or CI runs. Needs make and Python 3.11 or 3.12; the rest is installed
# into .venv, from requirements.lock, by the first target that needs it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint audit bench soak lock clean

# More arguments for the command of a target: make test ARGS="-k window -x"
ARGS ?=
# The Python to make .venv with: the first of these that will do.
PYTHON ?= python3.12 python3.11 python3

BIN := .venv/bin
READY := .venv/.ready
CODE := $(wildcard config features store streams training registry serving headrace tests benchmarks)

help: ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18
	@echo '  More arguments by ARGS, for example: make test ARGS="-k window -x"'

demo: $(READY) ## Run the whole system with simulated shoppers; the address is printed first
	@$(BIN)/headrace demo $(ARGS)

# Much of the tests' time is waiting for processes that they start: on two cores three files of them run side by side, so
# a test is also one beside another's load. ARGS="-n 0 -s" shows what they print.
# On a machine without Java or Redis 7 the tests that need them are left out, and it says so;
# with CI=true or HEADRACE_CI=1 that is a failure.
test: $(READY) ## Run the tests
	@missing="$$($(BIN)/python -m tests.support.kafka)"; \
	run="$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder"; \
	if [ -z "$$missing" ]; then exec $$run $(ARGS); fi; \
	if [ "$$CI" = true ] || [ "$$HEADRACE_CI" = 1 ]; then \
		echo "Nothing may be left out here, but $$missing." >&2; exit 1; \
	fi; \
	status=0; $$run -m "not kafka" $(ARGS) || status=$$?; \
	echo "LEFT OUT: the tests that need a real Apache Kafka, since $$missing."; \
	exit $$status

test-long: ## Run the tests with all rounds and seeds that docs/reliability.md reports
	@HEADRACE_TEST_LONG=1 $(MAKE) test

lint: $(READY) audit ## Check style, format, types and the dependencies' advisories
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(CODE)

soak: $(READY) ## Serve 10 minutes at 80 %, then twice too much; ARGS="--seconds 60" for less
	@$(BIN)/python -m benchmarks.soak $(ARGS)

# Where only a mirror of packages can be reached, it has no advisories: then it says so, and is no failure.
audit: $(READY) ## Ask PyPI's advisories about the locked versions
	@said="$$(timeout 120 $(BIN)/pip-audit --disable-pip --require-hashes --progress-spinner off \
		-r requirements.lock 2>&1)"; status=$$?; \
	if grep -q '^Found ' <<<"$$said"; then echo "$$said"; exit 1; fi; \
	unasked="$$(grep -c 'could not be audited' <<<"$$said")"; [ $$status = 0 ] || unasked=all; \
	echo "No known vulnerabilities; packages NOT AUDITED, for want of a way to PyPI's advisories: $$unasked"

bench: $(READY) ## Measure against the peers
	@$(BIN)/python -m benchmarks $(ARGS)

lock: $(READY) ## Solve the dependencies anew and write requirements.lock; ARGS=--upgrade for newer ones
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev \
		--generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' $(ARGS) pyproject.toml -o requirements.lock
	@! grep -n '://' requirements.lock || { echo 'requirements.lock names an address' >&2; exit 1; }

clean: ## Remove what was made, .venv and the cached Kafka too
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv is installed first, at the version and with the hashes that the lock has for it. It reads no
# pip.conf: where only pip knows the way to a package index, pip installs the same, more slowly.
# Everything is compiled once and for all: where PYTHONDONTWRITEBYTECODE is set, as in many images, each
# start of a process would compile it again, for most of its time.
$(READY): requirements.lock pyproject.toml
	@$(choose_python)
	@echo 'Installing what requirements.lock lists into .venv ...'
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.lock
	@export UV_PYTHON_DOWNLOADS=never; uv="$(BIN)/uv pip"; on="--python $(BIN)/python"; \
	$$uv sync --quiet $$on --compile-bytecode --require-hashes requirements.lock \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	$$uv install --quiet $$on --offline --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q $(CODE)
	@echo 'Compiling the loops ...'
	@$(BIN)/python -W ignore -m headrace.compiled
	@touch $@

# Each candidate is run, not only found: a pyenv shim may be there for a Python that is not.
define choose_python
set -e; good='import ensurepip, sys, venv; sys.exit(not ((3, 11) <= sys.version_info < (3, 13)))'; \
if [ -x $(BIN)/python ] && $(BIN)/python -c "$$good" 2>/dev/null \
	&& $(BIN)/python -m pip --version >/dev/null 2>&1; then exit 0; fi; \
for python in $(PYTHON); do \
	if "$$python" -c "$$good" >/dev/null 2>&1; then \
		echo "Making .venv with $$("$$python" --version) ..."; \
		exec "$$python" -m venv --clear .venv; \
	fi; \
done; \
echo 'Headrace needs Python 3.11 or 3.12 with its venv module (bytewax has nothing for others).' >&2; \
echo 'None of these is one: $(PYTHON).' >&2; \
echo 'Install one (Debian: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12' >&2; \
exit 1
endef
