#!/usr/bin/env bash
# The whole pipeline on a laptop, in the order of the paper. Read it from top to bottom; each command can also be pasted
# by itself, once `. .venv/bin/activate` and the lines with `export` have been. `make demo` runs this file; `make demo
# SEED=1 RUNS=runs/seed1` is another seed, in a folder of its own. Minutes: docs/toy.md. The same for the 8B: scripts/8b.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
export SEED=${SEED:-0} RUNS=${RUNS:-runs} HF_HUB_OFFLINE=1
export CUDA_VISIBLE_DEVICES=  # a model this small is faster without a GPU

# Two commands run side by side where they can (&), with a thread each: tensors are too small to share. The second one
# prints into a file; its last words are shown if something fails, and it ends with the script (Ctrl-C would spare it).
export OMP_NUM_THREADS=1
mkdir -p "$RUNS"
trap 'tail -n 3 "$RUNS"/*.log >&2' ERR
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

# A world whose truth is known: mp4 clips and six CSVs, in the formats found in the wild.
python -m toy data --out "$RUNS/data" --seed "$SEED" > "$RUNS/data.log" 2>&1 &

# The stand-in for Qwen3-VL-8B-Instruct: the real classes, tiny, pre-trained until it can describe a clip.
python -m toy base --out "$RUNS/base" --seed "$SEED"
wait $!

# Stage 0: the base model writes a CoT for each video. Greedy: stage 1 should see its best guess.
# A CoT that has not ended after 80 tokens never ends, and its whole batch would wait for it.
python collect_cots.py --model "$RUNS/base" --seed "$SEED" --temperature 0 --batch-size 120 --max-new-tokens 80 \
  --data "$RUNS/data/train_cold_start.csv" "$RUNS/data/val_cold_start.csv" \
  --out "$RUNS/data/train_cots.csv" "$RUNS/data/val_cots.csv"

# What the model reads, and the CoT: one pair, as text and as a picture.
python -m toy.look --show 1 --data "$RUNS/data/train_cots.csv" --model "$RUNS/base" --out "$RUNS/frames.png"

# Stage 1: the head learns to score, with the CoT masked in half of the pairs. A tiny model needs larger steps than an 8B:
# the LLM's rate is 250 times the paper's, the tower's 15, the head's 1,500. LoRA without dropout: drawing its masks is a
# quarter of a step at this width.
# Beside it, the discriminative baseline: every CoT masked, so the head scores without any.
python cold_start.py --model "$RUNS/base" --data "$RUNS/data/train_cots.csv" --val "$RUNS/data/val_cots.csv" \
  --out "$RUNS/discriminative" --overwrite --seed "$SEED" --batch-pairs 8 --micro-pairs 8 --epochs 3 \
  --lr 5e-4 --lr-vision 3e-5 --lr-head 3e-3 --lora-r 16 --lora-alpha 32 --lora-dropout 0 --no-gradient-checkpointing \
  --val-every 35 --save-every 0 --frame-cache "$RUNS/frames" --mask-probability 1 > "$RUNS/discriminative.log" 2>&1 &
python cold_start.py --model "$RUNS/base" --data "$RUNS/data/train_cots.csv" --val "$RUNS/data/val_cots.csv" \
  --out "$RUNS/stage1" --overwrite --seed "$SEED" --batch-pairs 8 --micro-pairs 8 --epochs 3 \
  --lr 5e-4 --lr-vision 3e-5 --lr-head 3e-3 --lora-r 16 --lora-alpha 32 --lora-dropout 0 --no-gradient-checkpointing \
  --val-every 35 --save-every 0 --frame-cache "$RUNS/frames"
wait $!

# Evaluation on three test sets, without thinking and after stage 1; it needs what is there, so stage 2 runs beside it.
(
python evaluate.py --model "$RUNS/discriminative/model" --out "$RUNS/eval/discriminative" --no-think \
  --root "$RUNS/data" --benchmark in-domain genai-bench videogen-rewardbench --batch-size 220 --max-new-tokens 80
python evaluate.py --model "$RUNS/stage1/model" --out "$RUNS/eval/stage1" \
  --root "$RUNS/data" --benchmark in-domain genai-bench videogen-rewardbench --batch-size 220 --max-new-tokens 80
) > "$RUNS/eval.log" 2>&1 &

# Stage 2: GRPO improves the thinking by rules, BT keeps the head in step. At 200 times the paper's learning rate the LLM
# moves away under the head faster: BT has 10 times the weight. CoTs here have about 55 tokens: the length reward's range.
python grpo.py --model "$RUNS/stage1/model" --data "$RUNS/data/train_rl.csv" --out "$RUNS/stage2" --overwrite \
  --seed "$SEED" --batch-pairs 6 --mini-pairs 6 --epochs 9 --max-steps 40 --lr 2e-4 --bt-coef 0.05 \
  --length-low 10 --length-high 40 --no-gradient-checkpointing --rows-per-batch 96 --save-every 0 --max-new-tokens 72 \
  --micro-rollouts 8

# Evaluation after stage 2: by the head, and by the score in its text. Two ranks share the videos; a CoT and a reward
# depend on neither the batch nor the rank.
torchrun --nproc_per_node 2 evaluate.py --model "$RUNS/stage2/model" --out "$RUNS/eval/stage2" --score-from head text \
  --root "$RUNS/data" --benchmark in-domain genai-bench videogen-rewardbench --batch-size 220 --max-new-tokens 80
wait $!

# One table and one figure of all reports. From the shelf: the pipeline itself does not need lab/.
if [ -d lab ]; then
  python -m lab.study.compare --out "$RUNS" --training "$RUNS" \
    --runs "discriminative=$RUNS/eval/discriminative/*/report.json" \
    "stage 2, its own text=$RUNS/eval/stage2/*/text/report.json" \
    "DeScore stage 1=$RUNS/eval/stage1/*/report.json" "DeScore stage 2=$RUNS/eval/stage2/*/report.json"
fi
