# The one door. Every target works in any folder and does its own set-up; set-up runs again only when what it read changed.
#
#   make demo          train and serve two categories of solar cells, end to end (KEEP=1 leaves everything up)
#   make test          all tests            make check    lint, types, imports
#   make unit | contracts | integration | e2e | ...   one folder of tests (ARGS goes to pytest)
#   make coverage      which lines unit tests and contracts run (ARGS=tests/integration adds to them)
#   make test-chaos | test-chaos-training | test-fuzz | test-overload | test-leaks | test-score | test-simulation   the long forms of what `make test` runs for minutes (ARGS=--help)
#   make fuzz-images   atheris on the decoder, for ten minutes or as long as ARGS say (ARGS=-help=1; Linux on x86_64)
#   make test-chart    the Helm chart in more than a thousand combinations of its values
#   make test-image    the image's build scripts in a bare Debian, and the chart's containers in what they made (root, debootstrap)
#   make prometheus    fetch a Prometheus server for the tests of alerts and boards (`make test` does, where there is apt-get)
#   make test-redis    contracts and the tests of the streams on Debian's Redis instead of Valkey (needs apt-get)
#   make boards        write the Grafana boards anew
#   make test-triton   the Triton engine on a real tritonserver, in an environment of its own
#   make bench-accuracy | bench-parity | bench-engine | bench-training   beside anomalib, in an environment of its own (ARGS=--help)
#   make bench-verdicts  what evaluate reports of a version beside what a worker flags, image for image (ARGS=--help)
#   make bench-gpu     all of it on a GPU beside anomalib (ARGS=--help)
#   make bench-stream  what is left of the engine's speed at the end of the stream (ARGS=--help)
#   make bench-scale   a plant of 100 lines, and ten times that, on a simulated clock (ARGS=--help)
#   make constraints   pin what pyproject.toml asks for, with hashes (ARGS='--upgrade-package torch' moves a pin)
#   make audit         known vulnerabilities of the pinned versions; asks PyPI
#   make fmt           format
#   make clean         remove what was made

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python
STAMP := $(VENV)/.flawstream-set-up
PEERS := .venv-anomalib
PEERS_STAMP := $(PEERS)/.flawstream-set-up
TRITON := .venv-triton
TRITON_STAMP := $(TRITON)/.flawstream-set-up
PROMETHEUS := .prometheus
PROMETHEUS_STAMP := $(PROMETHEUS)/.flawstream-set-up
ATHERIS := .atheris
ATHERIS_STAMP := $(ATHERIS)/.flawstream-set-up
REDIS := .redis-server
REDIS_STAMP := $(REDIS)/.flawstream-set-up

.DEFAULT_GOAL := help
.PHONY: help boards prometheus test-chart test-image setup fmt check test unit contracts monitoring chart integration e2e coverage test-redis test-chaos test-chaos-training test-fuzz test-overload test-leaks test-score test-simulation fuzz-images demo peers test-triton bench-accuracy bench-parity bench-engine bench-gpu bench-scale bench-stream bench-training bench-verdicts constraints audit clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# $(call install,FOLDER,CONSTRAINTS): a virtual environment with all that a file pins; a file with another hash is refused.
# pip and setuptools come first: they build what has no wheel, so that nothing unpinned is downloaded to build with.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation
define install
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { echo "cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	@$(1)/bin/python $(PIP_INSTALL) --require-hashes --requirement <(sed -n '/^\(pip\|setuptools\)==/,/[^\\]$$/p' $(2))
	@$(1)/bin/python $(PIP_INSTALL) --require-hashes --requirement $(2)
endef

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flawstream needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@echo "==> Setting up $(VENV) (once; some 7 GB and a few minutes, most of it PyTorch)"
	$(call install,$(VENV),constraints.txt)
	@$(BIN) $(PIP_INSTALL) --editable .
	@$(BIN) -m pip check
	@touch $(STAMP)
	@echo "==> Set-up done"

fmt: setup
	@$(BIN) -m ruff format .
	@$(BIN) -m ruff check --fix .

check: setup
	@echo "==> format"; $(BIN) -m ruff format --check .
	@echo "==> lint"; $(BIN) -m ruff check .
	@echo "==> types"; $(BIN) -m mypy
	@echo "==> imports"; $(BIN) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

# What computes and starts little runs on all cores at once, one thread each; Ray and the servers have them to themselves.
# Integration comes last: its Ray cluster stays up to the end, and the chaos test of e2e must find its own alone.
AT_ONCE := unit contracts monitoring chart
IN_TURN := e2e integration
PYTEST_AT_ONCE := OMP_NUM_THREADS=1 $(BIN) -m pytest -n auto --dist worksteal

test: setup prometheus
	@$(PYTEST_AT_ONCE) $(AT_ONCE:%=tests/%)
	@$(BIN) -m pytest $(IN_TURN:%=tests/%)

prometheus: $(PROMETHEUS_STAMP)

# $(call unpack,FOLDER,PACKAGES): Debian's packages, unpacked and not installed: no rights are needed, and nothing of the machine's is changed
define unpack
mkdir -p $(1)/lists/partial $(1)/cache/archives/partial && cd $(1) && apt_own="-o Dir::State::Lists=$$PWD/lists -o Dir::Cache=$$PWD/cache" && \
{ apt-get download -qq $(2) 2> /dev/null || { apt-get update -qq $$apt_own && apt-get download -qq $$apt_own $(2); }; } && \
for package in *.deb; do dpkg-deb --extract $$package .; done && rm -rf *.deb lists cache
endef

$(PROMETHEUS_STAMP):
	@if command -v prometheus > /dev/null && command -v promtool > /dev/null; then echo "==> Prometheus is installed"; \
	elif ! command -v apt-get > /dev/null; then \
	  echo "==> There is no apt-get to fetch Prometheus with: tests that need it are skipped until prometheus and promtool are on the PATH"; \
	else \
	  echo "==> Fetching Prometheus into $(PROMETHEUS) (once; 19 MB)"; $(call unpack,$(PROMETHEUS),prometheus) && usr/bin/promtool --version | head -1; \
	fi
	@mkdir -p $(PROMETHEUS) && touch $(PROMETHEUS_STAMP)

# Started by a script beside it, which names the folder of its two libraries
$(REDIS_STAMP):
	@echo "==> Fetching Redis into $(REDIS) (once; 2 MB)"
	@$(call unpack,$(REDIS),redis-server redis-tools libjemalloc2 liblzf1)
	@printf '%s\n' '#!/bin/sh' 'cd "$$(dirname "$$0")"' 'LD_LIBRARY_PATH=$$(echo usr/lib/*-linux-gnu) exec usr/bin/redis-server "$$@"' > $(REDIS)/redis-server
	@chmod +x $(REDIS)/redis-server && $(REDIS)/redis-server --version && touch $(REDIS_STAMP)

# What stands on a stream server alone: no Ray, and not the embedded server, which is Valkey. Debian 12 has Redis 7.0: without
# the tests of access rules and of durable pushes, which need 7.2.
ON_REDIS := tests/contracts $(addprefix tests/integration/test_,$(addsuffix .py,backlog cli_dead cli_streams \
  closed_connections dead_letter_box mixed_backbones no_repeats persistence producer redis_cluster reference_fetching results \
  retention sentinel shard_leases stream_runtime tls))
test-redis: setup $(REDIS_STAMP)
	@TEST_STREAM_SERVER=$(CURDIR)/$(REDIS)/redis-server $(BIN) -m pytest $(ON_REDIS) $(ARGS)

boards: setup
	@$(BIN) -m k8s.boards

monitoring e2e: prometheus
$(AT_ONCE): setup
	@$(PYTEST_AT_ONCE) tests/$@ $(ARGS)
$(IN_TURN): setup
	@$(BIN) -m pytest tests/$@ $(ARGS)

coverage: setup
	@$(PYTEST_AT_ONCE) --cov --cov-report=term tests/unit tests/contracts $(ARGS)

test-chaos test-fuzz test-overload test-leaks test-score test-simulation: setup
	@PYTHONPATH=tests $(BIN) -m soak.$(@:test-%=%) $(ARGS)

test-chaos-training: setup
	@PYTHONPATH=tests $(BIN) -m soak.chaos_training $(ARGS)

# Not in $(VENV): it has wheels for one system only, and nothing else wants it
fuzz-images: setup $(ATHERIS_STAMP)
	@PYTHONPATH=$(ATHERIS):tests $(BIN) -m soak.fuzz_images_deeply $(ARGS)

$(ATHERIS_STAMP): tests/fuzzing/constraints.txt | $(STAMP)
	@$(BIN) $(PIP_INSTALL) --target $(ATHERIS) --upgrade --require-hashes --requirement $<
	@touch $(ATHERIS_STAMP)

test-chart: setup
	@$(BIN) -m pytest tests/chart -m 'not image' $(ARGS)

# Not in `make test`: it wants root, debootstrap, 16 GB and minutes. ARGS goes to pytest.
test-image: setup
	@bash tests/chart/build_image_root.sh build/image
	@$(BIN) -m pytest tests/chart/test_image.py -m image $(ARGS)

# `make test` skips these where the environment is absent: a server of 400 MB that wants another NumPy than ours
test-triton: setup $(TRITON_STAMP)
	@$(BIN) -m pytest tests/integration/test_triton.py $(ARGS)

$(TRITON_STAMP): tests/triton/constraints.txt
	@echo "==> Setting up $(TRITON) with a real tritonserver (once; some 400 MB)"
	$(call install,$(TRITON),tests/triton/constraints.txt)
	@touch $(TRITON_STAMP)

demo: setup
	@$(BIN) -m flawstream_cli demo $(if $(KEEP),--keep)

peers: $(PEERS_STAMP)

$(PEERS_STAMP): bench/peers/constraints.txt
	@echo "==> Setting up $(PEERS) with anomalib (once; some 7 GB and a few minutes)"
	$(call install,$(PEERS),bench/peers/constraints.txt)
	@touch $(PEERS_STAMP)

bench-accuracy: setup peers
	@$(BIN) -m bench.accuracy --peer-python $(PEERS)/bin/python $(ARGS)

bench-parity: setup peers
	@$(BIN) -m bench.parity --peer-python $(PEERS)/bin/python $(ARGS)

bench-engine: setup peers
	@$(BIN) -m bench.engine --peer-python $(PEERS)/bin/python $(ARGS)

bench-training: setup peers
	@$(BIN) -m bench.training --peer-python $(PEERS)/bin/python $(ARGS)

bench-stream: setup
	@PYTHONPATH=tests $(BIN) -m bench.stream $(ARGS)

bench-gpu: setup
	@$(BIN) -m bench.gpu $(ARGS)

bench-scale: setup
	@$(BIN) -m bench.scale --picture docs/images/scale.png $(ARGS)

bench-verdicts: setup
	@$(BIN) -m bench.verdicts $(ARGS)

# For all systems and Pythons at once, with the hash of every file of a version. A pin stays unless ARGS moves it.
UV := $(VENV)/bin/uv
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command 'make constraints'
constraints: | $(UV)
	@$(COMPILE) --all-extras pyproject.toml --output-file constraints.txt $(ARGS)
	@$(COMPILE) bench/peers/requirements.in --output-file bench/peers/constraints.txt $(ARGS)
	@$(COMPILE) tests/fuzzing/requirements.in --output-file tests/fuzzing/constraints.txt $(ARGS)
	@$(COMPILE) tests/triton/requirements.in --output-file tests/triton/constraints.txt $(ARGS)
$(UV):
	@$(MAKE) setup

audit: setup
	@for pins in constraints.txt bench/peers/constraints.txt tests/fuzzing/constraints.txt tests/triton/constraints.txt; do echo "==> $$pins"; \
	  $(BIN) -m pip_audit --require-hashes --disable-pip --strict --requirement $$pins $(ARGS) || exit; done

clean:
	rm -rf $(VENV) $(PEERS) $(TRITON) $(PROMETHEUS) $(REDIS) $(ATHERIS) .flawstream build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
