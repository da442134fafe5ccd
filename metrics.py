"""How often rewards agree with people: accuracy without and with ties, and its uncertainty.

Pure functions of numpy arrays. labels (n,) in {+1: A is better, -1: B, 0: the same}; margins (n,) = r_A - r_B, finite.
"""

import numpy as np

from plumbing.settings import InputError

NOTHING_TIED = -1.0  # a threshold below every |margin|


def checked(labels, margins) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of shape (n,), n >= 1; InputError for other shapes, other labels and non-finite margins.

    Margins keep nine decimals (of the largest): 3.3 - 3.0 and 1.3 - 1.0 are the same, and floats say otherwise.
    """
    labels, margins = np.asarray(labels), np.asarray(margins, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != margins.shape:
        raise InputError(f"labels {labels.shape} and margins {margins.shape} must be two lists of the same length.")
    if not len(labels):
        raise InputError("there is no pair to measure.")
    good = np.isfinite(margins) & np.isin(labels, (-1, 0, 1))
    if not good.all():
        row = int(good.argmin())
        raise InputError(f"row {row} (from 0): label {labels[row]} must be 1, -1 or 0, margin {margins[row]} finite.")
    size = int(np.floor(np.log10(np.abs(margins).max() or 1.0)))
    return labels, np.round(margins, min(9 - size, 308))  # 10^309 is no float


def right(labels: np.ndarray, margins: np.ndarray, threshold: float = NOTHING_TIED) -> np.ndarray:
    """(n,) bool: is the pair right when |margin| <= threshold is a predicted tie? Untied, equal scores are wrong."""
    tied = np.abs(margins) <= threshold
    return np.where(tied, labels == 0, labels * margins > 0)


def accuracy_without_ties(labels, margins) -> float:
    """Share of pairs with sign(r_A - r_B) = label, human ties dropped, equal scores wrong (docs/metrics.md).

    Example: labels [1, 1, -1, 0], margins [2, 0, -1, 5] -> right, wrong (equal), right, dropped -> 2/3.
    Raises InputError for empty input, only human ties, or a non-finite margin.
    """
    labels, margins = checked(labels, margins)
    if not labels.any():
        raise InputError("every pair is a human tie: accuracy without ties is not defined.")
    return float(right(labels, margins)[labels != 0].mean())


def _hits_by_ties(labels, margins) -> tuple[np.ndarray, np.ndarray]:
    """(sorted |margin| (n,), hits (n + 1,)): hits[k] pairs are right when the k smallest |margin| are called ties."""
    order = np.argsort(np.abs(margins), kind="stable")
    human_tie, untied = (labels == 0)[order], right(labels, margins)[order]
    return np.abs(margins)[order], untied.sum() + np.cumsum(np.append(0, human_tie.astype(int) - untied))


def accuracy_curve(labels, margins) -> tuple[np.ndarray, np.ndarray]:
    """All candidate thresholds, rising, and the accuracy with ties at each. O(n log n): one sort, one running sum.

    No threshold can cut inside a run of equal |margin|: the candidates are "nothing is tied" (-1) and the runs' ends.
    Raises InputError as `checked` does.
    """
    labels, margins = checked(labels, margins)
    sizes, hits = _hits_by_ties(labels, margins)
    ends = np.flatnonzero(np.append(np.diff(sizes) > 0, True))
    return np.append(NOTHING_TIED, sizes[ends]), np.append(hits[0], hits[ends + 1]) / len(labels)


def accuracy_with_ties(labels, margins) -> tuple[float, float]:
    """Best share of right pairs when |r_A - r_B| <= eps is a predicted tie ("Ties Matter", arXiv 2305.14324).

    Returns (accuracy, eps). eps = -1 means "nothing is tied"; of equally good eps the smallest is returned.
    Example: labels [1, 0, -1], margins [2, .5, -1] -> (1.0, .5).
    """
    thresholds, accuracies = accuracy_curve(labels, margins)
    best = int(np.argmax(accuracies))
    return float(accuracies[best]), float(thresholds[best])


def accuracy_with_ties_cross_fitted(labels, margins, seeds: int = 20) -> float:
    """Accuracy with ties, eps tuned on one random half and measured on the other, both ways, mean over `seeds` splits.

    Tuning eps on the data it is measured on is optimistic (random scores at n = 100: .39 against .35 here).
    nan for a single pair, which has no halves. The order of the rows does not matter: they are sorted first.
    """
    labels, margins = checked(labels, margins)
    n, hits = len(labels), 0
    if n < 2:
        return float("nan")
    order = np.lexsort((labels, margins))
    labels, margins = labels[order], margins[order]
    for seed in range(seeds):
        half = np.random.default_rng(seed).permutation(n) < n // 2
        for tune, test in ((half, ~half), (~half, half)):
            _, threshold = accuracy_with_ties(labels[tune], margins[tune])
            hits += right(labels[test], margins[test], threshold).sum()
    return float(hits / (seeds * n))


def videoalign_compatible(labels, margins) -> float:
    """Accuracy with ties as VideoAlign's public script computes it, for comparison with published numbers only.

    It differs from the definition twice: "nothing is tied" is never tried, so four right predictions without human ties
    score 3/4; and cuts fall inside runs of equal |margin| too, in file order, so the value can depend on row order.
    margins: as they are, since that script rounds nothing.
    """
    checked(labels, margins)
    _, hits = _hits_by_ties(np.asarray(labels), np.asarray(margins, dtype=np.float64))
    return float(hits[1:].max() / len(labels))


def calibration(labels: np.ndarray, margins: np.ndarray, bins: int = 10) -> dict:
    """Do videos win as often as the Bradley-Terry model says? P(A wins) = 1 / (1 + exp(-margin)), human ties left out.

    Each pair counts from both sides, A against B and B against A: in a file that names winners first, A always wins,
    whatever a model says. Returns {said, won, pairs} of each non-empty one of `bins` equal slices of [0, 1], and the
    expected calibration error sum_b n_b / n |mean said - share won|: 0 is perfect; rewards on too large a scale are
    over-confident.
    """
    decided = labels != 0
    both = np.append(margins[decided], -margins[decided])
    won = np.append(labels[decided], -labels[decided]) > 0
    said = 1 / (1 + np.exp(-np.clip(both, -700, 700)))  # exp overflows at 710
    slot = np.minimum((said * bins).astype(int), bins - 1)
    chosen = [slot == b for b in np.unique(slot)]
    rows = [{"said": float(said[c].mean()), "won": float(won[c].mean()), "pairs": int(c.sum())} for c in chosen]
    error = sum(r["pairs"] * abs(r["said"] - r["won"]) for r in rows) / len(said) if rows else None
    return {"bins": rows, "expected_calibration_error": error}


def bootstrap_interval(values, groups=None, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of mean(values), values (n,) being 0/1 hits or paired differences of hits.

    groups (n,): pairs with the same number are drawn together. We pass the prompt, since its pairs share videos and are
    not independent. eps stays where it was tuned. (nan, nan) for fewer than two groups.
    """
    values = np.asarray(values, dtype=np.float64)
    groups = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(groups, weights=values), np.bincount(groups)
    if len(sums) < 2:
        return float("nan"), float("nan")
    rng, means = np.random.default_rng(seed), np.empty(draws)
    for k in range(draws):
        drawn = rng.integers(len(sums), size=len(sums))
        means[k] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
