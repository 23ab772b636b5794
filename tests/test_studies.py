"""The studies of bench/: their arms are configs that load, and their pairs are fair."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from exgrpo_fast.config import load_config

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

import study_smollm2  # noqa: E402
import study_when_arms as arms  # noqa: E402
import study_when_table  # noqa: E402


@pytest.mark.parametrize("arm", arms.EVERY_ARM)
def test_an_arm_of_the_map_changes_what_it_names(arm: str) -> None:
    keys = {**arms.TOY, **arms.EVERY_ARM[arm]}
    config = load_config("quickstart", [(name, json.dumps(value)) for name, value in keys.items()])
    step_1 = "from step 1" in arm or arm == "FIFO"
    assert (config.replay.start_success_rate is None) == step_1
    assert config.rollout.group_size * config.rollout.prompts_per_step == 128
    published = load_config("quickstart", []).replay
    changed = {n for n in type(published).model_fields if getattr(published, n) != getattr(config.replay, n)}  # fmt: skip
    if arm in arms.CHOICES | arms.WEIGHTS_AND_DUPLICATES:
        assert len(changed) == 1
    if arm in arms.LOSING_CHOICES:
        assert len(changed) == 2


@pytest.mark.parametrize("arm", study_smollm2.ARMS)
def test_an_arm_on_smollm2_is_a_config(arm: str) -> None:
    words = study_smollm2.ARMS[arm].options.split()
    names = [word.removeprefix("--") for word in words[::2]]
    config = load_config("smollm2", list(zip(names, words[1::2], strict=True)))
    assert config.algorithm == load_config("smollm2", []).algorithm
    sources = config.replay.enabled, config.prior_resampling.enabled, config.hindsight.enabled
    assert sum(sources) == (arm != study_smollm2.BASELINE)


def test_a_gap_is_paired_by_seed_and_start() -> None:
    def run(arm: str, seed: int, start: float, end: float) -> dict:
        return {"rate": 0.03, "arm": arm, "seed": seed, "start": start, "end": end}

    runs = [run("ExGRPO", 0, 0.03, 0.5), run("ExGRPO", 1, 0.04, 0.6), run("ExGRPO", 2, 0.02, 0.9)]
    runs += [run("changed", 0, 0.03, 0.6), run("changed", 1, 0.05, 0.1), run("changed", 2, 0.02, 0.8)]  # fmt: skip
    found = study_when_table.gap(runs, 0.03, "changed", "ExGRPO")
    assert found is not None and found["values"] == pytest.approx([0.1, -0.1])  # not seed 1
    assert study_when_table.gap(runs, 0.10, "changed", "ExGRPO") is None


def test_all_that_was_generated_counts() -> None:
    plain = {"tokens_generated": 640, "completion_len_mean": 10.0}
    guided = {**plain, "prior_completions": 8, "hindsight_revisions": None}
    revised = {**plain, "hindsight_revisions": 5}
    assert study_smollm2.completions([plain, guided, revised]) == 3 * 64 + 8 + 5
