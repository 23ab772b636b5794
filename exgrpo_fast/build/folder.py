"""What a model's folder says beside its weights, checked against the config before they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.experience.prior.compatibility import (
    fingerprint,
    read_vocabulary,
    refuse_other_vocabulary,
)
from exgrpo_fast.model.folder_reading import (
    ModelFiles,
    Tokenizer,
    end_of_sequence_ids,
    model_config,
    model_files,
    read_generation_config,
)
from exgrpo_fast.model.folder_settings import (
    Positions,
    overridden_settings,
    positions,
    refuse_broken_template,
    refuse_foreign_end_tokens,
    refuse_other_kinds,
    refuse_quantised,
    refuse_small_embedding,
    refuse_unsupported,
    unlisted_turn_end,
)

# Name and key -> the files; None where they cannot be read yet.
Reader = Callable[[str, str], ModelFiles | None]
PRIOR, TEACHER = "prior_resampling.model", "algorithm.distillation.teacher"


def check_folder(config: Config, name: str, tokenizer: Tokenizer) -> list[str]:
    """Lines on what the run does otherwise than the folder says. PolicyError for another kind of
    model, and as `check_settings`."""
    model = model_config(name)
    refuse_other_kinds(model, name)
    return check_settings(config, name, model, tokenizer)


def check_settings(config: Config, name: str, model: Any, tokenizer: Tokenizer) -> list[str]:
    """As `check_folder`, of a config that was read already. PolicyError for quantised weights,
    unsupported layers, an embedding smaller than the tokenizer, an end token beyond it, or a chat
    template that cannot be read."""
    refuse_quantised(model, name)
    refuse_unsupported(model)
    refuse_broken_template(tokenizer, name, system_prompt=config.data.system_prompt)
    text = model.get_text_config()
    refuse_small_embedding(text, tokenizer, name)
    generation = read_generation_config(name)
    lines = []
    if found := overridden_settings(text, name, dropout=config.model.dropout):
        lines.append(
            f"settings of the model's folder that are not followed: {', '.join(found)} (the "
            f"sections rollout and eval of the config say how tokens are drawn)"
        )
    end_tokens = end_of_sequence_ids(generation, tokenizer)
    refuse_foreign_end_tokens(text, end_tokens, name)
    if (turn_end := unlisted_turn_end(tokenizer, end_tokens)) is not None:
        lines.append(
            f"warning: the chat template ends an answer with {turn_end}, which is no end token "
            f"({', '.join(map(str, tokenizer.convert_ids_to_tokens(end_tokens)))}): completions go on "
            f"behind it, up to the limit; list it as eos_token_id in generation_config.json"
        )
    return lines


def refuse_too_long(config: Config, name: str, *, longest_prompt: int) -> None:
    """ConfigError where a sequence of the run can be longer than the model has positions for."""
    refuse_longer_than(positions_of(config, model_config(name)), config, name, longest_prompt)


def refuse_longer_than(
    limit: Positions | None, config: Config, name: str, longest_prompt: int
) -> None:
    """As `refuse_too_long`, of positions that are known already."""
    completion, hindsight = config.rollout.max_completion_tokens, config.hindsight
    prompts = {f"a prompt of {longest_prompt} tokens": longest_prompt}
    if hindsight.enabled:
        key = f"hindsight.max_prompt_tokens ({hindsight.max_prompt_tokens})"
        prompts[key] = hindsight.max_prompt_tokens
    for prompt, length in prompts.items():
        if limit is not None and length + completion > limit.limit:
            raise ConfigError(
                f"{prompt} and rollout.max_completion_tokens ({completion}) are more than the "
                f"{limit.limit} positions of {name} ({limit.why}); lower one of them"
                + (", or set train.allow_mismatch true" if limit.is_rotary else "")
            )


def completion_room(config: Config, name: str, *, longest_prompt: int) -> int:
    """The most tokens that a completion can have: at most rollout.max_completion_tokens."""
    limit = positions_of(config, model_config(name))
    asked = config.rollout.max_completion_tokens
    return asked if limit is None else max(1, min(asked, limit.limit - longest_prompt))


def positions_of(config: Config, model: Any) -> Positions | None:
    """None: there is no limit, or train.allow_mismatch lifts it."""
    return allowed(config, positions(model.get_text_config()))


def allowed(config: Config, found: Positions | None) -> Positions | None:
    """As `positions_of`, of what a model has."""
    return None if found and found.is_rotary and config.train.allow_mismatch else found


# --- the models beside the policy: do their tokens mean the same? ---------------------------------


def check_prior(config: Config, policy: ModelFiles, read: Reader = model_files) -> None:
    """PriorError, before any weights are loaded, where the prior cannot guide the policy."""
    prior = config.prior_resampling
    if not prior.enabled or prior.model is None:
        return
    if (files := read(prior.model, PRIOR)) is not None:
        refuse_other_vocabulary(read_vocabulary(policy), read_vocabulary(files))


def check_teacher(config: Config, policy: ModelFiles, read: Reader = model_files) -> None:
    """ConfigError, before any weights are loaded, where the teacher has another tokenizer than the
    policy, or for whole distributions a head of another size."""
    distillation = config.algorithm.distillation
    name = distillation.teacher
    files = None if name is None else read(name, TEACHER)
    if files is None:
        return
    own, theirs = policy.tokenizer, files.tokenizer
    if fingerprint(theirs.get_vocab()) != fingerprint(own.get_vocab()):
        raise ConfigError(
            f"{TEACHER} {name} has another tokenizer ({len(theirs)} tokens) than model.name "
            f"({len(own)} tokens)"
        )
    # Of the language-model head, padding included; None: only the class of the model knows it.
    rows, teachers = (
        getattr(one.config.get_text_config(), "vocab_size", None) for one in (policy, files)
    )
    if distillation.is_over_vocabulary and None not in (rows, teachers) and rows != teachers:
        raise ConfigError(
            f"{TEACHER} {name} has a head of {teachers} tokens, model.name one of {rows}; divergence "
            f"{distillation.divergence} compares them one by one, set it to sampled"
        )
