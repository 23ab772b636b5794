"""Rewards, verifier and evaluator, by config."""

from __future__ import annotations

from exgrpo_fast.build.models import make_decode
from exgrpo_fast.config import Config, ConfigError
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.hindsight.prompt import HindsightPrompt
from exgrpo_fast.experience.scoring import Scorer, Verifier
from exgrpo_fast.model.folder_reading import Tokenizer
from exgrpo_fast.rewards import RewardPool, RewardSample, RubricScorer
from exgrpo_fast.rewards.rubrics.judge import Judge
from exgrpo_fast.rollout.engine import RolloutEngine, Sampling
from exgrpo_fast.run.display import Screen
from exgrpo_fast.training.evaluate import Evaluator


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


def make_verifier(
    config: Config,
    rewards: RewardPool | None,
    tokenizer: Tokenizer,
    screen: Screen,
    processes: Processes = SINGLE_PROCESS,
) -> Verifier:
    """`rewards`: None on ranks other than 0."""
    scorer = make_scorer(config, rewards) if rewards is not None else None
    return Verifier(scorer, make_decode(tokenizer), screen, processes)


def make_scorer(config: Config, rewards: RewardPool) -> Scorer:
    if config.reward.judge is not None:
        return RubricScorer(rewards, Judge(**config.reward.judge.model_dump()))
    if judged := [name for name, rubric in rewards.rubrics.items() if rubric.judged]:
        raise ConfigError(
            f"reward.judge is not set, and only a judge can score the rubrics {', '.join(judged)}"
        )
    return rewards


def make_evaluator(
    config: Config,
    engine: RolloutEngine,
    verifier: Verifier,
    screen: Screen,
    *,
    prompt: HindsightPrompt | None = None,
    revisions: int = 0,
) -> Evaluator:
    sampling = Sampling(
        config.rollout.max_completion_tokens, config.eval.temperature, config.eval.top_p
    )
    return Evaluator(
        engine,
        verifier,
        screen,
        prompt=prompt,
        revisions=revisions,
        sampling=sampling,
        n=config.eval.n,
        ks=config.eval.k,
        seed=config.train.seed,
        num_examples=config.eval.examples,
    )
