"""A look inside the experience store, and a way to make it smaller.

Everything here reads a snapshot, the plain values and tensors that lie in a checkpoint
(`snapshot.py`): no store, no device and no model is needed.

Legend of shapes
    Q   questions that the snapshot names
    A   stored trajectories, in the order of arrival
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.experience.replay.store import NOBODY, rank_within
from exgrpo_fast.model.packing import Ragged

Snapshot = Mapping[str, Any]
SortKey = Literal["bucket", "trajectories", "visits", "entropy", "age"]


@dataclass(frozen=True)
class StoredQuestion:
    """One question, and what its trajectories have in common."""

    id: str
    bucket: int  # -1 where it is not drawn from the store
    retired: bool
    visits: int
    last_visit: int  # step
    trajectories: int
    lowest_entropy: float | None  # in nats; None where none was scored
    newest: int | None  # birth step of its youngest trajectory; None without one


@dataclass(frozen=True)
class StoredTrajectory:
    """One trajectory of a question."""

    token_ids: list[int]
    reward: float
    birth_step: int
    entropy: float | None  # last known mean over its tokens, in nats; None = never scored
    mean_logprob: float  # under the policy that produced it
    truncated: bool  # the length limit ended it


# --- the store as a whole -------------------------------------------------------------------------


def stats(snapshot: Snapshot, step: int) -> dict[str, Any]:
    """What is stored after `step`, as values for JSON; None where there is nothing to measure.

    `buckets` counts questions by bucket 0..K, `ages` trajectories by age in steps, in spans of
    powers of two; both leave out what is empty. Never scored trajectories have no entropy.
    """
    columns, of_question = snapshot["trajectories"], snapshot["of_question"]
    bucket, retired = of_question["bucket"], of_question["retired"]
    per_question = num_trajectories(snapshot)
    ages = step - columns["birth_step"]
    entropy, scored = columns["entropy"], columns["entropy"].isfinite()
    token_tensors = (snapshot["token_ids"], snapshot["behaviour_logprobs"])
    return {
        "step": step,
        "group_size": snapshot["group_size"],
        "questions": int((bucket >= 0).sum()),
        "retired": int(retired.sum()),
        "trajectories": len(ages),
        "tokens": len(snapshot["token_ids"]),
        "bytes": sum(t.numel() * t.element_size() for t in token_tensors),
        "evicted": snapshot["num_evicted"],
        "buckets": dict(sorted(Counter(bucket[bucket >= 0].tolist()).items())),
        "ages": age_spans(ages),
        "trajectories_per_question": spread(per_question[per_question > 0]),
        "age": spread(ages),
        "length": spread(snapshot["lengths"]),
        "entropy": spread(entropy[scored]),
        "never_scored": int((~scored).sum()),
    }


def num_trajectories(snapshot: Snapshot) -> Tensor:
    """int64 [Q]"""
    owner = snapshot["trajectories"]["question"]
    return torch.bincount(owner, minlength=len(snapshot["questions"]))


def age_spans(ages: Tensor) -> dict[str, int]:
    """{'0': 12, '1': 4, '4-7': 9}: each span begins at a power of two."""
    counts = Counter(age.bit_length() for age in ages.tolist())
    return {span(bits): counts[bits] for bits in sorted(counts)}


def span(bits: int) -> str:
    """The numbers of so many bits: 0 -> '0', 1 -> '1', 2 -> '2-3', 3 -> '4-7'."""
    return str(bits) if bits < 2 else f"{1 << bits - 1}-{(1 << bits) - 1}"


def spread(values: Tensor) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    return {
        "mean": float(values.double().mean()),
        "min": values.min().item(),
        "max": values.max().item(),
    }


# --- questions and their trajectories -------------------------------------------------------------


def stored_questions(
    snapshot: Snapshot,
    *,
    sort: SortKey = "bucket",
    bucket: int | None = None,
    limit: int | None = None,
) -> list[StoredQuestion]:
    """Questions that have a bucket or a trajectory; equals stay in the order of the data.

    sort: the lowest bucket, the most trajectories, the most visits, the lowest entropy, or the
    greatest age of the youngest trajectory comes first. bucket: only those in it.
    """
    found = [q for q in known_questions(snapshot) if q.bucket >= 0 or q.trajectories]
    if bucket is not None:
        found = [q for q in found if q.bucket == bucket]
    keys: dict[SortKey, Callable[[StoredQuestion], Any]] = {
        "bucket": lambda q: q.bucket,
        "trajectories": lambda q: -q.trajectories,
        "visits": lambda q: -q.visits,
        "entropy": lambda q: (q.lowest_entropy is None, q.lowest_entropy),
        "age": lambda q: (q.newest is None, q.newest),
    }
    return sorted(found, key=keys[sort])[:limit]


def known_questions(snapshot: Snapshot) -> list[StoredQuestion]:
    """Every question that the snapshot names, in the order of the data."""
    columns, of_question = snapshot["trajectories"], snapshot["of_question"]
    owner, count = columns["question"], len(snapshot["questions"])
    lowest = torch.full((count,), torch.inf).scatter_reduce_(0, owner, columns["entropy"], "amin")
    newest = torch.full((count,), -1).scatter_reduce_(0, owner, columns["birth_step"], "amax")
    columns_of_questions = (
        snapshot["questions"],
        *(of_question[name].tolist() for name in ("bucket", "retired", "visits", "last_visit")),
        num_trajectories(snapshot).tolist(),
        [known(entropy) for entropy in lowest.tolist()],
        [step if step >= 0 else None for step in newest.tolist()],
    )
    return [StoredQuestion(*row) for row in zip(*columns_of_questions, strict=True)]


def find_question(snapshot: Snapshot, question_id: str) -> StoredQuestion:
    """UserError, with the closest id, where the snapshot does not name it."""
    for question in known_questions(snapshot):
        if question.id == question_id:
            return question
    close = difflib.get_close_matches(question_id, snapshot["questions"], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise UserError(f"nothing is known of a question '{question_id}'{hint}")


def stored_trajectories(snapshot: Snapshot, question_id: str) -> list[StoredTrajectory]:
    """Those of one question that the snapshot names, in the order of arrival."""
    columns, lengths = snapshot["trajectories"], snapshot["lengths"]
    mine = (columns["question"] == snapshot["questions"].index(question_id)).nonzero().flatten()
    tokens, logprobs = (
        Ragged(snapshot[name], lengths).pick(mine).split()
        for name in ("token_ids", "behaviour_logprobs")
    )
    names = ("reward", "birth_step", "entropy", "truncated")
    rows = zip(tokens, logprobs, *(columns[name][mine].tolist() for name in names), strict=True)
    return [
        StoredTrajectory(
            token_ids=ids.tolist(),
            reward=reward,
            birth_step=birth_step,
            entropy=known(entropy),
            mean_logprob=float(of_one.mean()),
            truncated=truncated,
        )
        for ids, of_one, reward, birth_step, entropy, truncated in rows
    ]


def known(entropy: float) -> float | None:
    return None if entropy == float("inf") else entropy


# --- a smaller store ------------------------------------------------------------------------------


def prune(
    snapshot: Snapshot,
    *,
    step: int,
    max_age: int | None = None,
    max_per_question: int | None = None,
) -> tuple[dict[str, Any], int]:
    """(the snapshot of what stays, the number of trajectories dropped).

    First go those born more than `max_age` steps before `step`, then what a question has above
    `max_per_question`: the highest last-known entropy first, the never scored last, as in the
    store itself. A question left without a trajectory leaves its bucket.
    """
    columns, lengths = snapshot["trajectories"], snapshot["lengths"]
    kept = torch.ones(len(lengths), dtype=torch.bool)
    if max_age is not None:
        kept &= columns["birth_step"] >= step - max_age
    if max_per_question is not None:
        rows = kept.nonzero().flatten()
        entropy = columns["entropy"][rows]
        keys = entropy.masked_fill(entropy.isinf(), -torch.inf)
        rank = rank_within(columns["question"][rows], keys)
        kept[rows[rank >= max_per_question]] = False
    smaller = keep_only(snapshot, kept.nonzero().flatten())
    emptied = (num_trajectories(snapshot) > 0) & (num_trajectories(smaller) == 0)
    bucket = snapshot["of_question"]["bucket"].masked_fill(emptied, NOBODY)
    smaller["of_question"] = {**snapshot["of_question"], "bucket": bucket}
    return smaller, int((~kept).sum())


def keep_only(snapshot: Snapshot, index: Tensor) -> dict[str, Any]:
    """The snapshot with the trajectories of an index alone; questions stay as they are."""
    lengths = snapshot["lengths"]
    return {
        **snapshot,
        "trajectories": {name: c[index] for name, c in snapshot["trajectories"].items()},
        "lengths": lengths[index],
        **{
            name: Ragged(snapshot[name], lengths).pick(index).values
            for name in ("token_ids", "behaviour_logprobs")
        },
    }
