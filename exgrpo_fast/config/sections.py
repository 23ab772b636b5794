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
    """The words of every Literal in a type."""
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
            raise ValueError("neither true nor false can stand here")
        return value


class LoraConfig(Section):
    """Low-rank adapters, in the words of peft."""

    rank: Positive = 32
    alpha: PositiveFloat = Field(default=64.0, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
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
    name: str | None = Field(
        default=None, description="a folder, a hub name, a .gguf file, 'smollm2' or 'quickstart'"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="compute dtype: bfloat16 on CUDA, float32 elsewhere",
    )
    weights: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype they are kept in: docs/memory.md"
    )
    quantization: Literal["nf4"] | None = Field(
        default=None, description="of the frozen weights under model.lora (QLoRA), CUDA only"
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
    gradient_checkpointing: bool = True
    offload_activations: bool = Field(
        default=False, description="checkpointed activations wait in host memory"
    )
    tile_tokens: NonNegative | Literal["auto"] = Field(
        default="auto",
        description="of MLPs, norms and logits; 0 = MLPs and norms of the whole pack at once; "
        "auto = 0, and less than the pack where the run would not fit",
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
    """A procedurally generated reasoning-gym task."""

    gym: str = Field(description="name of the reasoning-gym dataset, such as chain_sum")
    size: Positive = 500
    seed: int = 0
    options: dict[str, Any] = Field(default_factory=dict, description="the task's own options")


class DataConfig(Section):
    train: str | GymTask | None = Field(
        default=None,
        description=".jsonl / .json / .parquet file, hub dataset 'name[:split]', or a gym task",
    )
    eval: str | GymTask | None = None
    eval_size: Positive | None = Field(
        default=None, description="use only the first so many questions"
    )
    prompt_field: str = Field(default="prompt", description="a string, or a list of chat messages")
    answer_field: str = "answer"
    id_field: str | None = None
    system_prompt: str | None = None
    max_prompt_tokens: Positive = 512
    overlong_prompts: Literal["drop", "refuse"] = "drop"
    max_bad_rows: Fraction = Field(
        default=0.001, description="share of malformed rows that is skipped"
    )
    check_answers: bool = Field(
        default=True, description="refuse gold answers that the reward rejects"
    )


class JudgeConfig(Section):
    """An LLM that decides the rubrics without a check, behind an OpenAI-compatible endpoint."""

    base_url: str = Field(description="up to and without /chat/completions, as a rule .../v1")
    model: str
    api_key_env: str | None = Field(
        default="OPENAI_API_KEY", description="environment variable with the key; null = none"
    )
    max_concurrency: Positive = 16
    timeout_seconds: PositiveFloat = 60.0
    retries: NonNegative = 3
    temperature: Annotated[float, Field(ge=0.0)] | None = 0.0
    max_tokens: Positive | None = 512


class RewardConfig(Section):
    functions: list[str] = Field(
        default=["math_verify"],
        min_length=1,
        description="built-in names, 'file.py:function' or 'package.module:name'",
    )
    weights: list[float] | None = Field(
        default=None, description="one per function; default 1.0 each"
    )
    workers: Positive = 2
    timeout_seconds: PositiveFloat = Field(
        default=5.0, description="per sample; the worker is then killed"
    )
    judge: JudgeConfig | None = Field(
        default=None, description="for a set of rubrics some of which have no check"
    )


class DynamicSamplingConfig(Section):
    enabled: bool = False
    max_extra_batches: NonNegative = Field(
        default=2, description="refill rounds before the step goes on"
    )


class ServerConfig(Section):
    """Rollout servers: engines in processes of their own."""

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
        default=120.0, description="without progress a server counts as lost"
    )


class RolloutConfig(Section):
    engine: Literal["auto", "transformers", "vllm", "vllm_server"] = Field(
        default="auto", description="auto = vllm on CUDA where it is installed, else transformers"
    )
    prompts_per_step: Positive = 64
    group_size: Positive = 8
    max_completion_tokens: Positive = 2048
    temperature: PositiveFloat = 1.0
    top_p: float = Field(default=1.0, description="only 1: see docs/rollouts.md")
    top_k: int = Field(default=0, description="only 0")
    min_p: float = Field(default=0.0, description="only 0")
    max_batch_sequences: Positive = Field(default=256, description="sequences decoded side by side")
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    generate_ahead: bool = Field(
        default=False, description="vllm_server: generate for a step while training on the last"
    )
    kv_cache_gib: PositiveFloat | None = Field(
        default=None, description="vLLM's cache of keys and values; null = by the memory plan"
    )
    sleep: Literal["auto", "always", "never"] = Field(
        default="auto", description="vllm: its memory goes to the trainer during an update"
    )
    sync_tolerance: PositiveFloat | None = Field(
        default=None, description="mean log-prob gap after an update; null = by the dtype"
    )
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _draws_from_the_policy(self) -> RolloutConfig:
        for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"rollout.{name} must stay {neutral:g}: a truncated distribution is not the "
                    f"policy, and no importance ratio is right for it; eval.top_p is free"
                )
        if self.generate_ahead and self.engine != "vllm_server":
            raise ValueError("rollout.generate_ahead needs rollout.engine vllm_server")
        return self


class KLConfig(Section):
    coef: Annotated[float, Field(ge=0.0)] = 0.0
    estimator: Literal["k1", "k2", "k3"] = "k3"
    previous_share: Fraction = Field(
        default=0.0, description="share of the term that holds to the preceding step's policy"
    )
    rebase_at_step: Positive | None = Field(
        default=None, description="the policy of that step replaces the initial one; null = never"
    )


class OverlongConfig(Section):
    mask_truncated: bool = Field(default=False, description="truncated responses get weight 0")
    soft_penalty_tokens: NonNegative = Field(
        default=0, description="DAPO: the reward falls linearly by 1 over the last so many tokens"
    )


class MismatchConfig(Section):
    """What a vLLM engine's own log-probs do to the weights of its tokens."""

    correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    max_ratio: PositiveFloat = Field(
        default=2.0, description="of probabilities, trainer / engine, of a token or a sequence"
    )
    min_ratio: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="of probabilities; masks only (IcePop: 0.5 to 5)"
    )


class AlgorithmConfig(Section):
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "dr_grpo"
    std: Literal["population", "sample"] = Field(
        default="population", description="of advantage grpo: over K, or over K - 1 as verl's"
    )
    surrogate: Literal["clip", "cispo", "sapo", "reinforce"] = "clip"
    ratio_level: Literal["token", "sequence"] = "token"
    clip_low: PositiveFloat | None = 0.2
    clip_high: PositiveFloat | None = 0.2
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        default="constant",
        description="what the token sum is divided by; constant = max_completion_tokens",
    )
    entropy_coef: float = 0.0
    kl: KLConfig = KLConfig()
    overlong: OverlongConfig = OverlongConfig()
    mismatch: MismatchConfig = MismatchConfig()


class StoreConfig(Section):
    """Memory of the experience store."""

    max_gib: PositiveFloat = Field(default=2.0, description="at most so much on the device")
    host_gib: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="cold trajectories move to pinned host memory instead of leaving"
    )
    page_tokens: Positive | None = Field(default=None, description="null = by the longest response")
    logprob_dtype: Literal["float32", "bfloat16"] = "float32"
    evict: Literal["entropy", "oldest"] = Field(
        default="entropy", description="who leaves a full store: highest last entropy, or oldest"
    )
    max_per_question: Positive | None = None
    max_groups: Positive | None = Field(
        default=None, description="keep the best groups by sum |A| x std; null = no such rule"
    )
    deduplicate: bool = True
    pool: str | None = Field(
        default=None, description="trajectories to start with: a parquet file of `buffer export`"
    )
    pool_field: str | None = Field(
        default=None, description="field of the training rows with a worked solution"
    )


class ReplayConfig(Section):
    enabled: bool = False
    method: str = Field(default="exgrpo", description="name shown in the summary")
    mixer: Literal["replace_slot", "append", "question_only", "recent_groups", "spent_groups"] = (
        Field(default="replace_slot", description="how the past enters a batch: docs/replay.md")
    )
    experience_ratio: Fraction = Field(
        default=0.5, description="rho: share of groups whose question comes from the store"
    )
    start_success_rate: Fraction | None = Field(
        default=0.35, description="replay starts after the first batch above it; null = from step 1"
    )
    stop_after_steps: Positive | None = Field(
        default=None, description="on-policy from there on; null = never"
    )
    keep: Literal["successes", "all", "none"] = "successes"
    difficulty: Literal["successes", "reward_std"] = Field(
        default="successes", description="what a bucket counts; reward_std for continuous rewards"
    )
    retire: bool = Field(default=True, description="questions solved K of K times leave for good")
    questions: Literal["gaussian", "uniform", "medium", "stream"] = Field(
        default="gaussian", description="which questions are asked again"
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
    min_stored: Positive = Field(default=1, description="questions with fewer are left alone")
    prefilter: Positive | None = Field(
        default=None, description="score only so many candidates, of the lowest last-known entropy"
    )
    max_age: Positive | None = Field(default=None, description="steps; older ones stay away")
    weight: Literal["shaped", "importance", "clipped", "none", "proximal"] = "shaped"
    shaping: Annotated[float, Field(ge=0.0)] = Field(
        default=0.1, description="beta of w / (w + beta)"
    )
    clip_fresh: bool = Field(
        default=False, description="keep the PPO clip on fresh rows once active"
    )
    baseline: Literal["pooled", "fresh", "split"] = "pooled"
    coef: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="weight of a replay objective of its own; null = one objective"
    )
    store: StoreConfig = StoreConfig()


class HindsightConfig(Section):
    """HeRL: failed responses are revised and the best revision joins its group."""

    enabled: bool = False
    threshold: float = Field(default=1.0, description="groups whose best reward is below it")
    max_revisions: Positive = Field(default=2, description="of each group")
    choose: Literal["at_least", "always"] = Field(
        default="at_least", description="join if as good as the best response, or always"
    )
    bonus: Annotated[float, Field(ge=0.0)] = Field(
        default=0.05, description="alpha: a response gains so much of what its revision gained"
    )
    clip_negative_bonus: bool = False
    shaping: PositiveFloat = Field(default=1.0, description="gamma of w / (w + gamma)")
    naive: bool = Field(default=False, description="NaiveHE: train without the hindsight")
    with_replay: bool = Field(default=False, description="revise beside a replayed one, too")
    with_prior: bool = Field(default=False, description="revise beside a prior-guided one, too")
    max_prompt_tokens: Positive = Field(
        default=4096, description="a longer hindsight prompt is left out, never cut"
    )


class PriorResamplingConfig(Section):
    """EAPO: a frozen prior re-draws critical tokens in some responses of each group."""

    enabled: bool = False
    model: str | None = Field(
        default=None,
        description="a checkpoint folder; null = made first by an on-policy run of this config",
    )
    prior_steps: Positive | None = Field(
        default=None, description="steps of that run; null = train.max_steps"
    )
    trigger: Literal[
        "ratio", "soft_ratio", "defensive", "entropy", "kl", "tv", "js", "random", "none"
    ] = Field(default="ratio", description="which drafted tokens are redrawn: docs/eapo.md")
    threshold: float = Field(default=0.5, description="tau, in nats where the trigger is not tv")
    rate: Fraction = Field(
        default=0.1, description="trigger random: share redrawn; defensive: share untested"
    )
    block_tokens: Positive = Field(
        default=20, description="K, tokens drafted before they are scored"
    )
    augmented_per_group: Positive = Field(default=1, description="guided ones of group_size")
    stop_after_steps: Positive | None = Field(
        default=60, description="T, on-policy from there on; null = never"
    )
    annealing: Literal["hard", "linear"] = Field(
        default="hard", description="all groups until T, or a share that falls to 0"
    )
    positive_only: bool = Field(
        default=True, description="train on correct ones; the others count in the baseline alone"
    )
    importance: Literal[
        "none", "sis_token", "sis_seq", "sis_geo", "flag_token", "exact_token", "exact_traj", "mis"
    ] = Field(default="sis_token", description="how a guided response weighs: docs/eapo.md")
    weight_cap: PositiveFloat = Field(
        default=3.0, description="upper limit of the weights of exact_token and exact_traj"
    )


class TrainConfig(Section):
    max_steps: Positive = 200
    lr: PositiveFloat = 1e-6
    optimizer: Literal["auto", "adamw", "flash_adamw", "adamw_8bit"] = Field(
        default="auto",
        description="auto = adamw; flash_adamw where model.weights is bfloat16: docs/memory.md",
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    warmup_steps: NonNegative = 0
    max_grad_norm: PositiveFloat = 1.0
    skip_grad_norm: PositiveFloat = Field(
        default=500.0, description="a larger norm skips the update"
    )
    minibatches: Positive = Field(default=1, description="optimiser updates per step")
    max_tokens_per_microbatch: Positive | Literal["auto"] = Field(
        default="auto", description="packed tokens per forward; auto = by the memory plan"
    )
    gradient_release: bool = Field(
        default=False,
        description="never hold all gradients: one pack an update, two backward passes",
    )
    preflight: Literal["auto", "always", "never"] = Field(
        default="auto", description="rehearse the largest step first; auto = on CUDA"
    )
    allow_mismatch: bool = Field(
        default=False,
        description="go on where the check of the forward pass at the start fails: docs/models.md",
    )
    sparsity: Annotated[float, Field(ge=0, lt=1)] | Literal["auto", "off"] = Field(
        default="auto", description="logit-gradient tiles below this share are not multiplied"
    )
    sparse_tail: Literal["drop", "centroid", "dense_dw"] = "drop"
    seed: NonNegative = 0


class EvalConfig(Section):
    n: Positive = Field(default=8, description="samples per question")
    k: list[Positive] = Field(default=[1, 8], min_length=1)
    temperature: Annotated[float, Field(ge=0.0)] = Field(default=1.0, description="0 = greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    every: NonNegative = Field(
        default=0, description="steps between evaluations; 0 = before and after"
    )


class CheckpointConfig(Section):
    every: NonNegative = Field(
        default=50, description="steps between checkpoints; 0 = only the last"
    )
    keep: Positive = 2


class LogConfig(Section):
    to: list[Literal["tensorboard", "wandb"]] = []
    completions_every: Positive = Field(default=10, description="steps between completion tables")


class WarmStartConfig(Section):
    """Supervised warm start of the quickstart model on generated solutions."""

    batches: Positive = 550
    batch_size: Positive = 128
    lr: PositiveFloat = 3e-3
    examples: Positive = 20000
    guess_share: Fraction = Field(
        default=0.55, description="solutions that guess; the others show their steps"
    )
    revision_share: Fraction = Field(
        default=0.0, description="examples that revise a wrong solution, told what it missed"
    )
    guess_batches: NonNegative = Field(
        default=0,
        description="batches at the end, nearly all guesses: the policy can show its steps and "
        "rarely does",
    )
