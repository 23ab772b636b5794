"""What can be wrong with models, rewards and the first rows of the data, found before torch is loaded.

Each rule is one that the run itself follows later, when it opens the folder and reads all rows; so
what is not known yet, such as the weights of a GGUF file, is refused then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from exgrpo_fast.build.data import distinct, questions_of, refuse_bad_golds, without_held_out
from exgrpo_fast.build.folder import (
    allowed,
    check_prior,
    check_settings,
    check_teacher,
    positions_of,
    refuse_longer_than,
)
from exgrpo_fast.build.pretrained import cached_folder
from exgrpo_fast.build.quickstart.template import CHAT_TEMPLATE
from exgrpo_fast.build.rewards import check_rewards, make_rewards
from exgrpo_fast.config import Config, ConfigError, GymTask
from exgrpo_fast.core.types import Question
from exgrpo_fast.data import DataReport, check_first_rows, question_from_text
from exgrpo_fast.model.folder_reading import (
    ModelFiles,
    PlainConfig,
    TemplateAlone,
    Tokenizer,
    plain_config,
    plain_tokenizer,
    quiet_libraries,
)
from exgrpo_fast.model.folder_settings import (
    refuse_broken_template,
    refuse_quantised,
    refuse_unknown_type,
    refuse_unsupported,
)
from exgrpo_fast.model.gguf_file import find_gguf, read_usable_header
from exgrpo_fast.model.weight_files import (
    read_shapes,
    refuse_missing_layers,
    refuse_other_shapes,
)
from exgrpo_fast.rewards import RewardPool
from exgrpo_fast.run.checkpoint.manifest import verify
from exgrpo_fast.run.display import Screen

FIRST_GOLDS = 20  # a field of other answers shows in these; one answer can take 50 ms
SMALL_FILE = 16 * 2**20  # bytes that are hashed in no time; of larger files the size is compared
QUICKSTART, SMOLLM2 = "quickstart", "smollm2"  # models that are no folders before the run


def check_before_torch(
    config: Config,
    rows: Mapping[str, DataReport],
    *,
    prompt: str | None = None,
    tokenizer_only: bool = False,
    weights: bool = True,
    shortens: bool = False,
    trains: bool = False,
    checkpoint: Path | None = None,
) -> RewardPool | None:
    """UserError for models that cannot be trained, sampled from or learnt from, rows that cannot be
    used, and rewards that fail on the first row; the workers of these rewards.

    rows: source -> the first ones; where they are all, what the run says of all is said here. prompt: a
    question typed by hand. tokenizer_only: a server has the model. weights: False where a checkpoint
    has them. shortens: completions are cut to what the model has positions for. trains: gold answers
    are checked, and held-out questions left out. checkpoint: of this step the run goes on; it must be
    whole. None: there is no row with an answer, or no tokenizer yet.
    """
    if checkpoint is not None:
        verify(checkpoint, largest_read=SMALL_FILE)
    name = config.model.name or ""
    quiet_libraries()
    rows = {**rows, **_first_of_tasks(config)}
    if name == QUICKSTART:
        if weights and config.data.train is not None:
            solved_task(config)
        questions = _questions(config, rows, prompt, TemplateAlone(CHAT_TEMPLATE), trains=trains)
        return _tried_rewards(config, questions, trains=trains)
    if name == SMOLLM2:
        folder = cached_folder(name)
        if folder is None:
            return None
        name, weights = folder, False  # verified by their digests
    if (file := find_gguf(name)) is not None:
        header = read_usable_header(file, f"model.name {name}")
        if header is None:
            return None
        template = TemplateAlone(header.chat_template)
        refuse_broken_template(template, name, system_prompt=config.data.system_prompt)
        if not shortens:
            refuse_longer_than(allowed(config, header.positions), config, name, 1)
        questions = _questions(config, rows, prompt, template, trains=trains)
        return _tried_rewards(config, questions, trains=trains)
    model = None if tokenizer_only else _supported_config(name, "model.name")
    if model is not None:
        refuse_quantised(model, name)
    tokenizer = plain_tokenizer(name)
    questions: list[Question] = []
    if tokenizer is not None:
        if model is not None:
            check_settings(config, name, model, tokenizer)
        questions = _questions(config, rows, prompt, tokenizer, trains=trains)
    if model is not None and questions and not shortens:
        longest = max(len(question.prompt_ids) for question in questions)
        refuse_longer_than(positions_of(config, model), config, name, longest)
    if model is not None and weights:
        _refuse_other_weights(model, name, "model.name")
    targets = config.model.lora.targets if config.model.lora else ["all-linear"]
    if model is not None and targets != ["all-linear"]:
        refuse_missing_layers(model, read_shapes(name, "model.name"), targets)
    if model is not None and tokenizer is not None:
        policy = ModelFiles(name, model, tokenizer)
        check_prior(config, policy, _checked_files)
        check_teacher(config, policy, _checked_files)
    return _tried_rewards(config, questions, trains=trains)


def solved_task(config: Config) -> GymTask:
    """The task that the quickstart's model is made for; ConfigError for others."""
    task = config.data.train
    if not isinstance(task, GymTask) or task.gym != "chain_sum":
        raise ConfigError(
            "model.name quickstart: data.train must be the gym task chain_sum, the one with "
            "generated solutions; train another task from a model of yours"
        )
    return task


def _first_of_tasks(config: Config) -> dict[str, DataReport]:
    """The first row of each gym task; files were read already."""
    tasks = [task for task in (config.data.train, config.data.eval) if isinstance(task, GymTask)]
    return {str(task): check_first_rows(task.model_dump()) for task in tasks}


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
    rows: Mapping[str, DataReport],
    prompt: str | None,
    tokenizer: Tokenizer,
    *,
    trains: bool,
) -> list[Question]:
    """Those that a run would take of the first rows."""
    found = {
        source: distinct(questions_of(config, report, tokenizer).questions)
        for source, report in rows.items()
    }
    train, held_out = map(str, (config.data.train, config.data.eval))
    if trains and held_out in found:
        kept_out = found[held_out][: config.data.eval_size]
        if train in found and rows[train].is_whole:
            found[train] = without_held_out(found[train], kept_out)
        found[held_out] = kept_out
    questions = [question for of_source in found.values() for question in of_source]
    if prompt is not None:
        system_prompt = config.data.system_prompt
        questions.append(
            question_from_text(prompt, tokenizer=tokenizer, system_prompt=system_prompt)
        )
    return questions


def _tried_rewards(
    config: Config, questions: Sequence[Question], *, trains: bool
) -> RewardPool | None:
    answered = [question for question in questions if question.answer]
    if not answered:  # a question typed by hand has none
        return None
    rewards = make_rewards(config)
    try:
        check_rewards(config, rewards, answered[0])
        if trains and config.data.check_answers:
            refuse_bad_golds(questions, rewards, Screen(), limit=FIRST_GOLDS)
    except BaseException:
        rewards.close()
        raise
    return rewards
