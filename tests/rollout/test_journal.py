"""The log of finished rollouts: what is answered from it, what is not, and what survives a crash."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import xxhash
from conftest import OwnEngine
from torch import Tensor

from exgrpo_fast.core.types import Completion, WeightSpan
from exgrpo_fast.rollout.engine import UNOBSERVED, Observer, Request, Sampling
from exgrpo_fast.rollout.journal import JournalledEngine

SAMPLING = Sampling(max_completion_tokens=8)


class CountingEngine(OwnEngine):
    """Completions that depend on the request alone; `batch` requests finish together."""

    def __init__(self, batch: int = 2) -> None:
        self.batch = batch
        self.asked: list[list[int]] = []
        self.versions: list[int] = []

    def sync(self, version: int) -> dict[str, float]:
        self.versions.append(version)
        return {}

    def generate(self, requests, sampling, observer=UNOBSERVED) -> list[Completion]:
        self.asked.append([request.seed for request in requests])
        done: list[Completion] = []
        for start in range(0, len(requests), self.batch):
            observer.on_poll()
            part = requests[start : start + self.batch]
            made = [completion_of(request) for request in part]
            done += made
            observer.finished(range(start, start + len(part)), made)
        return done


def completion_of(request: Request) -> Completion:
    length = request.seed % 5
    ids = torch.arange(length) * (1 << 28) + request.seed % 1000
    logprobs = -torch.arange(length, dtype=torch.float32) / 3
    spans = (WeightSpan(request.seed % 9, 0, length), WeightSpan(3, length, length))
    entropies = logprobs.square() if request.seed % 4 > 1 else None
    truncated = request.seed % 2 == 1
    return Completion(ids, logprobs, truncated, spans[: request.seed % 3], entropies=entropies)


def requests_of(*seeds: int) -> list[Request]:
    return [Request((1, 2, seed % 7), seed) for seed in seeds]


class Told(Observer):
    def __init__(self) -> None:
        self.of: dict[int, Completion] = {}
        self.waits = 0

    def finished(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        assert not self.of.keys() & set(places)
        self.of |= dict(zip(places, completions, strict=True))

    def on_poll(self) -> None:
        self.waits += 1


def same(a: Completion, b: Completion) -> bool:
    return (
        torch.equal(a.token_ids, b.token_ids)
        and torch.equal(a.logprobs, b.logprobs)
        and (a.token_ids.dtype, a.logprobs.dtype) == (torch.int64, torch.float32)
        and a.truncated == b.truncated
        and a.weight_spans == b.weight_spans
        and same_entropies(a.entropies, b.entropies)
    )


def same_entropies(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def check(found: list[Completion], requests: list[Request]) -> None:
    assert len(found) == len(requests)
    assert all(same(f, completion_of(r)) for f, r in zip(found, requests, strict=True))


def open_journal(folder: Path, version: int = 0, **more) -> tuple[JournalledEngine, CountingEngine]:
    inner = CountingEngine()
    return JournalledEngine(inner, folder, version=version, **more), inner


def test_the_next_life_generates_only_what_is_missing(tmp_path: Path) -> None:
    requests = requests_of(2**64 - 1, 3, 10, 11, 12)
    journal, _ = open_journal(tmp_path)
    check(journal.generate(requests[:3], SAMPLING), requests[:3])
    journal, inner = open_journal(tmp_path)
    told = Told()
    mixed = [requests[4], requests[0], requests[3], requests[1], requests[2]]
    check(journal.generate(mixed, SAMPLING, told), mixed)
    assert inner.asked == [[12, 11]] and told.waits == 1
    assert sorted(told.of) == [0, 1, 2, 3, 4]
    assert all(same(told.of[i], completion_of(r)) for i, r in enumerate(mixed))
    journal, inner = open_journal(tmp_path)
    check(journal.generate(mixed, SAMPLING), mixed)
    assert inner.asked == []


@pytest.mark.parametrize(
    "other",
    [
        dict(request=Request((1, 2, 4), 3)),
        dict(request=Request((1, 2, 3), 4)),
        dict(sampling=Sampling(9)),
        dict(sampling=Sampling(8, temperature=0.5)),
        dict(version=1),
        dict(identity="another config"),
    ],
)
def test_another_question_is_not_answered_from_the_log(tmp_path: Path, other: dict) -> None:
    asked = {"request": Request((1, 2, 3), 3), "sampling": SAMPLING, "version": 0, "identity": "a"}
    for settings in (asked, asked, asked | other):
        journal, inner = open_journal(
            tmp_path, version=settings["version"], identity=settings["identity"]
        )
        journal.generate([settings["request"]], settings["sampling"])
    assert inner.asked == [[(asked | other)["request"].seed]]


def test_versions_follow_sync_and_leave_with_a_checkpoint(tmp_path: Path) -> None:
    journal, inner = open_journal(tmp_path, version=4)
    for version in (5, 6, 7):
        journal.generate(requests_of(version), SAMPLING)
        journal.sync(version)
    assert inner.versions == [5, 6, 7]
    names = [f"version_{v}.log" for v in (4, 5, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    journal.forget_before(6)
    assert [path.name for path in tmp_path.iterdir()] == ["version_6.log"]
    journal, inner = open_journal(tmp_path, version=6)
    check(journal.generate(requests_of(7), SAMPLING), requests_of(7))
    assert inner.asked == []


def test_a_log_cut_anywhere_loses_no_whole_record_and_takes_new_ones(tmp_path: Path) -> None:
    requests = requests_of(*range(20, 26))
    journal, _ = open_journal(tmp_path)
    path = tmp_path / "version_0.log"
    ends = []
    for pair in (requests[:2], requests[2:4], requests[4:]):
        journal.generate(pair, SAMPLING)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = 2 * sum(end <= cut for end in ends)
        journal, inner = open_journal(tmp_path)
        check(journal.generate(requests, SAMPLING), requests)
        assert [r.seed for r in requests[whole:]] == (inner.asked or [[]])[0], cut
        journal, inner = open_journal(tmp_path)
        check(journal.generate(requests, SAMPLING), requests)
        assert inner.asked == [], cut


def test_a_changed_record_is_not_believed(tmp_path: Path) -> None:
    requests = requests_of(20, 21, 22, 23)
    journal, _ = open_journal(tmp_path)
    journal.generate(requests, SAMPLING)
    path = tmp_path / "version_0.log"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        journal, inner = open_journal(tmp_path)
        check(journal.generate(requests, SAMPLING), requests)
        assert inner.asked, place


def test_records_of_an_earlier_version_are_generated_again(tmp_path: Path) -> None:
    """They were binary: key, flags, numbers of tokens and spans, then int64 ids and float32s."""
    record = struct.pack("<16sBIIqf", bytes(16), 1, 1, 0, 5, -0.5)
    framed = struct.pack("<Q", len(record)) + xxhash.xxh3_128_digest(record) + record
    (tmp_path / "version_0.log").write_bytes(framed)
    requests = requests_of(1, 2, 3)
    for asked in ([[1, 2, 3]], []):
        journal, inner = open_journal(tmp_path)
        check(journal.generate(requests, SAMPLING), requests)
        assert inner.asked == asked


def test_a_log_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal, inner = open_journal(tmp_path / "file" / "rollouts")
    requests = requests_of(1, 2, 3)
    for _ in range(2):
        check(journal.generate(requests, SAMPLING), requests)
    assert inner.asked == [[1, 2, 3]] * 2
