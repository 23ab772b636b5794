"""The reward workers of a config, tried on a row before anything slow begins. Loads no torch."""

from __future__ import annotations

from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.core.types import Question
from exgrpo_fast.rewards import RewardPool, RewardSample, RubricScorer
from exgrpo_fast.rewards.rubrics.judge import Judge


def make_rewards(config: Config) -> RewardPool:
    reward = config.reward
    return RewardPool(
        reward.functions,
        weights=reward.weights,
        workers=reward.workers,
        timeout_seconds=reward.timeout_seconds,
    )


def check_rewards(config: Config, rewards: RewardPool | None, question: Question) -> None:
    """Try every reward, and the judge, on a row of the data.

    RewardError or JudgeError, in one line, where one fails whatever the completion says.
    """
    assert rewards is not None
    make_scorer(config, rewards).check(
        *(
            RewardSample(
                question.prompt,
                text.format(question.answer),
                question.answer,
                {**question.columns, **ALWAYS},
            )
            for text in PROBES
        )
    )


# The ways to answer that rewards look for: one that raises on all of them raises on every sample.
PROBES = ("<answer>{}</answer>", "The answer is {}.", "So it is $\\boxed{{{}}}$.")
ALWAYS = {"truncated": False}  # what a verifier adds to the columns of a row


def make_scorer(config: Config, rewards: RewardPool) -> RubricScorer | RewardPool:
    if config.reward.judge is not None:
        return RubricScorer(rewards, Judge(**config.reward.judge.model_dump()))
    if judged := [name for name, rubric in rewards.rubrics.items() if rubric.judged]:
        raise ConfigError(
            f"reward.judge is not set, and only a judge can score the rubrics {', '.join(judged)}"
        )
    return rewards
