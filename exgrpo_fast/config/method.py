"""The sections that a recipe sets: advantage and loss, replay, hindsight, resampling by a prior."""

from __future__ import annotations

from typing import Literal

from exgrpo_fast.config.sections import (
    AboveOne,
    Between,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    key,
)


class KLConfig(Section):
    """A KL term towards a frozen policy, which is loaded only where coef is above 0."""

    coef: NonNegativeFloat = key(0.0, "weight of the term")
    estimator: Literal["k1", "k2", "k3", "k3_ratio", "k3_plus", "abs"] = key(
        "k3", "of the KL: docs/losses.md"
    )
    reference: Literal["initial", "behaviour"] = key(
        "initial", "the initial policy, or the behaviour log-probs, which need no second model"
    )
    previous_share: Fraction = key(
        0.0, "share of the term towards the policy of the preceding step"
    )
    rebase_at_step: Positive | None = key(
        None, "the policy of that step replaces the initial one; null = never"
    )


class OverlongConfig(Section):
    """Completions that reach the length limit."""

    mask_truncated: bool = key(False, "truncated completions get weight 0")
    soft_penalty_tokens: NonNegative = key(
        0, "DAPO: the reward falls linearly by 1 over the last so many tokens"
    )


class MismatchConfig(Section):
    """Weights for tokens whose log-probs differ between engine and trainer: docs/rollouts.md."""

    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = key(
        "token_truncate",
        "cap the weight at max_ratio, or mask outside the range; a token or a sequence",
    )
    max_ratio: PositiveFloat = key(2.0, "of the probabilities, trainer / engine")
    min_ratio: NonNegativeFloat = key(0.0, "of probabilities; masks only (IcePop: 0.5 to 5)")


class DistillationConfig(Section):
    """On-policy distillation: docs/losses.md."""

    teacher: str | None = key(None, "a model with the policy's tokenizer; null = no distillation")
    divergence: Literal["sampled", "reverse", "forward", "jsd"] = key(
        "sampled",
        "to the teacher: sampled = reverse KL of the sampled token, as an advantage; "
        "others over the whole vocabulary",
    )
    mixture: Between = key(0.5, "of divergence jsd: the teacher's share of the middle")
    coef: PositiveFloat = key(1.0, "weight of the divergence")
    rewards: bool = key(True, "beside it, the advantages of the groups")

    @property
    def is_over_vocabulary(self) -> bool:
        return self.teacher is not None and self.divergence != "sampled"


class TokensConfig(Section):
    """Advantages of single tokens, by their entropies and log-probs: docs/losses.md."""

    high_entropy_share: Share = key(
        1.0, "only this share of tokens, of highest entropy, has an advantage"
    )
    divide_by: Literal["kept", "all"] = key(
        "kept", "tokens that high_entropy_share counts in the normaliser"
    )
    entropy_shaping: NonNegativeFloat = key(
        0.0, "advantages grow by so much x the token's entropy; 0 = not"
    )
    entropy_shaping_cap: AboveOne = key(2.0, "but at most by |advantage| / cap")
    clip_cov: Fraction = key(0.0, "Clip-Cov: share of tokens, drawn, without a gradient")
    clip_cov_range: tuple[float, float] = key(
        (1.0, 5.0), "drawn from tokens whose covariance lies between"
    )
    kl_cov: Fraction = key(0.0, "KL-Cov: the KL term is on this share, of largest covariance")


class AlgorithmConfig(Section):
    """Advantage and loss: docs/losses.md. A recipe sets these; touch them to change the method."""

    advantage: Literal["grpo", "dr_grpo", "rloo", "quantile"] = key(
        "dr_grpo", "estimator: docs/losses.md"
    )
    std: Literal["population", "sample"] = key(
        "population", "of advantage grpo and quantile: over K, or over K - 1 as verl's"
    )
    quantile: Between = key(0.4, "of a group's rewards, the baseline of advantage quantile")
    surrogate: Literal["clip", "cispo", "sapo", "reinforce"] = key(
        "clip", "policy loss: docs/losses.md"
    )
    ratio_level: Literal["token", "sequence"] = key(
        "token", "importance ratio of tokens, or of sequences (GSPO)"
    )
    clip_low: PositiveFloat | None = key(0.2, "ratio is clipped below 1 - clip_low; null = not")
    clip_high: PositiveFloat | None = key(0.2, "ratio is clipped above 1 + clip_high; null = not")
    dual_clip: AboveOne | None = key(
        None, "largest ratio where the advantage is negative; null = none"
    )
    tv_low: PositiveFloat | None = key(
        None, "DPPO: no gradient where a probability fell by more, at A <= 0; null = no bound"
    )
    tv_high: PositiveFloat | None = key(
        None, "DPPO: no gradient where a probability rose by more, at A > 0; null = no bound"
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = key(
        "constant", "what the token sum is divided by; constant = max_completion_tokens"
    )
    entropy_coef: float = key(0.0, "weight of the entropy bonus")
    tokens: TokensConfig = TokensConfig()
    distillation: DistillationConfig = DistillationConfig()
    kl: KLConfig = KLConfig()
    overlong: OverlongConfig = OverlongConfig()
    mismatch: MismatchConfig = MismatchConfig()


class StoreConfig(Section):
    """Memory of the replay buffer."""

    max_gib: PositiveFloat = key(2.0, "at most so much on the device")
    host_gib: NonNegativeFloat = key(
        0.0, "pinned host memory for trajectories that the device has no room for"
    )
    page_tokens: Positive | None = key(None, "tokens of a page; null = by the longest completion")
    logprob_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "bfloat16 halves 4 of 8 bytes a token"
    )
    evict: Literal["entropy", "oldest"] = key(
        "entropy", "evicted from a full store: the highest last entropy, or the oldest"
    )
    max_per_question: Positive | None = key(None, "trajectories of a question; null = no limit")
    max_groups: Positive | None = key(
        None, "keep the best groups by sum |A| x std; null = no such rule"
    )
    max_trajectories: Positive | None = key(
        None, "keep the newest; null = as many as there is room for"
    )
    spare_correct: Fraction = key(
        0.0, "share of max_trajectories that is kept for older ones that are correct"
    )
    deduplicate: bool = key(True, "store a completion of a question once")
    pool: str | None = key(None, "trajectories to start with: a parquet file of `buffer export`")
    pool_field: str | None = key(None, "field of the training rows with a worked solution")


class ReplayConfig(Section):
    """ExGRPO and related methods: docs/replay.md. A recipe sets these."""

    enabled: bool = key(False, "keep trajectories and train on them again")
    method: str = key("exgrpo", "name shown in the summary")
    mixer: Literal[
        "replace_slot", "append", "question_only", "recent_groups", "spent_groups", "fifo"
    ] = key("replace_slot", "how replayed trajectories enter a batch: docs/replay.md")
    experience_ratio: Fraction = key(0.5, "rho: share of groups with a stored question")
    replay_ratio: PositiveFloat = key(
        1.0, "mixer fifo: trajectories trained for each one generated"
    )
    start_success_rate: Fraction | None = key(
        0.35, "replay starts after the first batch above it; null = from step 1"
    )
    stop_after_steps: Positive | None = key(None, "on-policy from there on; null = never")
    keep: Literal["successes", "all", "none"] = key("successes", "which trajectories are stored")
    difficulty: Literal["successes", "reward_std"] = key(
        "successes", "what a bucket counts; reward_std for continuous rewards"
    )
    retire: bool = key(True, "questions solved K of K times are never drawn again")
    questions: Literal["gaussian", "uniform", "medium", "stream"] = key(
        "gaussian", "which stored questions are drawn: docs/replay.md"
    )
    bucket_mean: Fraction = key(0.5, "mu of the bucket Gaussian, in accuracy")
    bucket_sigma: PositiveFloat = key(0.125, "sigma, in accuracy (1.0 = as printed)")
    medium_low: Fraction = key(0.25, "questions medium: pass rate from")
    medium_high: Fraction = key(0.75, "questions medium: pass rate to")
    cooldown_steps: NonNegative = key(1, "questions medium: steps between")
    max_visits: Positive = key(8, "questions medium: visits at most")
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
    ] = key("entropy", "which stored trajectory: the lowest entropy, ...")
    count: Positive = key(1, "replayed trajectories a question")
    min_stored: Positive = key(1, "questions with fewer are not replayed")
    prefilter: Positive | None = key(
        None, "score only so many candidates, of the lowest last-known entropy"
    )
    max_age: Positive | None = key(None, "in steps; older ones are not replayed")
    weight: Literal["shaped", "importance", "clipped", "none", "proximal"] = key(
        "shaped", "importance weight: docs/replay.md"
    )
    shaping: NonNegativeFloat = key(0.1, "beta of w / (w + beta)")
    clip_fresh: bool = key(False, "keep the PPO clip on fresh rows once active")
    baseline: Literal["pooled", "fresh", "split"] = key("pooled", "of advantages: docs/replay.md")
    coef: PositiveFloat | None = key(
        None, "weight of a separate replay objective; null = one objective"
    )
    store: StoreConfig = StoreConfig()


class HindsightConfig(Section):
    """HeRL: failed completions are revised, and the best revision joins its group: docs/herl.md."""

    enabled: bool = key(False, "revise failed completions")
    threshold: float = key(1.0, "groups whose best reward is below it")
    max_revisions: Positive = key(2, "of each group")
    choose: Literal["at_least", "always"] = key(
        "at_least", "join if as good as the best completion, or always"
    )
    bonus: NonNegativeFloat = key(
        0.05, "alpha: share of a revision's gain that its completion is credited with"
    )
    clip_negative_bonus: bool = key(False, "no debit where the revision is worse")
    shaping: PositiveFloat = key(1.0, "gamma of w / (w + gamma)")
    naive: bool = key(False, "NaiveHE: train the revision on the plain question")
    with_replay: bool = key(False, "revise groups with a replayed trajectory, too")
    with_prior: bool = key(False, "revise groups with a prior-guided trajectory, too")
    max_prompt_tokens: Positive = key(4096, "a longer hindsight prompt is skipped, never cut")


class PriorResamplingConfig(Section):
    """EAPO: a frozen prior policy resamples critical tokens of some completions: docs/eapo.md."""

    enabled: bool = key(False, "resample by a prior policy")
    model: str | None = key(
        None, "a checkpoint folder; null = made first by an on-policy run of this config"
    )
    prior_steps: Positive | None = key(None, "steps of that run; null = train.max_steps")
    trigger: Literal[
        "ratio", "soft_ratio", "defensive", "entropy", "kl", "tv", "js", "random", "none"
    ] = key("ratio", "which drafted tokens are resampled: docs/eapo.md")
    threshold: float = key(0.5, "tau, in nats where the trigger is not tv")
    rate: Fraction = key(0.1, "trigger random: share resampled; defensive: share kept untested")
    block_tokens: Positive = key(20, "K, tokens drafted before they are scored")
    augmented_per_group: Positive = key(1, "guided completions of a group")
    stop_after_steps: Positive | None = key(60, "T, on-policy from there on; null = never")
    annealing: Literal["hard", "linear"] = key(
        "hard", "all groups until T, or a share that falls to 0"
    )
    positive_only: bool = key(
        True, "train on correct guided completions; others count in the baseline only"
    )
    importance: Literal[
        "none", "sis_token", "sis_seq", "sis_geo", "flag_token", "exact_token", "exact_traj", "mis"
    ] = key("sis_token", "importance weight of a guided completion: docs/eapo.md")
    weight_cap: PositiveFloat = key(3.0, "upper limit of the weights of exact_token and exact_traj")
