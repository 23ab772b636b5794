"""The experience store: successful trajectories by question, questions by bucket, the retired set.

    bucket k    questions with k successes in their latest visit, 1 <= k <= K - 1
    retired     questions that were solved K times out of K; they never come back

ExGRPO (arXiv 2510.02245), section 3.2. Token ids are int32 and log-probs float32, both on the
training device; trajectories of one question are distinct by their token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor


@dataclass(frozen=True)
class Experience:
    """One stored success."""

    token_ids: Tensor  # int32 [T]
    behaviour_logprobs: Tensor  # float32 [T], under the policy that produced it
    birth_step: int
    digest: int  # of the token ids, for exact de-duplication
    truncated: bool = False  # the length limit ended it


class ExperienceStore:
    """Partition of the stored questions into buckets 1..K-1, with their trajectories."""

    def __init__(self, *, group_size: int, device: torch.device | str = "cpu") -> None:
        if group_size < 2:
            raise ValueError(f"group_size must be at least 2, got {group_size}")
        self.group_size = group_size
        self.device = torch.device(device)
        self._experiences: dict[str, dict[int, Experience]] = {}  # question -> digest -> success
        self._bucket_of: dict[str, int] = {}
        # Dicts as ordered sets: constant time to move a question, and a reproducible order.
        self._buckets: dict[int, dict[str, None]] = {k: {} for k in range(1, group_size)}
        self._retired: dict[str, None] = {}

    # --- reading ---

    def __len__(self) -> int:
        """|E|, the number of stored questions."""
        return len(self._bucket_of)

    @property
    def num_trajectories(self) -> int:
        return sum(len(experiences) for experiences in self._experiences.values())

    @property
    def num_bytes(self) -> int:
        tensors = (t for q in self._experiences.values() for e in q.values() for t in _tensors(e))
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def retired(self) -> list[str]:
        return list(self._retired)

    def is_retired(self, question_id: str) -> bool:
        return question_id in self._retired

    def bucket(self, k: int) -> list[str]:
        return list(self._buckets[k])

    def bucket_sizes(self) -> dict[int, int]:
        return {k: len(questions) for k, questions in self._buckets.items()}

    def questions(self) -> list[str]:
        return list(self._bucket_of)

    def experiences(self, question_id: str) -> list[Experience]:
        return list(self._experiences[question_id].values())

    # --- changing ---

    def add(
        self,
        question_id: str,
        token_ids: Tensor,
        behaviour_logprobs: Tensor,
        *,
        birth_step: int,
        truncated: bool = False,
    ) -> None:
        """Keep one success, unless the very same tokens are kept already."""
        if token_ids.shape != behaviour_logprobs.shape or not token_ids.numel():
            raise ValueError(
                f"token_ids {tuple(token_ids.shape)} and behaviour_logprobs "
                f"{tuple(behaviour_logprobs.shape)} must be equal and not empty"
            )
        tokens = token_ids.to(self.device, torch.int32, copy=True)
        digest = xxhash.xxh3_64_intdigest(tokens.cpu().numpy().tobytes())
        self._experiences.setdefault(question_id, {}).setdefault(
            digest,
            Experience(
                token_ids=tokens,
                behaviour_logprobs=behaviour_logprobs.to(self.device, torch.float32, copy=True),
                birth_step=birth_step,
                digest=digest,
                truncated=truncated,
            ),
        )

    def move(self, question_id: str, k: int) -> None:
        """Put a question with stored successes into bucket k."""
        if question_id not in self._experiences:
            raise ValueError(f"question {question_id} has no stored success")
        old = self._bucket_of.get(question_id)
        if old is not None:
            del self._buckets[old][question_id]
        self._buckets[k][question_id] = None
        self._bucket_of[question_id] = k

    def retire(self, question_id: str) -> None:
        """The question leaves the store for good."""
        self._retired[question_id] = None
        self._experiences.pop(question_id, None)
        k = self._bucket_of.pop(question_id, None)
        if k is not None:
            del self._buckets[k][question_id]

    # --- invariants and persistence ---

    def check_valid(self) -> None:
        """Buckets partition E, the retired are not in it, and every question has a success."""
        listed = [q for bucket in self._buckets.values() for q in bucket]
        assert len(listed) == len(set(listed)), "a question lies in two buckets"
        assert set(listed) == set(self._bucket_of) == set(self._experiences), "buckets != E"
        assert all(q in self._buckets[k] for q, k in self._bucket_of.items())
        assert not set(listed) & set(self._retired), "a retired question is still stored"
        assert all(self._experiences.values()), "a stored question without a success"

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: {"index": JSON-able, "token_ids": ..., "logprobs": ...}."""
        flat = [(q, e) for q, found in self._experiences.items() for e in found.values()]
        return {
            "index": {
                "group_size": self.group_size,
                "buckets": {str(k): list(bucket) for k, bucket in self._buckets.items()},
                "retired": self.retired,
                "experiences": [
                    [q, e.token_ids.numel(), e.birth_step, e.truncated] for q, e in flat
                ],
            },
            "token_ids": _join((e.token_ids for _, e in flat), torch.int32),
            "behaviour_logprobs": _join((e.behaviour_logprobs for _, e in flat), torch.float32),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        index = state["index"]
        if index["group_size"] != self.group_size:
            raise ValueError(
                f"the store was saved with group_size {index['group_size']}, this run has "
                f"{self.group_size}: buckets count successes and cannot be converted"
            )
        self.__init__(group_size=self.group_size, device=self.device)
        lengths = [length for _, length, *_ in index["experiences"]]
        tokens = state["token_ids"].split(lengths) if lengths else []
        logprobs = state["behaviour_logprobs"].split(lengths) if lengths else []
        for (question_id, _, birth_step, truncated), t, lp in zip(
            index["experiences"], tokens, logprobs, strict=True
        ):
            self.add(question_id, t, lp, birth_step=birth_step, truncated=truncated)
        for k, questions in index["buckets"].items():
            for question_id in questions:
                self.move(question_id, int(k))
        self._retired = dict.fromkeys(index["retired"])
        self.check_valid()


def _tensors(experience: Experience) -> tuple[Tensor, Tensor]:
    return experience.token_ids, experience.behaviour_logprobs


def _join(tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(t.cpu() for t in tensors)])
