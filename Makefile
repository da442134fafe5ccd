# make demo   the whole pipeline on a laptop: scripts/demo.sh; SEED=1 RUNS=runs/seed1 for another seed
# make 8b     the same for the 8B on 8 GPUs: scripts/8b.sh; DATA=folder RUNS=runs/8b
# make test   the tests of heart, plumbing and toy: CPU, offline, a process per core, without those marked slow (FAST=: with
#             them); test-all: all tests, the shelf's, too; test TRANSFORMERS=5.24.0: in a .venv-5.24.0 with that version
# make lint   undefined, unused and shadowed names; nothing is reformatted
# make road   every command of lab/road/README.md on made-up files, with a tiny model
# make seeds  the demo with three seeds, and mean and spread over them
# make study  the paper's claims, each with a verdict; SEEDS=0 for one seed (lab/study/README.md)
# make post-train  a toy video generator, post-trained with the demo's DeScore; post-seeds: with three seeds
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
PY = HF_HUB_OFFLINE=1 $(VENV)/bin/python

.PHONY: demo 8b seeds study post-train post-seeds post-dpo post-grpo post-random post-gold road page notebook test test-all test-lab test-gpu lint setup clean
setup: $(VENV)/.ready
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

# A test process per core, four at most; the tests of a file share its fixtures, so they stay together, and the files
# come in the order of tests/conftest.py, not by their number of tests.
SPREAD = -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest $(SPREAD)
FAST ?= not slow
ifndef TRANSFORMERS
test: setup
	$(PYTEST) -m "$(FAST)" tests
else
# make test TRANSFORMERS=5.24.0: with another version, in .venv-5.24.0, which borrows all other packages from .venv.
# TESTS=tests/test_model.py runs a part of them.
OTHER = $(VENV)-$(TRANSFORMERS)
SITE = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
test: $(OTHER)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OTHER)/bin/python -m pytest $(SPREAD) $(TESTS)
$(OTHER)/.ready: $(VENV)/.ready
	$(PYTHON) -m venv $(OTHER)
	$(VENV)/bin/python $(SITE) > "$$($(OTHER)/bin/python $(SITE))/borrowed.pth"
	$(OTHER)/bin/python -m pip install -q transformers==$(TRANSFORMERS)
	touch $@
endif
TESTS ?= tests

test-all: setup
	$(PYTEST) tests lab

test-lab: setup
	$(PYTEST) lab tests/test_docs.py tests/test_imports.py

# On a machine with a CUDA GPU; all other tests hide it
test-gpu: setup
	DESCORE_TEST_GPU=1 $(PY) -m pytest -m gpu $(wildcard tests lab)

lint: setup
	$(VENV)/bin/ruff check .

SEED ?= 0
demo: setup
	PATH="$(abspath $(VENV))/bin:$$PATH" SEED=$(SEED) RUNS=$(RUNS) bash scripts/demo.sh

8b: setup
	PATH="$(abspath $(VENV))/bin:$$PATH" bash scripts/8b.sh

TABLE = --runs "discriminative=$(1)/eval/discriminative/*/report.json" "stage 2, its own text=$(1)/eval/stage2/*/text/report.json" \
	"DeScore stage 1=$(1)/eval/stage1/*/report.json" "DeScore stage 2=$(1)/eval/stage2/*/report.json"

# The demo with three seeds, and mean and spread over them.
seeds: setup
	for k in 0 1 2; do $(MAKE) demo SEED=$$k RUNS=$(RUNS)/seed$$k || exit 1; done
	$(PY) -m lab.study.compare --out $(RUNS) --training $(RUNS)/seed0 $(RUNS)/seed1 $(RUNS)/seed2 $(call TABLE,$(RUNS)/seed*)

# The study: demos of the seeds that have none, two at a time on one core each, then what its claims need.
SEEDS ?= 0 1 2
study: setup
	OMP_NUM_THREADS=1 $(MAKE) -j2 $(SEEDS:%=$(RUNS)/seed%/results.md)
	$(PY) -m lab.study --runs $(RUNS) --seeds $(SEEDS)

$(RUNS)/seed%/results.md:
	rm -rf $(@D) && mkdir -p $(@D)
	@echo "seed $*: a demo; what it prints is in $(@D).log"
	$(MAKE) demo SEED=$* RUNS=$(RUNS)/seed$* > $(@D).log 2>&1

# Post-training a toy video generator (lab/post_training/README.md), two runs at a time on one core each. Started again, it
# goes on. The control with the random reward shows what updates alone do, the one with gold what a perfect reward could.
# DeScore and gold judge are the same for all seeds. After `make study` or `make seeds`: REWARD=runs/seed0/stage2/model
REWARD ?= $(RUNS)/stage2/model
POST = --out $(RUNS)/post --seed $(SEED)
post-train: setup
	OMP_NUM_THREADS=1 $(PY) -m lab.post_training base $(POST)
	OMP_NUM_THREADS=1 $(MAKE) -j2 post-dpo post-grpo post-random post-gold
	OMP_NUM_THREADS=1 $(PY) -m lab.post_training measure $(POST) --reward $(REWARD)

post-dpo post-grpo:
	$(PY) -m lab.post_training $(@:post-%=%) $(POST) --reward $(REWARD)

post-random post-gold:
	$(PY) -m lab.post_training grpo $(POST) --reward $(@:post-%=%)

post-seeds: setup
	for k in $(SEEDS); do $(MAKE) post-train SEED=$$k || exit 1; done

# Needs two packages more, which the tests of lab/road/datasets.py and lab/road/annotate.py then use, too.
road: setup
	$(VENV)/bin/python -m pip install -q -r requirements-road.txt
	$(PY) -m lab.road --out $(RUNS)/road

# The paper line by line, and the files in two columns: build/index.html (lab/page)
page: setup
	$(VENV)/bin/python -m pip install -q -r requirements-page.txt
	$(PY) -m lab.page --out build

# The course's first hour, as a notebook with outputs (lab/course/first_hour.py)
notebook: setup
	$(VENV)/bin/python -m pip install -q -r requirements-page.txt
	$(PY) -m lab.course.notebook

clean:
	rm -rf $(RUNS)
