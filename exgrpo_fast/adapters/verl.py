"""Experience replay in verl, as a custom sampler of its v1 trainers.

    trainer.v1.sampler.custom_sampler.path=pkg://exgrpo_fast.adapters.verl
    trainer.v1.sampler.custom_sampler.name=ExperienceReplayBuffer
    actor_rollout_ref.rollout.calculate_log_probs=True
    algorithm.rollout_correction.rollout_is=token

A sampler sees groups when their completions are there; it cannot ask a question again, as ExGRPO
does. What it can do costs no generation: a group whose rewards are all equal has advantage 0 and
moves nothing, so its place in the batch goes to a stored group whose rewards differ, drawn by
difficulty as ExGRPO draws its questions (arXiv 2510.02245, algorithm 2). A stored completion keeps
`rollout_log_probs` of the policy that made it; verl's rollout correction weighs it by them.

The store is a partition of the TransferQueue beside verl's own, so nothing large lies in the
trainer's process. It starts empty after a restart.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from exgrpo_fast.core.errors import UserError
from exgrpo_fast.experience.replay.selectors import allocate, bucket_probabilities
from exgrpo_kernels.adapters import AdapterError, require_parameters, warn_if_untested
from exgrpo_kernels.adapters.verl import TESTED

STORE = "exgrpo_replay"  # the partition of the stored groups


@dataclass(frozen=True)
class GroupReplaySettings:
    """`trainer.v1.sampler.sampler_kwargs`."""

    experience_ratio: float = 0.5  # at most this share of a batch's groups is replayed
    bucket_mean: float = 0.5
    bucket_sigma: float = 0.125  # in accuracy
    correct_reward: float = 1.0  # a completion with at least this sum of rm_scores is correct
    max_groups: int = 1024  # the oldest leave
    max_age: int = 32  # in steps; older groups leave
    max_visits: int = 2  # a group is replayed so often
    seed: int = 0


@dataclass(frozen=True)
class StoredGroup:
    """What is known of a group whose completions lie in the store."""

    keys: tuple[str, ...]
    tags: tuple[Mapping[str, Any], ...]
    successes: int
    step: int  # in which it was generated
    visits: int = 0


@dataclass
class GroupStore:
    """The stored groups by uid, oldest first; their completions are in the TransferQueue."""

    settings: GroupReplaySettings
    groups: dict[str, StoredGroup] = field(default_factory=dict)

    def put(self, uid: str, group: StoredGroup, *, partition: str) -> None:
        """Copy the completions of a group from `partition` into the store."""
        fields = tq.kv_batch_get(keys=list(group.keys), partition_id=partition)
        if "rollout_log_probs" not in fields.keys():  # a TensorDict
            raise UserError(
                "exgrpo_fast.adapters.verl: completions have no rollout_log_probs; set "
                "actor_rollout_ref.rollout.calculate_log_probs=True"
            )
        tags = [dict(tag) for tag in group.tags]
        tq.kv_batch_put(keys=list(group.keys), partition_id=STORE, fields=fields, tags=tags)
        self.groups[uid] = group

    def take(self, uid: str, *, partition: str) -> StoredGroup:
        """Copy the completions of a stored group into `partition`; it stays, one visit older."""
        group = self.groups[uid]
        fields = tq.kv_batch_get(keys=list(group.keys), partition_id=STORE)
        tags = [dict(tag) for tag in group.tags]
        tq.kv_batch_put(keys=list(group.keys), partition_id=partition, fields=fields, tags=tags)
        self.groups[uid] = replace(group, visits=group.visits + 1)
        return group

    def drop_old(self, step: int) -> None:
        """Forget groups that are too old, replayed often enough, or more than the store holds."""
        limits = self.settings
        uids = list(self.groups)
        excess = uids[: max(0, len(uids) - limits.max_groups)]
        for uid, group in list(self.groups.items()):
            is_old = step - group.step > limits.max_age or group.visits >= limits.max_visits
            if is_old or uid in excess:
                tq.kv_clear(keys=list(group.keys), partition_id=STORE)
                del self.groups[uid]

    def draw(self, count: int, rng: np.random.Generator) -> list[str]:
        """At most `count` uids: buckets of accuracy by a Gaussian, uniform inside a bucket."""
        buckets: dict[int, list[str]] = {}
        for uid, group in self.groups.items():
            # groups may differ in size: hundredths of accuracy are the buckets
            buckets.setdefault(round(100 * group.successes / len(group.keys)), []).append(uid)
        sizes = {bucket: len(uids) for bucket, uids in buckets.items()}
        limits = self.settings
        probabilities = bucket_probabilities(
            sizes, group_size=100, mean=limits.bucket_mean, sigma=limits.bucket_sigma
        )
        shares = allocate(min(count, len(self.groups)), probabilities, sizes, rng)
        return [
            buckets[bucket][i]
            for bucket, share in shares.items()
            for i in rng.choice(sizes[bucket], size=share, replace=False)
        ]


class ExperienceReplayBuffer(ReplayBuffer):
    """`verl.trainer.ppo.v1.replay_buffer.ReplayBuffer` with stored groups in idle places.

    For synchronous training with rewards that are there when a completion is
    (`reward.reward_model` off, or in a separate resource pool).
    Errors: UserError for another trainer mode and for settings that it does not know; AdapterError
    where verl's `sample` takes other arguments or completions come without `rm_scores`.
    """

    def __init__(self, *, sampler_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        require_parameters(ReplayBuffer.sample, "global_steps", "partition_id", "batch_size")
        warn_if_untested("verl", TESTED)
        super().__init__(sampler_kwargs=sampler_kwargs, **kwargs)
        if self.trainer_mode != "sync":
            raise UserError(
                f"exgrpo_fast.adapters.verl: trainer.v1.trainer_mode is {self.trainer_mode}; "
                "ExperienceReplayBuffer is for sync"
            )
        self.settings = settings_from(sampler_kwargs or {})
        self.store = GroupStore(self.settings)
        self._rng = np.random.default_rng([self.settings.seed, 0x5E1EC7])

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict]:
        """verl's batch; in training, groups of equal rewards are replaced by stored ones."""
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "val" or not batch.keys:
            return batch, metrics
        self.store.drop_old(global_steps)
        rewards = rewards_of(batch.keys, partition_id)
        groups = by_uid(batch.keys)
        idle = [uid for uid, keys in groups.items() if len({rewards[key] for key in keys}) == 1]
        count = min(len(idle), int(self.settings.experience_ratio * len(groups)))
        drawn = self.store.draw(count, self._rng)
        fresh = dict(zip(batch.keys, batch.tags, strict=True))
        self._remember(groups, rewards, fresh, idle, step=global_steps, partition=partition_id)
        replaced = [key for uid in idle[: len(drawn)] for key in groups[uid]]
        if replaced:
            tq.kv_clear(keys=replaced, partition_id=partition_id)
        ages = []
        for uid in drawn:
            stored = self.store.take(uid, partition=partition_id)
            fresh |= dict(zip(stored.keys, stored.tags, strict=True))
            ages.append(global_steps - stored.step)
        kept = {key: tag for key, tag in fresh.items() if key not in set(replaced)}
        batch = tq.KVBatchMeta(
            partition_id=partition_id, keys=list(kept), tags=[dict(tag) for tag in kept.values()]
        )
        metrics |= {
            "replay/frac": len(drawn) / len(groups),
            "replay/idle_frac": len(idle) / len(groups),
            "replay/age": float(np.mean(ages)) if ages else 0.0,
            "replay/groups": len(self.store.groups),
        }
        return batch, metrics

    def _remember(
        self,
        groups: Mapping[str, Sequence[str]],
        rewards: Mapping[str, float],
        tags: Mapping[str, Mapping[str, Any]],
        idle: Sequence[str],
        *,
        step: int,
        partition: str,
    ) -> None:
        """Store the fresh groups whose rewards differ."""
        for uid, keys in groups.items():
            if uid in idle:
                continue
            successes = sum(rewards[key] >= self.settings.correct_reward for key in keys)
            group = StoredGroup(tuple(keys), tuple(tags[key] for key in keys), successes, step)
            self.store.put(uid, group, partition=partition)


def settings_from(given: Mapping[str, Any]) -> GroupReplaySettings:
    """UserError naming an unknown key."""
    known = GroupReplaySettings.__dataclass_fields__
    if unknown := sorted(set(given) - set(known)):
        raise UserError(
            f"trainer.v1.sampler.sampler_kwargs has no {', '.join(unknown)}; it takes "
            f"{', '.join(known)}"
        )
    return GroupReplaySettings(**given)


def by_uid(keys: Sequence[str]) -> dict[str, list[str]]:
    """Keys `{uid}_{session}_{index}` of a batch by their group, in order."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split("_")[0], []).append(key)
    return groups


def rewards_of(keys: Sequence[str], partition: str) -> dict[str, float]:
    """The sum of each completion's token rewards."""
    fields = tq.kv_batch_get(keys=list(keys), partition_id=partition, select_fields=["rm_scores"])
    if "rm_scores" not in fields.keys():  # a TensorDict
        raise AdapterError("completions were expected to hold rm_scores when they are sampled")
    sums = [float(scores.sum()) for scores in fields["rm_scores"]]
    return dict(zip(keys, sums, strict=True))
