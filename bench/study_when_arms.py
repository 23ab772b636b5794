"""What study_when.py trains: which methods, from which starting success rates, with which budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Arms = dict[str, dict[str, Any]]  # name -> config keys

RATES = (0.01, 0.03, 0.10, 0.25, 0.50)
BASELINE = "on-policy"
ARMS: Arms = {
    BASELINE: {"replay.enabled": False},
    "questions only": {"replay.mixer": "question_only"},
    "ExGRPO": {},
    "ExGRPO without shaping": {"replay.weight": "importance"},
    "FIFO": {
        "replay.mixer": "fifo",
        "replay.replay_ratio": 1.78,
        "replay.start_success_rate": None,
        "replay.keep": "all",
        "replay.retire": False,
        "replay.weight": "clipped",
        "replay.store": {"max_trajectories": 960, "evict": "oldest", "deduplicate": False},
    },
    "EAPO": {
        "replay.enabled": False,
        "prior_resampling.enabled": True,
        "prior_resampling.threshold": 0.5,
        "prior_resampling.block_tokens": 8,
    },
    "HeRL": {
        "replay.enabled": False,
        "reward.functions": ["sums_rubrics"],
        "hindsight.enabled": True,
        "hindsight.max_prompt_tokens": 320,
    },
}
# Why ExGRPO ends where it does: without its start rule, and then without what it replays.
FROM_STEP_1 = {"replay.start_success_rate": None}
ABLATIONS: Arms = {
    "ExGRPO from step 1": FROM_STEP_1,
    "questions only from step 1": {**FROM_STEP_1, "replay.mixer": "question_only"},
}
ABLATION_RATES = (0.01, 0.03, 0.10)
# And which of its choices that makes: one changed at a time.
CHOICES: Arms = {
    "ExGRPO, sigma 1 (as printed)": {"replay.bucket_sigma": 1.0},
    "ExGRPO without retirement": {"replay.retire": False},
    "ExGRPO, at most 10 steps old": {"replay.max_age": 10},
    "ExGRPO, highest entropy": {"replay.select": "highest_entropy"},
}
CHOICE_RATES = (0.03, 0.10, 0.25)
# A replayed token of ratio 1 weighs beta / (1 + beta)^2 of a fresh one: 0.083 with the published beta
# of 0.1, 0.019 with 0.02, at most 0.25 (with 1), and 1 without shaping. Duplicates: a completion that
# a question has brought already is stored again, or a question keeps a single one.
WEIGHTS_AND_DUPLICATES: Arms = {
    "ExGRPO, shaping 0.02": {"replay.shaping": 0.02},
    "ExGRPO, shaping 1": {"replay.shaping": 1.0},
    "ExGRPO, duplicates stored": {"replay.store": {"deduplicate": False}},
    "ExGRPO, one stored a question": {"replay.store": {"max_per_question": 1}},
}
# The same keys once more with the code of the changed runs: a version that rounds its sums otherwise
# gives another run of the same seed, so pairs need one version. Each changed run of `CHOICES` and
# `WEIGHTS_AND_DUPLICATES` in the corner is compared with its own.
AGAIN: Arms = {
    f"{arm} again": keys
    for arm, keys in {
        BASELINE: ARMS[BASELINE],
        "ExGRPO": {},
        "ExGRPO from step 1": FROM_STEP_1,
    }.items()
}
# The same changes where ExGRPO loses most: replay from step 1 in the corner.
LOSING = "ExGRPO from step 1"


def from_step_1(arm: str) -> str:
    return arm.replace("ExGRPO", LOSING, 1)


LOSING_CHOICES: Arms = {
    from_step_1(arm): {**(ARMS | CHOICES)[arm], **FROM_STEP_1}
    for arm in ("ExGRPO, sigma 1 (as printed)", "ExGRPO without shaping")
}
# As many completions a step in groups of another size, where few groups carry a gradient.
CORNER = 0.03
GROUP_SIZES: Arms = {
    f"{arm}, groups of {size}": {
        **keys,
        "rollout.group_size": size,
        "rollout.prompts_per_step": 128 // size,
    }
    for size in (4, 16)
    for arm, keys in ((BASELINE, ARMS[BASELINE]), ("ExGRPO from step 1", FROM_STEP_1))
}
TOY = {
    "train.lr": 1e-4,
    "train.max_steps": 200,
    "train.max_tokens_per_microbatch": 8192,
    "rollout.prompts_per_step": 16,
    "rollout.group_size": 8,
    "rollout.max_completion_tokens": 40,
    "reward.functions": ["exact"],  # reasoning_gym gives a wrong 86 half a point where 8 is right
    "reward.workers": 1,
}
# Which arms run from which starts.
ARMS_AT: list[tuple[Arms, tuple[float, ...]]] = [
    (ARMS, RATES),
    (ABLATIONS, ABLATION_RATES),
    (CHOICES, CHOICE_RATES),
    (WEIGHTS_AND_DUPLICATES, (CORNER,)),
    (LOSING_CHOICES, (CORNER,)),
    (AGAIN, (CORNER,)),
    (GROUP_SIZES, (CORNER,)),
]
EVERY_ARM = {arm: keys for arms, _ in ARMS_AT for arm, keys in arms.items()}
# Completions of a run: four times as many where no method moves in the first 4,096.
BUDGETS = {0.01: 16_384, 0.03: 16_384, 0.10: 4096, 0.25: 4096, 0.50: 4096}


def cells(seeds: int) -> Iterator[tuple[float, str, int]]:
    """The baseline of a rate before the others, since EAPO's prior comes from it."""
    for seed in range(seeds):
        for rate in (0.03, 0.10, 0.01, 0.25, 0.50):
            for arm in arms_of(rate):
                yield rate, arm, seed


def arms_of(rate: float) -> list[str]:
    return [arm for arms, rates in ARMS_AT if rate in rates for arm in arms]
