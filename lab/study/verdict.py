"""From measured values to a verdict: a bootstrap over seeds, then pairs, and three words fixed beforehand.

Values come as {seed: {test set: (n,) array}}, one value per pair: a hit, or the difference of two models' hits on that
pair. What is judged is the mean over pairs, then sets, then seeds, so that a larger set does not count more.
"""

import numpy as np

MARGIN = 0.03  # below it a difference of accuracies is no finding. Fixed before any run.
SEEN, NOT_SEEN, CANNOT_TELL = "seen here", "not seen here", "can't tell at this size"
NOT_TESTABLE, NOT_RUN = "not testable here", "not run yet"
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, .975, for 2 ... 10 seeds
ENOUGH = 20  # values: with fewer a bootstrap interval is too narrow to be believed


def pooled(values: dict) -> float:
    """The mean over pairs, then sets, then seeds. Sets without a pair are left out."""
    return float(np.mean([np.mean([a.mean() for a in sets.values() if len(a)]) for sets in values.values()]))


def interval(values: dict, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of `pooled`: seeds are drawn with replacement, then in each of them the pairs of a set.

    With one seed only pairs are drawn: the interval then knows nothing of how much another training run would differ.
    """
    rng, runs = np.random.default_rng(seed), list(values.values())
    means = np.empty((len(runs), len(runs), draws))  # [place in the draw, run, draw]: a run drawn twice is drawn anew
    for place in range(len(runs)):
        for number, sets in enumerate(runs):
            drawn = [_means(array, rng, draws) for array in sets.values() if len(array)]
            means[place, number] = np.mean(drawn, axis=0)
    chosen = rng.integers(len(runs), size=(len(runs), draws))
    places = np.arange(len(runs))[:, None]
    low, high = np.quantile(means[places, chosen, np.arange(draws)].mean(0), (0.025, 0.975))
    return float(low), float(high)


def interval_of_seeds(means) -> tuple[float, float] | None:
    """95 % interval by Student's t of one number per seed: mean ± t s / √n. None for a single seed.

    It knows of nothing but how much seeds differ, and of how few they are: for three, t is 4.3, not 1.96. A bootstrap
    over three seeds has ten different draws, and is too narrow. Worked: .071, .032, .013: .039 [-.035, +.112].
    More than ten seeds: t of ten, a little too wide.
    """
    means = np.asarray(means, dtype=float)
    if len(means) < 2:
        return None
    half = T[min(len(means) - 2, len(T) - 1)] * means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean() - half), float(means.mean() + half)


def summary_of_seeds(means) -> dict:
    """A row as `verdict` takes it, from one number per seed alone. One seed: no interval, so nothing can be told."""
    low, high = interval_of_seeds(means) or (-np.inf, np.inf)
    return {"mean": float(np.mean(means)), "low": low, "high": high, "seeds": len(means)}


def _means(array: np.ndarray, rng, draws: int) -> np.ndarray:
    """(draws,) means of n values drawn with replacement: how often each DIFFERENT value is drawn is multinomial.

    Hits have three different values, so this costs three numbers a draw, not n.
    """
    different, counts = np.unique(np.asarray(array, dtype=float), return_counts=True)
    return rng.multinomial(len(array), counts / len(array), size=draws) @ different / len(array)


def summary(values: dict) -> dict:
    """Mean, interval, number of values and seeds, and the mean of each seed: one row of the result."""
    count = sum(len(array) for sets in values.values() for array in sets.values())
    if count < ENOUGH:
        return {"mean": None, "low": None, "high": None, "n": count, "seeds": len(values)}
    values = {seed: sets for seed, sets in values.items() if any(len(array) for array in sets.values())}
    low, high = interval(values)
    by_seed = [pooled({seed: sets}) for seed, sets in values.items()]
    return {"mean": pooled(values), "low": low, "high": high, "n": count, "seeds": len(values), "by_seed": by_seed}


def verdict(row: dict, margin: float = MARGIN) -> str:
    """Seen: the interval lies above 0. Not seen: it lies below the margin, so an effect of that size is ruled out.

    Else, or with too few values, these data do not tell. The margin is one of accuracies: what has another unit gives
    0, and is then not seen only where it surely is not above 0. An effect that is surely positive but below the margin
    is seen: it is there, and its size stands beside it.
    """
    if row["mean"] is None:
        return CANNOT_TELL
    if row["low"] > 0:
        return SEEN
    return NOT_SEEN if row["high"] < margin else CANNOT_TELL


def weakest(verdicts: list[str]) -> str:
    """The verdict of a claim that needs several: seen if all are, not seen as soon as one is not."""
    if NOT_SEEN in verdicts:
        return NOT_SEEN
    return CANNOT_TELL if CANNOT_TELL in verdicts else SEEN


def interquartile_mean(values) -> float:
    """Mean of the middle half, for a handful of runs: a quarter of the values, rounded down, goes at each end."""
    ordered = np.sort(np.asarray(values, dtype=float).ravel())
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())
