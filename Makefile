# GNU make 3.81, bash 3.2 and BSD tools are enough: a Mac's own. Everything else is in scripts/dev.py,
# which needs Python 3.9 and nothing else, and sets up `.venv` when a target asks for it.
# Another Python: make test PYTHON=python3.13

# What the command line gives is data: make is to expand nothing in it, whatever its name is.
$(foreach it.is,$(.VARIABLES),$(if $(findstring $$,$(it.is)),,\
  $(if $(filter command,$(origin $(it.is))),\
    $(eval override $(it.is) := $$(value $(it.is)))$(eval export $(it.is)))))
export ORBCTL FAULT_SEED ITEM VERSION PYTHON EXACTLY

override CANDIDATES = python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9
# One that is named is the one that counts; else a newer one may be taken, for copier.
ifeq ($(origin PYTHON),override)
override EXACTLY := 1
else
override EXACTLY :=
PYTHON := $(shell for python in $(CANDIDATES); do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1 \
	&& echo "$$python" && break; done)
endif

.NOTPARALLEL:
.PHONY: help demo unit test boot hosts template compat bench conformance faults contract lint coverage docs release-test release-check release clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

demo: ## render the template into ./demo and deploy it to a machine, twice
unit: ## run the quick tests that need no machine (under half a minute)
test: ## run the test suite (about twenty minutes)
boot: ## test machines that boot, and their network (about ten minutes)
hosts: ## test how runs end, and what differs between hosts (about seven minutes)
template: ## test every combination of the template's answers (under fifteen minutes)
compat: ## test each supported Python with its pyinfra (about ten minutes)
bench: ## compare deploys with other connectors, for docs/performance.md (about an hour)
conformance: ## run the connector's suite and write docs/conformance.md
faults: ## run 10,000 steps with random faults (FAULT_SEED repeats a run)
contract: ## hold an orbctl to what is documented of it (ORBCTL=orbctl: OrbStack's own)
lint: ## check style and types
coverage: ## run the test suite and measure what it reaches of src/
docs: ## build the documentation and do what it tells to do
release-test: ## plant faults that release-check must find
release-check: ## check all that a release needs (ITEM=NAME: one item of it)
release: ## make a version ready to be pushed (VERSION=1.2.3)
clean: ## delete everything these targets made, machines included

demo unit test boot hosts template compat bench conformance faults contract lint coverage docs release-test release-check release clean:
	@test -n "$$PYTHON" || { echo "needs Python 3.9 or later on PATH" >&2; exit 1; }; \
	exec "$$PYTHON" scripts/dev.py $@
