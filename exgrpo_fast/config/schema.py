"""The whole config: its sections, what must fit together, and limits of world size and engine."""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

from pydantic import model_validator

from exgrpo_fast.config.method import (
    AlgorithmConfig,
    HindsightConfig,
    PriorResamplingConfig,
    ReplayConfig,
)
from exgrpo_fast.config.sections import (
    PREFERRED_TOKENS,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    TrainConfig,
    WarmStartConfig,
    key,
)
from exgrpo_fast.core.packs import tokens_of_share


class Config(Section):
    """Top level."""

    method: str = key("grpo", "name shown in the summary")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    replay: ReplayConfig = ReplayConfig()
    hindsight: HindsightConfig = HindsightConfig()
    prior_resampling: PriorResamplingConfig = PriorResamplingConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    warm_start: WarmStartConfig = WarmStartConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        steps, updates = self.rollout.prompts_per_step, self.train.minibatches
        if steps % updates:
            raise ValueError(
                f"rollout.prompts_per_step ({steps}) cannot be split into train.minibatches "
                f"({updates}) equal parts; try {_nearest_divisor(steps, updates)}"
            )
        self._optimizer_fits_weights()
        if self.rollout.group_size < 2 and self.algorithm.advantage != "dr_grpo":
            raise ValueError(
                f"rollout.group_size is {self.rollout.group_size}: algorithm.advantage "
                f"{self.algorithm.advantage} compares at least 2 completions"
            )
        if self.replay.enabled and self.rollout.group_size < 2:
            raise ValueError("rollout.group_size must be at least 2 when replay.enabled is true")
        replay = self.replay
        slots = replay.enabled and replay.mixer == "replace_slot"
        if slots and replay.count >= self.rollout.group_size:
            raise ValueError(
                f"replay.count ({replay.count}) leaves no fresh slot in a group of "
                f"rollout.group_size {self.rollout.group_size}; use replay.mixer append"
            )
        if self.rollout.generate_ahead and replay.enabled and replay.mixer == "recent_groups":
            raise ValueError("rollout.generate_ahead does not go with replay.mixer recent_groups")
        self._prior_fits()
        self._fifo_fits()
        if replay.weight == "proximal" and self.algorithm.dual_clip is not None:
            raise ValueError("replay.weight proximal has no algorithm.dual_clip; set it to null")
        if self.reward.weights and not any(self.reward.weights):
            raise ValueError("reward.weights are all 0: every reward would be 0")
        if self.reward.weights and len(self.reward.weights) != len(self.reward.functions):
            raise ValueError(
                f"reward.weights has {len(self.reward.weights)} entries for "
                f"{len(self.reward.functions)} reward.functions"
            )
        self._loss_fits()
        self._truncation_fits()
        algorithm = self.algorithm
        if self.reward.judge and len(self.reward.functions) != 1:
            raise ValueError("reward.judge goes with one set of rubrics in reward.functions")
        soft, limit = algorithm.overlong.soft_penalty_tokens, self.rollout.max_completion_tokens
        if soft > limit:
            raise ValueError(
                f"algorithm.overlong.soft_penalty_tokens ({soft}) is above "
                f"rollout.max_completion_tokens ({limit}): every completion would be penalised"
            )
        if max(self.eval.k) > self.eval.n:
            raise ValueError(f"eval.k asks for pass@{max(self.eval.k)} with eval.n = {self.eval.n}")
        name = "data" if self.longest_prompt == self.data.max_prompt_tokens else "hindsight"
        tokens = self.train.max_tokens_per_microbatch
        if tokens != "auto" and tokens < self.longest_sequence:
            raise ValueError(
                f"train.max_tokens_per_microbatch ({tokens}) is below the longest sequence, "
                f"{name}.max_prompt_tokens + rollout.max_completion_tokens = "
                f"{self.longest_sequence}"
            )
        self._release_fits()
        return self

    def _truncation_fits(self) -> None:
        """Only fresh completions bring the sets that their tokens were drawn from."""
        if self.rollout.top_k == 0:
            return
        if self.algorithm.distillation.is_over_vocabulary:
            raise ValueError(
                f"algorithm.distillation.divergence {self.algorithm.distillation.divergence} "
                "compares whole distributions, and rollout.top_k trains truncated ones; set "
                "divergence to sampled, or top_k to 0"
            )
        for name in ("replay", "hindsight", "prior_resampling"):
            if getattr(self, name).enabled:
                raise ValueError(
                    f"rollout.top_k does not go with {name}.enabled, whose trajectories are not "
                    "drawn from the same tokens; set top_k to 0"
                )

    def _loss_fits(self) -> None:
        """What `PolicyObjective` refuses, and columns that cannot mean two things."""
        algorithm, kl = self.algorithm, self.algorithm.kl
        if kl.previous_share and kl.estimator not in ("k1", "k2"):
            raise ValueError(
                f"algorithm.kl.previous_share joins two KL terms, which the estimator "
                f"{kl.estimator} does not allow; set algorithm.kl.estimator to k2"
            )
        if kl.reference == "behaviour" and (kl.previous_share or kl.rebase_at_step is not None):
            raise ValueError(
                "algorithm.kl.previous_share and rebase_at_step need algorithm.kl.reference initial"
            )
        if algorithm.dual_clip is not None and algorithm.surrogate != "clip":
            raise ValueError(
                f"algorithm.dual_clip belongs to algorithm.surrogate clip, not to "
                f"{algorithm.surrogate}; set it to null"
            )
        self._token_advantages_fit()
        has_trust_region = algorithm.tv_low is not None or algorithm.tv_high is not None
        moves_ratio = self.replay.enabled and self.replay.weight == "proximal"
        if moves_ratio and (has_trust_region or (kl.coef and kl.estimator == "k3_ratio")):
            raise ValueError(
                "replay.weight proximal shifts the ratio, which algorithm.tv_low, tv_high and the "
                "KL estimator k3_ratio read; use another weight"
            )
        if not has_trust_region:
            return
        if algorithm.surrogate not in ("clip", "cispo") or algorithm.ratio_level != "token":
            raise ValueError(
                "algorithm.tv_low and tv_high need algorithm.surrogate clip or cispo and "
                "algorithm.ratio_level token"
            )
        if algorithm.surrogate == "clip":
            for name in ("clip_low", "clip_high", "dual_clip"):
                if getattr(algorithm, name) is not None:
                    raise ValueError(
                        f"algorithm.tv_low and tv_high replace the clip; set algorithm.{name} "
                        "to null"
                    )

    def _token_advantages_fit(self) -> None:
        algorithm, tokens = self.algorithm, self.algorithm.tokens
        if tokens.kl_cov > 0:
            kl = algorithm.kl
            if kl.coef == 0 or (kl.estimator, kl.reference) != ("abs", "behaviour"):
                raise ValueError(
                    "algorithm.tokens.kl_cov needs algorithm.kl.coef above 0, estimator abs and "
                    "reference behaviour"
                )
            if self.train.minibatches == 1:
                raise ValueError(
                    "algorithm.tokens.kl_cov has no effect with train.minibatches 1: its term is "
                    "0 until the policy has moved; set train.minibatches to 2 or more"
                )
        distillation = algorithm.distillation
        is_sampled = distillation.teacher is not None and not distillation.is_over_vocabulary
        if is_sampled and self.replay.weight == "proximal":
            raise ValueError(
                "algorithm.distillation.divergence sampled gives tokens of a trajectory advantages of either sign, "
                "which replay.weight proximal does not take; use another weight"
            )
        low, high = tokens.clip_cov_range
        if tokens.clip_cov > 0 and not low < high:
            raise ValueError(
                f"algorithm.tokens.clip_cov_range must be increasing, got [{low:g}, {high:g}]"
            )
        if algorithm.advantage == "quantile" and self.prior_resampling.enabled:
            raise ValueError(
                "algorithm.advantage quantile has no weighted mean, which prior_resampling needs; "
                "use dr_grpo or grpo"
            )

    def _release_fits(self) -> None:
        """Where gradients are released, nothing is left to sum over packs."""
        if not self.train.gradient_release:
            return
        if self.model.lora is not None:
            raise ValueError(
                "train.gradient_release is for runs that train all weights; under model.lora "
                "gradients are small"
            )
        if self.replay.enabled and self.replay.select == "all":
            raise ValueError(
                "train.gradient_release needs a bound on what an update reads, and replay.select "
                "all has none; give replay.count with another choice"
            )

    def _fifo_fits(self) -> None:
        """Mixer fifo keeps of a completion what the policy drew alone, and no entropies of tokens."""
        if not self.replay.enabled or self.replay.mixer != "fifo":
            return
        tokens = self.algorithm.tokens
        refused = {
            "hindsight.enabled": self.hindsight.enabled,
            "prior_resampling.enabled": self.prior_resampling.enabled,
            "rollout.dynamic_sampling.enabled": self.rollout.dynamic_sampling.enabled,
            "algorithm.tokens.entropy_shaping": tokens.entropy_shaping > 0,
            "algorithm.tokens.high_entropy_share": tokens.high_entropy_share < 1,
        }
        for name, is_refused in refused.items():
            if is_refused:
                raise ValueError(f"{name} does not go with replay.mixer fifo")

    def _prior_fits(self) -> None:
        prior, rollout, replay = self.prior_resampling, self.rollout, self.replay
        if not prior.enabled:
            return
        taken = prior.augmented_per_group
        if replay.enabled and replay.mixer == "replace_slot":
            taken += replay.count
        if taken >= rollout.group_size:
            raise ValueError(
                f"prior_resampling.augmented_per_group ({prior.augmented_per_group}) and replay "
                f"leave no fresh slot in a group of rollout.group_size {rollout.group_size}"
            )
        if rollout.temperature != 1.0:
            raise ValueError(
                f"rollout.temperature is {rollout.temperature}: prior_resampling compares policy "
                f"and prior at temperature 1"
            )
        if prior.annealing == "linear" and prior.stop_after_steps is None:
            raise ValueError(
                "prior_resampling.annealing linear needs prior_resampling.stop_after_steps"
            )

    @property
    def longest_prompt(self) -> int:
        own = self.data.max_prompt_tokens
        return max(own, self.hindsight.max_prompt_tokens) if self.hindsight.enabled else own

    @property
    def longest_sequence(self) -> int:
        return self.longest_prompt + self.rollout.max_completion_tokens

    @property
    def update_tokens(self) -> int:
        """The most tokens that one optimiser update reads: all prompts and completions at their longest."""
        rollout, replay = self.rollout, self.replay
        appended = replay.count if replay.enabled and replay.mixer == "append" else 0
        completions = (rollout.group_size + appended) * rollout.max_completion_tokens
        if replay.enabled and replay.mixer == "fifo":  # each may have its own prompt
            drawn = math.ceil(replay.replay_ratio * rollout.group_size * rollout.prompts_per_step)
            return -(-drawn // self.train.minibatches) * self.longest_sequence
        revision = self.longest_sequence if self.hindsight.enabled else 0
        of_group = self.data.max_prompt_tokens + completions + revision
        return rollout.prompts_per_step // self.train.minibatches * of_group

    def released_tokens(self, ranks: int) -> int:
        """The least tokens of a pack with which any update is at most one pack a rank."""
        return tokens_of_share(self.update_tokens, self.longest_sequence, ranks)

    @property
    def microbatch_tokens(self) -> int:
        """`train.max_tokens_per_microbatch`; what `auto` is where no memory plan is made."""
        return self.preferred_tokens(ranks=1)

    def preferred_tokens(self, ranks: int) -> int:
        """The same, of each of `ranks`."""
        tokens = self.train.max_tokens_per_microbatch
        if tokens != "auto":
            return tokens
        released = self.train.gradient_release
        preferred = self.released_tokens(ranks) if released else PREFERRED_TOKENS
        return max(preferred, self.longest_sequence)

    @property
    def gradient_checkpointing(self) -> bool:
        """`model.gradient_checkpointing`; what `auto` is where no memory plan is made."""
        return self.model.gradient_checkpointing is not False

    @property
    def tile_tokens(self) -> int:
        """`model.tile_tokens`; what `auto` is where no memory plan is made."""
        return 0 if self.model.tile_tokens == "auto" else self.model.tile_tokens

    @property
    def trains_bfloat16(self) -> bool:
        """The weights that are trained, not those under an adapter, are kept in bfloat16."""
        return self.model.weights == "bfloat16" and self.model.lora is None

    @property
    def optimizer(self) -> Literal["adamw", "flash_adamw", "adamw_8bit"]:
        """`train.optimizer` with `auto` resolved."""
        if self.train.optimizer == "auto":
            return "flash_adamw" if self.trains_bfloat16 else "adamw"
        return self.train.optimizer

    def _optimizer_fits_weights(self) -> None:
        if self.trains_bfloat16 and self.optimizer == "adamw":
            raise ValueError(
                "train.optimizer adamw with model.weights bfloat16: at the learning rates of RL "
                "an update is smaller than a step of that dtype (at 1e-6 about 2 % of the weights "
                "would move); flash_adamw keeps the lost bits, adamw_8bit rounds at random"
            )
        if self.optimizer == "flash_adamw" and not self.trains_bfloat16:
            raise ValueError("train.optimizer flash_adamw is for model.weights bfloat16")


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))


# --- limits of the world size and of what is installed --------------------------------------------


def refuse_world_size(config: Config, count: int) -> None:
    """ConfigError naming the first key that does not go with `count` ranks."""
    refuse_small_packs(config, count)
    if count == 1:
        return
    refuse_engine_world_size(config, config.rollout.engine, count)
    prior = config.prior_resampling
    refused = {
        "model.quantization": config.model.quantization is not None,
        f"prior_resampling.trigger {prior.trigger}": prior.enabled
        and prior.trigger in ("entropy", "kl", "tv", "js"),
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ConfigError(f"{name} does not go with {count} processes; one process can do it")


def refuse_small_packs(config: Config, count: int) -> None:
    """ConfigError where an update with train.gradient_release may be more than one pack a rank."""
    train, tokens = config.train, config.train.max_tokens_per_microbatch
    if not train.gradient_release or tokens == "auto":
        return
    least = config.released_tokens(count)
    if tokens < least:
        why = "that an update can read, and train.gradient_release wants them in one pack"
        if count > 1:
            why = f"with which any update is at most {count} packs, as train.gradient_release needs"
        raise ConfigError(
            f"train.max_tokens_per_microbatch ({tokens}) is below the {least} tokens {why}; raise "
            f"it or train.minibatches ({train.minibatches})"
        )


def refuse_engine_world_size(config: Config, kind: str, count: int) -> None:
    """`kind`: the resolved `rollout.engine`."""
    if kind == "vllm" and count > 1:
        raise ConfigError(
            f"rollout.engine {config.rollout.engine}: vLLM in the trainer's process does not go "
            f"with {count} processes; vllm_server or transformers does"
        )


def engine_kind(config: Config, device: str) -> str:
    """`rollout.engine` with `auto` resolved. ConfigError where vLLM is asked for and absent.

    On a CPU that is `transformers` even beside vLLM: vLLM draws no faster there, and its completions
    have to be scored by the trainer.
    """
    require_engine(config)
    if config.rollout.engine != "auto":
        return config.rollout.engine
    return "vllm" if _has_vllm() and device == "cuda" else "transformers"


def require_engine(config: Config) -> None:
    """ConfigError where vLLM is asked for and absent."""
    kind = config.rollout.engine
    needs = kind == "vllm" or kind == "vllm_server" and not config.rollout.server.urls
    if needs and not _has_vllm():
        raise ConfigError(f"rollout.engine {kind}: vLLM is not installed; `exgrpo-fast doctor`")


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None
