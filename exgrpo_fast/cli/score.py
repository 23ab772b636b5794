"""`exgrpo-fast score`: rewards for a file of completions."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from exgrpo_fast.cli.arguments import add_command, require_file, require_rewards
from exgrpo_fast.config import ConfigError
from exgrpo_fast.data import BadRow, Row, as_answer, read_rows
from exgrpo_fast.rewards import RewardPool, RewardSample

ROWS_AT_ONCE = 2048  # bounds memory; large enough to keep the workers busy


def add_score(commands: Any) -> None:
    c = add_command(commands, "score", score, "rewards of the completions in a file")
    c.add_argument(
        "--in", dest="input", metavar="FILE", required=True, help="rows with gold and completion"
    )
    c.add_argument(
        "--out", dest="output", metavar="FILE", required=True, help="gets reward, reason, ms"
    )
    c.add_argument("--functions", default="math_verify", help="comma separated (math_verify)")


def score(arguments: argparse.Namespace) -> int:
    require_file(arguments.input, "--in")
    functions = arguments.functions.split(",")
    require_rewards(functions, "--functions")
    try:
        print(score_file(Path(arguments.input), Path(arguments.output), functions=functions))
    except OSError as error:
        raise ConfigError(f"--out {arguments.output}: {error.strerror}") from None
    return 0


@dataclass
class ScoreSummary:
    num_rows: int = 0
    reward_sum: float = 0.0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def reward_mean(self) -> float:
        return self.reward_sum / self.num_rows if self.num_rows else 0.0

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        return (
            f"{self.num_rows} rows in {self.seconds:.1f} s, mean reward {self.reward_mean:.4f}"
            f"{' (' + reasons + ')' if reasons else ''}"
        )


def score_file(
    in_path: str | Path,
    out_path: str | Path,
    *,
    functions: Sequence[str] = ("math_verify",),
    workers: int = 2,
    timeout_seconds: float = 5.0,
) -> ScoreSummary:
    """Rows {gold, completion} -> rows {reward, reason, ms}, one for each row, in order.

    `gold` may be a number; `prompt` and all other fields are handed to the functions. A malformed
    row gets reward 0 with the reason `bad_row` and a `detail` with file:line. The output appears
    under its name when it is complete. DataError for a file that cannot be read, RewardError for a
    reward that cannot be used, OSError when the output cannot be written.
    """
    started, summary = time.perf_counter(), ScoreSummary()
    unfinished = Path(f"{out_path}.partial")
    rows = read_rows(in_path)
    with RewardPool(functions, workers=workers, timeout_seconds=timeout_seconds) as pool:
        pool.check()
        with unfinished.open("w", encoding="utf-8") as file:
            while chunk := list(islice(rows, ROWS_AT_ONCE)):
                for line in _score_rows(chunk, pool):
                    summary.num_rows += 1
                    summary.reward_sum += line["reward"]
                    summary.reasons[line["reason"]] += 1
                    file.write(json.dumps(line) + "\n")
    os.replace(unfinished, out_path)
    summary.seconds = time.perf_counter() - started
    return summary


def _score_rows(rows: Sequence[Row | BadRow], pool: RewardPool) -> Iterator[dict[str, Any]]:
    samples = [_sample(row) for row in rows]
    scored = iter(pool.score([sample for sample in samples if isinstance(sample, RewardSample)]))
    for sample in samples:
        if isinstance(sample, BadRow):
            yield {"reward": 0.0, "reason": "bad_row", "ms": 0.0, "detail": str(sample)}
        else:
            found = next(scored)
            yield {"reward": found.reward, "reason": found.reason, "ms": found.milliseconds}


def _sample(row: Row | BadRow) -> RewardSample | BadRow:
    if isinstance(row, BadRow):
        return row
    fields = dict(row.fields)
    for name in ("gold", "completion"):
        if name not in fields:
            return BadRow(row.where, f"missing field '{name}'")
    completion = fields.pop("completion")
    if not isinstance(completion, str):
        return BadRow(row.where, "field 'completion' is no text")
    try:
        given = fields.pop("gold")
        gold = as_answer(given, "gold")
    except ValueError as error:
        return BadRow(row.where, str(error))
    prompt = fields.pop("prompt", "")
    fields.pop("answer", None)
    if not isinstance(given, str):
        fields["answer"] = given
    return RewardSample(prompt if isinstance(prompt, str) else "", completion, gold, fields)
