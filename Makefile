# Works with a Mac's own tools: GNU make 3.81, bash 3.2 and BSD tools. noxfile.py defines the targets.
# Any Python 3.9 or later can install nox and uv; uv installs everything else.
# To choose a Python: make test PYTHON=python3.13

# Values from the command line are data: make must not expand them, whatever the variable's name.
$(foreach it.is,$(.VARIABLES),$(if $(findstring $$,$(it.is)),,\
  $(if $(filter command,$(origin $(it.is))),\
    $(eval override $(it.is) := $$(value $(it.is)))$(eval export $(it.is)))))
export ORBCTL FAULT_SEED ITEM VERSION PYTHON EXACTLY

override CANDIDATES = python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9
# An explicit PYTHON is always used. Otherwise, a newer one may be used for copier.
ifeq ($(origin PYTHON),override)
override EXACTLY := 1
else
override EXACTLY :=
PYTHON := $(shell for python in $(CANDIDATES); do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1 \
	&& echo "$$python" && break; done)
endif
override PIP = https://files.pythonhosted.org/packages/44/3c/d717024885424591d5376220b5e836c2d5293ce2011523c9de23ff7bf068/pip-25.3-py3-none-any.whl

.NOTPARALLEL:
.PHONY: help demo unit test thorough boot hosts template compat bench conformance faults contract lint coverage docs release-test release-check release clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

demo: ## render the template into ./demo and deploy it to a machine, twice
unit: ## run the quick tests that need no machine (under half a minute)
test: ## run the test suite, except slow tests (under six minutes)
thorough: ## test all combinations of shells, users and transports, and races (about eight minutes)
boot: ## test machines that boot, and their network (about seven minutes)
hosts: ## test interrupted runs, and differences between hosts (about seven minutes)
template: ## test every combination of the template's answers (about twelve minutes)
compat: ## test each supported Python with its pyinfra (about ten minutes)
bench: ## compare deploys with other connectors, for docs/performance.md (about an hour)
conformance: ## run the connector's suite and write docs/conformance.md
faults: ## run 10,000 steps with random faults (FAULT_SEED repeats a run)
contract: ## check an orbctl against its documentation (ORBCTL=orbctl: OrbStack's own)
lint: ## check style and types
coverage: ## run the test suite and measure its coverage of src/
docs: ## build the documentation and run its code blocks
release-test: ## plant faults that release-check must find
release-check: ## check everything that a release needs (ITEM=NAME: only one item)
release: ## prepare a release: version, changelog, commit and tag (VERSION=1.2.3)
clean: ## delete everything that these targets created, machines included

demo unit test thorough boot hosts template compat bench conformance faults contract lint coverage docs release-test release-check release: .cache/nox/bin/nox
	@exec .cache/nox/bin/python -m nox --session $@

# Without .cache, there is nothing to stop. The environment of nox is deleted last.
clean: $(if $(wildcard .cache),.cache/nox/bin/nox)
	@test ! -e .cache || .cache/nox/bin/python -m nox --session clean
	@rm -rf build demo dist site .cache .venv .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +

# Debian's Python has no pip, so pip runs from its wheel.
.cache/nox/bin/nox:
	@test -n "$$PYTHON" || { echo "needs Python 3.9 or later on PATH" >&2; exit 1; }
	@echo "setting up nox and uv in .cache/nox"
	@"$$PYTHON" -m venv --clear .cache/nox >/dev/null 2>&1 || { \
		"$$PYTHON" -m venv --clear --without-pip .cache/nox && .cache/nox/bin/python -c \
			'import sys, urllib.request as u; u.urlretrieve(*sys.argv[1:])' $(PIP) .cache/nox/pip.whl; }
	@PYTHONPATH=.cache/nox/pip.whl .cache/nox/bin/python -m pip install --quiet \
		--disable-pip-version-check 'nox>=2026.4' 'uv>=0.9,<1'
