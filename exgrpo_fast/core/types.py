"""The values that travel between folders: Question, Completion, Trajectory, Group, TokenColumns.

All of them are frozen; a change makes a new value (`dataclasses.replace`).

Legend of shapes
    T   completion tokens of one trajectory (the end-of-sequence token included)
    K   trajectories in one group
    N   trained tokens of a batch, trajectories joined end to end, no padding

Token ids travel from the engine to the loss untouched: nothing here is ever decoded and re-encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # rewards and data read this module before torch is loaded
    from torch import Tensor

SourceName = Literal["fresh", "replay", "prior", "hindsight"]
Metrics = Mapping[str, Any]  # name -> number, text, None, or a nested one; numpy and tensors too


@dataclass(frozen=True)
class Question:
    """One task: what the policy reads and what its answer is checked against."""

    id: str  # stable over runs and machines: the row's own id, or a hash of its prompt and answer
    prompt_ids: tuple[int, ...]  # the chat template is already applied
    prompt: str  # the same prompt as text, for people and for reward functions
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # every other field of the row (JSON)
    conversation: tuple[Mapping[str, Any], ...] = ()  # the messages that the template was given


class WeightSpan(NamedTuple):
    """Tokens `start` to `end` of a completion were drawn by the weights of one version."""

    version: int  # the number of finished training steps
    start: int
    end: int


@dataclass(frozen=True)
class KeptTokens:
    """What top-k, top-p or min-p left to draw from at each position of a completion."""

    ids: Tensor  # int32, of one position after the other; the drawn token is among them
    counts: Tensor  # int64 [T]

    def first(self, length: int) -> KeptTokens:
        """Of the first `length` positions."""
        counts = self.counts[:length]
        return KeptTokens(self.ids[: int(counts.sum())], counts)


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one request; `logprobs` are the engine's own."""

    token_ids: Tensor  # int64 [T], ends with an end-of-sequence id unless truncated
    logprobs: Tensor  # float32 [T]
    truncated: bool  # True when the length limit ended it
    weight_spans: tuple[WeightSpan, ...] = ()  # none: all of it by the present weights
    kept: KeptTokens | None = None  # None: drawn from the whole vocabulary
    entropies: Tensor | None = None  # float32 [T], of what each token was drawn from; if asked for


class RewardSample(NamedTuple):
    """What one reward is asked about; `columns` are the other fields of the data row (JSON).

    They hold the answer, too, where it is no text: the functions get it as the row has it.
    """

    prompt: str
    completion: str
    answer: str
    columns: Mapping[str, Any] = MappingProxyType({})


class Verdict(NamedTuple):
    """A reward and why: `reason` is a short word that is counted in the metrics."""

    reward: float
    reason: str = "ok"
    milliseconds: float = 0.0
    scored: bool = True  # False: no verdict was possible; the trajectory is left out of its group
    checks: tuple[tuple[str, bool], ...] = ()  # rubrics by name: met or not
    correct: bool | None = None  # None: where the reward is 1

    @property
    def successful(self) -> bool:
        """Whether every reward function gave full marks."""
        return self.reward == 1.0 if self.correct is None else self.correct


@dataclass(frozen=True)
class Guidance:
    """How a prior took part in a completion, as the engines saw it; one entry a token."""

    redrawn: Tensor  # bool [T], drawn from the prior in place of the policy's draft
    draft_logprobs: Tensor  # float32 [T], of the drafts that were kept; nan where redrawn
    prior_logprobs: Tensor  # float32 [T], of the emitted token under the prior
    tested: Tensor  # float32 [T], the statistic of the draft that was tested
    rejected: Tensor  # int64 [T], the draft that was thrown away; -1 where it was kept


@dataclass(frozen=True)
class Trajectory:
    """One completion to a question, with what the loss has to know about where it came from."""

    question: Question
    token_ids: Tensor  # int64 [T]
    behaviour_logprobs: Tensor  # float32 [T], denominator of the ratio
    entropies: Tensor  # float32 [T], under the policy that scored `behaviour_logprobs`
    truncated: bool
    kept: KeptTokens | None = None  # what all log-probs are over; None: the whole vocabulary
    source: SourceName = "fresh"
    shaping: float = 0.0  # 0 = clipped ratio; g > 0 = unclipped w / (w + g)
    proximal_logprobs: Tensor | None = None  # float32 [T]; the clip is taken around these
    token_weights: Tensor | None = None  # float32 [T], factors of its tokens' weights
    ref_logprobs: Tensor | None = None  # float32 [T], under the reference policy of a KL term
    baseline_weight: float = 1.0  # of its reward in the group's mean
    masked: bool = False  # counts in the group's statistics alone, neither in loss nor normaliser
    guidance: Guidance | None = None  # of a prior-guided completion
    birth_step: int = 0  # the step in which it was generated
    verdict: Verdict | None = None
    penalty: float = 0.0  # added to the verified reward, such as DAPO's for overlong completions
    bonus: float = 0.0  # added as well, such as HeRL's for a completion that was revised

    @property
    def reward(self) -> float:
        return self._scored.reward + self.penalty + self.bonus

    @property
    def successful(self) -> bool:
        """Whether the verifier gave full marks, penalties apart."""
        return self._scored.successful

    @property
    def _scored(self) -> Verdict:
        if self.verdict is None:
            raise RuntimeError(f"question {self.question.id}: the reward is asked before scoring")
        return self.verdict

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()


@dataclass(frozen=True)
class Group:
    """The K trajectories of one question that share a baseline."""

    question: Question
    trajectories: tuple[Trajectory, ...]
    advantages: tuple[float, ...] = ()  # of each, once all rewards are final

    @property
    def rewards(self) -> list[float]:
        return [trajectory.reward for trajectory in self.trajectories]

    @property
    def num_successes(self) -> int:
        """Completions with full marks, a replayed one included (ExGRPO's s)."""
        return sum(trajectory.successful for trajectory in self.trajectories)

    @property
    def learnable(self) -> bool:
        """Whether the rewards differ: only then does the group carry a gradient."""
        return len(set(self.rewards)) > 1

    @property
    def replayed(self) -> list[bool]:
        return [trajectory.source == "replay" for trajectory in self.trajectories]

    def from_source(self, source: SourceName) -> list[Trajectory]:
        return [trajectory for trajectory in self.trajectories if trajectory.source == source]


def pass_at_1(groups: Sequence[Group]) -> float:
    """Share of correct among all trajectories, replayed ones included (ExGRPO's start rule); those
    that a prior has guided do not measure the policy."""
    own = (t for group in groups for t in group.trajectories if t.source != "prior")
    return fmean(t.successful for t in own)


@dataclass(frozen=True)
class TokenColumns:
    """Everything a policy loss needs, one entry per trained token; every method only fills these.

    `weights` is mask x loss normaliser x mismatch correction; 0 = not trained.
    """

    targets: Tensor  # int64 [N], the token that was emitted
    behaviour_logprobs: Tensor  # float32 [N]
    advantages: Tensor  # float32 [N]
    weights: Tensor  # float32 [N]
    shaping: Tensor  # float32 [N]
    sequence_ids: Tensor  # int64 [N], which trajectory of the micro-batch (sequence-level ratios)
    ref_logprobs: Tensor | None = None  # float32 [N], only when a KL term is on
    kl_weights: Tensor | None = None  # float32 [N], where the KL term is not on all tokens alike
    kept_ids: Tensor | None = None  # int32 [N, K], what it was drawn from; -1 behind the last

    def __post_init__(self) -> None:
        sizes = {f.name: len(getattr(self, f.name)) for f in fields(self) if self._has(f.name)}
        assert len(set(sizes.values())) == 1, f"columns differ in length: {sizes}"

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def num_tokens(self) -> int:
        return self.targets.numel()
