"""Which questions are asked again, and which of their trajectories are replayed.

All draws come from the run's own generator, and depend on what is stored alone: not on the device,
nor on the order of the groups that brought it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from exgrpo_fast.experience.replay.store import Experiences, ExperienceStore, rank_within

QuestionSelector = Callable[[ExperienceStore, int, np.random.Generator, int], list[int]]

# --- questions: (store, count, generator, step) -> places in the data -----------------------------


def gaussian_buckets(*, mean: float, sigma: float) -> QuestionSelector:
    """A Gaussian over buckets, uniform inside a bucket (ExGRPO, arXiv 2510.02245, algorithm 2).

    `sigma` is in accuracy, so that it means the same for every group size; the published runs use
    0.125 at K = 8 (one success), the paper prints 1.
    """

    def draw(store: ExperienceStore, count: int, rng: np.random.Generator, step: int) -> list[int]:
        sizes = dict(enumerate(store.bucket_sizes()))
        count = min(count, sum(sizes.values()))
        if count == 0:
            return []
        probabilities = bucket_probabilities(
            sizes, group_size=store.group_size, mean=mean, sigma=sigma
        )
        in_order = store.by_bucket()
        start, chosen = len(in_order) - sum(sizes.values()), []
        shares = allocate(count, probabilities, sizes, rng)
        for k, size in sizes.items():
            if shares.get(k):
                chosen.append(start + rng.choice(size, size=shares[k], replace=False))
            start += size
        places = torch.from_numpy(np.concatenate(chosen)).to(in_order.device)
        return in_order[places].tolist()

    return draw


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


def uniform_questions(
    store: ExperienceStore, count: int, rng: np.random.Generator, step: int
) -> list[int]:
    """Every stored question alike: ExGRPO's ablation "without question selection"."""
    stored = (store.bucket >= 0).nonzero().flatten().cpu().numpy()
    return rng.choice(stored, size=min(count, len(stored)), replace=False).tolist()


def medium_questions(
    *, low: float, high: float, cooldown: int, max_visits: int
) -> QuestionSelector:
    """Prompts of medium difficulty, the nearest to one half first (Prompt Replay, 2603.21177).

    A prompt waits `cooldown` steps after each visit, and comes `max_visits` times at most; of equal
    ones the longest unseen comes first. Nothing is drawn at random.
    """

    def draw(store: ExperienceStore, count: int, rng: np.random.Generator, step: int) -> list[int]:
        rate = store.successes / store.group_size
        ready = (store.bucket >= 0) & (rate >= low) & (rate <= high)
        ready &= (store.last_visit + cooldown < step) & (store.visits < max_visits)
        places = ready.nonzero().flatten()
        places = places[store.last_visit[places].argsort(stable=True)]
        distance = (rate[places] - 0.5).abs()
        return places[distance.argsort(stable=True)][:count].tolist()

    return draw


# --- trajectories: candidates -> one key each, the smallest is chosen -----------------------------

TrajectoryKey = Literal[
    "entropy", "highest_entropy", "nll", "entropy_sum", "stored_entropy", "random", "newest",
    "highest_reward", "max_variance", "all",
]  # fmt: skip
# Those that need a forward pass over every candidate.
SCORED: frozenset[str] = frozenset({"entropy", "highest_entropy", "nll", "entropy_sum"})


def stored_keys(by: TrajectoryKey, candidates: Experiences, rng: np.random.Generator) -> Tensor:
    """float32 [C]: keys that follow from what is stored."""
    device = candidates.entropy.device
    if by == "stored_entropy":
        return candidates.entropy
    if by == "random":
        return torch.from_numpy(rng.random(len(candidates), dtype=np.float32)).to(device)
    if by == "newest":
        # they come in the order of arrival
        return -torch.arange(len(candidates), device=device).float()
    if by == "highest_reward":
        return -candidates.reward
    assert by == "all", by
    return torch.zeros(len(candidates), device=device)


def choose(owner: Tensor, keys: Tensor, count: int) -> Tensor:
    """int64: places of the `count` smallest keys of each owner, sorted by owner, then by key.

    NaN counts as the largest; of equal keys the earlier one is taken.
    """
    rank = rank_within(owner, keys.nan_to_num(nan=torch.inf, posinf=torch.inf))
    places = (rank < count).nonzero().flatten()
    places = places[rank[places].argsort(stable=True)]
    return places[owner[places].argsort(stable=True)]


def max_variance_subset(rewards: Sequence[float], count: int) -> list[int]:
    """Places of the `count` rewards of the largest variance: some lowest and some highest.

    RePO (arXiv 2506.09340) picks so; the best subset always consists of both ends of the order.
    """
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    count = min(count, len(order))
    subsets = [order[:low] + order[len(order) - (count - low) :] for low in range(count + 1)]
    return sorted(max(subsets, key=lambda subset: float(np.var([rewards[i] for i in subset]))))
