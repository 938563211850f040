# Everything a newcomer or CI runs. `make help` lists the targets.
# Needs Python >= 3.10 with pip and venv; the rest is installed into .venv from the lock file.

PYTHON ?= python3
VENV   ?= .venv
# torch and torchvision are installed by name because their CPU and CUDA builds share a version. On a machine without
# a GPU, TORCH_INDEX=URL of PyTorch's own CPU index saves 4 GB.
TORCH  ?= torch==2.13.0 torchvision==0.28.0
TORCH_INDEX ?=
FRESH  ?=
NAME   ?= rounds

# make local and make e2e take RPL_KIND_NODE, RPL_ARGO_MANIFEST and others (rpl/demo/cluster.py) where the defaults, public
# images and releases, cannot be reached.
export RPL_TORCH_INDEX ?= $(TORCH_INDEX)

RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test e2e local local-down lint format argo chart docs bench lock clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*?## ' $(MAKEFILE_LIST) | awk -F ':.*?## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## Install everything into .venv, from the lock file with hashes

$(STAMP): images/locks/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=...")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r images/locks/dev.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP) ## Run the whole pipeline on a small world (FRESH=1 starts over); results in demo-output/
	$(RUN) -m jobs.cli demo $(if $(FRESH),--fresh)

test: lint ## Lint, type-check and test
	$(RUN) -m pytest -n 2 --dist loadgroup --max-worker-restart 0 --ignore tests/e2e

e2e: $(STAMP) ## Runs on a kind cluster, disturbed in every way we know (needs docker, kind, kubectl, helm, argo)
	$(RUN) -m pytest -s tests/e2e

local: $(STAMP) ## A kind cluster with Argo Workflows and the demo, one run in it (needs what e2e needs)
	$(RUN) -m rpl.demo.cluster up

local-down: ## Remove that cluster
	$(RUN) -m rpl.demo.cluster down

lint: $(STAMP) ## Check style (ruff) and types (mypy, strict)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP) ## Format the code and mend what can be mended
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

argo: $(STAMP) ## Write argo/templates/ again from rpl/rounds.py
	PYTHONPATH=. $(RUN) argo/generate.py

chart: $(STAMP) ## Write the chart's tables and descriptions again from helm/rpl/values.yaml
	PYTHONPATH=. $(RUN) helm/values_table.py

bench: $(STAMP) ## Run benchmarks/NAME.py (NAME=rounds); writes benchmarks/results/NAME.json
	$(RUN) -m benchmarks.$(NAME)

docs: $(STAMP) ## Make the pages that are made from the code: docs/metrics.md
	$(RUN) -m rpl.metrics.page docs/metrics.md

lock: $(STAMP) ## Compile the lock files again from pyproject.toml
	cd images/locks && for pair in light:sourcing clip:clip,pool clip-cuda:clip,pool-gpu dev:clip,demo,dev,sourcing; do \
	  $(CURDIR)/$(VENV)/bin/python -m uv pip compile --quiet --no-header --universal --python-version 3.10 --generate-hashes \
	    --override overrides.txt $$(echo $${pair#*:} | sed 's/[^,]*/--extra &/g; s/,/ /g') \
	    --output-file $${pair%%:*}.lock ../../pyproject.toml || exit 1; done

clean: ## Remove what the other targets made, but for .venv
	rm -rf .demo .bench demo-output .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
