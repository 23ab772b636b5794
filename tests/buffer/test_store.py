from __future__ import annotations

import json
import random

import pytest
import torch

from exgrpo_fast.buffer.store import ExperienceStore
from exgrpo_fast.checkpoint import merge_tensors, split_tensors


def filled(group_size: int = 4) -> ExperienceStore:
    store = ExperienceStore(group_size=group_size)
    store.add("a", torch.tensor([5, 6, 7]), torch.tensor([-0.1, -0.2, -0.3]), birth_step=3)
    store.add("a", torch.tensor([5, 6]), torch.tensor([-0.4, -0.5]), birth_step=4)
    store.move("a", 2)
    store.add("b", torch.tensor([9]), torch.tensor([-1.0]), birth_step=4)
    store.move("b", 1)
    return store


def test_stored_tokens_and_logprobs_come_back_as_they_were() -> None:
    first, second = filled().experiences("a")
    assert first.token_ids.tolist() == [5, 6, 7] and first.token_ids.dtype == torch.int32
    assert first.behaviour_logprobs.tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert (first.birth_step, second.birth_step) == (3, 4)


def test_a_response_cut_at_the_limit_stays_marked_over_a_checkpoint() -> None:
    store, other = filled(), ExperienceStore(group_size=4)
    store.add("b", torch.tensor([9, 9]), torch.zeros(2), birth_step=5, truncated=True)
    other.load_state_dict(store.state_dict())
    assert [e.truncated for e in other.experiences("b")] == [False, True]


def test_the_caller_keeps_no_hand_on_what_is_stored() -> None:
    store, tokens = ExperienceStore(group_size=4), torch.tensor([1, 2], dtype=torch.int32)
    store.add("a", tokens, torch.zeros(2), birth_step=1)
    tokens[0] = 99
    assert store.experiences("a")[0].token_ids.tolist() == [1, 2]


def test_the_same_tokens_are_kept_once_with_their_first_logprobs() -> None:
    store = filled()
    store.add("a", torch.tensor([5, 6]), torch.tensor([-9.0, -9.0]), birth_step=9)
    assert store.num_trajectories == 3
    assert store.experiences("a")[1].birth_step == 4


def test_a_question_lies_in_the_bucket_of_its_latest_visit() -> None:
    store = filled()
    store.move("a", 3)
    assert store.bucket_sizes() == {1: 1, 2: 0, 3: 1}
    store.check_valid()


def test_a_retired_question_leaves_and_is_remembered() -> None:
    store = filled()
    store.retire("a")
    assert len(store) == 1 and store.retired == ["a"] and store.num_trajectories == 1
    store.check_valid()


def test_bad_use_is_an_error() -> None:
    store = filled()
    with pytest.raises(ValueError, match="no stored success"):
        store.move("unknown", 1)
    with pytest.raises(ValueError, match="must be equal and not empty"):
        store.add("a", torch.tensor([1, 2]), torch.zeros(3), birth_step=1)
    with pytest.raises(KeyError):
        store.move("a", 4)  # K successes retire, they have no bucket


def test_invariants_hold_after_every_one_of_many_random_changes() -> None:
    rng, store = random.Random(0), ExperienceStore(group_size=8)
    for _ in range(400):
        question = f"q{rng.randrange(20)}"
        if store.is_retired(question):
            continue
        if rng.random() < 0.1:
            store.retire(question)
        else:
            tokens = torch.tensor([rng.randrange(4) for _ in range(rng.randint(1, 3))])
            store.add(question, tokens, torch.zeros(len(tokens)), birth_step=1)
            store.move(question, rng.randint(1, 7))
        store.check_valid()


def test_state_goes_through_json_and_tensors_and_back() -> None:
    store = filled()
    store.retire("b")
    plain, tensors = split_tensors(store.state_dict())
    restored = ExperienceStore(group_size=4)
    restored.load_state_dict(merge_tensors(json.loads(json.dumps(plain)), tensors))
    assert restored.bucket_sizes() == store.bucket_sizes() and restored.retired == ["b"]
    for ours, theirs in zip(store.experiences("a"), restored.experiences("a"), strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.behaviour_logprobs, theirs.behaviour_logprobs)
        assert (ours.birth_step, ours.digest) == (theirs.birth_step, theirs.digest)


def test_an_empty_store_can_be_saved() -> None:
    restored = ExperienceStore(group_size=4)
    restored.load_state_dict(ExperienceStore(group_size=4).state_dict())
    assert len(restored) == 0


def test_another_group_size_is_refused() -> None:
    with pytest.raises(ValueError, match="saved with group_size 4, this run has 8"):
        ExperienceStore(group_size=8).load_state_dict(filled().state_dict())
