"""Rows of your own: python examples/own_data.py [--model ./my-model] [--steps 20]

Rows are dicts in a list, a `datasets.Dataset`, a file of JSON lines or a name on the hub. Here they are
made in this file, with its own column names and a split for the evaluation before and after.
"""

import argparse

from exgrpo_fast import evaluate, train

SYSTEM = "Answer with the number."
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelled(number):
    """7 -> seven, 42 -> forty-two; below 100."""
    if number < len(ONES):
        return ONES[number]
    tens, ones = TENS[number // 10 - 2], number % 10
    return f"{tens}-{ONES[ones]}" if ones else tens


def row(number):
    """Columns beside question and answer reach the reward by their names."""
    return {
        "task": f"Write {spelled(number)} in digits.",
        "solved": number,
        "digits": len(str(number)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub name, a .gguf file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="runs/own-data")
    options = parser.parse_args()

    held_out = [row(number) for number in range(100) if number % 4 == 3]
    rows = [row(number) for number in range(100) if number % 4 != 3]
    columns = {"data.prompt_field": "task", "data.answer_field": "solved", "system_prompt": SYSTEM}
    lengths = {"max_completion_tokens": 24}

    before = evaluate(options.model, held_out, "last_number", n=2, **columns, **lengths)
    run = train(
        options.model,
        rows,
        "last_number",  # a built-in reward: the last number of the completion
        recipe="exgrpo",
        out=options.out,
        max_steps=options.steps,
        lr=1e-5,
        prompts_per_step=8,
        group_size=8,
        replay={"start_success_rate": None},  # from the first correct completion on
        **columns,
        **lengths,
    )
    after = evaluate(str(run.checkpoint), held_out, "last_number", n=2, **columns, **lengths)
    print(f"avg@2 on held-out rows: {before['avg_at_n']:.1%} before, {after['avg_at_n']:.1%} after")
