"""A reward of your own: python examples/own_reward.py [--model ./my-model] [--steps 20]

Trains SmolLM2-135M-Instruct, which pip fetches once (93 MB), or a model of yours to answer sums and
nothing else. A reward is a function with TRL's signature; it runs in worker processes, where an error
or an endless loop costs the reward of one completion, not the run.
"""

import argparse

from exgrpo_fast import train


def only_the_sum(completions, answer, **columns):
    """1.0 for the sum alone, 0.2 for a completion that ends in it, and why: reasons are counted."""
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion.strip().removesuffix(".")
        if text == gold:
            rewards.append((1.0, "correct"))
        elif text.endswith(gold):
            rewards.append((0.2, "wordy"))
        else:
            rewards.append((0.0, "wrong"))
    return rewards


def sums(numbers):
    return [
        {"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in numbers for b in numbers
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub name, a .gguf file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/own-reward")
    options = parser.parse_args()
    run = train(
        options.model,
        sums(range(2, 30)),
        only_the_sum,
        recipe="exgrpo",
        out=options.out,
        max_steps=options.steps,
        lr=1e-5,
        prompts_per_step=8,
        group_size=8,
        max_completion_tokens=24,
        system_prompt="Answer with the number alone.",
        replay={"start_success_rate": None},  # from the first correct completion on
    )
    for step in run.metrics:
        print(step["step"], f"reward {step['reward_mean']:.2f}", step["reasons"])
    print("model:", run.checkpoint, " report:", run.report)
