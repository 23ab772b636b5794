from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from exgrpo_fast.build.quickstart.prepare import (
    imitated_pairs,
    prepare_quickstart,
    tokenize_examples,
    warm_start,
)
from exgrpo_fast.build.quickstart.solutions import guess, solved_examples, worked_solution
from exgrpo_fast.build.quickstart.toy_model import make_model, make_tokenizer
from exgrpo_fast.config import ConfigError, GymTask, load_config
from exgrpo_fast.model.packing import Ragged
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.run.display import Screen

SUMS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}


def test_steps_are_shown_from_left_to_right() -> None:
    assert worked_solution("12 - 5 + 7") == "12-5=7\n7+7=14\n<answer>14</answer>"
    assert worked_solution("3 - 9") == "3-9=-6\n<answer>-6</answer>"


def test_every_worked_solution_ends_in_the_tasks_own_answer() -> None:
    import reasoning_gym

    task = GymTask(gym="chain_sum", size=200, seed=4, options=SUMS)
    rows = reasoning_gym.create_dataset("chain_sum", size=200, seed=4, **SUMS)
    solutions = solved_examples(task, guess_share=0.0, seed=0)
    for row, (question, solution) in zip(rows, solutions, strict=True):
        assert question == row["question"]
        assert solution.endswith(f"\n<answer>{row['answer']}</answer>")


def test_guesses_are_near_and_wrong() -> None:
    rng = np.random.default_rng(0)
    errors = [int(re.sub(r"\D*?(-?\d+)\D*", r"\1", guess("20", rng))) - 20 for _ in range(2000)]
    assert sorted(set(errors)) == [-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]


def test_the_share_of_guesses_is_as_asked() -> None:
    task = GymTask(gym="chain_sum", size=1000, seed=4, options=SUMS)
    pairs = list(solved_examples(task, guess_share=0.5, seed=1))
    assert sum("\n" not in s for _, s in pairs) == pytest.approx(500, abs=50)
    assert pairs == list(solved_examples(task, guess_share=0.5, seed=1))


def test_held_out_questions_are_not_imitated() -> None:
    config = load_config("quickstart", [("warm_start.examples", "3000")])
    assert isinstance(config.data.train, GymTask) and isinstance(config.data.eval, GymTask)
    held_out = {q for q, _ in solved_examples(config.data.eval, guess_share=0.0, seed=0)}
    pairs = imitated_pairs(config, config.data.train)
    assert len(held_out) >= 200 and len(pairs) > 2000
    assert not held_out & {question for question, _ in pairs}


def test_digits_are_single_tokens_and_any_text_survives() -> None:
    tokenizer = make_tokenizer(["12 + 34 =", "12+34=46"] * 5)
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == list("1234")
    text = "Größe ≥ 12\n\tok 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|user|>hi<|end|><|assistant|>"


def test_weights_come_from_the_seed_alone_and_leave_the_random_state() -> None:
    tokenizer = make_tokenizer(["1 + 2"])
    state = torch.get_rng_state()
    one, same, other = (make_model(tokenizer, seed=s, layers=1, width=64) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_warm_start_learns_what_it_is_shown() -> None:
    pairs = [(f"Say {n}.", f"<answer>{n}</answer>") for n in range(10)]
    tokenizer = make_tokenizer([q + s for q, s in pairs])
    policy = Policy(make_model(tokenizer, seed=0, layers=1, width=64))
    examples = tokenize_examples(pairs, tokenizer)
    assert all(e.completion_ids[-1] == tokenizer.eos_token_id for e in examples)

    def mean_logprob() -> float:
        scores = policy.score(
            Ragged.of([e.prompt_ids for e in examples]),
            Ragged.of([e.completion_ids for e in examples]),
        )
        return float(scores.logprobs.mean())

    before = mean_logprob()
    warm_start(policy, examples, batches=60, batch_size=16, lr=3e-3, seed=0, screen=Screen())
    assert before < -4.0 and mean_logprob() > -0.4


def test_a_task_without_solutions_is_refused(tmp_path) -> None:
    config = load_config("quickstart", [("data.train.gym", "gcd"), ("data.train.options", "{}")])
    with pytest.raises(ConfigError, match="must be the gym task chain_sum"):
        prepare_quickstart(config, tmp_path, Screen(), device="cpu")
