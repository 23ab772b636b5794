"""Replay as verl's custom sampler: the real ReplayBuffer above a queue that lies in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

tq = pytest.importorskip("transfer_queue", reason="make test-adapters installs TransferQueue")

from omegaconf import OmegaConf  # noqa: E402
from tensordict import NonTensorStack, TensorDict  # noqa: E402
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer  # noqa: E402
from verl.utils.import_utils import load_extern_object  # noqa: E402

from exgrpo_fast.adapters import verl as adapter  # noqa: E402
from exgrpo_fast.core.errors import UserError  # noqa: E402
from exgrpo_kernels.adapters import AdapterError  # noqa: E402


class Queue:
    """The four functions of a TransferQueue that verl's sampler calls, on dicts."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, dict]] = {}
        self.values: dict[str, dict[str, TensorDict]] = {}

    def kv_batch_put(self, keys, partition_id, fields=None, tags=None) -> None:
        for i, key in enumerate(keys):
            self.tags.setdefault(partition_id, {}).setdefault(key, {}).update(tags[i])
            if fields is not None:
                self.values.setdefault(partition_id, {})[key] = fields[i : i + 1]

    def kv_batch_get(self, keys, partition_id, select_fields=None) -> TensorDict:
        rows = [self.values[partition_id][key] for key in keys]
        names = [n for n in rows[0].keys() if select_fields is None or n in select_fields]
        found: dict[str, Any] = {}
        for name in names:
            values = [value for row in rows for value in row[name]]
            is_tensor = isinstance(values[0], torch.Tensor)
            found[name] = (
                torch.nested.as_nested_tensor(values, layout=torch.jagged)
                if is_tensor
                else NonTensorStack(*values)
            )
        return TensorDict(found, batch_size=len(rows))

    def kv_list(self, partition_id=None) -> dict:
        return {name: dict(items) for name, items in self.tags.items()}

    def kv_clear(self, keys, partition_id) -> None:
        for key in keys:
            self.tags[partition_id].pop(key, None)
            self.values.get(partition_id, {}).pop(key, None)

    # ---- what verl's rollout does ----

    def finish(self, uid: str, rewards: list[float], *, step: int, lacks: str = "") -> None:
        """A prompt whose completions are there, of 2, 3, 4, ... tokens."""
        self.kv_batch_put(
            [uid], "train", tags=[{"is_prompt": True, "status": "finished", "global_steps": step}]
        )
        lengths = range(2, 2 + len(rewards))

        def jagged(values: list[torch.Tensor]) -> torch.Tensor:
            return torch.nested.as_nested_tensor(values, layout=torch.jagged)

        fields = {
            "uid": NonTensorStack(*[uid] * len(rewards)),
            "responses": jagged([torch.arange(n) + 100 * step for n in lengths]),
            "rollout_log_probs": jagged([-torch.rand(n) - step for n in lengths]),
            "rm_scores": jagged(
                [torch.eye(n)[-1] * r for n, r in zip(lengths, rewards, strict=True)]
            ),
        }
        fields.pop(lacks, None)
        self.kv_batch_put(
            [f"{uid}_{i}_0" for i in range(len(rewards))],
            "train",
            fields=TensorDict(fields, batch_size=len(rewards)),
            tags=[{"is_prompt": False, "seq_len": n, "global_steps": step} for n in lengths],
        )


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    for name in ("kv_batch_put", "kv_batch_get", "kv_list", "kv_clear"):
        monkeypatch.setattr(tq, name, getattr(made, name))
    return made


def sampler(**settings) -> adapter.ExperienceReplayBuffer:
    """Loaded and called as `PPOTrainer._build_replay_buffer` does."""
    kind = load_extern_object("pkg://exgrpo_fast.adapters.verl", "ExperienceReplayBuffer")
    assert kind is adapter.ExperienceReplayBuffer and issubclass(kind, ReplayBuffer)
    return kind(
        trainer_mode=settings.pop("trainer_mode", "sync"),
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create(settings),
        refill_fn=lambda count: None,
    )


def groups_of(batch) -> dict[str, int]:
    return {uid: len(keys) for uid, keys in adapter.by_uid(batch.keys).items()}


def test_idle_groups_give_their_places_to_stored_ones(queue: Queue) -> None:
    buffer = sampler(experience_ratio=0.5)
    queue.finish("mixed", [1, 0, 1, 0], step=1)
    queue.finish("easy", [1, 1, 1, 1], step=1)
    batch, metrics = buffer.sample(1, "train", 2)
    assert groups_of(batch) == {"mixed": 4, "easy": 4}  # nothing was stored yet
    assert (metrics["replay/frac"], metrics["replay/idle_frac"]) == (0.0, 0.5)
    assert metrics["replay/groups"] == 1
    stored = queue.kv_batch_get(batch.keys[:4], "train")
    tq.kv_clear(keys=batch.keys, partition_id="train")  # as the trainer does after its step

    queue.finish("hard", [0, 0, 0, 0], step=2)
    queue.finish("other", [0, 1, 0, 0], step=2)
    batch, metrics = buffer.sample(2, "train", 2)
    assert groups_of(batch) == {"other": 4, "mixed": 4}
    assert metrics["replay/frac"] == 0.5 and metrics["replay/age"] == 1.0
    assert set(queue.tags["train"]) == set(batch.keys)  # of "hard" nothing stays
    again = queue.kv_batch_get([k for k in batch.keys if k.startswith("mixed")], "train")
    for name in ("responses", "rollout_log_probs", "rm_scores"):  # as when they were generated
        for ours, theirs in zip(again[name], stored[name], strict=True):
            assert torch.equal(ours, theirs)
    lengths = {key: tag["seq_len"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
    assert lengths["mixed_3_0"] == 5  # verl balances ranks by this tag


def test_a_batch_without_idle_groups_is_verls(queue: Queue) -> None:
    buffer = sampler()
    for step in (1, 2):
        for name in "ab":
            queue.finish(f"{name}{step}", [1, 0], step=step)
        batch, metrics = buffer.sample(step, "train", 2)
        assert groups_of(batch) == {f"a{step}": 2, f"b{step}": 2}
        assert metrics["replay/frac"] == 0.0
        tq.kv_clear(keys=batch.keys, partition_id="train")


def test_the_share_age_and_visits_are_bounded(queue: Queue) -> None:
    buffer = sampler(experience_ratio=0.5, max_age=3, max_visits=1)

    def step(number: int, rewards: list[list[float]]) -> float:
        for i, each in enumerate(rewards):
            queue.finish(f"q{number}x{i}", each, step=number)
        batch, metrics = buffer.sample(number, "train", len(rewards))
        tq.kv_clear(keys=batch.keys, partition_id="train")
        return metrics["replay/frac"]

    assert step(1, [[1, 0]] * 4) == 0.0
    assert step(2, [[0, 0]] * 4) == 0.5  # two of four, though all are idle
    assert step(3, [[0, 0]] * 4) == 0.5  # the other two
    assert step(4, [[0, 0]] * 4) == 0.0  # each has been replayed once
    assert step(5, [[1, 0]] + [[0, 0]] * 3) == 0.0
    assert step(9, [[0, 0]] * 4) == 0.0  # too old
    assert not buffer.store.groups and not queue.tags[adapter.STORE]


def test_difficulty_decides_which_group_is_drawn(queue: Queue) -> None:
    buffer = sampler(bucket_mean=0.5, bucket_sigma=0.05)
    for name, rewards in (("rare", [1] + [0] * 7), ("half", [1, 0] * 4), ("often", [1] * 7 + [0])):
        queue.finish(name, rewards, step=1)
    buffer.sample(1, "train", 3)
    assert buffer.store.draw(1, buffer._rng) == ["half"]
    assert sorted(buffer.store.draw(5, buffer._rng)) == ["half", "often", "rare"]


def test_validation_is_left_alone(queue: Queue) -> None:
    buffer = sampler()
    queue.finish("a", [1, 0], step=1)
    queue.tags["val"], queue.values["val"] = queue.tags.pop("train"), queue.values.pop("train")
    batch, metrics = buffer.sample(1, "val", 1)
    assert groups_of(batch) == {"a": 2} and metrics == {}
    assert not buffer.store.groups


@pytest.mark.parametrize(
    ("lacks", "error", "said"),
    [
        ("rollout_log_probs", UserError, "calculate_log_probs=True"),
        ("rm_scores", AdapterError, "expected to hold rm_scores"),
    ],
)
def test_what_completions_lack_is_named(queue: Queue, lacks, error, said) -> None:
    queue.finish("a", [1, 0], step=1, lacks=lacks)
    with pytest.raises(error, match=said):
        sampler().sample(1, "train", 1)


def test_what_it_cannot_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="trainer_mode is separate_async"):
        sampler(trainer_mode="separate_async")
    with pytest.raises(UserError, match="sampler_kwargs has no shaping; it takes experience_ratio"):
        sampler(shaping=0.1)
    monkeypatch.setattr(adapter, "TESTED", "0.0.1")
    with pytest.warns(UserWarning, match=r"tested with verl 0\.0\.1"):
        sampler()
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, step: None)
    with pytest.raises(AdapterError, match="was expected to take global_steps"):
        sampler()
