"""Rewards for the tests, in TRL's signature; run by the reward workers."""

from exgrpo_fast.rewards import Rubric


def right(prompts, completions, **columns):
    """1 for completions that begin with 'right'."""
    return [float(completion.startswith("right")) for completion in completions]


def even_length(prompts, completions, **columns):
    """1 for an even number of characters: a random policy gets about half of them."""
    return [float(len(completion) % 2 == 0) for completion in completions]


def always(prompts, completions, **columns):
    return [1.0] * len(completions)


def never(prompts, completions, **columns):
    return [0.0] * len(completions)


def raises_on_wrong(prompts, completions, **columns):
    """Right ones score 1; on any other completion the function breaks."""
    for completion in completions:
        if not completion.startswith("right"):
            raise RuntimeError("no idea")
    return [1.0] * len(completions)


def graded(prompts, completions, **columns):
    """'score 0.4 x' is worth 0.4; anything else cannot be judged."""
    words = [completion.split() for completion in completions]
    return [float(w[1]) if w[:1] == ["score"] else None for w in words]


def length_reward(prompts, completions, **columns):
    """Between 0 and 0.9, never full marks."""
    return [0.9 * min(len(completion), 20) / 20 for completion in completions]


rubrics = [
    Rubric("even", 1.0, lambda prompt, response, context: len(response) % 2 == 0, "Even length."),
    Rubric("third", 1.0, lambda prompt, response, context: len(response) % 3 == 0, "Thirds."),
    Rubric("short", 1.0, lambda prompt, response, context: len(response) < 20, "Be brief."),
]
