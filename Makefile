# Everything from a fresh clone: `make serve`, `make test`. Steps that are done leave a stamp in the
# virtual environment and are not repeated; `make help` lists targets and variables.

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= auto
MODEL ?= smollm2-135m-instruct
PORT ?= 8000
ARGS ?=

# A model is a name that scripts/fetch_model.py knows, or the path of a folder.
MODEL_DIR := $(if $(findstring /,$(MODEL)),$(MODEL),models/$(MODEL))
TEST_MODEL := models/smollm2-135m-instruct

BIN := $(VENV)/bin
SETUP = $(PYTHON) scripts/setup_env.py --venv $(VENV) --device $(DEVICE)
SOURCES := $(wildcard pyproject.toml setup.py) \
	$(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_SOURCES := $(filter csrc/%,$(SOURCES)) $(shell find tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cuh')
# vLLM 0.33 is unpacked over the native libraries of the build for CPUs; see setup_env.py.
IS_CPU_VLLM = $(BIN)/python -c \
	'import importlib.metadata as m; exit(not m.version("vllm").endswith("cpu"))'
EXTRAS := $(addprefix $(VENV)/.,models test lint eval)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help serve test lint lm-eval clean distclean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo
	@echo 'Variables: MODEL=$(MODEL) PORT=$(PORT) VENV=$(VENV) DEVICE=$(DEVICE) PYTHON=$(PYTHON)'
	@echo '           ARGS=arguments for vllm serve, pytest or scripts/run_lm_eval.py'

serve test lint lm-eval: $(VENV)/.plugin

serve: $(MODEL_DIR)/config.json  ## Set up all that is needed, then serve MODEL on PORT
	$(BIN)/python scripts/serve.py $(MODEL_DIR) --port $(PORT) $(ARGS)

test: $(VENV)/.test $(TEST_MODEL)/config.json  ## Set up, run all tests
	@if $(IS_CPU_VLLM); then $(MAKE) --no-print-directory build/vllm-0.33; fi
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.lint  ## Check Python, C++ and Dockerfiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vllm_turboquant
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/hadolint docker/Dockerfile.cpu docker/Dockerfile.cuda

lm-eval: $(VENV)/.eval  ## Evaluate the server that runs on PORT
	$(BIN)/python scripts/run_lm_eval.py $(MODEL_DIR) --port $(PORT) $(ARGS)

clean:  ## Remove what was built
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	rm -f vllm_turboquant/*.so $(VENV)/.plugin

distclean: clean  ## Remove the virtual environment and the models as well
	rm -rf $(VENV) models

$(VENV)/.vllm: scripts/setup_env.py
	$(SETUP) vllm
	@touch $@

$(VENV)/.plugin: $(SOURCES) | $(VENV)/.vllm
	$(SETUP) plugin
	@touch $@

$(EXTRAS): $(VENV)/.%: pyproject.toml | $(VENV)/.plugin
	$(SETUP) $*
	@touch $@

%/config.json:
	$(error $* has no config.json: MODEL is a name in scripts/fetch_model.py or a local folder; \
	a model of a hub is served, once `make $(VENV)/.plugin` is done, by \
	`$(BIN)/vllm serve $(MODEL) --kv-cache-dtype turboquant3`)

models/%/config.json: | $(VENV)/.models
	$(BIN)/python scripts/fetch_model.py $*

build/vllm-0.33: | $(VENV)/.vllm
	$(SETUP) vllm-0.33
