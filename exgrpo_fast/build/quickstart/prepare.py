"""Make the quickstart's starting point: tokenizer, model, and a warm start to a middling policy."""

from __future__ import annotations

from pathlib import Path

from exgrpo_fast.build.quickstart.solutions import solved_examples
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.build.quickstart.warm_start import tokenize_examples, warm_start
from exgrpo_fast.config import Config, ConfigError, GymTask
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.run.display import Screen

LATE_GUESS_SHARE = 0.97  # of the examples of the last `guess_batches`
EXAMPLES_SEED = 1_000_000  # gym rows are drawn from seed + index: far from train and eval seeds


def prepare_quickstart(config: Config, path: Path, screen: Screen, *, device: str) -> None:
    """Write a Hugging Face folder with a policy that solves a third of the task.

    Held-out questions are kept out of the imitated examples. ConfigError when the task has no
    generated solutions.
    """
    task = config.data.train
    if not isinstance(task, GymTask) or task.gym != "chain_sum":
        raise ConfigError(
            "model.name quickstart: data.train must be the gym task chain_sum, the one with "
            "generated solutions; train another task from a model of yours"
        )
    settings, seed = config.warm_start, config.train.seed
    with screen.phase("make examples"):
        pairs = imitated_pairs(config, task)
        tokenizer = make_tokenizer(f"{question}\n{solution}" for question, solution in pairs[:2000])
        policy = Policy(
            make_model(tokenizer, seed=seed),
            device=device,
            max_tokens_per_microbatch=config.microbatch_tokens,
        )
        examples = tokenize_examples(pairs, tokenizer)
    warm_start(
        policy,
        examples,
        batches=settings.batches,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=seed,
        screen=screen,
    )
    if settings.guess_batches:
        guesses = imitated_pairs(config, task, guess_share=LATE_GUESS_SHARE)
        warm_start(
            policy,
            tokenize_examples(guesses, tokenizer),
            batches=settings.guess_batches,
            batch_size=settings.batch_size,
            lr=settings.lr / 10,  # a habit moves fast; what it knows of sums should stay
            seed=seed,
            screen=screen,
        )
    policy.model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def imitated_pairs(
    config: Config, task: GymTask, *, guess_share: float | None = None
) -> list[tuple[str, str]]:
    settings, seed = config.warm_start, config.train.seed
    larger = {"size": settings.examples, "seed": EXAMPLES_SEED * (1 + seed)}
    held_out: set[str] = set()
    if isinstance(config.data.eval, GymTask):
        held_out = {q for q, _ in solved_examples(config.data.eval, guess_share=0.0, seed=0)}
    pairs = solved_examples(
        task.model_copy(update=larger),
        guess_share=settings.guess_share if guess_share is None else guess_share,
        revision_share=settings.revision_share,
        seed=seed,
        leave_out=held_out,
    )
    return list(pairs)
