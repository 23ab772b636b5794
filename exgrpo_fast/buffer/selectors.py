"""Which questions are replayed, and which of their trajectories.

Questions: a Gaussian over buckets, ExGRPO (arXiv 2510.02245) section 3.2 and algorithm 2. Its
sigma is given in accuracy, so that it means the same for every group size; the published runs use
0.125 at K = 8 (one success), the paper prints 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exgrpo_fast.buffer.store import ExperienceStore


def bucket_probabilities(
    sizes: Mapping[int, int], *, group_size: int, mean: float, sigma: float
) -> dict[int, float]:
    """p_k ~ exp(-(k/K - mean)^2 / (2 sigma^2)) over the non-empty buckets, whatever their size."""
    filled = [k for k, size in sizes.items() if size > 0]
    exponents = np.array([-((k / group_size - mean) ** 2) / (2 * sigma**2) for k in filled])
    # The largest exponent is taken out: a bucket far from the mean must not turn 0 / 0.
    densities = np.exp(exponents - exponents.max()) if filled else exponents
    return dict(zip(filled, (densities / densities.sum()).tolist(), strict=True)) if filled else {}


def allocate(
    count: int,
    probabilities: Mapping[int, float],
    sizes: Mapping[int, int],
    rng: np.random.Generator,
) -> dict[int, int]:
    """Questions per bucket: one multinomial draw, then what does not fit is handed out singly.

    Sums to `count`, never above a bucket's size. ValueError when the buckets hold fewer.
    """
    if count > sum(sizes[k] for k in probabilities):
        raise ValueError(f"{count} questions wanted, {sum(sizes.values())} stored")
    buckets = list(probabilities)
    drawn = rng.multinomial(count, [probabilities[k] for k in buckets]) if buckets else []
    taken = {k: min(int(c), sizes[k]) for k, c in zip(buckets, drawn, strict=True)}
    for _ in range(count - sum(taken.values())):
        free = [k for k in buckets if taken[k] < sizes[k]]
        weights = np.array([probabilities[k] for k in free])
        # Buckets so far from the mean that their probability underflows share what is left.
        weights = (
            weights / weights.sum() if weights.sum() > 0 else np.full(len(free), 1 / len(free))
        )
        taken[free[rng.choice(len(free), p=weights)]] += 1
    return taken


def draw_questions(
    store: ExperienceStore, count: int, *, mean: float, sigma: float, rng: np.random.Generator
) -> list[str]:
    """`count` distinct stored questions: Gaussian over buckets, uniform inside a bucket."""
    sizes = store.bucket_sizes()
    probabilities = bucket_probabilities(sizes, group_size=store.group_size, mean=mean, sigma=sigma)
    chosen: list[str] = []
    for k, share in allocate(count, probabilities, sizes, rng).items():
        questions = store.bucket(k)
        chosen += [questions[i] for i in rng.choice(len(questions), size=share, replace=False)]
    return chosen


def lowest(keys: Sequence[float]) -> int:
    """Index of the smallest key, the first of equal ones."""
    return min(range(len(keys)), key=keys.__getitem__)
