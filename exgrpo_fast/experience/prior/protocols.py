"""Protocols of prior resampling: the engine that drafts, the prior that scores, and the source of
guided completions that the collector uses.

Every call names whole prefixes, so an engine without memory can answer it (with a prefix cache it
is cheap); one that keeps its own cache finds what it has already read (hf_backend.py).
The result of an engine that is stepped becomes ready later.

Legend: m drafted tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from exgrpo_fast.core.types import Question, Trajectory
from exgrpo_fast.experience.prior.guidance_metrics import GuidanceCost

T = TypeVar("T")


class Prefix(NamedTuple):
    """A prompt with the completion so far. `place` says which completion of the session it is."""

    place: int
    token_ids: list[int]


class Draft(NamedTuple):
    """Tokens after a prefix; an end-of-sequence token ends them early."""

    token_ids: list[int]
    logprobs: Tensor  # float32 [m], under the drafting policy
    distributions: Tensor | None = None  # [m, V] log-probabilities, where they were asked for


class DraftScores(NamedTuple):
    """Of drafted tokens, under the prior."""

    logprobs: Tensor  # float32 [m]; -inf for tokens that the prior does not have
    distributions: Tensor | None = None  # [m, V]


class Drawn(NamedTuple):
    token_id: int
    logprob: float


class EngineResult(Generic[T]):
    """A result that may not be there yet; as it stands, of an engine that works inside the call."""

    def __init__(self, value: T) -> None:
        self.value = value

    def ready(self) -> bool:
        """Makes what progress can be made without waiting; whether `result` is there."""
        return True

    def result(self) -> T:
        return self.value


class Drafter(Protocol):
    """The policy, as the rollout engine holds it."""

    concurrent: bool  # whether drafts are made beside the fresh completions

    def draft(
        self,
        prefixes: Sequence[Prefix],
        lengths: Sequence[int],
        seeds: Sequence[int],
        *,
        distributions: bool = False,
    ) -> EngineResult[list[Draft]]:
        """At most `lengths[i]` tokens after each prefix, at temperature 1 from the whole
        distribution, each draft a function of its prefix and its seed."""
        ...

    def forget(self) -> None:
        """The session is over and the weights will change: drop what was cached."""
        ...


class PriorScorer(Protocol):
    """The prior, frozen."""

    prefix_block: int | None  # tokens in a block of its prefix cache, where drafts must mind it

    def score(
        self,
        prefixes: Sequence[Prefix],
        drafts: Sequence[Sequence[int]],
        *,
        distributions: bool = False,
    ) -> EngineResult[list[DraftScores]]:
        """The log-probability of every drafted token behind its prefix, in one pass."""
        ...

    def draw(self, prefixes: Sequence[Prefix], seeds: Sequence[int]) -> EngineResult[list[Drawn]]:
        """One token after each prefix. A prefix is one of the last `score`, with none or some of
        its draft appended."""
        ...

    def whole_completions(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Tensor]
    ) -> list[Tensor]:
        """float32 [T] of each: log-probabilities of completions that are not guided."""
        ...

    def forget(self) -> None:
        """The session is over: drop what belongs to its completions."""
        ...


# --- what the collector asks of a prior -----------------------------------------------------------


class Prior:
    """The interface of a source of guided completions; as it stands, of the run without a prior.

    `PriorSource` is the one with a prior policy.
    """

    @property
    def concurrent(self) -> bool:
        """Whether completions are guided while the fresh ones are generated."""
        return False

    def counts(self, num_questions: int, *, step: int) -> list[int]:
        """Guided completions of each question."""
        return [0] * num_questions

    def begin(self, questions: Sequence[Question], counts: Sequence[int], *, step: int) -> Any:
        """The guided completions of one call, while they are generated: `advance()` goes as far as
        it goes without waiting."""
        return self

    def advance(self) -> None:
        """Of a step without guided completions."""

    def score(
        self, guided: Any, fresh: Sequence[Trajectory], *, step: int
    ) -> tuple[list[Trajectory], list[Trajectory], GuidanceCost]:
        """(guided trajectories, the fresh ones, what it took); `guided`: what `begin` returned."""
        return [], list(fresh), GuidanceCost()

    def mask_failed(self, trajectory: Trajectory) -> Trajectory:
        """The positive filter, on a trajectory with its verdict: see `PriorSource.mask_failed`."""
        return trajectory
