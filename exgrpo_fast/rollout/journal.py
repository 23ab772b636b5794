"""A log of finished rollouts around any engine: a run that died does not generate them again.

    rollouts/version_12.log   what was generated with the weights after step 12

One record holds what finished together, length and xxh3-128 in front, so that a torn tail is seen
and left aside. A request is found again by the weights' version, its own content and the sampling.
A disk that refuses a record costs that record and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from exgrpo_fast.experience import Completion
from exgrpo_fast.rollout.engine import UNOBSERVED, Observer, Request, RolloutEngine, Sampling

Key = bytes  # xxh3-128 of a request

_FRAME = struct.Struct("<Q16s")  # bytes of the record, their xxh3-128
_ENTRY = struct.Struct("<16s?I")  # key, truncated, number of tokens; int64 ids and float32s follow

log = logging.getLogger(__name__)


class JournalledEngine:
    """Answers what the log knows, lets `engine` generate the rest, and logs what it finishes."""

    def __init__(
        self, engine: RolloutEngine, folder: Path, *, identity: str = "", version: int = 0
    ) -> None:
        """`identity`: of the run's config; `version`: of the weights, as `sync` counts."""
        self.engine = engine
        self.folder = folder
        self.identity = identity
        self.version = version
        self._known = self._read(version)

    def sync(self, version: int) -> Any:
        self.version = version
        self._known = self._read(version)
        return self.engine.sync(version)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        observer: Observer = UNOBSERVED,
    ) -> list[Completion]:
        keys = [self._key(request, sampling) for request in requests]
        known = [place for place, key in enumerate(keys) if key in self._known]
        found = {place: self._known[keys[place]] for place in known}
        if known:
            observer.finished(known, [found[place] for place in known])
        rest = [place for place in range(len(requests)) if place not in found]
        if rest:
            recorder = _Recorder(self, [keys[place] for place in rest], rest, observer)
            made = self.engine.generate([requests[place] for place in rest], sampling, recorder)
            found |= dict(zip(rest, made, strict=True))
        return [found[place] for place in range(len(requests))]

    def forget_before(self, version: int) -> None:
        """A checkpoint with the weights of `version` is durable: no life needs the earlier ones."""
        for path in self.folder.glob("version_*.log"):
            number = path.stem.removeprefix("version_")
            if number.isdecimal() and int(number) < version:
                path.unlink(missing_ok=True)

    def append(self, keys: Sequence[Key], completions: Sequence[Completion]) -> None:
        record = b"".join(_pack(*entry) for entry in zip(keys, completions, strict=True))
        framed = _FRAME.pack(len(record), xxhash.xxh3_128_digest(record)) + record
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._path(self.version).open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(framed) < len(framed):  # a full disk takes a part of it
                    file.truncate(size)
        except OSError as error:
            log.warning("%s: %s; these rollouts are not logged", self.folder, error.strerror)

    def _path(self, version: int) -> Path:
        return self.folder / f"version_{version}.log"

    def _key(self, request: Request, sampling: Sampling) -> Key:
        asked = [self.identity, self.version, asdict(request), asdict(sampling)]
        return xxhash.xxh3_128_digest(json.dumps(asked).encode())

    def _read(self, version: int) -> dict[Key, Completion]:
        path = self._path(version)
        try:
            data = path.read_bytes()
            records = list(_records(data))
            whole = sum(_FRAME.size + len(record) for record in records)
            if whole < len(data):  # what follows a torn record could not be found
                os.truncate(path, whole)
        except OSError:
            return {}
        return {key: completion for record in records for key, completion in _unpack(record)}


class _Recorder(Observer):
    """Logs what finishes, and tells the caller's observer of it by the caller's places."""

    def __init__(
        self, journal: JournalledEngine, keys: Sequence[Key], places: Sequence[int], to: Observer
    ) -> None:
        self.journal, self.keys, self.places, self.to = journal, keys, places, to

    def finished(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        self.journal.append([self.keys[place] for place in places], completions)
        self.to.finished([self.places[place] for place in places], completions)

    def waiting(self) -> None:
        self.to.waiting()


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records at the start of a log."""
    start = 0
    while start + _FRAME.size <= len(data):
        size, digest = _FRAME.unpack_from(data, start)
        start += _FRAME.size
        record = data[start : start + size]
        if len(record) < size or xxhash.xxh3_128_digest(record) != digest:
            return
        yield record
        start += size


def _pack(key: Key, completion: Completion) -> bytes:
    ids, logprobs = completion.token_ids.long(), completion.logprobs.float()
    head = _ENTRY.pack(key, completion.truncated, len(ids))
    return head + ids.cpu().numpy().tobytes() + logprobs.cpu().numpy().tobytes()


def _unpack(record: bytes) -> Iterator[tuple[Key, Completion]]:
    memory, start = bytearray(record), 0  # writable, as torch asks
    while start < len(memory):
        key, truncated, count = _ENTRY.unpack_from(memory, start)
        start += _ENTRY.size
        ids = _tensor(memory, torch.int64, count, start)
        logprobs = _tensor(memory, torch.float32, count, start + 8 * count)
        start += 12 * count
        yield key, Completion(ids, logprobs, truncated)


def _tensor(memory: bytearray, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).clone()
