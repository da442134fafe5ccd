# make demo   the whole pipeline on a laptop: data -> base -> stage 1 -> stage 2 -> evaluation (README, "The commands")
# make test   all CPU tests, offline, a process per core
# make lint   undefined, unused and shadowed names; nothing is reformatted
# make road   every command of lab/road/README.md on made-up files, with a tiny model
# make seeds  the demo with three seeds, and mean and spread over them
# make study  the paper's claims, each with a verdict; SEEDS=0 for one seed (lab/study/README.md)
# make post-train  a toy video generator, post-trained with the demo's DeScore; post-seeds: with three seeds
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
PY = HF_HUB_OFFLINE=1 $(VENV)/bin/python

.PHONY: demo seeds study post-train post-seeds post-dpo post-grpo post-random post-gold road test lint setup clean
setup: $(VENV)/.ready
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

# A test process per core, four at most; the tests of a file share its fixtures, so they stay together.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadscope

lint: setup
	$(VENV)/bin/ruff check .

# The demo in steps, each a line you can run by itself. SEED and RUNS can be set: make demo SEED=1 RUNS=runs/seed1
SEED ?= 0
D = $(RUNS)/data
# A CoT that has not ended after 80 tokens runs on for ever, and its whole batch waits for it.
THINK = --max-new-tokens 80
COTS = --temperature 0 --batch-size 120 $(THINK)
# A tiny model wants larger steps than an 8B, and its CoTs are about 55 tokens long: so the length reward has its own range.
# LoRA dropout draws a mask for each of its layers: at this width a quarter of the step.
# At 200 times the paper's learning rate the LLM moves away under the head faster: BT holds it with 10 times the weight.
STAGE1 = --overwrite --model $(RUNS)/base --data $(D)/train_cots.csv --val $(D)/val_cots.csv --seed $(SEED) --batch-pairs 8 --micro-pairs 8 \
	--epochs 3 --lr 5e-4 --lr-vision 3e-5 --lr-head 3e-3 --lora-r 16 --lora-alpha 32 --lora-dropout 0 --no-gradient-checkpointing \
	--val-every 35 --save-every 0 --frame-cache $(RUNS)/frames
STAGE2 = --overwrite --model $(RUNS)/stage1/model --data $(D)/train_rl.csv --seed $(SEED) --batch-pairs 6 --mini-pairs 6 --epochs 9 --max-steps 40 \
	--lr 2e-4 --bt-coef 0.05 --length-low 10 --length-high 40 --no-gradient-checkpointing --rows-per-batch 96 --save-every 0 \
	--max-new-tokens 72
EVAL = --root $(D) --benchmark in-domain genai-bench videogen-rewardbench --batch-size 220 $(THINK)

demo: setup
	$(PY) -m toy data --out $(D) --seed $(SEED)
	$(PY) -m toy base --out $(RUNS)/base --seed $(SEED)
	$(PY) rollout.py --model $(RUNS)/base --seed $(SEED) $(COTS) --data $(D)/train_cold_start.csv $(D)/val_cold_start.csv \
		--out $(D)/train_cots.csv $(D)/val_cots.csv
	$(PY) -m toy.look --show 1 --data $(D)/train_cots.csv --model $(RUNS)/base --out $(RUNS)/frames.png
	$(PY) cold_start.py $(STAGE1) --out $(RUNS)/stage1
	$(PY) cold_start.py $(STAGE1) --out $(RUNS)/discriminative --mask-probability 1
	$(PY) grpo.py $(STAGE2) --out $(RUNS)/stage2
	$(PY) evaluate.py $(EVAL) --model $(RUNS)/discriminative/model --out $(RUNS)/eval/discriminative --no-think
	$(PY) evaluate.py $(EVAL) --model $(RUNS)/stage1/model --out $(RUNS)/eval/stage1
	$(PY) evaluate.py $(EVAL) --model $(RUNS)/stage2/model --out $(RUNS)/eval/stage2 --score-from head text
	$(PY) -m lab.study.compare --out $(RUNS) --training $(RUNS) $(call TABLE,$(RUNS))

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

clean:
	rm -rf $(RUNS)
