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
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]  # not 0
Between = Annotated[float, Field(gt=0.0, lt=1.0)]  # neither 0 nor 1
AboveOne = Annotated[float, Field(gt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
# Packed tokens that keep a GPU busy; more cost memory and win little.
PREFERRED_TOKENS = 16384


class ConfigError(UserError):
    """A user's mistake in a config, as one line that names the key."""


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key of a section; `limits`: further arguments of `Field`."""
    return Field(default=default, description=description, **limits)


def _words(annotation: Any) -> set[str]:
    """The values of every Literal in a type."""
    if typing.get_origin(annotation) is Literal:
        return set(typing.get_args(annotation))
    return {word for part in typing.get_args(annotation) for word in _words(part)}


LARGEST, LARGEST_SEED = 2**31 - 1, 2**53  # a typing error, before it fills the memory or overflows


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_1(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        field = cls.model_fields[name]
        if value is False and "off" in _words(field.annotation):
            return "off"  # YAML reads `off` as false
        accepted = (field.annotation, *typing.get_args(field.annotation))
        if isinstance(value, bool) and bool not in accepted:
            raise ValueError("expected a value, not true or false")
        if type(value) is int and value > (LARGEST_SEED if name == "seed" else LARGEST):
            raise ValueError(f"{value} is too large")
        return value


class LoraConfig(Section):
    """Low-rank adapters (peft). For a model whose full training does not fit."""

    rank: Positive = key(32, "rank of the update")
    alpha: PositiveFloat = key(64.0, "the update is scaled by alpha / rank")
    dropout: BelowOne = key(0.0, "dropout on the input of the adapters")
    targets: list[str] = key(
        ["all-linear"],
        "names of linear layers, such as q_proj; all-linear = all but the head",
        min_length=1,
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

    name: str | None = key(None, "a folder, a hub name, a .gguf file, 'smollm2' or 'quickstart'")
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "compute dtype: bfloat16 on CUDA, float32 elsewhere"
    )
    weights: Literal["float32", "bfloat16"] = key(
        "float32", "dtype of the trained weights: docs/memory.md"
    )
    quantization: Literal["nf4"] | None = key(
        None, "4-bit frozen weights under model.lora (QLoRA), CUDA only"
    )
    lora: LoraConfig | None = key(None, "null = all weights are trained")
    attention: Literal["auto", "flash", "varlen", "flex", "sdpa"] = key(
        "auto",
        "back end: flash-attn, torch's varlen or flex_attention on CUDA, sdpa anywhere; "
        "auto = flash, varlen or sdpa, the first that can run",
    )
    dropout: bool = key(False, "drop in the update what the model's own config says")
    gradient_checkpointing: bool | Literal["auto"] = key(
        "auto",
        "recompute activations in the backward pass; auto = true, or false on a GPU with room for "
        "all of them",
    )
    offload_activations: bool = key(False, "keep checkpointed activations in host memory")
    tile_tokens: NonNegative | Literal["auto"] = key(
        "auto",
        "MLPs, norms and logits of so many tokens at a time; 0 = of the whole pack; "
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
    size: Positive = key(500, "number of questions")
    seed: int = key(0, "seed of the questions")
    options: dict[str, Any] = Field(default_factory=dict, description="the task's own options")


class DataConfig(Section):
    """Training and held-out questions, and the names of their fields."""

    train: str | GymTask | None = key(
        None, ".jsonl / .json / .parquet file, hub dataset 'name[:split]', or a gym task"
    )
    eval: str | GymTask | None = key(
        None, "held-out questions, as data.train; null = no evaluation"
    )
    eval_size: Positive | None = key(None, "evaluate on the first so many questions; null = all")
    prompt_field: str | None = key(
        None,
        "field with the prompt, text or chat messages, nested as a.b; null = the first "
        "there of prompt, problem, question, messages",
    )
    answer_field: str | None = key(
        None,
        "field with the gold answer; null = the first there of answer, "
        "reward_model.ground_truth, ground_truth, solution",
    )
    id_field: str | None = key(None, "field with a unique id; null = a hash of prompt and answer")
    system_prompt: str | None = key(None, "system message before each prompt")
    max_prompt_tokens: Positive = key(512, "longest prompt, chat template included")
    overlong_prompts: Literal["drop", "refuse"] = key(
        "drop", "drop longer prompts, or refuse the data"
    )
    max_bad_rows: Fraction = key(0.001, "share of malformed rows that may be skipped")
    check_answers: bool = key(True, "refuse gold answers that the reward rejects")


class JudgeConfig(Section):
    """An LLM that scores rubrics without a check, behind an OpenAI-compatible endpoint."""

    base_url: str = Field(description="up to and without /chat/completions, as a rule .../v1")
    model: str = Field(description="its name at the endpoint")
    api_key_env: str | None = key(
        "OPENAI_API_KEY", "environment variable with the key; null = none"
    )
    max_concurrency: Positive = key(16, "requests at a time")
    timeout_seconds: PositiveFloat = key(60.0, "of a request")
    retries: NonNegative = key(3, "after errors and timeouts")
    temperature: NonNegativeFloat | None = key(0.0, "of sampling; null = the endpoint's default")
    max_tokens: Positive | None = key(512, "of an answer; null = the endpoint's default")


class RewardConfig(Section):
    """Reward functions, which run in worker processes."""

    functions: list[str] = key(
        ["math_verify"], "built-in names, 'file.py:function' or 'package.module:name'", min_length=1
    )
    weights: list[float] | None = key(None, "one per function; default 1.0 each")
    workers: Positive = key(
        2, "worker processes; more where rewards take longer than rollouts", le=1000
    )
    timeout_seconds: PositiveFloat = key(5.0, "per sample; the worker is then killed")
    judge: JudgeConfig | None = key(None, "for a set of rubrics some of which have no check")


class DynamicSamplingConfig(Section):
    """DAPO: groups whose rewards are all equal are replaced by groups of other questions."""

    enabled: bool = key(False, "replace groups without a gradient")
    max_extra_batches: NonNegative = key(
        2, "rounds at most; then the step goes on with fewer groups"
    )


class ServerConfig(Section):
    """engine vllm_server: vLLM in separate processes, on other GPUs or machines."""

    count: Positive = key(1, "servers to start, one GPU each")
    gpus: list[NonNegative] | None = key(
        None, "GPU of each server; null = those behind the trainer's"
    )
    urls: list[str] | None = key(
        None, "servers that run already, http://host:port; none is started"
    )
    key_env: str = key("EXGRPO_FAST_KEY", "environment variable with the key of the urls")
    weights: Literal["shared_memory", "broadcast"] = key(
        "shared_memory", "how new weights travel: same machine, or any (NCCL)"
    )
    host: str = key("127.0.0.1", "broadcast: where servers elsewhere reach the trainer")
    deadline_seconds: PositiveFloat = key(
        120.0, "without progress a server counts as lost, and is left out"
    )
    patience_seconds: PositiveFloat = key(
        600.0, "with all servers lost, how long to wait until one is back"
    )
    max_in_flight: Positive | None = key(
        None, "requests that one server has at a time; null = 5/4 of max_batch_sequences"
    )


class RolloutConfig(Section):
    """Generation. Batch and lengths first; the engine where its defaults do not fit: docs/rollouts.md."""

    engine: Literal["auto", "transformers", "vllm", "vllm_server"] = key(
        "auto", "auto = vllm on CUDA where it is installed, else transformers"
    )
    prompts_per_step: Positive = key(64, "questions a step")
    group_size: Positive = key(8, "K, completions of a question")
    max_completion_tokens: Positive = key(2048, "longest completion")
    temperature: PositiveFloat = key(1.0, "of sampling, and of every log-prob in the loss")
    top_p: Share = key(1.0, "the likeliest tokens up to this sum; needs top_k: docs/rollouts.md")
    top_k: NonNegative = key(0, "so many of the likeliest tokens; 0 = all")
    min_p: BelowOne = key(0.0, "tokens of at least this share of the likeliest; needs top_k")
    max_batch_sequences: Positive = key(256, "sequences decoded at a time")
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    scoring: Literal["auto", "always"] = key(
        "auto",
        "fresh completions that the trainer scores: auto = a sample, where the engine has "
        "its weights in float32; always = all: docs/rollouts.md",
    )
    generate_ahead: bool = key(False, "vllm_server: generate for a step while training on the last")
    kv_cache_gib: PositiveFloat | None = key(
        None, "vLLM's cache of keys and values; null = by the memory plan"
    )
    sleep: Literal["auto", "always", "never"] = key(
        "auto", "vllm: frees its GPU memory during an update"
    )
    sync_tolerance: PositiveFloat | None = key(
        None, "mean log-prob gap after an update; null = by the dtype"
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

    max_steps: Positive = key(200, "steps of the run")
    lr: PositiveFloat = key(1e-6, "learning rate")
    optimizer: Literal["auto", "adamw", "flash_adamw", "adamw_8bit"] = key(
        "auto", "auto = adamw; flash_adamw where model.weights is bfloat16: docs/memory.md"
    )
    weight_decay: NonNegativeFloat = key(0.01, "decoupled (AdamW)")
    betas: tuple[BelowOne, BelowOne] = key((0.9, 0.999), "of AdamW")
    warmup_steps: NonNegative = key(0, "optimiser updates of linear warm-up")
    max_grad_norm: PositiveFloat = key(1.0, "gradients are clipped to this norm")
    skip_grad_norm: PositiveFloat = key(500.0, "a larger norm skips the update")
    minibatches: Positive = key(1, "optimiser updates per step")
    max_tokens_per_microbatch: Positive | Literal["auto"] = key(
        "auto", "packed tokens per forward; auto = by the memory plan"
    )
    gradient_release: bool = key(
        False,
        "free each gradient once applied: one pack an update on each rank, two backward passes",
    )
    preflight: Literal["auto", "always", "never"] = key(
        "auto", "rehearse the largest step first; auto = on CUDA"
    )
    allow_mismatch: bool = key(
        False, "go on where the check of the forward pass at the start fails: docs/models.md"
    )
    sparsity: BelowOne | Literal["auto", "off"] = key(
        "auto", "skip logit-gradient tiles below this share: docs/kernels.md"
    )
    sparse_tail: Literal["drop", "centroid", "dense_dw"] = key(
        "drop", "replacement of skipped tiles: docs/kernels.md"
    )
    seed: NonNegative = key(0, "of everything random")


class EvalConfig(Section):
    """Evaluation on data.eval with the training rewards."""

    n: Positive = key(8, "samples per question")
    k: list[Positive] = key([1, 8], "pass@k; at most n, and 1 and n if not given", min_length=1)
    temperature: NonNegativeFloat = key(1.0, "0 = greedy")
    top_p: Share = key(1.0, "nucleus sampling")
    every: NonNegative = key(0, "steps between evaluations; 0 = before and after")
    examples: NonNegative = key(0, "held-out questions of which one completion is printed")

    @model_validator(mode="before")
    @classmethod
    def _k_follows_n(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("n"), int) and "k" not in given:
            return given | {"k": sorted({1, given["n"]})}
        return given


class CheckpointConfig(Section):
    """Checkpoints: docs/reliability.md."""

    every: NonNegative = key(50, "steps between checkpoints; 0 = only the last")
    keep: Positive = key(2, "newest checkpoints that are kept")


class LogConfig(Section):
    """Where metrics go beside metrics.jsonl and the screen."""

    to: list[Literal["tensorboard", "wandb"]] = key([], "further sinks")
    completions_every: Positive = key(10, "steps between completion tables")
    updates: bool = key(
        False, "keep what each step trained on, for train --from-rollouts; 16 bytes a token"
    )


class WarmStartConfig(Section):
    """Supervised warm start of the quickstart model on generated solutions."""

    batches: Positive = key(550, "batches of the warm start")
    batch_size: Positive = key(128, "examples a batch")
    lr: PositiveFloat = key(3e-3, "learning rate")
    examples: Positive = key(20000, "generated examples")
    guess_share: Fraction = key(0.55, "solutions that guess; the others show their steps")
    revision_share: Fraction = key(
        0.0, "examples that revise a wrong solution, given what it missed"
    )
    guess_batches: NonNegative = key(
        0, "batches of guesses at the end: the policy then rarely shows its steps"
    )
