"""Trajectories that a run starts with: an export that is read again, and worked solutions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_cases import Item, add, contents, items_of, make_store

from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.replay.snapshot import snapshot
from exgrpo_fast.experience.replay.starting_pool import (
    EXPORTED,
    export_pool,
    load_pool,
    solutions_of,
)

INF = float("inf")
IDS = [f"q{i}" for i in range(6)]
ITEMS = [
    Item(4, (7, 8, 9), (-0.5, -0.25, -3.0), entropy=1.5, birth_step=12, truncated=True, group=3),
    Item(1, (5,), success=False, reward=0.0),
    Item(1, (6, 0)),
    Item(0, (2**31 - 1, 1), entropy=0.25, reward=0.5),
]


def exported(path: Path, *items: Item, vocabulary: str = "words") -> Path:
    store = make_store()
    add(store, *items)
    state = snapshot(store, IDS, vocabulary=vocabulary)
    count = export_pool(state, path, lambda ids: " ".join(map(str, ids)))
    assert count == len(items)
    return path


def test_an_export_has_every_trajectory_as_a_row(tmp_path: Path) -> None:
    table = pq.read_table(exported(tmp_path / "pool.parquet", *ITEMS))
    assert table.column_names == list(EXPORTED)
    assert table.schema.metadata[b"vocabulary"] == b"words"
    rows = table.to_pylist()
    assert [row["question_id"] for row in rows] == ["q4", "q1", "q1", "q0"]
    assert rows[0] == {
        "question_id": "q4",
        "token_ids": [7, 8, 9],
        "behaviour_logprobs": [-0.5, -0.25, -3.0],
        "birth_step": 12,
        "reward": 1.0,
        "success": True,
        "truncated": True,
        "entropy": 1.5,
        "completion": "7 8 9",
    }
    assert [row["success"] for row in rows] == [True, False, True, True]


def test_an_export_comes_back_as_successes_born_before_the_first_step(tmp_path: Path) -> None:
    path = exported(tmp_path / "pool.parquet", *ITEMS)
    # This run has its questions in another order, and does not have q0.
    pool = load_pool(path, ["q9", "q4", "q2", "q1"], vocabulary="words")
    newborn = {"birth_step": 0, "reward": 1.0, "truncated": False, "group": -1}
    expected = [
        replace(ITEMS[0], question=1, **newborn),
        replace(ITEMS[2], question=3, **newborn),
    ]
    assert items_of(pool) == expected
    store = make_store()
    store.add(pool)
    assert contents(store) == expected


def test_an_empty_export_is_written_and_refused_as_a_pool(tmp_path: Path) -> None:
    path = exported(tmp_path / "pool.parquet")
    assert pq.read_table(path).num_rows == 0
    with pytest.raises(ValueError, match="no success for a question of data.train"):
        load_pool(path, IDS, vocabulary="words")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "pool.parquet", *ITEMS, vocabulary="others")
    with pytest.raises(ValueError, match="written with another tokenizer"):
        load_pool(path, IDS, vocabulary="words")


@pytest.mark.parametrize(("ids", "items"), [(["a", "b"], ITEMS), (IDS, ITEMS[1:2])])
def test_a_pool_without_a_success_for_this_run_is_refused(
    tmp_path: Path, ids: list[str], items: list[Item]
) -> None:
    path = exported(tmp_path / "pool.parquet", *items)
    with pytest.raises(ValueError, match="no success for a question of data.train"):
        load_pool(path, ids, vocabulary="words")


def test_a_file_that_is_no_export_is_refused_by_its_name(tmp_path: Path) -> None:
    text = tmp_path / "text.parquet"
    text.write_text("no table\n" * 9)
    with pytest.raises(ValueError, match="text.parquet: ") as error:
        load_pool(text, IDS, vocabulary="words")
    assert "\n" not in str(error.value)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"question_id": ["q0"], "token_ids": [[1]]}), other)
    with pytest.raises(
        ValueError, match="other.parquet: no export of a buffer: .* behaviour_logpro"
    ):
        load_pool(other, IDS, vocabulary="words")
    with pytest.raises(ValueError, match="missing.parquet"):
        load_pool(tmp_path / "missing.parquet", IDS, vocabulary="words")


# --- worked solutions -----------------------------------------------------------------------------


def question(**columns) -> Question:
    return Question("q", (1,), "q?", "3", columns)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_solutions_are_texts_or_lists_of_texts() -> None:
    questions = [
        question(solution="ab"),
        question(),
        question(solution=["c", None, 7, "de"]),
        question(solution=5, other="x"),
        question(solution=[]),
        question(solution=""),
    ]
    found = items_of(solutions_of(questions, "solution", encode=letters, eos=0))
    assert [(item.question, item.tokens) for item in found] == [
        (0, (97, 98, 0)),
        (2, (99, 0)),
        (2, (100, 101, 0)),
        (5, (0,)),
    ]
    for item in found:
        assert item.logprobs == (0.0,) * len(item.tokens), "the ratio is the policy itself"
        assert (item.entropy, item.reward, item.success, item.birth_step) == (INF, 1.0, True, 0)
    store = make_store()
    store.add(solutions_of(questions, "solution", encode=letters, eos=0))
    assert contents(store) == found


def test_data_without_the_field_is_refused() -> None:
    with pytest.raises(ValueError, match="no training row has a text in the field 'proof'"):
        solutions_of([question(solution="a"), question(proof=3)], "proof", encode=letters, eos=0)
