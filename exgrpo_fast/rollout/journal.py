"""Completions on disk, around any engine: a restarted run does not generate them again.

    rollouts/version_12.log   what was generated with the weights after step 12

One record holds what finished together as JSON, length and xxh3-128 in front, so that a torn tail is
seen and cut off. A request is found again by the weights' version, its own content and the sampling.
A disk that refuses a record costs that record and nothing else. Completions of truncated sampling
are not logged: what their tokens were drawn from would outweigh them.

No sqlite3: its database file has no checksums, so a digest a row would stay, and a file cut in its
middle is lost as a whole, where here every record before the cut is read.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from exgrpo_fast.core.types import Completion
from exgrpo_fast.rollout.engine import (
    UNOBSERVED,
    EngineWrapper,
    Generation,
    Observer,
    Request,
    RolloutEngine,
    Sampling,
)
from exgrpo_fast.rollout.wire import pack_completion, unpack_completion

Key = str  # xxh3-128 of a request
_FRAME = struct.Struct("<Q16s")  # bytes of the record, their xxh3-128

log = logging.getLogger(__name__)


@dataclass(eq=False)
class JournalledEngine(EngineWrapper):
    """Returns logged completions, has `engine` generate the others, and logs what it finishes."""

    engine: RolloutEngine
    folder: Path
    _: KW_ONLY
    identity: str = ""  # of the run's config
    version: int = 0  # of the weights, as `sync` counts

    def __post_init__(self) -> None:
        self._known = self._read(self.version)

    def sync(self, version: int) -> dict[str, float]:
        self.version = version
        self._known = self._read(version)
        return self.engine.sync(version)

    def start(self, requests: Sequence[Request], sampling: Sampling) -> JournalledGeneration:
        keys = [self._key(request, sampling) for request in requests]
        known = {i: self._known[key] for i, key in enumerate(keys) if key in self._known}
        rest = [i for i in range(len(requests)) if i not in known]
        generation = None
        if rest:
            generation = self.engine.start([requests[i] for i in rest], sampling)
        path = self._path(self.version)

        def log_finished(places: Sequence[int], completions: Sequence[Completion]) -> None:
            if all(completion.kept is None for completion in completions):
                self.append(path, [keys[i] for i in places], completions)

        return JournalledGeneration(known, rest, generation, log_finished)

    def forget_before(self, version: int) -> None:
        """Delete the logs of weights that are older than a durable checkpoint's, `version`."""
        for path in self.folder.glob("version_*.log"):
            number = path.stem.removeprefix("version_")
            if number.isdecimal() and int(number) < version:
                path.unlink(missing_ok=True)

    def append(self, path: Path, keys: Sequence[Key], completions: Sequence[Completion]) -> None:
        packed = (pack_completion(place, each) for place, each in enumerate(completions))
        record = json.dumps(dict(zip(keys, packed, strict=True))).encode()
        framed = _FRAME.pack(len(record), xxhash.xxh3_128_digest(record)) + record
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(framed) < len(framed):  # a full disk takes a part of it
                    file.truncate(size)
        except OSError as error:
            log.warning("%s: %s; these rollouts are not logged", self.folder, error.strerror)

    def _path(self, version: int) -> Path:
        return self.folder / f"version_{version}.log"

    def _key(self, request: Request, sampling: Sampling) -> Key:
        asked = [self.identity, self.version, asdict(request), asdict(sampling)]
        return xxhash.xxh3_128_hexdigest(json.dumps(asked).encode())

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


@dataclass(frozen=True)
class JournalledGeneration:
    """Logged completions, and the others on their way."""

    known: dict[int, Completion]  # by the caller's places
    missing: list[int]  # the others' places
    generation: Generation | None
    log_finished: Callable[[Sequence[int], Sequence[Completion]], None]

    def wait(self, observer: Observer = UNOBSERVED) -> list[Completion]:
        found = dict(self.known)
        if found:
            observer.finished(list(found), list(found.values()))
        if self.generation is not None:
            made = self.generation.wait(_Recorder(self, observer))
            found |= dict(zip(self.missing, made, strict=True))
        return [found[place] for place in range(len(found))]


class _Recorder(Observer):
    """Logs what finishes, and calls the caller's observer with the caller's places."""

    def __init__(self, generation: JournalledGeneration, to: Observer) -> None:
        self.generation, self.to = generation, to

    def finished(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        own = [self.generation.missing[place] for place in places]
        self.generation.log_finished(own, completions)
        self.to.finished(own, completions)

    def on_poll(self) -> None:
        self.to.on_poll()


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


def _unpack(record: bytes) -> Iterator[tuple[Key, Completion]]:
    try:
        entries: dict[Key, dict[str, Any]] = json.loads(record)
    except ValueError:  # of a version that wrote other records: generated again
        return
    for key, entry in entries.items():
        yield key, unpack_completion(entry)[1]
