# Two commands matter: `make demo` and `make test`. Both set themselves up. LMC_VENV moves the environments to another folder.
LMC_VENV ?= .venvs
VLLM := $(LMC_VENV)/vllm/bin
SGLANG := $(LMC_VENV)/sglang/bin
export LMC_VENV
export LMC_DATA_DIR ?= $(abspath ../shared/data)

.PHONY: demo test check fmt unit setup setup-sglang setup-prometheus docs clean

demo: setup            ## run a real engine with and without the cache, and write reports/quickstart
	$(VLLM)/lmc bench workloads/quickstart.yaml

test: setup setup-sglang setup-prometheus check ## every test, each engine's in its own environment
	$(VLLM)/python -m pytest
	$(SGLANG)/python -m pytest tests/engines -m sglang

check: setup           ## format, lint, types
	$(VLLM)/ruff format --check .
	$(VLLM)/ruff check .
	$(VLLM)/mypy

unit: setup            ## the tests that start no engine
	$(VLLM)/python -m pytest -m "not engine"

fmt: setup
	$(VLLM)/ruff check --fix .
	$(VLLM)/ruff format .

docs: setup            ## the documentation as a site, in site/built; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(VLLM)/mkdocs build --strict --config-file site/mkdocs.yml

setup:
	@scripts/setup vllm

setup-prometheus:
	@scripts/setup-prometheus

setup-sglang:
	@scripts/setup sglang

clean:
	rm -rf $(LMC_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
