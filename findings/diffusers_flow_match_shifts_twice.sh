#!/usr/bin/env bash
# diffusers 0.42.1, FlowMatchEulerDiscreteScheduler(shift=3).set_timesteps(10): the grid is shifted TWICE, so it ends
# .278, .0089, 0. The ends of the grid (sigma_max, sigma_min) are those of the shifted training sigmas, an even grid is
# laid between them, and that is shifted again; the last step is almost none. Deterministic samplers hardly notice.
# A stochastic one does (Flow-GRPO's SDE step): noise added in the step before the last is taken out by nobody.
# Given `sigmas` = 1, .9, ..., .1 it shifts once and ends .4286, .25, 0.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"; "$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
cd "$dir"; venv/bin/python - <<'PY'
import diffusers, numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
print("diffusers", diffusers.__version__)
shift = lambda s: 3 * s / (1 + 2 * s)
plain, given = (FlowMatchEulerDiscreteScheduler(shift=3.0) for _ in range(2))
plain.set_timesteps(10)
given.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
twice, once = plain.sigmas.numpy(), given.sigmas.numpy()
print("set_timesteps(10)      ", np.round(twice, 4).tolist())
print("set_timesteps(sigmas=) ", np.round(once, 4).tolist())
low = shift(1e-3)  # the training sigmas' smallest, shifted
assert np.allclose(once[:-1], shift(np.linspace(1, 0.1, 10)), atol=1e-4)
assert np.allclose(twice[:-1], shift(np.linspace(1, low, 10)), atol=1e-3) and np.isclose(twice[-2], shift(low), atol=1e-4)
assert twice[-2] < 0.01 < 0.2 < twice[-3]
print("as described")
PY
