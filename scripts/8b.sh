#!/usr/bin/env bash
# The paper's setting: Qwen3-VL-8B-Instruct on one node of 8 GPUs of 80 GB. Not run here; memory and hours are planned
# (docs/machines.md, which has other machines, too). Settings that are not named are the paper's, each script's defaults.
#   DATA   folder with train.csv, val.csv and train_rl.csv (docs/data.md), e.g. made from public data by lab/road/README.md
#   BENCH  VideoGen-RewardBench (docs/benchmarks.md)
# Started again after an interruption, stages 1 and 2 need --resume; the CoTs and the evaluation go on by themselves.
set -euo pipefail
cd "$(dirname "$0")/.."
export DATA=${DATA:-data} BENCH=${BENCH:-VideoGen-RewardBench} RUNS=${RUNS:-runs/8b}

# Will it fit? GiB on a GPU and minutes of an update, before anything is downloaded.
if [ -d lab ]; then
  python -m lab.bench.plan --plan 8B --gpus 8
fi

# Stage 0: the base model thinks about each video, one vLLM engine on each GPU.
torchrun --nproc_per_node 8 collect_cots.py --engine vllm \
  --data "$DATA/train.csv" "$DATA/val.csv" --out "$DATA/train_cots.csv" "$DATA/val_cots.csv"

# Stage 1: LoRA on the LLM, all of the vision tower, query and head.
torchrun --nproc_per_node 8 cold_start.py --data "$DATA/train_cots.csv" --val "$DATA/val_cots.csv" --out "$RUNS/stage1"

# Stage 2: all of the LLM. Ctrl-C lets the running step end and saves; torchrun kills after 30 seconds unless told otherwise.
torchrun --shutdown_timeout 900 --nproc_per_node 8 grpo.py --engine vllm --micro-rollouts 4 \
  --model "$RUNS/stage1/model" --data "$DATA/train_rl.csv" --out "$RUNS/stage2"

# Evaluation: think, score, count, with ties and without.
torchrun --nproc_per_node 8 evaluate.py --engine vllm \
  --model "$RUNS/stage2/model" --benchmark videogen-rewardbench --root "$BENCH" --out "$RUNS/eval"
