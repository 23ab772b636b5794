from __future__ import annotations

import math
import random

import pytest

from exgrpo_fast.training.advantages import dr_grpo, grpo, rloo


def test_dr_grpo_is_centred_only() -> None:
    assert dr_grpo([1, 0, 0, 1]) == [0.5, -0.5, -0.5, 0.5]


def test_grpo_divides_by_the_population_std() -> None:
    assert grpo([1, 0, 0, 0]) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])


def test_rloo_leaves_the_sample_out_of_its_baseline() -> None:
    assert rloo([1, 0, 0, 0]) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("successes", range(8))
def test_o3_mixed_group(successes: int) -> None:
    """Oracle O3 of the ExGRPO specification: K = 8, the replayed completion is right."""
    advantages = dr_grpo([1.0] + [1.0] * successes + [0.0] * (7 - successes))
    assert advantages[0] == pytest.approx(0.875 - 0.125 * successes)
    if successes < 7:
        assert advantages[-1] == pytest.approx(-0.125 - 0.125 * successes)
    assert sum(advantages) == pytest.approx(0.0, abs=1e-12)
    assert sum(advantages[1:]) == pytest.approx(-advantages[0])


@pytest.mark.parametrize("advantage", [grpo, dr_grpo, rloo])
def test_equal_rewards_give_exactly_zero(advantage) -> None:
    for reward in (0.0, 1.0, 0.1, -3.7):
        for size in (1, 2, 3, 7, 8):
            assert advantage([reward] * size) == [0.0] * size


def test_ten_thousand_random_groups_stay_bounded() -> None:
    rng = random.Random(0)
    for _ in range(10_000):
        size = rng.randint(2, 16)
        rewards = [
            rng.choice([0.0, 1.0, rng.gauss(0, 1e-6), rng.uniform(-1, 1)]) for _ in range(size)
        ]
        advantages = grpo(rewards)
        assert all(math.isfinite(a) for a in advantages)
        assert max(map(abs, advantages)) <= math.sqrt(size) * (1 + 1e-9)
        assert abs(sum(advantages)) < 1e-6
