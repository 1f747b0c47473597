# Two commands do all set-up: `make demo` and `make test`. They need Python 3.11 or newer, pip and make.
# `make PYTHON=/path/to/python3.12 ...` chooses the Python; pip reads its usual settings (PIP_INDEX_URL, pip.conf, ...).

VENV      := .venv
CORE_VENV := .venv-core
ECOSYSTEM_VENV := .venv-ecosystem
DIST_VENV := .venv-dist
# Each has its own environment: the oldest JAX and the oldest TensorFlow need different versions of the packages they share.
OLDEST := core torch jax tf
OLDEST_TESTS_core := tests/core
OLDEST_TESTS_torch := tests/torch tests/cli
OLDEST_TESTS_jax := tests/flax
OLDEST_TESTS_tf := tests/tf
# optimum's packages need older versions of transformers than the others, two different ones.
OPTIMUM := onnx openvino
DOCS_VENV := .venv-docs
PYTHON    ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then command -v $$p; break; fi; done)
PIP       := -m pip --disable-pip-version-check --quiet install -c constraints.txt
SOURCES   := $(wildcard src tests tools bench examples)
# Files that an install depends on; the kernels are compiled again when one of them changes.
INSTALLED := pyproject.toml constraints.txt hatch_build.py $(wildcard src/monoblock/native/*.[ch]pp) \
	src/monoblock/native/build.py
PROMPT    ?= def fibonacci(n):

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types test-core test-all test-page test-ecosystem test-optimum docs clean test-notebooks test-distributed test-plans
.PHONY: embed-million fuzz fuzz-readers fuzz-saves fuzz-server soak sanitize test-oldest test-arm wheel mutate search-model chat-adapter
# A stamp whose recipe failed is deleted.
.DELETE_ON_ERROR:
# Stamps of environments are kept, though they are intermediate files of pattern rules.
.PRECIOUS: .venv-optimum-%/.installed
# The steps of `test` use all cores, and pytest's summary is printed last.
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1@\2/p' Makefile | awk -F@ '{ printf "%-22s%s\n", $$1, $$2 }'

demo: $(VENV)/.installed-torch ## install, then stream a completion from the embedded model
	@$(VENV)/bin/monoblock generate --echo "$(PROMPT)"

test: lint $(CORE_VENV)/.installed ## lint; then types, the core without any framework, and every test
	@echo "== types, the core without a framework, and every test"
	@$(VENV)/bin/python tools/run_tests.py --bare $(CORE_VENV)/bin/python

lint: $(VENV)/.installed-test ## ruff: rules and format
	@echo "== ruff"
	@$(VENV)/bin/ruff check $(SOURCES)
	@$(VENV)/bin/ruff format --check $(SOURCES)

format: $(VENV)/.installed-test ## format the sources with ruff
	@$(VENV)/bin/ruff check --fix $(SOURCES)
	@$(VENV)/bin/ruff format $(SOURCES)

types: $(VENV)/.installed-test ## pyright (it brings its own node)
	@echo "== pyright"
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

test-core: $(CORE_VENV)/.installed ## the core's tests where no framework is installed
	@echo "== the core, in an environment with no framework"
	@MONOBLOCK_TEST_NO_FRAMEWORK=1 $(CORE_VENV)/bin/python -m pytest tests/core

test-all: $(VENV)/.installed-test ## every test
	@echo "== every test"
	@$(VENV)/bin/python tools/run_tests.py

test-page: $(VENV)/.installed-test ## the server's page in headless Chromium (Debian's chromium and chromium-driver)
	@echo "== the page in a browser"
	@MONOBLOCK_TEST_BROWSER=1 $(VENV)/bin/python -m pytest tests/serving/test_page.py

test-ecosystem: $(ECOSYSTEM_VENV)/.installed ## models with peft, trl, accelerate, ... (not in `test`)
	@echo "== packages that use models: peft, trl, accelerate, ..."
	@MONOBLOCK_TEST_ECOSYSTEM=1 $(ECOSYSTEM_VENV)/bin/python -m pytest tests/ecosystem

test-optimum: $(OPTIMUM:%=test-optimum-%) ## exported folders in optimum's classes and sentence-transformers' backends

test-optimum-%: .venv-optimum-%/.installed
	@echo "== exported folders in optimum: $*"
	@MONOBLOCK_TEST_ECOSYSTEM=1 USE_TF=0 USE_FLAX=0 .venv-optimum-$*/bin/python -m pytest \
		tests/ecosystem/test_export_files.py -k "(optimum or sentence_transformers) and $*"

test-distributed: $(VENV)/.installed-test ## four processes, and the commands that start processes (not in `test`)
	@echo "== several processes"
	@MONOBLOCK_TEST_DISTRIBUTED=1 $(VENV)/bin/python -m pytest tests/distributed

test-plans: $(VENV)/.installed-test ## the native kernels' tests with other ways to read weights
	@$(VENV)/bin/python tools/native_tests.py

test-oldest: $(OLDEST:%=test-oldest-%) ## the tests with the oldest versions that pyproject.toml admits

test-oldest-core: export MONOBLOCK_TEST_NO_FRAMEWORK = 1
test-oldest-%: .venv-oldest-%/.installed
	@echo "== the oldest $*"
	@.venv-oldest-$*/bin/python -m pytest $(OLDEST_TESTS_$*)

embed-million: $(VENV)/.installed-test ## `monoblock embed` on 1,000,000 texts: killed, resumed, memory checked (minutes)
	@echo "== a million texts"
	@$(VENV)/bin/python bench/embed_million.py

test-notebooks: $(VENV)/.installed-test ## run the notebooks in examples/ whole (minutes; not in `test`)
	@echo "== notebooks"
	@$(VENV)/bin/python $(PIP) -e ".[test,train,notebooks]"
	@MONOBLOCK_TEST_NOTEBOOKS=1 $(VENV)/bin/python -m pytest tests/core/test_notebooks.py

search-model: $(VENV)/.installed-test ## train the embedded search model and write its index (10 minutes)
	@$(VENV)/bin/python $(PIP) -e ".[train]"
	@$(VENV)/bin/python tools/train_search.py

chat-adapter: $(VENV)/.installed-test ## train the chat adapter of the embedded demo (10 minutes)
	@$(VENV)/bin/python $(PIP) -e ".[train]"
	@$(VENV)/bin/python tools/train_chat.py

mutate: $(VENV)/.installed-test ## 200 changes of the sources, each of which a test must notice (hours)
	@$(VENV)/bin/python tools/mutate.py

wheel: $(DIST_VENV)/.installed ## sdist and manylinux wheel into dist/, the wheel tried without a compiler
	@$(DIST_VENV)/bin/python tools/wheel.py

docs: $(DOCS_VENV)/.installed ## the documentation as a site in site/; links, anchors and the API reference are checked
	@echo "== the documentation site"
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --clean
	@$(DOCS_VENV)/bin/python tools/check_site.py
	@echo "read it: $(DOCS_VENV)/bin/python -m http.server -d site"

fuzz: fuzz-readers fuzz-saves fuzz-server ## fuzzed files and requests, and killed saves (hours; not in `test`)

fuzz-server: $(VENV)/.installed-test ## 20,000 fuzzed requests to a server (minutes; `test` takes a sample)
	@MONOBLOCK_FUZZ_REQUESTS=20000 $(VENV)/bin/python -m pytest -s tests/serving/test_fuzz_server.py

soak: $(VENV)/.installed-test ## 10,000 requests to a server with random disconnects, then SIGTERM under load (minutes)
	@MONOBLOCK_SOAK_REQUESTS=10000 $(VENV)/bin/python -m pytest -s tests/serving/test_soak.py

fuzz-saves: $(VENV)/.installed-test ## saves, killed at every file operation (`test` takes a sample)
	@for part in core/test_transaction torch/test_saves_torch flax/test_saves_flax tf/test_saves_tf; do \
		echo "== $$part, killed at every file operation"; \
		MONOBLOCK_TEST_ALL_KILL_POINTS=1 $(VENV)/bin/python -m pytest tests/$$part.py || exit 1; done

test-arm: $(VENV)/.installed-test ## the native kernels' tests at every AArch64 level, under qemu (half an hour; not in `test`)
	@echo "== native kernels for AArch64, under qemu"
	@$(VENV)/bin/python tools/test_arm.py

sanitize: $(VENV)/.installed-test ## the native kernels' tests with the address and undefined-behaviour sanitizers
	@echo "== native kernels, built with -fsanitize=address,undefined"
	@$(VENV)/bin/python tools/sanitize.py

fuzz-readers: $(VENV)/.installed-test ## 20,000 fuzzed inputs for each reader of files (hours)
	@$(VENV)/bin/python tests/fuzz/run.py

clean: ## remove the environments and all caches
	rm -rf $(VENV) $(CORE_VENV) $(ECOSYSTEM_VENV) $(DIST_VENV) $(DOCS_VENV) $(OLDEST:%=.venv-oldest-%) $(OPTIMUM:%=.venv-optimum-%) site
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# Without ensurepip, the system's pip installs pip into the environment.
define make_venv
	@if [ -z "$(PYTHON)" ]; then \
		echo "monoblock needs Python 3.11 or newer, and none was found; try: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@echo "== $(1): a virtual environment of $(PYTHON)"
	@"$(PYTHON)" -m venv $(1) >/dev/null 2>&1 || { \
		"$(PYTHON)" -m venv --clear --without-pip $(1) && \
		"$(PYTHON)" -m pip --quiet --python $(1)/bin/python install pip; }
endef

$(VENV)/bin/python:
	$(call make_venv,$(VENV))

$(CORE_VENV)/bin/python:
	$(call make_venv,$(CORE_VENV))

$(ECOSYSTEM_VENV)/bin/python:
	$(call make_venv,$(ECOSYSTEM_VENV))

$(DOCS_VENV)/bin/python:
	$(call make_venv,$(DOCS_VENV))

$(VENV)/.installed-torch: $(INSTALLED) | $(VENV)/bin/python
	@echo "== installing monoblock with PyTorch into $(VENV)"
	@$(VENV)/bin/python $(PIP) -e ".[torch]"
	@touch $@

$(VENV)/.installed-test: $(INSTALLED) | $(VENV)/bin/python
	@echo "== installing monoblock with the test dependencies into $(VENV)"
	@$(VENV)/bin/python $(PIP) -e ".[test]"
	@touch $@ $(VENV)/.installed-torch

$(CORE_VENV)/.installed: $(INSTALLED) | $(CORE_VENV)/bin/python
	@echo "== installing monoblock without a framework into $(CORE_VENV)"
	@$(CORE_VENV)/bin/python $(PIP) -e . pytest hypothesis safetensors
	@touch $@

$(ECOSYSTEM_VENV)/.installed: $(INSTALLED) | $(ECOSYSTEM_VENV)/bin/python
	@echo "== installing monoblock with the packages of the ecosystem tests into $(ECOSYSTEM_VENV)"
	@$(ECOSYSTEM_VENV)/bin/python $(PIP) -e ".[ecosystem]"
	@touch $@

$(DIST_VENV)/bin/python:
	$(call make_venv,$(DIST_VENV))

$(DIST_VENV)/.installed: $(INSTALLED) | $(DIST_VENV)/bin/python
	@echo "== installing the tools for distributions into $(DIST_VENV)"
	@$(DIST_VENV)/bin/python $(PIP) -e ".[dist]"
	@touch $@

.venv-oldest-%/.installed: $(INSTALLED) tools/oldest/%.txt
	$(call make_venv,.venv-oldest-$*)
	@echo "== installing the oldest $* into .venv-oldest-$*"
	@.venv-oldest-$*/bin/python -m pip --disable-pip-version-check --quiet install -r tools/oldest/$*.txt

# The other packages are those of the ecosystem's environment.
.venv-optimum-%/.installed: $(ECOSYSTEM_VENV)/.installed tools/optimum/%.txt
	$(call make_venv,.venv-optimum-$*)
	@echo "== installing optimum for $* into .venv-optimum-$*"
	@$(ECOSYSTEM_VENV)/bin/python -c \
		"import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> "$$(.venv-optimum-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_ecosystem.pth"
	@.venv-optimum-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r tools/optimum/$*.txt
	@touch $@

$(DOCS_VENV)/.installed: $(INSTALLED) | $(DOCS_VENV)/bin/python
	@echo "== installing monoblock with the documentation tools into $(DOCS_VENV)"
	@$(DOCS_VENV)/bin/python $(PIP) -e ".[docs]"
	@touch $@
