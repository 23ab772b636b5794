"""ExGRPO's experience replay in TRL's GRPO trainer.

    from exgrpo_fast.adapters.trl import ReplayGRPOTrainer
    ReplayGRPOTrainer(model=..., reward_funcs=..., args=GRPOConfig(...), train_dataset=rows).train()

Half of the groups of a generation batch ask stored questions of middling difficulty again, and
in each of them one fresh completion gives its place to the stored correct one of the lowest
entropy (ExGRPO, arXiv 2510.02245, sections 3.2-3.3). Store and selectors are those of
`exgrpo_fast.experience.replay`; generation, rewards and logs stay TRL's, by way of
`_generate_and_score_completions` and `super()`.

Legend: B completions of a generation batch, K of a group, C completion tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.experience.replay.plan import StorePlan
from exgrpo_fast.experience.replay.selectors import choose, gaussian_buckets
from exgrpo_fast.experience.replay.snapshot import load_snapshot, snapshot
from exgrpo_fast.experience.replay.store import Experiences, ExperienceStore
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.run.checkpoint.format import merge_tensors, split_tensors
from exgrpo_kernels.adapters import require_parameters
from exgrpo_kernels.adapters.trl import FusedGRPOTrainer

STATE_FILE = "experience_replay.safetensors"  # and its plain values beside it, as .json
# Columns that belong to a completion token; what replaces a row is padded to their width.
TOKEN_COLUMNS = (
    "completion_ids",
    "completion_mask",
    "old_per_token_logps",
    "sampling_per_token_logps",
    "tool_mask",
)


@dataclass(frozen=True)
class ReplaySettings:
    """Names and defaults are those of the section `replay` of a config; docs/exgrpo.md has each."""

    experience_ratio: float = 0.5  # share of groups that ask a stored question again
    shaping: float = 0.1  # beta in w / (w + beta)
    start_success_rate: float | None = 0.35  # share correct from which replay starts; None: at once
    bucket_mean: float = 0.5
    bucket_sigma: float = 0.125  # in accuracy
    max_gib: float = 1.0  # of the store, on the training device
    correct_reward: float | None = None  # None: the sum of reward_weights
    seed: int = 0


class ReplayGRPOTrainer(FusedGRPOTrainer):
    """`trl.GRPOTrainer` with ExGRPO's replay and the fused loss, for one process.

    Replayed rows have the loss w / (w + beta) and no clip; fresh rows keep TRL's clip, where the
    authors' code removes it. A question solved K times of K leaves the store for good, but TRL's
    sampler may still bring it.

    Errors: UserError for several processes, a KL term (beta > 0), group sizes below 2, and
    images.
    """

    def __init__(self, *args, replay: ReplaySettings | None = None, **kwargs) -> None:
        require_parameters(FusedGRPOTrainer._calculate_rewards, "inputs", "prompts", "completions")
        super().__init__(*args, **kwargs)
        self.replay = replay or ReplaySettings()
        reasons = {
            "several processes": self.accelerator.num_processes > 1,
            "a KL term (beta > 0)": self.beta != 0.0,
            "num_generations below 2": self.num_generations < 2,
        }
        for reason in (name for name, applies in reasons.items() if applies):
            raise UserError(f"ReplayGRPOTrainer does not take {reason}")
        num_questions = len(self.train_dataset)
        plan = StorePlan.fit(
            num_questions=num_questions,
            trajectories_per_step=self.args.generation_batch_size,
            num_steps=max(1, num_questions * self.num_generations),
            max_tokens=self.max_completion_length,
            max_bytes=int(self.replay.max_gib * 2**30),
        )
        self.store = ExperienceStore(
            plan, group_size=self.num_generations, device=self.accelerator.device
        )
        self.replay_active = self.replay.start_success_rate is None
        self._select = gaussian_buckets(
            mean=self.replay.bucket_mean, sigma=self.replay.bucket_sigma
        )
        self._rng = np.random.default_rng([self.replay.seed, 0x5E1EC7])
        self._questions: list[dict[str, Any]] = []  # rows of the data, by place in the store
        self._place_of: dict[str, int] = {}
        self._rewards: Tensor | None = None

    # ---- one generation batch --------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weights = self.reward_weights.to(per_function.device)
        self._rewards = (per_function * weights).nansum(1)
        return per_function

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        size, step = self.num_generations, self.state.global_step
        rows = inputs[::size]
        asked = self._ask_again(len(rows), exclude=[self._place(row) for row in rows], step=step)
        if asked:  # the last groups of the batch ask stored questions
            rows = rows[: len(rows) - len(asked)] + [self._questions[place] for place in asked]
            inputs = [dict(row) for row in rows for _ in range(size)]
        batch = super()._generate_and_score_completions(inputs)
        if "pixel_values" in batch:
            raise UserError("ReplayGRPOTrainer does not take images")
        assert self._rewards is not None
        rewards = self._rewards.to(batch["advantages"].device)
        if self.replay_active and batch.get("old_per_token_logps") is None:
            batch["old_per_token_logps"] = self._score(
                batch["prompt_ids"],
                batch["prompt_mask"],
                batch["completion_ids"],
                batch["completion_mask"],
            )[0]
        places = torch.tensor([self._place(row) for row in rows])
        fresh = self._fresh(batch, rewards, places, step=step) if self.replay_active else None
        if asked:
            batch, rewards = self._replace_rows(batch, rewards, asked, step=step)
        self._remember(fresh, rewards, places, step=step)
        return batch

    def _ask_again(self, num_groups: int, *, exclude: Sequence[int], step: int) -> list[int]:
        """Places of stored questions to ask in this batch, none of which it brings anyway."""
        count = int(self.replay.experience_ratio * num_groups)
        if not self.replay_active or count == 0:
            return []
        hidden = torch.tensor(exclude, device=self.store.device)
        kept = self.store.bucket[hidden].clone()
        self.store.bucket[hidden] = -1  # not to be drawn now
        drawn = self._select(self.store, count, self._rng, step)
        self.store.bucket[hidden] = kept
        return drawn

    def _replace_rows(
        self, batch: dict[str, Any], rewards: Tensor, asked: Sequence[int], *, step: int
    ) -> tuple[dict[str, Any], Tensor]:
        """The first row of each asked group becomes its stored completion of the lowest entropy."""
        size = self.num_generations
        first = len(rewards) - len(asked) * size + size * torch.arange(len(asked))
        places = torch.tensor(asked, device=self.store.device)
        found, owner = self.store.rows_of(places)
        candidates = self.store.read(found)
        entropies = self._entropies(batch, candidates, first[owner.cpu()])
        self.store.note_entropy(found, entropies)
        chosen = choose(owner, entropies, 1).cpu()
        stored = candidates.pick(chosen)
        rows = first[owner[chosen].cpu()].to(rewards.device)
        width = max(batch["completion_ids"].size(1), int(stored.tokens.lengths.max()))
        batch = dict(batch)
        for name in TOKEN_COLUMNS:
            if name in batch:
                batch[name] = _widened(batch[name], width)
        tokens, mask, logprobs = _padded(stored, width, pad=self.processing_class.pad_token_id)
        batch["completion_ids"][rows] = tokens.to(batch["completion_ids"].dtype)
        batch["completion_mask"][rows] = mask.to(batch["completion_mask"].dtype)
        batch["old_per_token_logps"][rows] = logprobs
        if "sampling_per_token_logps" in batch:
            batch["sampling_per_token_logps"][rows] = logprobs
        if "importance_sampling_ratio" in batch:
            ratio = batch["importance_sampling_ratio"]
            batch["importance_sampling_ratio"] = (
                _widened(ratio, width) if ratio.size(1) > 1 else ratio
            )
            batch["importance_sampling_ratio"][rows] = 1.0
        if "tool_mask" in batch:
            batch["tool_mask"][rows] = mask.to(batch["tool_mask"].dtype)
        batch["shaping"] = torch.zeros_like(rewards).index_fill(0, rows, self.replay.shaping)
        rewards = rewards.index_copy(0, rows, stored.reward.to(rewards.device))
        batch["advantages"] = self._advantages(rewards)
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
        self._metrics["train"]["replay/frac"].append(len(asked) * size / len(rewards))
        self._metrics["train"]["replay/age"].append(
            float((step - stored.birth_step.float()).mean())
        )
        return batch, rewards

    def _advantages(self, rewards: Tensor) -> Tensor:
        """[B] -> [B]: TRL's "sum_then_normalize" with its `scale_rewards`, replayed rows included."""
        groups = rewards.view(-1, self.num_generations)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten()
        if self.scale_rewards == "group":
            advantages = advantages / (groups.std(1).repeat_interleave(groups.size(1)) + 1e-4)
        elif self.scale_rewards == "batch":
            advantages = advantages / (rewards.std() + 1e-4)
        return advantages

    def _remember(
        self, fresh: Experiences | None, rewards: Tensor, places: Tensor, *, step: int
    ) -> None:
        """What the batch teaches the store: successes of mixed groups, retired questions, start."""
        is_correct = self._is_correct(rewards).view(-1, self.num_generations)
        successes = is_correct.sum(1).cpu()
        self.store.visit(places, successes, step=step)
        self.store.retire(places[successes == self.num_generations])
        is_mixed = (successes > 0) & (successes < self.num_generations)
        if fresh is not None:
            in_mixed = torch.isin(fresh.question, places[is_mixed])
            index = (fresh.success.cpu() & in_mixed.cpu()).nonzero().flatten()
            self.store.add(fresh.pick(index))
            self.store.move(places[is_mixed], successes[is_mixed])
        rate = is_correct.float().mean().item()
        start = self.replay.start_success_rate
        self.replay_active = self.replay_active or start is None or rate > start
        self._metrics["train"]["replay/questions"].append(float(len(self.store)))

    # ---- parts -----------------------------------------------------------------------------------

    def _is_correct(self, rewards: Tensor) -> Tensor:
        full = self.replay.correct_reward
        full = float(self.reward_weights.sum()) if full is None else full
        return rewards >= full - 1e-6

    def _place(self, row: dict[str, Any]) -> int:
        """The place of a question in the store; questions are equal when their prompts are."""
        key = json.dumps(row["prompt"], sort_keys=True, default=str)
        if key not in self._place_of:
            self._place_of[key] = len(self._questions)
            self._questions.append(dict(row))
        return self._place_of[key]

    def _score(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [B, C] under the present weights, without gradient."""
        with torch.no_grad():
            logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([prompt_ids, completion_ids], 1),
                torch.cat([prompt_mask, mask.to(prompt_mask.dtype)], 1),
                completion_ids.size(1),
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
            )
        return logprobs, entropies

    def _entropies(self, batch: dict[str, Any], stored: Experiences, rows: Tensor) -> Tensor:
        """[A]: mean entropy of stored completions under the prompts of `rows` of the batch."""
        tokens, mask, _ = _padded(
            stored, int(stored.tokens.lengths.max()), pad=self.processing_class.pad_token_id
        )
        rows = rows.to(batch["prompt_ids"].device)
        _, entropies = self._score(
            batch["prompt_ids"][rows], batch["prompt_mask"][rows], tokens.long(), mask
        )
        return (entropies * mask).sum(1) / mask.sum(1)

    def _fresh(
        self, batch: dict[str, Any], rewards: Tensor, places: Tensor, *, step: int
    ) -> Experiences:
        """All completions of the batch as columns of the store."""
        mask = batch["completion_mask"].bool()
        count = len(rewards)
        lengths = mask.sum(1).cpu()
        group = torch.arange(count) // self.num_generations
        ends = batch["completion_ids"].gather(
            1, (lengths.to(mask.device) - 1).clamp(min=0)[:, None]
        )
        kept = (lengths > 0).nonzero().flatten()
        new = Experiences(
            question=places[group],
            tokens=Ragged(batch["completion_ids"][mask], lengths),
            logprobs=batch["old_per_token_logps"][mask].float(),
            birth_step=torch.full((count,), step),
            reward=rewards.float().cpu(),
            success=self._is_correct(rewards).cpu(),
            truncated=(ends.squeeze(1) != self.processing_class.eos_token_id).cpu(),
            entropy=torch.full((count,), torch.inf),
            group=group,
            score=torch.zeros(count),
            advantage=torch.zeros(count),
        )
        return new if len(kept) == count else new.pick(kept)

    # ---- checkpoints -----------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        state = {
            "store": snapshot(self.store, list(self._place_of)),
            "rows": self._questions,
            "active": self.replay_active,
            "rng": self._rng.bit_generator.state,
        }
        plain, tensors = split_tensors(state)
        path = folder / STATE_FILE
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)
        path.with_suffix(".json").write_text(json.dumps(plain, default=str))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (path := Path(checkpoint) / STATE_FILE).exists():
            return
        plain = json.loads(path.with_suffix(".json").read_text())
        state = merge_tensors(plain, load_file(path))
        for row in state["rows"]:
            self._place(row)
        load_snapshot(self.store, state["store"], self._place_of)
        self.replay_active = state["active"]
        self._rng.bit_generator.state = state["rng"]


def _widened(column: Tensor, width: int) -> Tensor:
    """[B, C] -> a copy of [B, width], zeros on the right."""
    return torch.nn.functional.pad(column, (0, width - column.size(1))).clone()


def _padded(stored: Experiences, width: int, *, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and log-probs [A, width] of stored completions."""
    lengths = stored.tokens.lengths
    device = stored.logprobs.device
    mask = torch.arange(width, device=device) < lengths.to(device)[:, None]
    tokens = torch.full(mask.shape, pad, device=device, dtype=torch.long)
    logprobs = torch.zeros(mask.shape, device=device)
    tokens[mask] = stored.tokens.values.to(device).long()
    logprobs[mask] = stored.logprobs.float()
    return tokens, mask, logprobs
