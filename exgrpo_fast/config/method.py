"""The sections that a recipe sets: advantage and loss, replay, hindsight, resampling by a prior."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from exgrpo_fast.config.sections import Fraction, NonNegative, Positive, PositiveFloat, Section


class KLConfig(Section):
    """A KL term towards a frozen policy, which is loaded only where coef is above 0."""

    coef: Annotated[float, Field(ge=0.0)] = Field(default=0.0, description="weight of the term")
    estimator: Literal["k1", "k2", "k3", "k3_ratio", "k3_plus", "abs"] = Field(
        default="k3", description="of the KL: docs/losses.md"
    )
    reference: Literal["initial", "behaviour"] = Field(
        default="initial",
        description="the initial policy, or the behaviour log-probs, which need no second model",
    )
    previous_share: Fraction = Field(
        default=0.0, description="share of the term towards the policy of the preceding step"
    )
    rebase_at_step: Positive | None = Field(
        default=None, description="the policy of that step replaces the initial one; null = never"
    )


class OverlongConfig(Section):
    """Completions that reach the length limit."""

    mask_truncated: bool = Field(default=False, description="truncated completions get weight 0")
    soft_penalty_tokens: NonNegative = Field(
        default=0, description="DAPO: the reward falls linearly by 1 over the last so many tokens"
    )


class MismatchConfig(Section):
    """Weights for tokens whose log-probs differ between engine and trainer: docs/rollouts.md."""

    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = Field(
        default="token_truncate",
        description="cap the weight at max_ratio, or mask outside the range; a token or a sequence",
    )
    max_ratio: PositiveFloat = Field(
        default=2.0, description="of the probabilities, trainer / engine"
    )
    min_ratio: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="of probabilities; masks only (IcePop: 0.5 to 5)"
    )


class DistillationConfig(Section):
    """On-policy distillation: docs/losses.md."""

    teacher: str | None = Field(
        default=None, description="a model with the policy's tokenizer; null = no distillation"
    )
    divergence: Literal["sampled", "reverse", "forward", "jsd"] = Field(
        default="sampled",
        description="to the teacher: sampled = reverse KL of the sampled token, as an advantage; "
        "others over the whole vocabulary",
    )
    mixture: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.5, description="of divergence jsd: the teacher's share of the middle"
    )
    coef: PositiveFloat = Field(default=1.0, description="weight of the divergence")
    rewards: bool = Field(default=True, description="beside it, the advantages of the groups")

    @property
    def is_over_vocabulary(self) -> bool:
        return self.teacher is not None and self.divergence != "sampled"


class TokensConfig(Section):
    """Advantages of single tokens, by their entropies and log-probs: docs/losses.md."""

    high_entropy_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="only this share of tokens, of highest entropy, has an advantage"
    )
    divide_by: Literal["kept", "all"] = Field(
        default="kept", description="tokens that high_entropy_share counts in the normaliser"
    )
    entropy_shaping: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="advantages grow by so much x the token's entropy; 0 = not"
    )
    entropy_shaping_cap: Annotated[float, Field(gt=1.0)] = Field(
        default=2.0, description="but at most by |advantage| / cap"
    )
    clip_cov: Fraction = Field(
        default=0.0, description="Clip-Cov: share of tokens, drawn, without a gradient"
    )
    clip_cov_range: tuple[float, float] = Field(
        default=(1.0, 5.0), description="drawn from tokens whose covariance lies between"
    )
    kl_cov: Fraction = Field(
        default=0.0, description="KL-Cov: the KL term is on this share, of largest covariance"
    )


class AlgorithmConfig(Section):
    """Advantage and loss: docs/losses.md. A recipe sets these; touch them to change the method."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "quantile"] = Field(
        default="dr_grpo", description="estimator: docs/losses.md"
    )
    std: Literal["population", "sample"] = Field(
        default="population",
        description="of advantage grpo and quantile: over K, or over K - 1 as verl's",
    )
    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.4, description="of a group's rewards, the baseline of advantage quantile"
    )
    surrogate: Literal["clip", "cispo", "sapo", "reinforce"] = Field(
        default="clip", description="policy loss: docs/losses.md"
    )
    ratio_level: Literal["token", "sequence"] = Field(
        default="token", description="importance ratio of tokens, or of sequences (GSPO)"
    )
    clip_low: PositiveFloat | None = Field(
        default=0.2, description="ratio is clipped below 1 - clip_low; null = not"
    )
    clip_high: PositiveFloat | None = Field(
        default=0.2, description="ratio is clipped above 1 + clip_high; null = not"
    )
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(
        default=None, description="largest ratio where the advantage is negative; null = none"
    )
    tv_low: PositiveFloat | None = Field(
        default=None,
        description="DPPO: no gradient where a probability fell by more, at A <= 0; null = no bound",
    )
    tv_high: PositiveFloat | None = Field(
        default=None,
        description="DPPO: no gradient where a probability rose by more, at A > 0; null = no bound",
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        default="constant",
        description="what the token sum is divided by; constant = max_completion_tokens",
    )
    entropy_coef: float = Field(default=0.0, description="weight of the entropy bonus")
    tokens: TokensConfig = TokensConfig()
    distillation: DistillationConfig = DistillationConfig()
    kl: KLConfig = KLConfig()
    overlong: OverlongConfig = OverlongConfig()
    mismatch: MismatchConfig = MismatchConfig()


class StoreConfig(Section):
    """Memory of the replay buffer."""

    max_gib: PositiveFloat = Field(default=2.0, description="at most so much on the device")
    host_gib: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="pinned host memory for trajectories that the device has no room for",
    )
    page_tokens: Positive | None = Field(
        default=None, description="tokens of a page; null = by the longest completion"
    )
    logprob_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16 halves 4 of 8 bytes a token"
    )
    evict: Literal["entropy", "oldest"] = Field(
        default="entropy",
        description="evicted from a full store: the highest last entropy, or the oldest",
    )
    max_per_question: Positive | None = Field(
        default=None, description="trajectories of a question; null = no limit"
    )
    max_groups: Positive | None = Field(
        default=None, description="keep the best groups by sum |A| x std; null = no such rule"
    )
    max_trajectories: Positive | None = Field(
        default=None, description="keep the newest; null = as many as there is room for"
    )
    spare_correct: Fraction = Field(
        default=0.0,
        description="share of max_trajectories that is kept for older ones that are correct",
    )
    deduplicate: bool = Field(default=True, description="store a completion of a question once")
    pool: str | None = Field(
        default=None, description="trajectories to start with: a parquet file of `buffer export`"
    )
    pool_field: str | None = Field(
        default=None, description="field of the training rows with a worked solution"
    )


class ReplayConfig(Section):
    """ExGRPO and related methods: docs/replay.md. A recipe sets these."""

    enabled: bool = Field(default=False, description="keep trajectories and train on them again")
    method: str = Field(default="exgrpo", description="name shown in the summary")
    mixer: Literal[
        "replace_slot", "append", "question_only", "recent_groups", "spent_groups", "fifo"
    ] = Field(
        default="replace_slot",
        description="how replayed trajectories enter a batch: docs/replay.md",
    )
    experience_ratio: Fraction = Field(
        default=0.5, description="rho: share of groups with a stored question"
    )
    replay_ratio: PositiveFloat = Field(
        default=1.0, description="mixer fifo: trajectories trained for each one generated"
    )
    start_success_rate: Fraction | None = Field(
        default=0.35, description="replay starts after the first batch above it; null = from step 1"
    )
    stop_after_steps: Positive | None = Field(
        default=None, description="on-policy from there on; null = never"
    )
    keep: Literal["successes", "all", "none"] = Field(
        default="successes", description="which trajectories are stored"
    )
    difficulty: Literal["successes", "reward_std"] = Field(
        default="successes", description="what a bucket counts; reward_std for continuous rewards"
    )
    retire: bool = Field(
        default=True, description="questions solved K of K times are never drawn again"
    )
    questions: Literal["gaussian", "uniform", "medium", "stream"] = Field(
        default="gaussian", description="which stored questions are drawn: docs/replay.md"
    )
    bucket_mean: Fraction = Field(default=0.5, description="mu of the bucket Gaussian, in accuracy")
    bucket_sigma: PositiveFloat = Field(
        default=0.125, description="sigma, in accuracy (1.0 = as printed)"
    )
    medium_low: Fraction = Field(default=0.25, description="questions medium: pass rate from")
    medium_high: Fraction = Field(default=0.75, description="questions medium: pass rate to")
    cooldown_steps: NonNegative = Field(default=1, description="questions medium: steps between")
    max_visits: Positive = Field(default=8, description="questions medium: visits at most")
    select: Literal[
        "entropy",
        "highest_entropy",
        "nll",
        "entropy_sum",
        "stored_entropy",
        "random",
        "newest",
        "highest_reward",
        "max_variance",
        "all",
    ] = Field(default="entropy", description="which stored trajectory: the lowest entropy, ...")
    count: Positive = Field(default=1, description="replayed trajectories a question")
    min_stored: Positive = Field(default=1, description="questions with fewer are not replayed")
    prefilter: Positive | None = Field(
        default=None, description="score only so many candidates, of the lowest last-known entropy"
    )
    max_age: Positive | None = Field(
        default=None, description="in steps; older ones are not replayed"
    )
    weight: Literal["shaped", "importance", "clipped", "none", "proximal"] = Field(
        default="shaped", description="importance weight: docs/replay.md"
    )
    shaping: Annotated[float, Field(ge=0.0)] = Field(
        default=0.1, description="beta of w / (w + beta)"
    )
    clip_fresh: bool = Field(
        default=False, description="keep the PPO clip on fresh rows once active"
    )
    baseline: Literal["pooled", "fresh", "split"] = Field(
        default="pooled", description="of advantages: docs/replay.md"
    )
    coef: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="weight of a separate replay objective; null = one objective"
    )
    store: StoreConfig = StoreConfig()


class HindsightConfig(Section):
    """HeRL: failed completions are revised, and the best revision joins its group: docs/herl.md."""

    enabled: bool = Field(default=False, description="revise failed completions")
    threshold: float = Field(default=1.0, description="groups whose best reward is below it")
    max_revisions: Positive = Field(default=2, description="of each group")
    choose: Literal["at_least", "always"] = Field(
        default="at_least", description="join if as good as the best completion, or always"
    )
    bonus: Annotated[float, Field(ge=0.0)] = Field(
        default=0.05,
        description="alpha: share of a revision's gain that its completion is credited with",
    )
    clip_negative_bonus: bool = Field(
        default=False, description="no debit where the revision is worse"
    )
    shaping: PositiveFloat = Field(default=1.0, description="gamma of w / (w + gamma)")
    naive: bool = Field(
        default=False, description="NaiveHE: train the revision on the plain question"
    )
    with_replay: bool = Field(
        default=False, description="revise groups with a replayed trajectory, too"
    )
    with_prior: bool = Field(
        default=False, description="revise groups with a prior-guided trajectory, too"
    )
    max_prompt_tokens: Positive = Field(
        default=4096, description="a longer hindsight prompt is skipped, never cut"
    )


class PriorResamplingConfig(Section):
    """EAPO: a frozen prior policy resamples critical tokens of some completions: docs/eapo.md."""

    enabled: bool = Field(default=False, description="resample by a prior policy")
    model: str | None = Field(
        default=None,
        description="a checkpoint folder; null = made first by an on-policy run of this config",
    )
    prior_steps: Positive | None = Field(
        default=None, description="steps of that run; null = train.max_steps"
    )
    trigger: Literal[
        "ratio", "soft_ratio", "defensive", "entropy", "kl", "tv", "js", "random", "none"
    ] = Field(default="ratio", description="which drafted tokens are resampled: docs/eapo.md")
    threshold: float = Field(default=0.5, description="tau, in nats where the trigger is not tv")
    rate: Fraction = Field(
        default=0.1, description="trigger random: share resampled; defensive: share kept untested"
    )
    block_tokens: Positive = Field(
        default=20, description="K, tokens drafted before they are scored"
    )
    augmented_per_group: Positive = Field(default=1, description="guided completions of a group")
    stop_after_steps: Positive | None = Field(
        default=60, description="T, on-policy from there on; null = never"
    )
    annealing: Literal["hard", "linear"] = Field(
        default="hard", description="all groups until T, or a share that falls to 0"
    )
    positive_only: bool = Field(
        default=True,
        description="train on correct guided completions; others count in the baseline only",
    )
    importance: Literal[
        "none", "sis_token", "sis_seq", "sis_geo", "flag_token", "exact_token", "exact_traj", "mis"
    ] = Field(
        default="sis_token", description="importance weight of a guided completion: docs/eapo.md"
    )
    weight_cap: PositiveFloat = Field(
        default=3.0, description="upper limit of the weights of exact_token and exact_traj"
    )
