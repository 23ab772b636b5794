"""The sections of a config: which keys exist, which values they accept. Those of the method, which a
recipe sets, are in `method.py`."""

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
