# make demo   the whole pipeline on a laptop: data -> base -> stage 1 -> stage 2 -> evaluation (README, "Two commands")
# make test   all CPU tests, offline
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
PY = HF_HUB_OFFLINE=1 $(VENV)/bin/python

.PHONY: demo test setup clean
setup: $(VENV)/.ready
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

test: setup
	$(PY) -m pytest

clean:
	rm -rf $(RUNS)
