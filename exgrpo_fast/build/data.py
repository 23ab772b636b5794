"""The questions of a run: read, deduplicated, and their gold answers checked by the rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from exgrpo_fast.config import Config, ConfigError, GymTask, require
from exgrpo_fast.core.types import Question
from exgrpo_fast.data import DataReport, LoadedQuestions, check_data, make_questions
from exgrpo_fast.model.folder_reading import Tokenizer
from exgrpo_fast.rewards import RewardPool, check_golds
from exgrpo_fast.run.display import Screen


def load_data(
    config: Config, tokenizer: Tokenizer, screen: Screen
) -> tuple[list[Question], list[Question]]:
    """(training questions, held-out questions): distinct, and disjoint by content."""
    with screen.phase("read data"):
        held_out: list[Question] = []
        if config.data.eval is not None:
            loaded = read_questions(config, config.data.eval, tokenizer, screen.note)
            held_out = distinct(loaded.questions)[: config.data.eval_size]
        source = require(config.data.train, "data.train", "a .jsonl file, a dataset or a gym task")
        # A gym task draws some questions twice; of those the first stays.
        train = distinct(read_questions(config, source, tokenizer, screen.note).questions)
    unseen = without_held_out(train, held_out)
    if len(unseen) < len(train):
        screen.note(
            f"{len(train) - len(unseen)} training questions are held-out ones too: left out"
        )
    if len(unseen) < config.rollout.prompts_per_step:
        screen.note(
            f"data.train has {len(unseen)} questions: a step takes all of them instead of "
            f"rollout.prompts_per_step {config.rollout.prompts_per_step}"
        )
    return unseen, held_out


def without_held_out(train: Sequence[Question], held_out: Sequence[Question]) -> list[Question]:
    """ConfigError where none is left."""
    kept_out = {content(question) for question in held_out}
    unseen = [question for question in train if content(question) not in kept_out]
    if not unseen:
        raise ConfigError(
            f"data.train: all of its {len(train)} questions are held out by data.eval; give another "
            "file, or hold out fewer with data.eval_size"
        )
    return unseen


def content(question: Question) -> tuple[str, str]:
    return question.prompt, question.answer


def distinct(questions: Sequence[Question]) -> list[Question]:
    return list({content(question): question for question in reversed(questions)}.values())[::-1]


def read_questions(
    config: Config, source: str | GymTask, tokenizer: Tokenizer, note: Callable[[str], object]
) -> LoadedQuestions:
    data = config.data
    report = check_data(
        source if isinstance(source, str) else source.model_dump(),
        prompt_field=data.prompt_field,
        answer_field=data.answer_field,
        id_field=data.id_field,
    )
    loaded = questions_of(config, report, tokenizer)
    for line in loaded.notes:
        note(line)
    for row in loaded.bad_rows:
        note(f"skipped {row.where}: {row.reason}")
    if loaded.num_overlong:
        note(
            f"{loaded.num_overlong} prompts over data.max_prompt_tokens "
            f"({data.max_prompt_tokens}) were dropped"
        )
    return loaded


def questions_of(config: Config, report: DataReport, tokenizer: Tokenizer) -> LoadedQuestions:
    """Of rows that were read already. DataError as `make_questions`."""
    data = config.data
    return make_questions(
        report,
        tokenizer=tokenizer,
        system_prompt=data.system_prompt,
        max_prompt_tokens=data.max_prompt_tokens,
        overlong_prompts=data.overlong_prompts,
        max_bad_rows=data.max_bad_rows,
    )


def refuse_bad_golds(
    questions: Sequence[Question],
    rewards: RewardPool | None,
    screen: Screen,
    *,
    limit: int | None = None,
) -> None:
    """ConfigError naming the first gold answers that the reward itself does not accept.

    `limit`: of the first so many questions alone.
    """
    assert rewards is not None
    which = "" if limit is None or len(questions) <= limit else "the first "
    questions = questions[:limit]
    with screen.phase("check gold answers", len(questions)) as advance:
        bad = check_golds(questions, rewards, advance)
    if bad:
        listed = "; ".join(f"{g.question_id}: {g.answer!r} ({g.reason})" for g in bad[:3])
        raise ConfigError(
            f"{len(bad)} of {which}{len(questions)} gold answers fail their own reward: {listed}; "
            f"correct them, or set data.check_answers false"
        )
