"""What other trainers, and earlier versions of this one, call a key: hints in error messages."""

from __future__ import annotations

from collections.abc import Sequence

# An earlier name -> the present one. A config that still has it is refused with the new name.
RENAMED = {"model.mlp_tile_tokens": "model.tile_tokens"}

# Our key -> its names in TRL's GRPOConfig and in verl's config tree, of the latter the shortest suffix
# that is unambiguous. These are no aliases: most values mean something slightly different here.
OTHER_NAMES = {
    "model.name": "model_name_or_path model.path",
    "model.dtype": "torch_dtype bf16",
    "model.attention": "attn_implementation",
    "model.gradient_checkpointing": "enable_gradient_checkpointing",
    "model.quantization": "load_in_4bit",
    "model.lora.rank": "lora_r lora_rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.targets": "lora_target_modules target_modules",
    "data.train": "dataset_name train_files",
    "data.eval": "val_files",
    "data.prompt_field": "prompt_key",
    "data.max_prompt_tokens": "max_prompt_length",
    "data.overlong_prompts": "filter_overlong_prompts",
    "reward.functions": "reward_funcs custom_reward_function.path",
    "reward.weights": "reward_weights",
    "rollout.group_size": "num_generations rollout.n",
    "rollout.prompts_per_step": "per_device_train_batch_size generation_batch_size train_batch_size",
    "rollout.max_completion_tokens": "max_completion_length max_response_length",
    "rollout.temperature": "temperature",
    "rollout.engine": "use_vllm vllm_mode rollout.name",
    "rollout.kv_cache_gib": "vllm_gpu_memory_utilization gpu_memory_utilization",
    "rollout.sleep": "vllm_enable_sleep_mode free_cache_engine",
    "rollout.max_batch_sequences": "max_num_seqs",
    "rollout.dynamic_sampling.enabled": "filter_groups.enable",
    "rollout.dynamic_sampling.max_extra_batches": "max_num_gen_batches",
    "algorithm.advantage": "adv_estimator scale_rewards norm_adv_by_std_in_grpo",
    "algorithm.aggregation": "loss_type loss_agg_mode",
    "algorithm.surrogate": "policy_loss.loss_mode",
    "algorithm.ratio_level": "importance_sampling_level",
    "algorithm.clip_low": "epsilon clip_ratio clip_ratio_low",
    "algorithm.clip_high": "epsilon_high clip_ratio_high",
    "algorithm.dual_clip": "delta clip_ratio_c",
    "algorithm.entropy_coef": "entropy_coeff",
    "algorithm.kl.coef": "beta kl_coef kl_loss_coef use_kl_loss",
    "algorithm.kl.estimator": "kl_loss_type use_bias_correction_kl",
    "algorithm.tokens.high_entropy_share": "top_entropy_quantile",
    "algorithm.tokens.clip_cov": "clip_cov_ratio",
    "algorithm.tokens.clip_cov_range": "clip_cov_lb clip_cov_ub",
    "algorithm.tokens.kl_cov": "kl_cov_ratio",
    "algorithm.quantile": "quantile_k",
    "algorithm.tv_low": "dppo_mask_low",
    "algorithm.tv_high": "dppo_mask_high",
    "algorithm.kl.previous_share": "ref_model_mixup_alpha",
    "algorithm.kl.rebase_at_step": "ref_model_sync_steps",
    "algorithm.overlong.mask_truncated": "mask_truncated_completions",
    "algorithm.overlong.soft_penalty_tokens": "overlong_buffer.len",
    "algorithm.mismatch.correction": "vllm_importance_sampling_correction",
    "algorithm.mismatch.max_ratio": "vllm_importance_sampling_cap",
    "train.lr": "learning_rate optim.lr",
    "train.optimizer": "optim",
    "train.betas": "adam_beta1 adam_beta2",
    "train.warmup_steps": "lr_warmup_steps",
    "train.max_grad_norm": "grad_clip",
    "train.max_steps": "num_train_epochs total_epochs total_training_steps",
    "train.minibatches": "ppo_mini_batch_size steps_per_generation",
    "train.max_tokens_per_microbatch": "gradient_accumulation_steps ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu",
    "eval.every": "eval_steps test_freq",
    "eval.n": "val_kwargs.n",
    "checkpoint.every": "save_steps save_freq",
    "checkpoint.keep": "save_total_limit",
    "log.to": "report_to trainer.logger",
    "log.completions_every": "log_completions",
}
FOREIGN = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}


def hint(path: Sequence[str]) -> str | None:
    """What an unknown key is called here, by the longest suffix that is known; None for others."""
    if renamed := RENAMED.get(".".join(path)):
        return f"; it is now '{renamed}'"
    suffixes = (".".join(path[start:]) for start in range(len(path)))
    found = next((FOREIGN[suffix] for suffix in suffixes if suffix in FOREIGN), None)
    return f"; here it is '{found}'" if found else None
