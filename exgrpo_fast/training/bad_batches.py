"""bad_batches/: what an update was made of whose gradient was refused, for study.

step_12.0.safetensors   the tokens and their columns, trajectories joined end to end
step_12.0.json          the reason, and who the trajectories are
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from exgrpo_fast.run.sinks import strict
from exgrpo_fast.training.batch import LossTerm
from exgrpo_fast.training.update_stats import RefusedUpdate

log = logging.getLogger(__name__)


class BadBatches:
    """Keeps the first `MAX_KEPT` of a run: those show the cause, and a disk is finite."""

    MAX_KEPT = 20

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, step: int, refused: Sequence[RefusedUpdate]) -> None:
        """One pair of files for each; a disk that refuses them is logged and costs nothing."""
        for number, update in enumerate(refused):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if len(list(self.folder.glob("*.json"))) < self.MAX_KEPT:
                    _write(self.folder / f"step_{step}.{number}", step, update)
            except (OSError, SafetensorError) as error:
                log.warning("%s: %s; a refused batch is not kept", self.folder, error)


def _write(path: Path, step: int, update: RefusedUpdate) -> None:
    trajectories = [term.trajectory for term in update.terms]
    prompts = [torch.tensor(t.question.prompt_ids, dtype=torch.int64) for t in trajectories]
    columns = {
        "prompt_ids": torch.cat(prompts),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "token_ids": torch.cat([t.token_ids for t in trajectories]),
        "lengths": torch.tensor([t.num_tokens for t in trajectories]),
        "behaviour_logprobs": torch.cat([t.behaviour_logprobs for t in trajectories]),
        "advantages": torch.tensor([term.advantage for term in update.terms]),
        "weights": torch.tensor([term.weight for term in update.terms]),
    }
    save_file({name: t.cpu().contiguous() for name, t in columns.items()}, f"{path}.safetensors")
    content = {"step": step, "reason": update.reason, "grad_norm": update.grad_norm}
    content["rows"] = [_describe(term) for term in update.terms]
    Path(f"{path}.json").write_text(json.dumps(strict(content), indent=1, allow_nan=False) + "\n")


def _describe(term: LossTerm) -> dict[str, Any]:
    trajectory = term.trajectory
    return {
        "question_id": trajectory.question.id,
        "source": trajectory.source,
        "birth_step": trajectory.birth_step,
        "reward": trajectory.reward,
        "reason": trajectory.verdict.reason if trajectory.verdict else None,
        "truncated": trajectory.truncated,
    }


class NoBadBatches(BadBatches):
    """Of ranks other than 0: rank 0 has the same batch and keeps it."""

    def __init__(self) -> None:
        super().__init__(Path())

    def write(self, step: int, refused: Sequence[Any]) -> None:
        pass
