"""Logged completions -> a parquet file for `replay.store.pool`, as `buffer export` writes it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from exgrpo_fast.build.data import read_questions
from exgrpo_fast.build.environment import prepare_process
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.build.pretrained import model_folder
from exgrpo_fast.config import Config
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.types import Question
from exgrpo_fast.data import BadRow, Row, read_rows
from exgrpo_fast.experience.prior.compatibility import fingerprint
from exgrpo_fast.experience.replay.past_logs import (
    PastCompletion,
    Unusable,
    past_completion,
    prompt_keys,
)
from exgrpo_fast.experience.replay.starting_pool import pool_vocabulary, write_pool
from exgrpo_fast.model.folder_reading import Tokenizer, load_tokenizer, make_encode
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.run.display import Screen

SCORED_AT_ONCE = 512


@dataclass
class Imported:
    """What came of an import, for people."""

    trajectories: int = 0
    questions: int = 0
    correct: int = 0
    scored: int = 0  # by this model, since the log had no log-probs
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = (
            f"{self.trajectories} trajectories of {self.questions} questions, {self.correct} "
            f"correct, {self.scored} scored by the model"
        )
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return f"{text}; left out: {reasons}" if reasons else text


@dataclass(frozen=True)
class PoolRow:
    """One row of the file, until it has its log-probs."""

    question: Question
    past: PastCompletion


def import_rollouts(
    files: Sequence[str], out: Path, config: Config, *, correct_from: float | None, device: str
) -> Imported:
    """Write `out` at once or not at all. UserError in one line where no row can be used.

    `correct_from`: the reward of a correct completion; None: 1 of each reward function.
    """
    prepare_process(device)
    name = model_folder(config.model.name or "", Screen())
    tokenizer = load_tokenizer(name)
    source = config.data.train
    assert isinstance(source, str)
    questions = read_questions(config, source, tokenizer, lambda note: None).questions
    found = Imported()
    rows = _usable(files, _by_key(questions, tokenizer), tokenizer, config, found)
    if not rows:
        raise UserError(f"buffer import: no row of {', '.join(files)} can be used: {found}")
    lacking = [i for i, row in enumerate(rows) if not row.past.logprobs]
    found.scored = len(lacking)
    if lacking:
        scored = _score([rows[i] for i in lacking], config, name, device=device)
        for i, row in zip(lacking, scored, strict=True):
            rows[i] = row
    threshold = (
        (lambda past: past.full_marks) if correct_from is None else lambda past: correct_from
    )
    values = {
        "question_id": [row.question.id for row in rows],
        "token_ids": [list(row.past.token_ids) for row in rows],
        "behaviour_logprobs": [list(row.past.logprobs) for row in rows],
        "birth_step": [row.past.step for row in rows],
        "reward": [row.past.reward for row in rows],
        "success": [row.past.reward >= threshold(row.past) for row in rows],
        "truncated": [row.past.truncated for row in rows],
        "entropy": [row.past.entropy for row in rows],
        "completion": [row.past.text for row in rows],
    }
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        write_pool(values, partial, fingerprint(tokenizer.get_vocab()))
        os.replace(partial, out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"--out {out}: {error.strerror or error}") from None
    found.trajectories, found.correct = len(rows), sum(values["success"])
    found.questions = len(set(values["question_id"]))
    return found


def _by_key(questions: Sequence[Question], tokenizer: Tokenizer) -> dict[str, Question]:
    """All names by which a log may call a question: its id, its prompt with and without special
    tokens, its messages, its last message. A name that two questions share is none."""
    found: dict[str, Question | None] = {}
    for question in questions:
        plain = tokenizer.decode(list(question.prompt_ids), skip_special_tokens=True)
        names = {question.id, question.prompt.strip(), plain.strip()}
        if question.conversation:
            names |= set(prompt_keys([dict(message) for message in question.conversation]))
        for name in names:
            found[name] = question if name not in found else None
    return {name: question for name, question in found.items() if question is not None}


def _usable(
    files: Sequence[str],
    by_key: dict[str, Question],
    tokenizer: Tokenizer,
    config: Config,
    found: Imported,
) -> list[PoolRow]:
    """The rows that can be kept, tokenized; the others are counted by reason."""
    encode, limit = make_encode(tokenizer), config.rollout.max_completion_tokens
    seen: set[tuple[str, tuple[int, ...]]] = set()
    rows = []
    for row in _rows_of(files, fingerprint(tokenizer.get_vocab())):
        try:
            if isinstance(row, BadRow):
                raise Unusable("unreadable")
            past = past_completion(row.fields)
            question = next((by_key[k] for k in past.prompt_keys if k in by_key), None)
            if question is None:
                raise Unusable("of an unknown question")
            end = [] if past.truncated else [tokenizer.eos_token_id]
            ids = past.token_ids or (*encode(past.text), *end)
            if len(ids) > limit:
                raise Unusable(f"longer than {limit} tokens")
            if (question.id, ids) in seen:
                raise Unusable("repeated")
        except Unusable as reason:
            found.left_out[str(reason)] += 1
            continue
        seen.add((question.id, ids))
        rows.append(PoolRow(question, replace(past, token_ids=ids)))
    return rows


def _rows_of(files: Sequence[str], vocabulary: str) -> Iterable[Row | BadRow]:
    for file in files:
        written_with = pool_vocabulary(Path(file))
        if written_with is not None and written_with != vocabulary:
            raise UserError(f"{file}: written with another tokenizer: its token ids differ")
        yield from read_rows(file)


def _score(rows: Sequence[PoolRow], config: Config, name: str, *, device: str) -> list[PoolRow]:
    """Log-probs and entropies under the model; logs without log-probs do not say what their own
    policy gave."""
    policy = make_policy(config, name, device=device)
    scored = []
    for start in range(0, len(rows), SCORED_AT_ONCE):
        part = rows[start : start + SCORED_AT_ONCE]
        scores = policy.score(
            Ragged.of([row.question.prompt_ids for row in part]),
            Ragged.of([row.past.token_ids for row in part]),
        ).split()
        for row, (logprobs, entropies) in zip(part, scores, strict=True):
            entropy = float(entropies.mean())
            past = replace(row.past, logprobs=tuple(logprobs.tolist()), entropy=entropy)
            if not all(map(math.isfinite, past.logprobs)):
                raise UserError(f"buffer import: {name} gives a completion no finite log-prob")
            scored.append(PoolRow(row.question, past))
    return scored
