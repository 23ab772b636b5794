"""Files of the shape in which data sets are published are read as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exgrpo_fast.build.data import load_data
from exgrpo_fast.config import ConfigError, validate
from exgrpo_fast.data import BadRow, DataError, check_data, load_questions
from exgrpo_fast.rewards import RewardPool, RewardSample, check_golds
from exgrpo_fast.run.display import Screen

SHAPES = Path(__file__).parent / "shapes"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("shape", "prompt_field", "answer_field", "prompt", "answers"),
    [
        ("gsm8k", "question", "answer", "Ada has 4 pens and buys", ["12", "999", "21"]),
        ("math", "problem", "solution", "What is $3^2$?", ["9", "121", "144"]),
        (
            "math500",
            "problem",
            "answer",
            "What is $3-",
            [r"\frac{5}{2}", r"\frac{21}{2}", r"\frac{23}{2}"],
        ),
        ("verl", "prompt", "reward_model.ground_truth", "What is 3 + 3?", ["6", "22", "24"]),
        ("dapo_math", "prompt", "reward_model.ground_truth", "Solve the", ["9", "33", "36"]),
        ("trl_prompt", "prompt", "solution", "What is 3 + 1?", ["$4$", "$12$", "$13$"]),
        ("trl_text", "prompt", "answer", "What is 3 + 1?", ["4", "12", "13"]),
        ("trl_parts", "prompt", "answer", "What is 3 + 1?", ["4", "12", "13"]),
        ("open_r1", "problem", "answer", "What is 3 - 1?", ["2", "10", "11"]),
        ("sft_messages", "messages", "answer", "What is 3 - 1?", ["2", "10", "11"]),
    ],
)
def test_questions_and_answers_are_found(
    shape: str, prompt_field: str, answer_field: str, prompt: str, answers: list[str]
) -> None:
    report = check_data(SHAPES / f"{shape}.jsonl")
    assert report.bad_rows == []
    assert [row.answer for row in report.rows] == answers
    first = report.rows[0].prompt
    assert (first if isinstance(first, str) else first[-1]["content"]).startswith(prompt)
    said = [f"prompts from '{prompt_field}'"] * (prompt_field != "prompt")
    said += [f"answers from '{answer_field}'"] * (answer_field != "answer")
    chosen = [note for note in report.notes if " from " in note]
    assert chosen == [f"data {SHAPES}/{shape}.jsonl: {', '.join(said)}"] * bool(said)


def test_their_answers_earn_the_reward_and_pass_the_check_of_golds() -> None:
    names = ["gsm8k", "math", "math500", "verl", "dapo_math", "trl_prompt", "trl_parts", "open_r1"]
    rows = [row for name in names for row in check_data(SHAPES / f"{name}.jsonl").rows]
    with RewardPool(["math_verify"], workers=1) as pool:
        assert check_golds(rows, pool) == []
        samples = [RewardSample("", f"\\boxed{{{r.answer}}}", r.answer, r.columns) for r in rows]
        assert {scored.reward for scored in pool.score(samples)} == {1.0}


def test_an_answer_of_any_type_reaches_the_reward_as_the_row_has_it(tmp_path) -> None:
    (tmp_path / "typed.py").write_text(
        "def typed(prompt, completion, answer):\n    return 1.0, f'{type(answer).__name__} {answer}'\n"
    )
    [countdown, *_] = check_data(SHAPES / "verl_countdown.jsonl").rows
    assert json.loads(countdown.answer) == {"numbers": [3, 3], "target": 6}
    rows = [{"prompt": f"p{i}", "answer": a} for i, a in enumerate([7, 7.0, "7", True, [7, 8]])]
    rows = check_data(write(tmp_path / "a.jsonl", *rows)).rows
    assert [row.answer for row in rows] == ["7", "7", "7", "True", "[7, 8]"]
    with RewardPool([f"{tmp_path}/typed.py:typed"], workers=1) as pool:
        samples = [RewardSample("", "", row.answer, row.columns) for row in [countdown, *rows]]
        reasons = [scored.reason for scored in pool.score(samples)]
    assert reasons == [
        "dict {'numbers': [3, 3], 'target': 6}",
        "int 7",
        "float 7.0",
        "str 7",
        "bool True",
        "list [7, 8]",
    ]


@pytest.mark.parametrize("function", ["exact", "gsm8k", "math_verify"])
def test_an_integer_that_a_table_has_widened_is_that_integer(tmp_path, function: str) -> None:
    rows = [{"prompt": "p", "answer": 7.0}, {"prompt": "q", "answer": 0.5}]
    rows = check_data(write(tmp_path / "a.jsonl", *rows)).rows
    texts = [("7", "7.0", "8"), ("0.5", ".50", "0.6")]
    with RewardPool([function], workers=1) as pool:
        assert check_golds(rows, pool) == []
        samples = [
            RewardSample("", f"\\boxed{{{text}}}", row.answer, row.columns)
            for row, of_row in zip(rows, texts, strict=True)
            for text in of_row
        ]
        assert [scored.reward for scored in pool.score(samples)] == [1.0, 1.0, 0.0] * 2


# --- which field ----------------------------------------------------------------------------------


def test_the_first_of_the_usual_fields_is_taken(tmp_path) -> None:
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": "m"}],
        "question": "q",
        "problem": "p",
        "prompt": "x",
        "solution": "3",
        "answer": "2",
    }
    for name, prompt in [("prompt", "x"), ("problem", "p"), ("question", "q"), ("messages", None)]:
        [found] = check_data(write(tmp_path / "a.jsonl", row)).rows
        assert found.prompt == (prompt or row["messages"])
        del row[name]
    with pytest.raises(DataError, match="no field 'prompt', 'problem', 'question', 'messages'; "):
        check_data(tmp_path / "a.jsonl") if write(tmp_path / "a.jsonl", row) else None


def test_a_field_may_be_nested_and_a_hint_names_its_path(tmp_path) -> None:
    row = {"input": {"text": "q", "id": 5}, "meta": {"key": {"value": "4"}}, "a.b": "flat"}
    path = write(tmp_path / "a.jsonl", row)
    fields = {
        "prompt_field": "input.text",
        "answer_field": "meta.key.value",
        "id_field": "input.id",
    }
    [found] = check_data(path, **fields).rows
    assert (found.prompt, found.answer, found.id) == ("q", "4", "5")
    assert (
        check_data(path, prompt_field="a.b", answer_field="meta.key.value").rows[0].prompt == "flat"
    )
    with pytest.raises(DataError, match="input.text, input.id, meta.key.value, a.b; did you mean "
                       "data.answer_field meta.key.value?"):  # fmt: skip
        check_data(path, prompt_field="input.text", answer_field="meta.key.valeu")
    report = check_data(
        write(tmp_path / "b.jsonl", row, {**row, "meta": {"key": 1}}),
        prompt_field="input.text",
        answer_field="meta.key.value",
    )
    assert report.bad_rows == [BadRow(f"{tmp_path}/b.jsonl:2", "missing field 'meta.key.value'")]


def test_parts_that_are_no_text_are_refused_by_name(tmp_path) -> None:
    image = [{"type": "image", "url": "x"}, {"type": "text", "text": "What is this?"}]
    rows = [{"prompt": [{"role": "user", "content": image}], "answer": 1}]
    [bad] = check_data(write(tmp_path / "a.jsonl", *rows)).bad_rows
    assert bad.reason == "field 'prompt': message 1 has a part that is no text: image"


# --- repeated questions ---------------------------------------------------------------------------


def test_repeated_questions_are_merged_with_a_count(tokenizer, tmp_path) -> None:
    rows = [{"prompt": f"p{i % 20}", "answer": i % 20, "n": i} for i in range(2000)]
    path = write(tmp_path / "a.jsonl", *rows)
    loaded = load_questions(path, tokenizer=tokenizer)
    assert [q.columns["n"] for q in loaded.questions] == list(range(20))
    assert loaded.bad_rows == []
    assert loaded.notes == [f"data {path}: 1980 rows repeat a question: merged"]
    report = check_data(path)
    assert (report.num_good, report.num_repeated, report.num_rows) == (20, 1980, 2000)


def test_one_id_of_two_questions_is_a_bad_row(tmp_path) -> None:
    rows = [{"id": 1, "prompt": p, "answer": 2} for p in ("1 + 1?", "1 + 1?", "4 - 2?")]
    report = check_data(write(tmp_path / "a.jsonl", *rows), id_field="id")
    assert (report.num_good, report.num_repeated) == (1, 1)
    assert [bad.reason for bad in report.bad_rows] == ["another question than line 1, id '1'"]


def test_a_question_with_two_answers_is_said(tokenizer, tmp_path) -> None:
    rows = [{"prompt": "1 + 1?", "answer": gold} for gold in ("2", "2", "3")]
    path = write(tmp_path / "a.jsonl", *rows)
    loaded = load_questions(path, tokenizer=tokenizer)
    assert [q.answer for q in loaded.questions] == ["2", "3"]
    assert loaded.notes == [
        f"data {path}: 1 rows repeat a question: merged",
        f"data {path}: 1 rows ask a question again, with another answer: all kept",
    ]


# --- a last message of the assistant --------------------------------------------------------------


def test_a_message_that_the_assistant_has_begun_is_continued(chat_tokenizer) -> None:
    loaded = load_questions(
        SHAPES / "prefill.jsonl", tokenizer=chat_tokenizer, system_prompt="Go on."
    )
    assert loaded.questions[0].prompt == (
        "<system>Go on.</system><user>What is 3 - 1?</user><assistant>"
        "Let me think in 2 steps.\n<think>\n"
    )
    assert len(loaded.questions) == 3
    assert "3 rows end with a message of the assistant: completions continue it" in loaded.notes[1]


@pytest.mark.parametrize(
    "text",
    [
        r"It is \boxed{12}.",
        "6 + 6 is 12\n#### 12",
        "<answer>12</answer>",
        "So the answer is 12.",
        "There are 12 of them",
        "**12**",
    ],
)
def test_an_answer_of_the_assistant_is_left_out_of_the_prompt(
    chat_tokenizer,
    tmp_path,
    text: str,
) -> None:
    messages = [{"role": "user", "content": "6 + 6?"}, {"role": "assistant", "content": text}]
    path = write(tmp_path / "a.jsonl", {"messages": messages, "answer": "12"})
    loaded = load_questions(path, tokenizer=chat_tokenizer)
    assert loaded.questions[0].prompt == "<user>6 + 6?</user><assistant>"
    assert loaded.notes[1].endswith(
        "1 rows end with the assistant's answer: left out of the prompt"
    )


@pytest.mark.parametrize(
    "text", ["Let me see.", "I have 12 steps.\n<think>", "Step 12:", r"The answer is \boxed{"]
)
def test_what_gives_no_answer_is_no_answer(chat_tokenizer, tmp_path, text: str) -> None:
    messages = [{"role": "user", "content": "6 + 6?"}, {"role": "assistant", "content": text}]
    path = write(tmp_path / "a.jsonl", {"messages": messages, "answer": "12"})
    [question] = load_questions(path, tokenizer=chat_tokenizer).questions
    assert question.prompt == f"<user>6 + 6?</user><assistant>{text}"


def test_an_answer_without_a_question_is_a_bad_row(tmp_path) -> None:
    row = {"messages": [{"role": "assistant", "content": r"\boxed{2}"}], "answer": 2}
    [bad] = check_data(write(tmp_path / "a.jsonl", row)).bad_rows
    assert bad.reason == "field 'messages': nothing but the assistant's answer"


# --- training and evaluation ----------------------------------------------------------------------


def test_a_file_that_is_all_held_out_leaves_nothing_to_train_on(tokenizer) -> None:
    path = str(SHAPES / "trl_text.jsonl")
    config = validate({"data": {"train": path, "eval": path}})
    with pytest.raises(ConfigError, match="data.train: all of its 3 questions are held out"):
        load_data(config, tokenizer, Screen())
    config = validate({"data": {"train": path, "eval": path, "eval_size": 1}})
    train, held_out = load_data(config, tokenizer, Screen())
    assert (len(train), len(held_out)) == (2, 1)
