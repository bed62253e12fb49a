# Two commands for a new user: `make demo` and `make test`. Both create .venv and install the pinned packages first.

PYTHON ?= python3.11
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint install clean

install: $(INSTALLED)

# --no-deps: the lock is complete. Left to resolve by itself, pip adds builds of torchvision, torchaudio and
# torchcodec that need CUDA, and with them `import transformers` fails on a machine without it.
$(INSTALLED): requirements/cpu.txt pyproject.toml setup.py
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements/cpu.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python examples/arithmetic/demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
