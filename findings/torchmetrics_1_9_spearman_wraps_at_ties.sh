#!/usr/bin/env bash
# Spearman against human labels ranks the labels, and labels of three or five levels are nearly all ties. torchmetrics gives
# tied values the mean of their ranks, as it should, but sums these ranks in int32: a level of m labels around rank r
# wraps once m * r passes 2^31, in the top third of some 90,000 labels, say. From there its correlation of perfectly sound
# float32 scores and labels is too low or has the wrong sign, without a word; preference sets for video hold up to twice
# as many pairs. Continuous labels, which have no ties, are right at any size.
# Behaviour: torchmetrics beside scipy at 50,000 to 400,000 labels, by number of levels.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==2.13.0,!=2.13.0+cpu" numpy==2.4.6 scipy==1.17.1 torchmetrics==1.9.0 2> "$dir/log" || { tail -n 5 "$dir/log"; exit 1; }
cat > "$dir/run.py" <<'PY'
import numpy as np, scipy, torch, torchmetrics
from scipy.stats import spearmanr
from torchmetrics.functional import spearman_corrcoef
print("torchmetrics", torchmetrics.__version__, "scipy", scipy.__version__, "torch", torch.__version__)
far, said_so = {}, {}
for levels in (3, 5, None):
    for n in (50_000, 100_000, 200_000, 400_000):
        g = np.random.default_rng(0)
        quality = g.normal(size=n)
        said, score = ((quality + g.normal(size=n)).astype(np.float32) for _ in range(2))
        if levels:
            said = np.digitize(said, np.linspace(-1, 1, levels - 1)).astype(np.float32)
        ours, theirs = spearmanr(score, said).statistic, float(spearman_corrcoef(torch.tensor(score), torch.tensor(said)))
        far[levels, n], said_so[levels, n] = abs(ours - theirs), theirs
        print(f"  {levels or 'no'} levels, {n} labels: torchmetrics {theirs:+.3f}, scipy {ours:+.3f}")
assert all(far[levels, 50_000] < 1e-3 for levels in (3, 5)) and all(far[None, n] < 1e-3 for _, n in far)
assert far[3, 100_000] > 0.1 and all(said_so[levels, n] < 0 for levels in (3, 5) for n in (200_000, 400_000))
print("as described")
PY
"$dir/env/bin/python" "$dir/run.py" 2> "$dir/log" || { tail -n 8 "$dir/log"; exit 1; }
