"""What updates were made of, on disk: safetensors with the tokens and their columns, trajectories
joined end to end, and a .json beside it.

updates/step_000012      what each step trained on, so that it can be trained on again without an
                         engine: the loss, and of each trajectory its group, advantage, prompt and
                         reward. Kept is all that `Learner.update` reads, in its precision
bad_batches/step_12.0    an update whose gradient was refused, for study: the reason, and who the
                         trajectories are
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.types import Group, KeptTokens, Question, Trajectory, Verdict
from exgrpo_fast.run.directory import whole_file
from exgrpo_fast.run.sinks import strict
from exgrpo_fast.training.update_stats import RefusedUpdate
from exgrpo_kernels import PolicyObjective

log = logging.getLogger(__name__)

# Of every trajectory, and of those that have them
COLUMNS = ("token_ids", "behaviour_logprobs", "entropies")
OPTIONAL = ("proximal_logprobs", "token_weights")
# Of a Trajectory, beside them
SCALARS = "source shaping truncated baseline_weight masked birth_step penalty bonus".split()


@dataclass(frozen=True)
class UpdateLog:
    """Writes one pair of files a step; a disk that refuses them is logged and costs nothing else."""

    folder: Path
    keeps: bool = True  # False: where `log.updates` is off, and on ranks other than 0

    def write(self, step: int, groups: Sequence[Group], objective: PolicyObjective) -> None:
        if not self.keeps:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder, step, groups, objective)
        except (OSError, SafetensorError) as error:
            log.warning("%s: %s; what step %d trained on is not kept", self.folder, error, step)


def _write(folder: Path, step: int, groups: Sequence[Group], objective: PolicyObjective) -> None:
    """The .json last: where it is, the tensors are whole."""
    trajectories = [t for group in groups for t in group.trajectories]
    columns = {name: _join(trajectories, name) for name in (*COLUMNS, *OPTIONAL)}
    kept = [t.kept for t in trajectories if t.kept is not None]
    if kept:
        columns["kept_ids"] = torch.cat([k.ids for k in kept])
        columns["kept_counts"] = torch.cat([k.counts for k in kept])
    rows = [
        {
            "group": number,
            "advantage": advantage,
            "question_id": t.question.id,
            "prompt_ids": list(t.question.prompt_ids),
            "num_tokens": t.num_tokens,
            "reward": t.reward - t.penalty - t.bonus if t.verdict is None else t.verdict.reward,
            "correct": t.successful,
            "has": [name for name in OPTIONAL if getattr(t, name) is not None],
            "num_kept": None if t.kept is None else len(t.kept.ids),
            **{name: getattr(t, name) for name in SCALARS},
        }
        for number, group in enumerate(groups)
        for t, advantage in zip(group.trajectories, group.advantages, strict=True)
    ]
    content = {"step": step, "objective": asdict(objective), "rows": rows}
    path = folder / f"step_{step:06d}"
    with whole_file(path.with_suffix(".safetensors")) as temporary:
        save_file(columns, temporary)
    with whole_file(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content))


def _join(trajectories: Sequence[Trajectory], name: str) -> Tensor:
    """[N] of those that have it."""
    found = [v for t in trajectories if (v := getattr(t, name)) is not None]
    return torch.cat([v.cpu() for v in found]).contiguous() if found else torch.empty(0)


def saved_steps(folder: Path) -> list[int]:
    numbers = (path.stem.removeprefix("step_") for path in folder.glob("step_*.json"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def read_update(folder: Path, step: int) -> tuple[list[Group], PolicyObjective]:
    """The groups of a step with their advantages, and its loss. UserError where it cannot be read."""
    path = folder / f"step_{step:06d}"
    try:
        content = json.loads(Path(f"{path}.json").read_text())
        columns = load_file(f"{path}.safetensors")
        trajectories = _trajectories(content["rows"], columns)
        objective = PolicyObjective(**content["objective"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None
    members: dict[int, list[tuple[Trajectory, float]]] = {}
    for row, trajectory in zip(content["rows"], trajectories, strict=True):
        members.setdefault(row["group"], []).append((trajectory, row["advantage"]))
    groups = [
        Group(found[0][0].question, tuple(t for t, _ in found), tuple(a for _, a in found))
        for found in members.values()
    ]
    return groups, objective


def _trajectories(rows: Sequence[dict[str, Any]], columns: dict[str, Tensor]) -> list[Trajectory]:
    parts = {}
    for name in (*COLUMNS, *OPTIONAL):
        lengths = [row["num_tokens"] for row in rows if name in COLUMNS or name in row["has"]]
        parts[name] = iter(columns[name].split(lengths) if lengths else ())
    kept = _kept(rows, columns)
    return [
        Trajectory(
            question=Question(row["question_id"], tuple(row["prompt_ids"]), "", ""),
            verdict=Verdict(row["reward"], "stored", correct=row["correct"]),
            **{name: next(parts[name]) for name in (*COLUMNS, *row["has"])},
            kept=None if row.get("num_kept") is None else next(kept),
            **{name: row[name] for name in SCALARS},
        )
        for row in rows
    ]


def _kept(rows: Sequence[dict[str, Any]], columns: dict[str, Tensor]) -> Iterator[KeptTokens]:
    """Of the trajectories that have it, in their order."""
    found = [row for row in rows if row.get("num_kept") is not None]
    if not found:
        return iter(())
    ids = columns["kept_ids"].split([row["num_kept"] for row in found])
    counts = columns["kept_counts"].split([row["num_tokens"] for row in found])
    return map(KeptTokens, ids, counts)


# --- refused updates ------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadBatches:
    """Keeps refused updates; a disk that refuses them is logged and costs nothing else."""

    folder: Path
    keeps: bool = True  # False: on ranks other than 0, which has the same batch
    MAX_KEPT = 20  # the first of a run: those show the cause, and a disk is finite

    def write(self, step: int, refused: Sequence[RefusedUpdate]) -> None:
        for number, update in enumerate(refused if self.keeps else ()):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if len(list(self.folder.glob("*.json"))) < self.MAX_KEPT:
                    _write_refused(self.folder / f"step_{step}.{number}", step, update)
            except (OSError, SafetensorError) as error:
                log.warning("%s: %s; a refused batch is not kept", self.folder, error)


def _write_refused(path: Path, step: int, update: RefusedUpdate) -> None:
    trajectories = [term.trajectory for term in update.terms]
    prompts = [torch.tensor(t.question.prompt_ids, dtype=torch.int64) for t in trajectories]
    columns = {
        "prompt_ids": torch.cat(prompts),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "token_ids": _join(trajectories, "token_ids"),
        "lengths": torch.tensor([t.num_tokens for t in trajectories]),
        "behaviour_logprobs": _join(trajectories, "behaviour_logprobs"),
        "advantages": torch.tensor([term.advantage for term in update.terms]),
        "weights": torch.tensor([term.weight for term in update.terms]),
    }
    save_file(columns, f"{path}.safetensors")
    rows = [
        {
            "question_id": t.question.id,
            **{name: getattr(t, name) for name in ("source", "birth_step", "reward", "truncated")},
            "reason": t.verdict.reason if t.verdict else None,
        }
        for t in trajectories
    ]
    content = {"step": step, "reason": update.reason, "grad_norm": update.grad_norm, "rows": rows}
    Path(f"{path}.json").write_text(json.dumps(strict(content), indent=1, allow_nan=False) + "\n")
