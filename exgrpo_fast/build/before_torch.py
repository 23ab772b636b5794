"""What can be wrong with models, rewards and the first rows of the data, found before torch is loaded.

Each rule is one that the run itself follows later, when it opens the folder and reads all rows; so
what is not known yet, such as the tokenizer of a GGUF file, is refused then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exgrpo_fast.build.folder import (
    check_prior,
    check_settings,
    check_teacher,
    positions_of,
    refuse_longer_than,
)
from exgrpo_fast.build.rewards import check_rewards, make_rewards
from exgrpo_fast.config import Config
from exgrpo_fast.core.types import Question
from exgrpo_fast.data import CheckedRow, first_questions, question_from_text
from exgrpo_fast.model.folder_reading import (
    ModelFiles,
    PlainConfig,
    Tokenizer,
    plain_config,
    plain_tokenizer,
    quiet_libraries,
)
from exgrpo_fast.model.folder_settings import (
    refuse_quantised,
    refuse_unknown_type,
    refuse_unsupported,
)
from exgrpo_fast.model.gguf_file import find_gguf, refuse_unreadable
from exgrpo_fast.model.weight_files import read_shapes, refuse_other_shapes
from exgrpo_fast.rewards import RewardPool

MADE_HERE = ("quickstart", "smollm2")  # names of models that are no folders before the run


def check_before_torch(
    config: Config,
    rows: Mapping[str, Sequence[CheckedRow]],
    *,
    prompt: str | None = None,
    tokenizer_only: bool = False,
    weights: bool = True,
    shortens: bool = False,
) -> RewardPool | None:
    """UserError for models that cannot be trained, sampled from or learnt from, rows that the chat
    template refuses, and rewards that fail on the first row; the workers of these rewards.

    rows: source -> the first ones. prompt: a question typed by hand. tokenizer_only: a server has the
    model. weights: False where a checkpoint has them. shortens: completions are cut to what the model
    has positions for. None: there is no row with an answer, or no tokenizer yet.
    """
    name = config.model.name or ""
    quiet_libraries()
    if name in MADE_HERE:
        return None
    if (file := find_gguf(name)) is not None:
        refuse_unreadable(file, f"model.name {name}")
        return None
    model = None if tokenizer_only else _supported_config(name, "model.name")
    if model is not None:
        refuse_quantised(model, name)
    tokenizer = plain_tokenizer(name)
    questions: list[Question] = []
    if tokenizer is not None:
        if model is not None:
            check_settings(config, name, model, tokenizer)
        questions = _questions(config, rows, prompt, tokenizer)
    if model is not None and questions and not shortens:
        # Longer ones may be dropped; the run says what becomes of them.
        lengths = [len(question.prompt_ids) for question in questions]
        taken = [length for length in lengths if length <= config.data.max_prompt_tokens]
        refuse_longer_than(positions_of(config, model), config, name, max(taken, default=1))
    if model is not None and weights:
        _refuse_other_weights(model, name, "model.name")
    if model is not None and tokenizer is not None:
        policy = ModelFiles(name, model, tokenizer)
        check_prior(config, policy, _checked_files)
        check_teacher(config, policy, _checked_files)
    return _tried_rewards(config, questions)


def _supported_config(name: str, key: str) -> PlainConfig:
    model = plain_config(name, key)
    refuse_unknown_type(model, f"{key} {name}")
    refuse_unsupported(model)
    return model


def _refuse_other_weights(model: PlainConfig, name: str, key: str) -> None:
    refuse_other_shapes(model, read_shapes(name, key), f"{key} {name}")


def _checked_files(name: str, key: str) -> ModelFiles | None:
    """Of a model beside the policy; None for a GGUF file, and without the tokenizer's own file."""
    if find_gguf(name) is not None:
        return None
    model, tokenizer = _supported_config(name, key), plain_tokenizer(name, key)
    _refuse_other_weights(model, name, key)
    return ModelFiles(name, model, tokenizer) if tokenizer else None


def _questions(
    config: Config,
    rows: Mapping[str, Sequence[CheckedRow]],
    prompt: str | None,
    tokenizer: Tokenizer,
) -> list[Question]:
    system_prompt = config.data.system_prompt
    questions = [
        question
        for source, first in rows.items()
        for question in first_questions(
            source, first, tokenizer=tokenizer, system_prompt=system_prompt
        )
    ]
    if prompt is not None:
        questions.append(
            question_from_text(prompt, tokenizer=tokenizer, system_prompt=system_prompt)
        )
    return questions


def _tried_rewards(config: Config, questions: Sequence[Question]) -> RewardPool | None:
    answered = [question for question in questions if question.answer]
    if not answered:  # a question typed by hand has none
        return None
    rewards = make_rewards(config)
    try:
        check_rewards(config, rewards, answered[0])
    except BaseException:
        rewards.close()
        raise
    return rewards
