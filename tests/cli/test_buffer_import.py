"""`exgrpo-fast buffer import` on what TRL and verl wrote themselves, on our logs, and on bad input.

`logs/trl_completions.parquet`: step 1 of TRL 1.16's GRPOTrainer with `log_completions` on a random
model with the tokenizer of `conftest.py`. `logs/verl_7.jsonl`: six completions of the same model's
tokenizer, written by the dump of verl 0.9.1's `rollout_data_dir`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import exit_code
from transformers import AutoModelForCausalLM

from exgrpo_fast.experience.prior.compatibility import fingerprint
from exgrpo_fast.experience.replay.starting_pool import load_pool, write_pool
from exgrpo_fast.run.sinks import CompletionLog

LOGS = Path(__file__).parent / "logs"
IDS = [f"sum{i}" for i in range(4)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"id": name, "prompt": f"What is {i} + 1?", "answer": str(i + 1)}
        for i, name in enumerate(IDS)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def imports(tmp_path: Path, data: Path, model_folder: Path, capsys):
    """(exit code, rows of the new file or None, output)"""

    def call(*files: Path, **options: object):
        out = tmp_path / f"pool{len(list(tmp_path.iterdir()))}.parquet"
        words: list[object] = ["buffer", "import", *files, "--out", out]
        words += ["--model", model_folder, "--data", data, "--id-field", "id"]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", value]
        capsys.readouterr()
        code = exit_code(*words)
        captured = capsys.readouterr()
        rows = pq.read_table(out).to_pylist() if out.exists() else None
        return code, rows, captured.out + captured.err

    return call


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def log_probs(model_folder: Path, prompt: list[int], tokens: list[int]) -> list[float]:
    """From full logits in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager").double()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def test_trl_completions_are_scored_by_the_model(imports, tokenizer, model_folder) -> None:
    logged = pq.read_table(LOGS / "trl_completions.parquet").to_pylist()
    code, rows, output = imports(LOGS / "trl_completions.parquet")
    assert code == 0 and len(rows) == len(logged) == 8
    assert "8 trajectories of 2 questions" in output and "8 scored by the model" in output
    for row, source in zip(rows, logged, strict=True):
        question = source["prompt"][0]["content"]
        text = source["completion"][0]["content"]
        assert row["question_id"] == f"sum{question.split()[2]}"
        assert row["token_ids"] == tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        assert row["reward"] == source["even_length"] + source["says_something"]
        assert row["success"] == (row["reward"] == 2.0)  # both functions gave full marks
        assert row["birth_step"] == 1 and row["completion"] == text
    prompt = tokenizer.apply_chat_template(
        logged[0]["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    expected = log_probs(model_folder, prompt, rows[0]["token_ids"])
    assert rows[0]["behaviour_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_a_threshold_says_what_is_correct(imports) -> None:
    _, rows, _ = imports(LOGS / "trl_completions.parquet", correct_from=1)
    assert all(row["success"] for row in rows)


def test_verl_prompts_are_found_without_their_special_tokens(imports, tokenizer) -> None:
    code, rows, output = imports(LOGS / "verl_7.jsonl")
    assert code == 0
    assert [(row["question_id"], row["completion"], row["reward"]) for row in rows] == [
        ("sum0", "<answer>1</answer>", 1.0),
        ("sum0", "wrong", 0.0),
        ("sum0", "right 7", 0.0),
        ("sum1", "<answer>2</answer>", 1.0),
    ]
    assert {row["birth_step"] for row in rows} == {7}
    assert "left out: 1 no text, 1 repeated" in output


def test_our_own_completion_tables(imports, tmp_path, tokenizer) -> None:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 1?"}], add_generation_prompt=True, tokenize=False
    )
    row = {"question_id": "q", "source": "fresh", "prompt": chat, "answer": "3", "reason": "ok"}
    path = CompletionLog(tmp_path).write(
        12,
        [
            {**row, "completion": "right 3", "reward": 1.0, "truncated": False},
            {**row, "completion": "right", "reward": 0.5, "truncated": True},
        ],
    )
    _, rows, _ = imports(path)
    assert [r["token_ids"] for r in rows] == [
        tokenizer("right 3<|end|>")["input_ids"],
        tokenizer("right")["input_ids"],  # the limit ended it
    ]
    assert [(r["success"], r["reward"], r["birth_step"]) for r in rows] == [
        (True, 1.0, 12),
        (False, 0.5, 12),
    ]


def test_an_export_is_taken_as_it_is(imports, tmp_path, tokenizer) -> None:
    ids = tokenizer("right 3<|end|>")["input_ids"]
    values = {
        "question_id": ["sum2"],
        "token_ids": [ids],
        "behaviour_logprobs": [[-0.5] * len(ids)],
        "birth_step": [4],
        "reward": [0.75],
        "success": [True],
        "truncated": [False],
        "entropy": [0.25],
        "completion": ["right 3"],
    }
    write_pool(values, tmp_path / "export.parquet", fingerprint(tokenizer.get_vocab()))
    code, rows, output = imports(tmp_path / "export.parquet")
    assert code == 0 and "0 scored by the model" in output
    assert rows == [{name: column[0] for name, column in values.items()}]

    write_pool(values, tmp_path / "other.parquet", "another tokenizer")
    code, rows, output = imports(tmp_path / "other.parquet")
    assert (code, rows) == (2, None) and "another tokenizer" in output and output.count("\n") == 1


def test_several_files_become_one_pool_that_a_run_loads(imports, tmp_path, tokenizer) -> None:
    plain = lines(
        tmp_path / "plain.jsonl",
        {"prompt": "What is 3 + 1?", "completion": "right 4", "reward": 1},
        {"prompt": "What is 9 + 9?", "completion": "right 4", "reward": 1},
        {"prompt": "What is 3 + 1?", "completion": "no reward"},
        {"prompt": "What is 3 + 1?", "completion": "right " * 30, "reward": 1},
        {"completion": "no prompt", "reward": 1},
    )
    with plain.open("a") as file:
        file.write('{"prompt": "torn\n')
    code, rows, output = imports(plain, LOGS / "verl_7.jsonl", max_completion_tokens=24)
    assert code == 0 and len(rows) == 5
    for reason in (
        "1 of an unknown question",
        "1 no reward",
        "1 longer than 24 tokens",
        "1 no prompt and completion",
        "1 unreadable",
    ):
        assert reason in output
    path = next(tmp_path.glob("pool*.parquet"))
    pool = load_pool(path, IDS, vocabulary=fingerprint(tokenizer.get_vocab()))
    assert pool.question.tolist() == [3, 0, 1]
    assert torch.isfinite(pool.logprobs).all() and (pool.logprobs < 0).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "Who?", "completion": "x", "reward": 1}\n', "1 of an unknown question"),
        ("", "can be used"),
        (None, "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(imports, tmp_path, content, said) -> None:
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    before = {p.name for p in tmp_path.iterdir()}
    code, rows, output = imports(path)
    assert (code, rows) == (2, None)
    assert said in output and output.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == before
