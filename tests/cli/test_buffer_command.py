"""`exgrpo-fast buffer` on the checkpoint of a real run of three steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import REWARDS, exit_code

from exgrpo_fast.build.saved_store import SavedStore
from exgrpo_fast.core.text import clean_text
from exgrpo_fast.experience.replay.inspect import (
    known_questions,
    stored_questions,
    stored_trajectories,
)
from exgrpo_fast.experience.replay.starting_pool import load_pool
from exgrpo_fast.model.folder_reading import make_decode
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.run.checkpoint.format import load_state, split_tensors, write_checkpoint
from exgrpo_fast.run.checkpoint.manifest import verify

HOSTILE = "\x1b[2J"  # clears the screen of whoever prints it


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder: Path) -> Path:
    """A run of 3 steps with replay from the first; tests read it and leave it alone."""
    folder = tmp_path_factory.mktemp("buffer")
    rows = [{"id": f"sum{i}", "prompt": f"{HOSTILE}{i} + 1?", "answer": "3"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = f"""
        --model.name {model_folder} --data.train {folder / "rows.jsonl"} --data.id_field id
        --data.check_answers false --reward.functions [{REWARDS}:even_length] --reward.workers 1
        --rollout.prompts_per_step 4 --rollout.group_size 4 --rollout.max_completion_tokens 8
        --replay.start_success_rate null --train.max_steps 3 --train.lr 1e-3
        --no-supervise
    """.split()
    assert exit_code("train", "exgrpo", "--out", folder / "run", *settings) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints" / "step_3"


@pytest.fixture(scope="module")
def stored(checkpoint: Path) -> dict[str, Any]:
    """The snapshot of the store."""
    return load_state(checkpoint)["replay"]["store"]


def last_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


# --- stats ----------------------------------------------------------------------------------------


def test_stats_agree_with_the_metrics_of_the_run(run, trained: Path, stored) -> None:
    result = run("buffer", "stats", trained, "--json")
    found, metrics = json.loads(result.out), last_metrics(trained)
    assert (result.code, found["step"], found["group_size"]) == (0, 3, 4)
    assert found["questions"] == metrics["replay_size"] > 0
    assert found["retired"] == metrics["retired_size"]
    assert found["trajectories"] == metrics["replay_trajectories"] > found["questions"]
    assert found["evicted"] == metrics["replay_evicted"] == 0
    assert [found["buckets"].get(str(k), 0) for k in (1, 2, 3)] == metrics["replay_buckets"]
    ages = [found["ages"].get(span, 0) for span in ("0", "1", "2-3")]
    assert ages == metrics["replay_ages"][:3] and sum(ages) == found["trajectories"]
    assert (found["tokens"], found["never_scored"]) == (int(stored["lengths"].sum()), 0)
    entropy = stored["trajectories"]["entropy"]
    assert found["entropy"]["mean"] == pytest.approx(float(entropy.mean()), rel=1e-6)


def test_stats_as_text(run, trained: Path, checkpoint: Path) -> None:
    found = json.loads(run("buffer", "stats", checkpoint, "--json").out)
    lines = run("buffer", "stats", trained).out.splitlines()
    words = [line.split() for line in lines]
    assert lines[0] == f"{checkpoint}, after step 3"
    assert ["questions", "stored", str(found["questions"])] in words
    assert ["trajectories", str(found["trajectories"])] in words
    mean, low, high = (found["length"][what] for what in ("mean", "min", "max"))
    assert ["length,", "in", "tokens", f"{mean:.3f}", str(low), str(high)] in words
    for bucket, count in found["buckets"].items():
        assert [f"{bucket}/4", str(count)] in [line[:2] for line in words]
    most = max(found["ages"].values())
    assert [line.count("#") for line in lines[-len(found["ages"]) :]] == [
        -(-40 * count // most) for count in found["ages"].values()
    ]


# --- ls and show ----------------------------------------------------------------------------------


def listed(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[1:]]


def test_ls_has_a_line_for_each_question(run, trained: Path, stored) -> None:
    shown = run("buffer", "ls", trained)
    assert shown.out.splitlines()[0].split() == (
        "question bucket visits last stored entropy born".split()
    )
    assert listed(shown.out) == [
        [
            q.id,
            f"{q.bucket}/4",
            str(q.visits),
            str(q.last_visit),
            str(q.trajectories),
            f"{q.lowest_entropy:.3f}",
            str(q.newest),
        ]
        for q in stored_questions(stored)
    ]


@pytest.mark.parametrize("sort", ["bucket", "trajectories", "visits", "entropy", "age"])
def test_ls_in_another_order(run, trained: Path, stored, sort) -> None:
    names = [q.id for q in stored_questions(stored, sort=sort)]
    assert [row[0] for row in listed(run("buffer", "ls", trained, "--sort", sort).out)] == names
    two = run("buffer", "ls", trained, "--sort", sort, "--limit", 2)
    assert [row[0] for row in listed(two.out)] == names[:2]


def test_ls_of_one_bucket(run, trained: Path, stored) -> None:
    for bucket in range(5):
        shown = run("buffer", "ls", trained, "--bucket", bucket)
        names = [q.id for q in stored_questions(stored) if q.bucket == bucket]
        assert (shown.code, [row[0] for row in listed(shown.out)]) == (0, names)


def test_show_has_the_question_and_every_trajectory(run, trained: Path, stored, tokenizer) -> None:
    question = stored_questions(stored, sort="trajectories")[0]
    shown = run("buffer", "show", trained, question.id)
    head, *completions = shown.out.split("\n--- ")
    assert shown.code == 0 and f"question  {question.id}\n" in head
    assert f"bucket {question.bucket}/4, visits: {question.visits}" in head
    assert f"{question.id.removeprefix('sum')} + 1?\nanswer    3\n" in head
    found = stored_trajectories(stored, question.id)
    assert len(completions) == len(found) == question.trajectories > 1
    for text, trajectory in zip(completions, found, strict=True):
        line, _, completion = text.partition("\n")
        assert line.startswith(f"reward 1, {len(trajectory.token_ids)} tokens")
        assert f", born in step {trajectory.birth_step}, " in line
        assert line.endswith(f"mean log-prob {trajectory.mean_logprob:.3f}")
        decoded = make_decode(tokenizer)(trajectory.token_ids)
        assert completion.rstrip("\n") == clean_text(decoded).rstrip("\n")


def test_show_of_a_retired_question(run, trained: Path, stored) -> None:
    retired = [q for q in known_questions(stored) if q.retired]
    assert retired
    for question in retired:
        shown = run("buffer", "show", trained, question.id)
        visited = f"visits: {question.visits}, the last in step {question.last_visit}"
        assert shown.code == 0 and f"retired, {visited}, trajectories: 0\n" in shown.out
        assert "---" not in shown.out


def test_what_others_wrote_cannot_steer_the_terminal(run, trained, stored, monkeypatch) -> None:
    monkeypatch.setattr(SavedStore, "decoder", lambda self: lambda ids: f"so {HOSTILE}4")
    shown = run("buffer", "show", trained, stored_questions(stored)[0].id)
    assert "\x1b" not in shown.out
    assert "so \\e[2J4\n" in shown.out and " + 1?\nanswer" in shown.out


def test_a_run_whose_data_is_gone_is_shown_without_the_prompt(run, checkpoint, tmp_path) -> None:
    shutil.copytree(checkpoint, tmp_path / "alone")
    question = stored_questions(load_state(checkpoint)["replay"]["store"])[0]
    shown = run("buffer", "show", tmp_path / "alone", question.id)
    assert shown.code == 0 and "answer" not in shown.out
    assert shown.out.count("--- reward") == question.trajectories


# --- export ---------------------------------------------------------------------------------------


def test_an_export_is_a_pool_for_another_run(run, trained, stored, tokenizer, tmp_path) -> None:
    file = tmp_path / "pool.parquet"
    result = run("buffer", "export", trained, "--out", file)
    count = len(stored["lengths"])
    assert (result.code, result.out) == (0, f"{file}: {count} trajectories\n")
    names = stored["questions"][::-1]  # the other run numbers them in another way
    pool = load_pool(file, names, vocabulary=stored["vocabulary"])
    owners = stored["trajectories"]["question"].tolist()
    assert [names[i] for i in pool.question.tolist()] == [stored["questions"][i] for i in owners]
    assert pool.tokens.values.tolist() == stored["token_ids"].tolist()
    assert torch.equal(pool.logprobs, stored["behaviour_logprobs"])
    assert torch.equal(pool.entropy, stored["trajectories"]["entropy"])
    texts = [
        make_decode(tokenizer)(ids.tolist())
        for ids in Ragged(stored["token_ids"], stored["lengths"]).split()
    ]
    assert pq.read_table(file).column("completion").to_pylist() == texts


# --- prune ----------------------------------------------------------------------------------------


def test_prune_writes_a_checkpoint_that_differs_in_the_store_alone(
    run, trained: Path, checkpoint: Path, stored, tmp_path: Path
) -> None:
    before = (checkpoint / "MANIFEST.json").read_bytes()
    out = tmp_path / "pruned"
    result = run("buffer", "prune", trained, "--max-per-question", 1, "--out", out)
    assert run("verify-checkpoint", out).code == 0
    verify(checkpoint)
    assert (checkpoint / "MANIFEST.json").read_bytes() == before
    state, pruned = load_state(checkpoint), load_state(out)
    smaller = pruned["replay"].pop("store")
    state["replay"].pop("store")
    assert same(state, pruned)
    for file in (checkpoint / "hf").iterdir():
        assert (out / "hf" / file.name).read_bytes() == file.read_bytes()
    dropped = len(stored["lengths"]) - len(smaller["lengths"])
    left = f"{len(smaller['lengths'])} trajectories stay, {dropped} were dropped"
    assert dropped > 0 and (result.code, result.out) == (0, f"{out}: {left}\n")
    kept = {q.id: (q.trajectories, q.lowest_entropy) for q in stored_questions(smaller)}
    assert kept == {q.id: (1, q.lowest_entropy) for q in stored_questions(stored)}


def same(ours: Any, theirs: Any) -> bool:
    (plain, tensors), (other_plain, others) = split_tensors(ours), split_tensors(theirs)
    equal = tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )
    return equal and plain == other_plain


def test_a_run_resumes_from_a_pruned_checkpoint(run, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "young" / "checkpoints" / "step_3"
    assert run("buffer", "prune", trained, "--max-age", 0, "--out", out).code == 0
    pruned = json.loads(run("buffer", "stats", tmp_path / "young", "--json").out)
    assert pruned["age"]["max"] == 0 < pruned["trajectories"]
    assert pruned["trajectories"] == last_metrics(trained)["replay_ages"][0]
    words = ["--out", tmp_path / "young", "--resume", "auto", "--max-steps", 4]
    words += ["--no-supervise"]
    assert run("train", trained / "config.yaml", *words).code == 0
    metrics = last_metrics(tmp_path / "young")
    assert metrics["step"] == 4 and metrics["replay_frac"] > 0
    assert sum(metrics["replay_ages"][2:]) == 0  # nobody is older than the limit and one step


# --- which checkpoint -----------------------------------------------------------------------------


def test_the_newest_checkpoint_that_verifies_is_taken(
    run, refused, trained: Path, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.copytree(checkpoint, copy / "checkpoints" / "step_9")
    damaged = copy / "checkpoints" / "step_9" / "hf" / "config.json"
    damaged.write_text("{}")
    found = run("buffer", "stats", copy, "--json")
    assert (found.code, json.loads(found.out)["step"]) == (0, 3)
    assert found.err.startswith(f"checkpoint passed over: {damaged}: damaged")
    assert f"{damaged}: damaged" in refused("buffer", "stats", copy / "checkpoints" / "step_9")


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_about_the_run_are_one_line(refused, tmp_path: Path) -> None:
    def write(name: str, replay: dict[str, Any]) -> Path:
        write_checkpoint(tmp_path / name, 1, Path.mkdir, {"num_steps": 1, "replay": replay})
        return tmp_path / name

    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    near = f"runs does not exist; did you mean {tmp_path / 'run'}?"
    (tmp_path / "run").mkdir()
    for words, said in [
        (["stats", tmp_path / "runs"], near),
        (["ls", tmp_path / "run"], "neither a run folder nor a checkpoint"),
        (["stats", tmp_path / "empty"], "checkpoints: no checkpoint that verifies"),
        (["stats", write("plain", {})], "keeps no experience, its run had no replay"),
        (["show", write("old", {"store": {"index": {}}}), "a"], "saved by an early version"),
        (["export", tmp_path / "plain", "--out", tmp_path / "x"], "keeps no experience"),
    ]:
        assert said in refused("buffer", *words)
    assert not (tmp_path / "x").exists()


def test_mistakes_about_what_is_asked_are_one_line(
    refused, trained: Path, checkpoint: Path, stored, tmp_path: Path
) -> None:
    (tmp_path / "there").write_text("mine")
    name = stored_questions(stored)[0].id
    out = ["--out", tmp_path / "new"]
    for words, said in [
        (["show", trained, f"{name}x"], f"'{name}x'; did you mean 'sum"),
        (["ls", trained, "--bucket", 5], "--bucket 5: the buckets are 0 to 4"),
        (["ls", trained, "--bucket", -1], "--bucket: -1 is not a number from 0 on"),
        (["ls", trained, "--sort", "entropi"], "did you mean 'entropy'?"),
        (["ls", trained, "--limt", 1], "unknown argument '--limt'; did you mean '--limit'?"),
        (["stat", trained], "did you mean 'stats'?"),
        (["prune", trained, *out], "give --max-age STEPS, --max-per-question N or both"),
        (["prune", trained, "--max-age", 1], "the following arguments are required: --out"),
        (["prune", trained, "--max-age", 1, "--out", trained], f"{trained}: is there already"),
        (["prune", trained, "--max-age", 1, "--out", tmp_path / "there/x"], "Not a directory"),
        (["prune", trained, "--max-age", 1, "--out", checkpoint / "x"], "inside the checkpoint"),
        (["export", trained, "--out", checkpoint / "x.parquet"], "inside the checkpoint"),
        (["export", trained, "--out", tmp_path / "there"], "there: is there already"),
        (["export", trained, "--out", tmp_path / "no" / "x"], "No such file or directory"),
    ]:
        assert said in refused("buffer", *words)
    assert (tmp_path / "there").read_text() == "mine" and not (tmp_path / "new").exists()
    verify(checkpoint)
