"""The sections of a config: which keys exist, which values they accept."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from exgrpo_fast.core.errors import UserError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
# Packed tokens that keep a GPU busy; more cost memory and win little.
PREFERRED_TOKENS = 16384


class ConfigError(UserError):
    """A user's mistake in a config, as one line that names the key."""


def _words(annotation: Any) -> set[str]:
    """The values of every Literal in a type."""
    if typing.get_origin(annotation) is Literal:
        return set(typing.get_args(annotation))
    return {word for part in typing.get_args(annotation) for word in _words(part)}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_1(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if value is False and "off" in _words(field.annotation):
            return "off"  # YAML reads `off` as false
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("expected a value, not true or false")
        return value


class LoraConfig(Section):
    """Low-rank adapters (peft). For a model whose full training does not fit."""

    rank: Positive = Field(default=32, description="rank of the update")
    alpha: PositiveFloat = Field(default=64.0, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="dropout on the input of the adapters"
    )
    targets: list[str] = Field(
        default=["all-linear"],
        min_length=1,
        description="names of linear layers, such as q_proj; all-linear = all but the head",
    )

    @field_validator("targets")
    @classmethod
    def _never_the_head(cls, targets: list[str]) -> list[str]:
        if "lm_head" in targets:
            raise ValueError("the fused loss reads the language-model head directly; leave it out")
        if "all-linear" in targets and len(targets) > 1:
            raise ValueError("all-linear already names every layer; give it alone")
        return targets


class ModelConfig(Section):
    """The policy. Beside the name, keys to touch when a run does not fit or is slow: docs/memory.md."""

    name: str | None = Field(
        default=None, description="a folder, a hub name, a .gguf file, 'smollm2' or 'quickstart'"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="compute dtype: bfloat16 on CUDA, float32 elsewhere",
    )
    weights: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the trained weights: docs/memory.md"
    )
    quantization: Literal["nf4"] | None = Field(
        default=None, description="4-bit frozen weights under model.lora (QLoRA), CUDA only"
    )
    lora: LoraConfig | None = Field(default=None, description="null = all weights are trained")
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"] = Field(
        default="auto",
        description="back end: flash-attn, torch's varlen or flex_attention on CUDA, sdpa anywhere; "
        "auto = flash, varlen or sdpa, the first that can run",
    )
    dropout: bool = Field(
        default=False, description="drop in the update what the model's own config says"
    )
    gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in the backward pass"
    )
    offload_activations: bool = Field(
        default=False, description="keep checkpointed activations in host memory"
    )
    tile_tokens: NonNegative | Literal["auto"] = Field(
        default="auto",
        description="MLPs, norms and logits of so many tokens at a time; 0 = of the whole pack; "
        "auto = 0, or tiles where the run would not fit",
    )

    def compute_dtype(self, device: str) -> Literal["float32", "bfloat16"]:
        """`dtype` with `auto` resolved."""
        if self.dtype == "auto":
            low = device == "cuda" or self.weights == "bfloat16"
            return "bfloat16" if low else "float32"
        return self.dtype

    @model_validator(mode="after")
    def _weights_can_be_trained(self) -> ModelConfig:
        if self.quantization and self.lora is None:
            raise ValueError("model.quantization freezes the weights: set model.lora as well")
        if self.weights == "bfloat16" and self.dtype == "float32":
            raise ValueError("model.dtype float32 cannot come from model.weights bfloat16")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("model.offload_activations needs model.gradient_checkpointing")
        return self


class GymTask(Section):
    """A procedurally generated reasoning-gym task, in place of a file."""

    gym: str = Field(description="name of the reasoning-gym dataset, such as chain_sum")
    size: Positive = Field(default=500, description="number of questions")
    seed: int = Field(default=0, description="seed of the questions")
    options: dict[str, Any] = Field(default_factory=dict, description="the task's own options")


class DataConfig(Section):
    """Training and held-out questions, and the names of their fields."""

    train: str | GymTask | None = Field(
        default=None,
        description=".jsonl / .json / .parquet file, hub dataset 'name[:split]', or a gym task",
    )
    eval: str | GymTask | None = Field(
        default=None, description="held-out questions, as data.train; null = no evaluation"
    )
    eval_size: Positive | None = Field(
        default=None, description="evaluate on the first so many questions; null = all"
    )
    prompt_field: str | None = Field(
        default=None,
        description="field with the prompt, text or chat messages, nested as a.b; null = the first "
        "there of prompt, problem, question, messages",
    )
    answer_field: str | None = Field(
        default=None,
        description="field with the gold answer; null = the first there of answer, "
        "reward_model.ground_truth, ground_truth, solution",
    )
    id_field: str | None = Field(
        default=None, description="field with a unique id; null = a hash of prompt and answer"
    )
    system_prompt: str | None = Field(default=None, description="system message before each prompt")
    max_prompt_tokens: Positive = Field(
        default=512, description="longest prompt, chat template included"
    )
    overlong_prompts: Literal["drop", "refuse"] = Field(
        default="drop", description="drop longer prompts, or refuse the data"
    )
    max_bad_rows: Fraction = Field(
        default=0.001, description="share of malformed rows that may be skipped"
    )
    check_answers: bool = Field(
        default=True, description="refuse gold answers that the reward rejects"
    )


class JudgeConfig(Section):
    """An LLM that scores rubrics without a check, behind an OpenAI-compatible endpoint."""

    base_url: str = Field(description="up to and without /chat/completions, as a rule .../v1")
    model: str = Field(description="its name at the endpoint")
    api_key_env: str | None = Field(
        default="OPENAI_API_KEY", description="environment variable with the key; null = none"
    )
    max_concurrency: Positive = Field(default=16, description="requests at a time")
    timeout_seconds: PositiveFloat = Field(default=60.0, description="of a request")
    retries: NonNegative = Field(default=3, description="after errors and timeouts")
    temperature: Annotated[float, Field(ge=0.0)] | None = Field(
        default=0.0, description="of sampling; null = the endpoint's default"
    )
    max_tokens: Positive | None = Field(
        default=512, description="of an answer; null = the endpoint's default"
    )


class RewardConfig(Section):
    """Reward functions, which run in worker processes."""

    functions: list[str] = Field(
        default=["math_verify"],
        min_length=1,
        description="built-in names, 'file.py:function' or 'package.module:name'",
    )
    weights: list[float] | None = Field(
        default=None, description="one per function; default 1.0 each"
    )
    workers: Positive = Field(
        default=2, description="worker processes; more where rewards take longer than rollouts"
    )
    timeout_seconds: PositiveFloat = Field(
        default=5.0, description="per sample; the worker is then killed"
    )
    judge: JudgeConfig | None = Field(
        default=None, description="for a set of rubrics some of which have no check"
    )


class DynamicSamplingConfig(Section):
    """DAPO: groups whose rewards are all equal are replaced by groups of other questions."""

    enabled: bool = Field(default=False, description="replace groups without a gradient")
    max_extra_batches: NonNegative = Field(
        default=2, description="rounds at most; then the step goes on with fewer groups"
    )


class ServerConfig(Section):
    """engine vllm_server: vLLM in separate processes, on other GPUs or machines."""

    count: Positive = Field(default=1, description="servers to start, one GPU each")
    gpus: list[NonNegative] | None = Field(
        default=None, description="GPU of each server; null = those behind the trainer's"
    )
    urls: list[str] | None = Field(
        default=None, description="servers that run already, http://host:port; none is started"
    )
    key_env: str = Field(
        default="EXGRPO_FAST_KEY", description="environment variable with the key of the urls"
    )
    weights: Literal["shared_memory", "broadcast"] = Field(
        default="shared_memory", description="how new weights travel: same machine, or any (NCCL)"
    )
    host: str = Field(
        default="127.0.0.1", description="broadcast: where servers elsewhere reach the trainer"
    )
    deadline_seconds: PositiveFloat = Field(
        default=120.0, description="without progress a server counts as lost, and is left out"
    )
    patience_seconds: PositiveFloat = Field(
        default=600.0, description="with all servers lost, how long to wait until one is back"
    )
    max_in_flight: Positive | None = Field(
        default=None,
        description="requests that one server has at a time; null = 5/4 of max_batch_sequences",
    )


class RolloutConfig(Section):
    """Generation. Batch and lengths first; the engine where its defaults do not fit: docs/rollouts.md."""

    engine: Literal["auto", "transformers", "vllm", "vllm_server"] = Field(
        default="auto", description="auto = vllm on CUDA where it is installed, else transformers"
    )
    prompts_per_step: Positive = Field(default=64, description="questions a step")
    group_size: Positive = Field(default=8, description="K, completions of a question")
    max_completion_tokens: Positive = Field(default=2048, description="longest completion")
    temperature: PositiveFloat = Field(
        default=1.0, description="of sampling, and of every log-prob in the loss"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description="the likeliest tokens up to this sum; needs top_k: docs/rollouts.md",
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0, description="so many of the likeliest tokens; 0 = all"
    )
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        default=0.0, description="tokens of at least this share of the likeliest; needs top_k"
    )
    max_batch_sequences: Positive = Field(default=256, description="sequences decoded at a time")
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    scoring: Literal["auto", "always"] = Field(
        default="auto",
        description="fresh completions that the trainer scores: auto = a sample, where the engine has "
        "its weights in float32; always = all: docs/rollouts.md",
    )
    generate_ahead: bool = Field(
        default=False, description="vllm_server: generate for a step while training on the last"
    )
    kv_cache_gib: PositiveFloat | None = Field(
        default=None, description="vLLM's cache of keys and values; null = by the memory plan"
    )
    sleep: Literal["auto", "always", "never"] = Field(
        default="auto", description="vllm: frees its GPU memory during an update"
    )
    sync_tolerance: PositiveFloat | None = Field(
        default=None, description="mean log-prob gap after an update; null = by the dtype"
    )
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _kept_sets_are_known(self) -> RolloutConfig:
        for name, neutral in (("top_p", 1.0), ("min_p", 0.0)):
            if getattr(self, name) != neutral and self.top_k == 0:
                raise ValueError(
                    f"rollout.{name} needs rollout.top_k, which bounds what is kept of each token; "
                    "try 512"
                )
        if self.generate_ahead and self.engine != "vllm_server":
            raise ValueError("rollout.generate_ahead needs rollout.engine vllm_server")
        return self


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


class TrainConfig(Section):
    """Optimiser and update. Learning rate and steps first; the rest is for memory and speed."""

    max_steps: Positive = Field(default=200, description="steps of the run")
    lr: PositiveFloat = Field(default=1e-6, description="learning rate")
    optimizer: Literal["auto", "adamw", "flash_adamw", "adamw_8bit"] = Field(
        default="auto",
        description="auto = adamw; flash_adamw where model.weights is bfloat16: docs/memory.md",
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.01, description="decoupled (AdamW)"
    )
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.999), description="of AdamW")
    warmup_steps: NonNegative = Field(default=0, description="optimiser updates of linear warm-up")
    max_grad_norm: PositiveFloat = Field(
        default=1.0, description="gradients are clipped to this norm"
    )
    skip_grad_norm: PositiveFloat = Field(
        default=500.0, description="a larger norm skips the update"
    )
    minibatches: Positive = Field(default=1, description="optimiser updates per step")
    max_tokens_per_microbatch: Positive | Literal["auto"] = Field(
        default="auto", description="packed tokens per forward; auto = by the memory plan"
    )
    gradient_release: bool = Field(
        default=False,
        description="free each gradient once applied: one pack an update on each rank, two backward passes",
    )
    preflight: Literal["auto", "always", "never"] = Field(
        default="auto", description="rehearse the largest step first; auto = on CUDA"
    )
    allow_mismatch: bool = Field(
        default=False,
        description="go on where the check of the forward pass at the start fails: docs/models.md",
    )
    sparsity: Annotated[float, Field(ge=0, lt=1)] | Literal["auto", "off"] = Field(
        default="auto",
        description="skip logit-gradient tiles below this share: docs/kernels.md",
    )
    sparse_tail: Literal["drop", "centroid", "dense_dw"] = Field(
        default="drop", description="replacement of skipped tiles: docs/kernels.md"
    )
    seed: NonNegative = Field(default=0, description="of everything random")


class EvalConfig(Section):
    """Evaluation on data.eval with the training rewards."""

    n: Positive = Field(default=8, description="samples per question")
    k: list[Positive] = Field(
        default=[1, 8], min_length=1, description="pass@k; at most n, and 1 and n if not given"
    )
    temperature: Annotated[float, Field(ge=0.0)] = Field(default=1.0, description="0 = greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="nucleus sampling"
    )
    every: NonNegative = Field(
        default=0, description="steps between evaluations; 0 = before and after"
    )
    examples: NonNegative = Field(
        default=0, description="held-out questions of which one completion is printed"
    )

    @model_validator(mode="before")
    @classmethod
    def _k_follows_n(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("n"), int) and "k" not in given:
            return given | {"k": sorted({1, given["n"]})}
        return given


class CheckpointConfig(Section):
    """Checkpoints: docs/reliability.md."""

    every: NonNegative = Field(
        default=50, description="steps between checkpoints; 0 = only the last"
    )
    keep: Positive = Field(default=2, description="newest checkpoints that are kept")


class LogConfig(Section):
    """Where metrics go beside metrics.jsonl and the screen."""

    to: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="further sinks")
    completions_every: Positive = Field(default=10, description="steps between completion tables")
    updates: bool = Field(
        default=False,
        description="keep what each step trained on, for train --from-rollouts; 16 bytes a token",
    )


class WarmStartConfig(Section):
    """Supervised warm start of the quickstart model on generated solutions."""

    batches: Positive = Field(default=550, description="batches of the warm start")
    batch_size: Positive = Field(default=128, description="examples a batch")
    lr: PositiveFloat = Field(default=3e-3, description="learning rate")
    examples: Positive = Field(default=20000, description="generated examples")
    guess_share: Fraction = Field(
        default=0.55, description="solutions that guess; the others show their steps"
    )
    revision_share: Fraction = Field(
        default=0.0, description="examples that revise a wrong solution, given what it missed"
    )
    guess_batches: NonNegative = Field(
        default=0,
        description="batches of guesses at the end: the policy then rarely shows its steps",
    )
