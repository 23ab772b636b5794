"""Trajectories that a run starts with: another run's experience, or worked solutions of the data.

The parquet file is what `exgrpo-fast buffer export` writes: one row a trajectory, with the columns
of `EXPORTED`, and the tokenizer's fingerprint in its metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from exgrpo_fast.core.text import first_line
from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.replay.store import Experiences
from exgrpo_fast.model.packing import Ragged

EXPORTED = {
    "question_id": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "behaviour_logprobs": pa.list_(pa.float32()),
    "birth_step": pa.int64(),
    "reward": pa.float32(),
    "success": pa.bool_(),
    "truncated": pa.bool_(),
    "entropy": pa.float32(),
    "completion": pa.string(),
}
VOCABULARY = b"vocabulary"


def export_pool(
    snapshot: Mapping[str, Any], path: Path, decode: Callable[[Sequence[int]], str]
) -> int:
    """Write the trajectories of a snapshot of the store; returns their number."""
    columns, lengths = snapshot["trajectories"], snapshot["lengths"]
    tokens = [t.tolist() for t in Ragged(snapshot["token_ids"], lengths).split()]
    values = {
        "question_id": [snapshot["questions"][i] for i in columns["question"].tolist()],
        "token_ids": tokens,
        "behaviour_logprobs": [
            t.tolist() for t in Ragged(snapshot["behaviour_logprobs"], lengths).split()
        ],
        "completion": [decode(ids) for ids in tokens],
        **{name: columns[name].tolist() for name in EXPORTED if name in columns},
    }
    write_pool(values, path, snapshot["vocabulary"])
    return len(tokens)


def write_pool(values: Mapping[str, Sequence[Any]], path: Path, vocabulary: str) -> None:
    """`values`: the columns of EXPORTED; `vocabulary`: the fingerprint of the tokenizer."""
    schema = pa.schema(
        [pa.field(name, kind) for name, kind in EXPORTED.items()],
        metadata={VOCABULARY: vocabulary.encode()},
    )
    pq.write_table(pa.table(dict(values), schema=schema), path)


def pool_vocabulary(path: Path) -> str | None:
    """The fingerprint that an export of a buffer names; None for any other file."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return metadata[VOCABULARY].decode() if VOCABULARY in metadata else None


def load_pool(path: Path, question_ids: Sequence[str], *, vocabulary: str) -> Experiences:
    """The successes of an export whose questions this run has.

    ValueError when the file is no export, comes from another tokenizer, or knows no question.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from None
    missing = EXPORTED.keys() - set(table.column_names)
    if missing:
        raise ValueError(f"{path}: no export of a buffer: it has no column {min(missing)}")
    if (table.schema.metadata or {}).get(VOCABULARY, b"").decode() != vocabulary:
        raise ValueError(f"{path}: written with another tokenizer: its token ids differ")
    place_of = {name: place for place, name in enumerate(question_ids)}
    rows = [r for r in table.to_pylist() if r["success"] and r["question_id"] in place_of]
    if not rows:
        raise ValueError(f"{path}: no success for a question of data.train")
    return pool_of(
        [place_of[row["question_id"]] for row in rows],
        [row["token_ids"] for row in rows],
        [row["behaviour_logprobs"] for row in rows],
        [row["entropy"] for row in rows],
    )


def solutions_of(
    questions: Sequence[Question], field: str, *, encode: Callable[[str], list[int]], eos: int
) -> Experiences:
    """The worked solutions in a field of the rows (a text or a list of them), as experience.

    Who wrote them is unknown: their log-probs are 0, so that the ratio is pi_now itself (LUFFY).
    ValueError when no row has the field.
    """
    pairs = [
        (place, [*encode(text), eos])
        for place, question in enumerate(questions)
        for text in texts_of(question.columns.get(field))
    ]
    if not pairs:
        raise ValueError(f"no training row has a text in the field '{field}'")
    tokens = [ids for _, ids in pairs]
    zeros = [[0.0] * len(ids) for ids in tokens]
    return pool_of([place for place, _ in pairs], tokens, zeros, [float("inf")] * len(pairs))


def texts_of(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def pool_of(
    places: Sequence[int],
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    entropies: Sequence[float],
) -> Experiences:
    """Successes born before the first step."""
    count = len(places)
    return Experiences(
        question=torch.tensor(places),
        tokens=Ragged.of(tokens),
        logprobs=torch.tensor([x for of_one in logprobs for x in of_one]),
        birth_step=torch.zeros(count, dtype=torch.int64),
        reward=torch.ones(count),
        success=torch.ones(count, dtype=torch.bool),
        truncated=torch.zeros(count, dtype=torch.bool),
        entropy=torch.tensor(entropies, dtype=torch.float32),
        group=torch.full((count,), -1),
        score=torch.zeros(count),
        advantage=torch.zeros(count),
    )
