"""What a step is made of, beside replay, on several processes: a prior, engines that work ahead,
policies that a KL term follows. The runs are those of one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_policy import served
from toy_runs import assert_same_course, make_inputs, run, steps
from transformers import PreTrainedTokenizerFast

from exgrpo_fast.build.quickstart.toy_model import make_model

GUIDED = """
    --prior_resampling.enabled true --prior_resampling.model prior --prior_resampling.threshold 0.05
    --prior_resampling.block_tokens 3 --prior_resampling.positive_only false
    --prior_resampling.importance mis --algorithm.kl.estimator k2
    --algorithm.kl.coef 0.1 --algorithm.kl.previous_share 0.5 --algorithm.kl.rebase_at_step 2
""".split()


@pytest.fixture(scope="module")
def folder(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_inputs(path, model_folder)
    make_model(tokenizer, seed=1, layers=1, width=48).save_pretrained(path / "prior")
    tokenizer.save_pretrained(path / "prior")
    return path


def done(folder: Path, count: int, out: str, *more: str) -> Path:
    ended = run(folder, count, out, "--max-steps", "4", *more)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return folder / out


@pytest.fixture(scope="module")
def guided(folder: Path) -> list[Path]:
    return [done(folder, count, f"guided_by_{count}", *GUIDED) for count in (1, 2)]


def test_two_processes_are_guided_by_a_prior_as_one_is(guided: list[Path]) -> None:
    one, two = guided
    assert_same_course(two, one)
    for found, wanted in zip(steps(two), steps(one), strict=True):
        assert wanted["prior_redrawn_frac"] > 0.0
        for name in ("prior_redrawn_frac", "prior_rounds", "prior_tokens", "prior_reward_mean"):
            assert found[name] == wanted[name], (found["step"], name)
        for name in ("kl_ref", "prior_kl", "prior_ratio_kept_mean", "prior_rate_mean"):
            assert found[name] == pytest.approx(wanted[name], abs=1e-6), (found["step"], name)
    assert steps(one)[-1]["kl_ref"] > 0.0


@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 3)])
def test_a_guided_run_goes_on_with_another_number(
    folder: Path, guided: list[Path], first: int, then: int
) -> None:
    """With the policies of its KL term: that of step 2 and that of the step before."""
    out = f"{first}_then_{then}"
    shutil.copytree(guided[first - 1], folder / out)
    done(folder, then, out, *GUIDED, "--resume", "2")
    assert_same_course(folder / out, guided[0])


@pytest.fixture(scope="module")
def url(model_folder: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    assert isinstance(tokenizer.eos_token_id, int)
    with served(model_folder, [tokenizer.eos_token_id]) as address:
        yield address


def of_servers(*urls: str) -> list[str]:
    return ["--rollout.engine", "vllm_server", "--rollout.server.urls", f"[{','.join(urls)}]"]


@pytest.mark.slow  # five runs of one to three processes
def test_servers_generate_ahead_for_several_as_for_one(
    folder: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run of 2 goes on with 1 and with 3; the server outlives all of them."""
    monkeypatch.setenv("EXGRPO_FAST_KEY", "any")
    ahead = [*of_servers(url), "--rollout.generate_ahead", "true"]
    one, two, three = (done(folder, count, f"ahead_of_{count}", *ahead) for count in (1, 2, 3))
    assert [m["staleness_mean"] for m in steps(one)] == [0.0, 1.0, 1.0, 1.0]
    # What was generated ahead is no part of a checkpoint, so step 3 is drawn by its weights.
    resumed = []
    for then in (1, 3):
        out = folder / f"ahead_then_{then}"
        shutil.copytree(two, out)
        resumed.append(done(folder, then, out.name, *ahead, "--resume", "2"))
    assert [m["staleness_mean"] for m in steps(resumed[0])] == [0.0, 1.0, 0.0, 1.0]
    for several, alone in ((two, one), (three, one), (resumed[1], resumed[0])):
        assert_same_course(several, alone)
        for found, wanted in zip(steps(several), steps(alone), strict=True):
            assert found["staleness_mean"] == wanted["staleness_mean"]


def test_a_server_that_dies_in_a_step_leaves_its_requests_to_the_other(
    folder: Path, url: str, model_folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXGRPO_FAST_KEY", "any")
    one = done(folder, 1, "served_by_one", *of_servers(url))
    with served(model_folder, [tokenizer.eos_token_id], dies_at_version=2) as mortal:
        two = done(folder, 2, "served_by_a_mortal", *of_servers(url, mortal))
    assert_same_course(two, one)
    assert [m["servers_live"] for m in steps(two)] == [2, 2, 1, 1]
    resent = [m["requests_resent"] for m in steps(two)]
    assert resent[2] > 0 and resent[:2] == [0, 0]
