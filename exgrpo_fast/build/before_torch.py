"""What can be wrong with a model's folder and the first rows of the data, found before torch is loaded.

Each rule is one that the run itself follows later, when it opens the folder and reads all rows; so a
hub name, a GGUF file or a model that is made on the spot is refused then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exgrpo_fast.build.folder import check_settings, positions_of, refuse_longer_than
from exgrpo_fast.config import Config
from exgrpo_fast.core.types import Question
from exgrpo_fast.data import first_questions, question_from_text
from exgrpo_fast.model.folder_reading import (
    Tokenizer,
    plain_config,
    plain_tokenizer,
    quiet_libraries,
)
from exgrpo_fast.model.folder_settings import refuse_unknown_type
from exgrpo_fast.model.weight_files import refuse_damaged_weights


def check_model_and_rows(
    config: Config,
    sources: Sequence[str],
    *,
    prompt: str | None = None,
    tokenizer_only: bool = False,
    weights: bool = True,
    shortens: bool = False,
) -> None:
    """UserError for a folder that cannot be trained or sampled from, or whose chat template refuses
    each of the first rows of a source.

    sources: files of rows. prompt: a question typed by hand. tokenizer_only: a server has the model.
    weights: False where a checkpoint has them. shortens: completions are cut to what the model has
    positions for.
    """
    name = config.model.name or ""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.gguf")):
        return
    quiet_libraries()
    model = None if tokenizer_only else plain_config(folder)
    if model is not None:
        refuse_unknown_type(model, name)
    tokenizer = plain_tokenizer(folder)
    if tokenizer is None:
        return
    if model is not None:
        check_settings(config, name, model, tokenizer)
    questions = _first_questions(config, sources, tokenizer)
    if prompt is not None:
        system_prompt = config.data.system_prompt
        questions.append(
            question_from_text(prompt, tokenizer=tokenizer, system_prompt=system_prompt)
        )
    if model is None:
        return
    if not shortens:
        lengths = [len(question.prompt_ids) for question in questions]
        # Longer ones may be dropped; the run says what becomes of them.
        taken = [length for length in lengths if length <= config.data.max_prompt_tokens]
        limit = positions_of(config, model)
        refuse_longer_than(limit, config, name, max(taken, default=1))
    if weights:
        refuse_damaged_weights(name)


def _first_questions(
    config: Config, sources: Sequence[str], tokenizer: Tokenizer
) -> list[Question]:
    data = config.data
    return [
        question
        for source in sources
        for question in first_questions(
            source,
            tokenizer=tokenizer,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            id_field=data.id_field,
            system_prompt=data.system_prompt,
        )
    ]
