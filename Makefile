# Two commands for a new user: `make demo` and `make test`. Both create .venv and install the pinned packages first.

PYTHON ?= python3.11
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo lint check test install slurm clean

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

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# What a change is tried with while it is made: three minutes on two cores.
check: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --quiet -m "not slurm and not server and not slow"

# A file's tests stay with one worker, for the servers that they share. Of 1,800 that start real processes on a machine
# that may be five times slower than usual, one that fails is tried once more, and shown as RERUN: a fault to mend.
test: $(INSTALLED) slurm
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 --reruns 1 -rfER

# tests/slurm runs jobs in a real SLURM, whose daemons it starts itself. Without root or apt those tests are skipped, and
# say so; in CI they fail.
slurm:
	@PATH="$$PATH:/usr/sbin"; if ! command -v slurmctld && [ "$$(id -u)" = 0 ] && command -v apt-get; then \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update --quiet=2; apt-get install --quiet=2 --no-install-recommends slurm-wlm munge; \
	fi > /dev/null || echo "make slurm: apt-get failed; tests/slurm will say what is missing"

clean:
	rm -rf $(VENV) build *.egg-info
