"""What other trainers, and earlier versions of this one, call a key: hints in error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# An earlier name -> the present one. A config that still has it is refused with the new name.
RENAMED = {"model.mlp_tile_tokens": "model.tile_tokens"}


class Names(NamedTuple):
    """A key's names elsewhere, separated by spaces. They are no aliases: `note` says what differs.

    trl      fields of TRL's GRPOConfig, ModelConfig, ScriptArguments or arguments of GRPOTrainer
    verl     paths in verl's config; a hint matches what follows the slash, the shortest suffix that
             is unambiguous there
    earlier  names that earlier versions of both had: hints alone, not on the page
    """

    trl: str = ""
    verl: str = ""
    note: str = ""
    earlier: str = ""


_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_MODEL = "actor_rollout_ref.model"
# docs/from-trl-and-verl.md shows it; tests/with_trl and tests/with_verl look the names up.
OTHER_NAMES = {
    "model.name": Names(
        "model_name_or_path", "actor_rollout_ref/model.path", "a `.gguf` file or `smollm2`, too"
    ),
    "model.dtype": Names(
        "dtype bf16",
        note="of the computation; `model.weights` is how they are kept",
        earlier="torch_dtype",
    ),
    "model.attention": Names("attn_implementation"),
    "model.gradient_checkpointing": Names(
        "gradient_checkpointing", f"{_MODEL}/enable_gradient_checkpointing"
    ),
    "model.quantization": Names("load_in_4bit", note="`nf4`"),
    "model.lora.rank": Names("lora_r", f"{_MODEL}/lora_rank"),
    "model.lora.alpha": Names("lora_alpha", f"{_MODEL}/lora_alpha"),
    "model.lora.dropout": Names("lora_dropout"),
    "model.lora.targets": Names("lora_target_modules", f"{_MODEL}/target_modules"),
    "data.train": Names("dataset_name", "data/train_files", "a file, hub name or gym task"),
    "data.eval": Names(verl="data/val_files"),
    "data.prompt_field": Names(verl="data/prompt_key", note="found under its usual names"),
    "data.max_prompt_tokens": Names(verl="data/max_prompt_length", earlier="max_prompt_length"),
    "data.overlong_prompts": Names(verl="data/filter_overlong_prompts"),
    "reward.functions": Names(
        "reward_funcs", "reward/custom_reward_function.path", "TRL's signature: docs/rewards.md"
    ),
    "reward.weights": Names("reward_weights"),
    "rollout.group_size": Names("num_generations", "actor_rollout_ref/rollout.n"),
    "rollout.prompts_per_step": Names(
        "generation_batch_size per_device_train_batch_size",
        "data/train_batch_size",
        "questions; TRL counts completions",
    ),
    "rollout.max_completion_tokens": Names("max_completion_length", "data/max_response_length"),
    "rollout.temperature": Names("temperature", f"{_ROLLOUT}/temperature"),
    "rollout.top_p": Names("top_p", f"{_ROLLOUT}/top_p", "needs `rollout.top_k`: docs/rollouts.md"),
    "rollout.top_k": Names("top_k", f"{_ROLLOUT}/top_k", "0, not -1, for all"),
    "rollout.min_p": Names("min_p"),
    "rollout.engine": Names("use_vllm vllm_mode", "actor_rollout_ref/rollout.name"),
    "rollout.kv_cache_gib": Names(
        "vllm_gpu_memory_utilization",
        f"{_ROLLOUT}/gpu_memory_utilization",
        "in GiB, not a share of the GPU",
    ),
    "rollout.sleep": Names("vllm_enable_sleep_mode", f"{_ROLLOUT}/free_cache_engine"),
    "rollout.max_batch_sequences": Names(verl=f"{_ROLLOUT}/max_num_seqs"),
    "rollout.server.urls": Names("vllm_server_base_url"),
    "rollout.dynamic_sampling.enabled": Names(verl="algorithm/filter_groups.enable"),
    "rollout.dynamic_sampling.max_extra_batches": Names(
        verl="algorithm.filter_groups/max_num_gen_batches"
    ),
    "algorithm.advantage": Names(
        "scale_rewards",
        "algorithm/adv_estimator algorithm/norm_adv_by_std_in_grpo",
        "`grpo` divides by the std, `dr_grpo` does not",
    ),
    "algorithm.aggregation": Names("loss_type", f"{_ACTOR}/loss_agg_mode", "see below"),
    "algorithm.surrogate": Names(verl=f"{_ACTOR}/policy_loss.loss_mode", note="see below"),
    "algorithm.ratio_level": Names("importance_sampling_level", note="`sequence` is GSPO"),
    "algorithm.clip_low": Names("epsilon", f"{_ACTOR}/clip_ratio {_ACTOR}/clip_ratio_low"),
    "algorithm.clip_high": Names(
        "epsilon_high", f"{_ACTOR}/clip_ratio_high", "not taken from `clip_low`: set both"
    ),
    "algorithm.dual_clip": Names(
        "delta", f"{_ACTOR}/clip_ratio_c", "a bound of the reward side; `null` = off"
    ),
    "algorithm.entropy_coef": Names(verl=f"{_ACTOR}/entropy_coeff"),
    "algorithm.kl.coef": Names(
        "beta",
        f"{_ACTOR}/kl_loss_coef {_ACTOR}/use_kl_loss algorithm.kl_ctrl/kl_coef",
        "in the loss, never in the reward",
    ),
    "algorithm.kl.estimator": Names("use_bias_correction_kl", f"{_ACTOR}/kl_loss_type"),
    "algorithm.kl.rebase_at_step": Names("ref_model_sync_steps", note="once, at this step"),
    "algorithm.kl.previous_share": Names("ref_model_mixup_alpha"),
    "algorithm.tokens.high_entropy_share": Names("top_entropy_quantile"),
    "algorithm.tokens.clip_cov": Names(verl=f"{_ACTOR}.policy_loss/clip_cov_ratio"),
    "algorithm.tokens.clip_cov_range": Names(
        verl=f"{_ACTOR}.policy_loss/clip_cov_lb {_ACTOR}.policy_loss/clip_cov_ub"
    ),
    "algorithm.tokens.kl_cov": Names(verl=f"{_ACTOR}.policy_loss/kl_cov_ratio"),
    "algorithm.quantile": Names(earlier="quantile_k"),
    "algorithm.tv_low": Names(earlier="dppo_mask_low"),
    "algorithm.tv_high": Names(earlier="dppo_mask_high"),
    "algorithm.overlong.mask_truncated": Names("mask_truncated_completions"),
    "algorithm.overlong.soft_penalty_tokens": Names(earlier="overlong_buffer.len"),
    "algorithm.mismatch.correction": Names("vllm_importance_sampling_correction"),
    "algorithm.mismatch.max_ratio": Names(
        "vllm_importance_sampling_clip_max", earlier="vllm_importance_sampling_cap"
    ),
    "algorithm.mismatch.min_ratio": Names("vllm_importance_sampling_clip_min"),
    "train.lr": Names("learning_rate", f"{_ACTOR}/optim.lr"),
    "train.optimizer": Names("optim"),
    "train.weight_decay": Names("weight_decay", f"{_ACTOR}/optim.weight_decay", "matrices alone"),
    "train.betas": Names("adam_beta1 adam_beta2", f"{_ACTOR}/optim.betas", "a pair"),
    "train.warmup_steps": Names(
        verl=f"{_ACTOR}.optim/lr_warmup_steps", note="optimiser updates; the rate then stays"
    ),
    "train.max_grad_norm": Names(verl=f"{_ACTOR}/grad_clip"),
    "train.max_steps": Names(
        "num_train_epochs",
        "trainer/total_epochs trainer/total_training_steps",
        "steps, never epochs",
    ),
    "train.minibatches": Names(
        "steps_per_generation", f"{_ACTOR}/ppo_mini_batch_size", "how many, not how large"
    ),
    "train.max_tokens_per_microbatch": Names(
        "gradient_accumulation_steps",
        f"{_ACTOR}/ppo_max_token_len_per_gpu {_ACTOR}/ppo_micro_batch_size_per_gpu",
        "packed tokens; the gradient does not depend on it",
    ),
    "eval.every": Names("eval_steps", "trainer/test_freq"),
    "eval.n": Names("num_generations_eval", f"{_ROLLOUT}/val_kwargs.n"),
    "checkpoint.every": Names("save_steps", "trainer/save_freq"),
    "checkpoint.keep": Names("save_total_limit", "trainer/max_actor_ckpt_to_keep"),
    "log.to": Names("report_to", "/trainer.logger"),
    "log.completions_every": Names("log_completions"),
}
FOREIGN = {
    name: key
    for key, names in OTHER_NAMES.items()
    for name in (
        *names.trl.split(),
        *(path.rpartition("/")[2] for path in names.verl.split()),
        *names.earlier.split(),
    )
}


def hint(path: Sequence[str]) -> str | None:
    """What an unknown key is called here, by the longest suffix that is known; None for others."""
    if renamed := RENAMED.get(".".join(path)):
        return f"; it is now '{renamed}'"
    suffixes = (".".join(path[start:]) for start in range(len(path)))
    found = next((FOREIGN[suffix] for suffix in suffixes if suffix in FOREIGN), None)
    return f"; here it is '{found}'" if found else None
