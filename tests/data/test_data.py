"""Data: every malformed row is named with file, line and reason; good rows become questions."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exgrpo_fast.data import (
    BadRow,
    DataError,
    LoadedQuestions,
    Row,
    check_data,
    load_questions,
    parse_row,
    read_rows,
)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


GOOD = b'{"prompt": "1+1?", "answer": "2"}'
NESTED = b'{"prompt": "p", "answer": "2", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NESTED_LESS = b'{"prompt": "p", "answer": "2", "x": ' + b"[" * 100 + b"]" * 100 + b"}"

# --- malformed lines ------------------------------------------------------------------------------

MALFORMED = [
    (GOOD + GOOD, "two objects on one line"),
    (GOOD + b" and more", "text after the object"),
    (b"null", "null instead of an object"),
    (b"[1, 2]", "a list instead of an object"),
    (b'"text"', "a string instead of an object"),
    (b"7", "a number instead of an object"),
    (b'{"prompt": "p", "answer": NaN}', "NaN is not JSON"),
    (b'{"prompt": "p", "answer": -Infinity}', "-Infinity is not JSON"),
    (b'{"prompt": "p", "answer": 1e999}', "number out of range"),
    (b'{"prompt": "p", "answer": "1", "prompt": "q"}', "duplicate key 'prompt'"),
    (b'{"prompt": "p", "answer": ' + b"7" * 5000 + b"}", "integer of 5000 digits"),
    (NESTED, "nested too deeply"),
    (NESTED_LESS, "nested too deeply"),
    (b'{"prompt": "p \\ud800", "answer": "2"}', "lone surrogate in 'prompt'"),
    (b'{"prompt": "p", "answer": "2", "x": [{"y": "\\udfff"}]}', "lone surrogate in 'x'"),
    (b'{"prompt": "p\\u0000", "answer": "2"}', "NUL character in 'prompt'"),
    (b'{"prompt": "p\0", "answer": "2"}', "NUL byte"),
    (b"\0\0\0\0", "NUL byte"),
    (b'{"prompt": "p\xff", "answer": "2"}', "not UTF-8 (byte 14)"),
    (b'\xef\xbb\xbf{"prompt": "p", "answer": "2"}', "byte order mark inside the file"),
    (b'{"prompt": "p", "answer"', "truncated"),
    (b'{"prompt": "p", "answ', "truncated"),
    (b"{'prompt': 1}", "expecting property name enclosed in double quotes at column 2"),
    (b'{"prompt": "p"}', "missing field 'answer'"),
    (b'{"answer": "2"}', "missing field 'prompt'"),
    (b'{"prompt": " ", "answer": "2"}', "empty field 'prompt'"),
    (b'{"prompt": [], "answer": "2"}', "empty field 'prompt'"),
    (b'{"prompt": "p", "answer": ""}', "empty field 'answer'"),
    (b'{"prompt": null, "answer": "2"}', "field 'prompt': null instead of text or messages"),
    (b'{"prompt": 3, "answer": "2"}', "field 'prompt': a number instead of text or messages"),
    (b'{"prompt": "p", "answer": null}', "field 'answer': null instead of an answer"),
    (b'{"prompt": "p", "answer": []}', "empty field 'answer'"),
    (b'{"prompt": "p", "answer": "so it is $\\\\boxed{}$"}', "nothing in the last box"),
    (b'{"prompt": "p", "answer": "so it is #### "}', "nothing after '####'"),
    (b'{"prompt": ["p"], "answer": "2"}', "field 'prompt': message 1 is a string, not an object"),
    (b'{"prompt": [{"role": "user"}], "answer": "2"}',
     "field 'prompt': message 1 has no text 'content'"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_a_malformed_line_is_named_and_the_others_stay(tmp_path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b'\n{"prompt": "3+4?", "answer": "7"}\n')
    report = check_data(path)
    assert report.bad_rows == [BadRow(f"{path}:3", reason)]
    assert [(row.where, row.answer) for row in report.rows] == [
        (f"{path}:1", "2"),
        (f"{path}:4", "7"),
    ]


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_no_faults(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + '{"prompt": "é?", "answer": 3}'.encode()
    )
    report = check_data(path)
    assert report.bad_rows == []
    assert [(r.where, r.prompt, r.answer) for r in report.rows] == [
        (f"{path}:1", "1+1?", "2"),
        (f"{path}:4", "é?", "3"),
    ]


def test_a_truncated_last_line_is_named(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:-9])
    assert check_data(path).bad_rows == [BadRow(f"{path}:2", "truncated")]


@given(st.binary(max_size=200))
def test_no_line_raises_anything_but_a_reason(line: bytes) -> None:
    try:
        assert isinstance(parse_row(line), dict)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())))
def test_json_that_python_writes_is_read_back_unless_it_is_refused_by_name(row: dict) -> None:
    try:
        assert parse_row(json.dumps(row).encode()) == row
    except ValueError as error:
        assert str(error).startswith(("NUL character in", "lone surrogate in"))


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (72, "72"),
        (-3, "-3"),
        (0.5, "0.5"),
        (72.0, "72"),
        ("  7 ", "7"),
        ("a #### b\n#### 1,234 ", "1,234"),
    ],
)
def test_answers_become_text(tmp_path, value: object, answer: str) -> None:
    [row] = check_data(write(tmp_path / "a.jsonl", {"prompt": "p", "answer": value})).rows
    assert row.answer == answer


# --- fields, columns, ids -------------------------------------------------------------------------


def test_columns_hold_every_other_field(tmp_path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"question": "q", "answer": "work\n#### 72", "level": 3, "tests": [1], "meta": {"a": None}},
    )
    [row] = check_data(path, prompt_field="question").rows
    assert row.answer == "72"
    assert row.columns == {
        "level": 3,
        "tests": [1],
        "meta": {"a": None},
        "solution": "work\n#### 72",
    }


def test_the_answer_keeps_its_own_name_for_rewards_that_ask_for_it(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "q", "target": "5", "answer": "old"})
    [row] = check_data(path, answer_field="target").rows
    assert (row.answer, row.columns) == ("5", {"target": "5"})


def test_an_unknown_field_is_an_error_with_a_suggestion_never_a_guess(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", {"query": "q", "answer": "5", "level": 1})
    with pytest.raises(DataError) as error:
        check_data(path, prompt_field="prompt")
    assert str(error.value) == (
        f"data {path}: no field 'prompt'; fields there: query, answer, level; "
        "did you mean data.prompt_field query?"
    )
    with pytest.raises(DataError, match="did you mean data.answer_field answer?"):
        check_data(path, prompt_field="query", answer_field="anwser")
    with pytest.raises(DataError, match="no field 'key'.*; name one with data.id_field"):
        check_data(path, prompt_field="query", id_field="key")
    both = write(tmp_path / "b.jsonl", {"query": "q", "input": "p", "answer": "5"})
    with pytest.raises(DataError, match="name one with data.prompt_field"):
        check_data(both)


def test_ids_are_stable_and_unique(tmp_path) -> None:
    rows = [{"prompt": f"p{i}", "answer": str(i), "name": i % 3} for i in range(4)]
    path = write(tmp_path / "a.jsonl", *rows)
    ids = [row.id for row in check_data(path).rows]
    assert ids[0] == "6ea0a01609336b67"  # xxh3-64 of "p0\\0" + "0"
    assert len(set(ids)) == 4 and all(len(i) == 16 for i in ids)
    report = check_data(path, id_field="name")
    assert [row.id for row in report.rows] == ["0", "1", "2"]
    assert report.bad_rows == [BadRow(f"{path}:4", "another question than line 1, id '0'")]


# --- sources --------------------------------------------------------------------------------------


def test_json_lists_report_the_line_of_each_object(tmp_path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        '[\n {"prompt": "p",\n  "answer": 1},\n {"prompt": "q", "answer": NaN},\n'
        ' 7,\n {"prompt": "r",\n  "answer": "3"}\n]\n'
    )
    report = check_data(path)
    assert [(row.where, row.answer) for row in report.rows] == [
        (f"{path}:2", "1"),
        (f"{path}:6", "3"),
    ]
    assert report.bad_rows == [
        BadRow(f"{path}:4", "NaN is not JSON"),
        BadRow(f"{path}:5", "a number instead of an object"),
    ]
    path.write_text('[{"prompt": "p", "answer": 1},\n {"prompt": ')
    with pytest.raises(DataError, match="rows.json:2: truncated"):
        check_data(path)
    path.write_text('[{"prompt": "p", "answer": 1} {"prompt": "q", "answer": 1}]')
    with pytest.raises(DataError, match="rows.json:1: the list does not go on"):
        check_data(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="no rows"):
        check_data(path)


def test_json_lines_may_be_named_json(tmp_path) -> None:
    path = write(tmp_path / "rows.json", {"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 2})
    assert [row.answer for row in check_data(path).rows] == ["1", "2"]


def test_parquet_rows_are_plain_values(tmp_path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "prompt": "p",
            "answer": 1,
            "day": datetime.date(2024, 5, 1),
            "x": float("nan"),
            "raw": b"1",
        },
        {"prompt": "q", "answer": None, "day": None, "x": 0.5, "raw": None},
        {"prompt": "r\0", "answer": 3, "day": None, "x": 0.5, "raw": None},
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    report = check_data(path)
    [row] = report.rows
    assert (row.where, row.answer) == (f"{path}:1", "1")
    assert row.columns == {"day": "2024-05-01", "x": None, "raw": None, "answer": 1}
    assert report.bad_rows == [
        BadRow(f"{path}:2", "field 'answer': null instead of an answer"),
        BadRow(f"{path}:3", "NUL character in 'prompt'"),
    ]
    path.write_bytes(b"PAR1 no parquet at all")
    with pytest.raises(DataError, match="data file .*rows.parquet: ") as error:
        check_data(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line_with_the_nearest_name(tmp_path) -> None:
    write(tmp_path / "train.jsonl", {"prompt": "p", "answer": 1})
    with pytest.raises(DataError) as error:
        check_data(tmp_path / "trian.jsonl")
    assert str(error.value) == (
        f"data file {tmp_path}/trian.jsonl: no such file; did you mean {tmp_path}/train.jsonl?"
    )
    with pytest.raises(DataError, match=f"no folder {tmp_path}/nowhere"):
        check_data(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(DataError, match="unknown kind '.csv'; accepted: .jsonl, .ndjson, .json, "):
        check_data(tmp_path / "a.csv")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        check_data(tmp_path / "folder.jsonl")


def test_hub_datasets_are_loaded_by_name_configuration_and_split(monkeypatch) -> None:
    import datasets

    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub")
        return datasets.Dataset.from_list(
            [{"prompt": "p", "answer": 4}, {"prompt": "q", "answer": 5}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [first, second] = read_rows("org/maths")
    assert first == Row("org/maths:1", {"prompt": "p", "answer": 4})
    assert isinstance(second, Row) and second.fields["answer"] == 5
    assert len(check_data("org/maths:test").rows) == 2
    assert len(check_data("org/maths:main:test").rows) == 2
    assert calls == [
        ("org/maths", None, "train"),
        ("org/maths", None, "test"),
        ("org/maths", "main", "test"),
    ]
    with pytest.raises(
        DataError, match="no such file, and as a hub dataset: Dataset .* doesn't exist"
    ) as e:
        check_data("nobody/nothing")
    assert "\n" not in str(e.value)


def test_gym_tasks_become_rows_that_a_scorer_can_judge_elsewhere() -> None:
    pytest.importorskip("reasoning_gym")
    task = {"gym": "chain_sum", "size": 5, "seed": 1, "options": {"max_terms": 2}}
    report = check_data(task, prompt_field="question", id_field="key")  # names for files only
    assert [row.where for row in report.rows] == [
        f"reasoning-gym chain_sum:{i}" for i in range(1, 6)
    ]
    columns = report.rows[0].columns
    assert columns["reasoning_gym"] == "chain_sum"
    assert columns["gym_options"] == '{"max_terms": 2}'
    assert "'source_dataset': 'chain_sum'" in columns["metadata"]
    assert [row.id for row in check_data(task).rows] == [row.id for row in report.rows]
    with pytest.raises(
        DataError, match="unknown reasoning-gym task 'chainsum'; did you mean 'chain_sum'"
    ):
        check_data({"gym": "chainsum"})
    with pytest.raises(DataError, match="reasoning-gym task 'chain_sum': .*no_such"):
        check_data({"gym": "chain_sum", "options": {"no_such": 1}})


def test_a_gym_task_may_draw_a_question_twice_and_name_no_answer() -> None:
    pytest.importorskip("reasoning_gym")
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    report = check_data({"gym": "chain_sum", "size": 400, "options": options})
    assert (len(report.rows), report.bad_rows) == (400, [])
    assert len({row.id for row in report.rows}) == 400
    assert [row.answer for row in check_data({"gym": "graph_color", "size": 2}).rows] == ["", ""]


# --- questions ------------------------------------------------------------------------------------


def test_prompts_are_tokenized_with_the_chat_template(chat_tokenizer, tmp_path) -> None:
    chat = [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]
    path = write(
        tmp_path / "a.jsonl", {"prompt": "a", "answer": 1, "n": 2}, {"prompt": chat, "answer": 2}
    )
    loaded = load_questions(path, tokenizer=chat_tokenizer, system_prompt="be brief")
    texts = [
        "<system>be brief</system><user>a</user><assistant>",
        "<system>own</system><user>b</user><assistant>",
    ]
    assert isinstance(loaded, LoadedQuestions)
    assert [q.prompt for q in loaded.questions] == texts
    assert [q.prompt_ids for q in loaded.questions] == [ids_of(text) for text in texts]
    assert [q.answer for q in loaded.questions] == ["1", "2"]
    assert loaded.questions[0].columns == {"n": 2, "answer": 1}
    plain = load_questions(path, tokenizer=chat_tokenizer)
    assert plain.questions[0].prompt == "<user>a</user><assistant>"
    direct = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    assert plain.questions[0].prompt_ids == tuple(direct)
    assert plain.questions[0].id == loaded.questions[0].id  # not of the template, of the row


def test_without_a_template_the_text_is_tokenized_as_it_is(tokenizer, tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2=", "answer": 4})
    [question] = load_questions(path, tokenizer=tokenizer).questions
    assert (question.prompt, question.prompt_ids) == ("2+2=", (0, *ids_of("2+2=")))
    [question] = load_questions(path, tokenizer=tokenizer, system_prompt="s").questions
    assert question.prompt == "s\n\n2+2="
    chat = write(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": "x"}], "answer": 4})
    with pytest.raises(DataError, match="b.jsonl:1: the prompt is a list of chat messages, and"):
        load_questions(chat, tokenizer=tokenizer)


def test_a_row_that_the_template_refuses_is_a_bad_row(chat_tokenizer, tmp_path) -> None:
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(3)]
    rows.insert(1, {"prompt": [{"role": "tool", "content": "x"}], "answer": 9})
    path = write(tmp_path / "a.jsonl", *rows)
    loaded = load_questions(path, tokenizer=chat_tokenizer, max_bad_rows=0.5)
    assert [q.answer for q in loaded.questions] == ["0", "1", "2"]
    assert loaded.bad_rows == [BadRow(f"{path}:2", "the chat template refuses it: no tools")]


@pytest.mark.parametrize("limit", [9, 10, 11])
def test_overlong_prompts_are_dropped_with_a_count_or_refused(
    tokenizer, tmp_path, limit: int
) -> None:
    lengths = [3, 9, 10, 11, 1000]  # with the BOS in front
    rows = [{"prompt": "x" * (n - 1), "answer": n} for n in lengths]
    path = write(tmp_path / "a.jsonl", *rows)
    loaded = load_questions(path, tokenizer=tokenizer, max_prompt_tokens=limit)
    kept = [n for n in lengths if n <= limit]
    assert [len(q.prompt_ids) for q in loaded.questions] == kept
    assert loaded.num_overlong == len(lengths) - len(kept)
    with pytest.raises(DataError, match=f"a.jsonl:.: the prompt has .* tokens, above .* {limit} "):
        load_questions(
            path, tokenizer=tokenizer, max_prompt_tokens=limit, overlong_prompts="refuse"
        )
    with pytest.raises(DataError, match="no usable question in 5 rows: 0 malformed, 5 longer than"):
        load_questions(path, tokenizer=tokenizer, max_prompt_tokens=2)


def test_malformed_rows_are_skipped_up_to_the_limit(tokenizer, tmp_path) -> None:
    rows = [json.dumps({"prompt": f"p{i}", "answer": i}) for i in range(98)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*rows[:50], "null", *rows[50:], "{"]))
    loaded = load_questions(path, tokenizer=tokenizer, max_bad_rows=0.02)
    assert [q.answer for q in loaded.questions] == [str(i) for i in range(98)]
    assert [bad.where for bad in loaded.bad_rows] == [f"{path}:51", f"{path}:100"]
    with pytest.raises(DataError) as error:
        load_questions(path, tokenizer=tokenizer, max_bad_rows=0.019)
    assert str(error.value) == (
        f"data {path}: 2 of 100 rows are malformed, data.max_bad_rows allows 0.019 of them; "
        f"the first: {path}:51: null instead of an object"
    )


def test_limit_takes_the_first_good_questions(tokenizer, tmp_path) -> None:
    rows = [{"prompt": "x" * (1 + 50 * (i % 2)) + str(i), "answer": i} for i in range(20)]
    path = write(tmp_path / "a.jsonl", *rows)
    loaded = load_questions(path, tokenizer=tokenizer, max_prompt_tokens=20, limit=3)
    assert [q.answer for q in loaded.questions] == ["0", "2", "4"]


def test_ten_thousand_rows_load_quickly(chat_tokenizer, tmp_path) -> None:
    rows = [{"prompt": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(10_000)]
    path = write(tmp_path / "a.jsonl", *rows)
    started = time.perf_counter()
    loaded = load_questions(path, tokenizer=chat_tokenizer)
    assert [q.answer for q in loaded.questions[-2:]] == ["19996", "19998"]
    assert time.perf_counter() - started < 30.0  # about 1.5 s; row by row it would be minutes


def test_checking_a_file_loads_no_torch() -> None:
    import subprocess

    code = (
        "import sys, exgrpo_fast.data; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
