"""One of several processes that train a tiny model together: losses, gradients and weights of each
update, beside those of a whole model that learns alone from the same groups."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from several_processes import met
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from exgrpo_fast.core.dtensor import full_tensor
from exgrpo_fast.core.process_group import Processes, mesh_of
from exgrpo_fast.core.types import Group, KeptTokens, Question, Trajectory, Verdict
from exgrpo_fast.model.lora import add_adapter
from exgrpo_fast.model.packing import Pack, Ragged, kept_sets
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.rollout.engine import Request, Sampling
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.shared_engine import AnnouncedPolicy, CopiedEngine, SharedEngine
from exgrpo_fast.rollout.sync_check import VerifiedEngine
from exgrpo_fast.training.advantages import AdvantageRule
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.distillation import VocabularyDistillation
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim.optimiser import Optimiser, UpdateOutcome
from exgrpo_fast.training.preflight import DoesNotFit, rehearse
from exgrpo_fast.training.reference import AdapterOff, Reference
from exgrpo_kernels import PolicyObjective

VOCABULARY = 131  # odd: the parts of the head differ in size
UPDATES = 2
FULL_IN = ("forward", "loss", "backward", "recomputation", "scoring")


def make_model(*, tied: bool, seed: int = 0, lora_rank: int = 0, lora_dropout: float = 0.0) -> Any:
    """`lora_rank`: of adapters that have learned something already; 0: none."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=tied,
        )
    )
    if lora_rank:
        add_adapter(model, rank=lora_rank, alpha=2.0 * lora_rank, dropout=lora_dropout)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def adapters_in_float32(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def make_groups(step: int, count: int = 5, *, truncated: bool = False) -> list[Group]:
    """Groups of four responses of different lengths, one of each replayed.

    `truncated`: each token was drawn from a few, and the log-probs are over those.
    """
    generator = torch.Generator().manual_seed(step)

    def draw(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    groups = []
    for number in range(count):
        question = Question(
            f"{step}/{number}", tuple(draw(VOCABULARY, 3 + number).tolist()), "", ""
        )
        members = []
        for place in range(4):
            length = 1 + int(draw(14, 1))
            tokens = draw(VOCABULARY, length)
            mean = -1.2 if truncated else -5.0
            members.append(
                Trajectory(
                    question,
                    token_ids=tokens,
                    behaviour_logprobs=mean + 0.2 * torch.rand(length, generator=generator),
                    kept=kept_around(tokens) if truncated else None,
                    entropies=torch.ones(length),
                    truncated=False,
                    source="replay" if place == 0 else "fresh",
                    shaping=0.1 if place == 0 else 0.0,
                    verdict=Verdict(float(place % 2)),
                )
            )
        groups.append(AdvantageRule().apply(Group(question, tuple(members))))
    return groups


def kept_around(tokens: Tensor) -> KeptTokens:
    """Each token and those behind it: one to four."""
    counts = 1 + tokens % 4
    ids = [
        (token + torch.arange(count)) % VOCABULARY
        for token, count in zip(tokens, counts.tolist(), strict=True)
    ]
    return KeptTokens(torch.cat(ids).int(), counts)


class Recording(Optimiser):
    """Keeps what it is given, before it is clipped."""

    def __init__(self, model: Any, **settings: Any) -> None:
        self.model = model
        super().__init__([p for p in model.parameters() if p.requires_grad], **settings)
        self.found: list[dict[str, Tensor]] = []

    def step(self) -> UpdateOutcome:
        self.found.append(
            {
                name: full_tensor(parameter.grad).clone()
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            }
        )
        return super().step()


def make_learner(policy: Policy, **settings: Any) -> tuple[Learner, Recording]:
    optimiser = Recording(policy.model, lr=1e-3, max_grad_norm=0.05, skip_grad_norm=500.0)
    learner = Learner(
        policy,
        optimiser,
        weights=WeightRule("token_mean", 16),
        **settings,
    )
    return learner, optimiser


def distance(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max()) / max(1e-3, float(expected.abs().max()))


def furthest(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The greatest distance of any entry, as a share of the greatest entry of all."""
    assert ours.keys() == expected.keys()
    all_reduce_max = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((ours[n] - expected[n]).abs().max()) for n in expected) / all_reduce_max


def compare(
    processes: Processes,
    *,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    kl: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float | None = 0.28,
    updates: int = UPDATES,
    lora_rank: int = 0,
    lora_dropout: float = 0.0,
    weights: torch.dtype = torch.float32,
    of_one: Mapping[str, Any] = MappingProxyType({}),
    distils: bool = False,
    truncated: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """`of_one`: settings of the one process that are not those of the several, `more`.

    `distils`: a teacher's whole distributions are part of the loss.
    """
    objective = PolicyObjective(clip_low, clip_high, entropy_coef=0.01, kl_coef=kl)
    settings = {"max_tokens_per_microbatch": 60, "compute_dtype": dtype, "temperature": 0.9, **more}
    model = make_model(tied=tied, lora_rank=lora_rank, lora_dropout=lora_dropout).to(weights)
    adapters_in_float32(model)
    minibatches = settings.pop("minibatches", 1)
    alone = Policy(copy.deepcopy(model), **{**settings, **of_one})
    mesh = mesh_of(processes)
    together = ShardedPolicy(model, mesh=mesh, processes=processes, **settings)
    others: list[Any] = [
        ShardedPolicy(make_model(tied=tied, seed=1), mesh=mesh, processes=processes),
        Policy(make_model(tied=tied, seed=1)),
    ]
    frozen = [AdapterOff(together), AdapterOff(alone)] if lora_rank else others
    learners = [
        make_learner(
            policy,
            minibatches=minibatches,
            reference=Reference(base) if kl else None,
            distillation=VocabularyDistillation(teacher) if distils else None,
        )
        for policy, base, teacher in zip((together, alone), frozen, others, strict=True)
    ]
    report: dict[str, Any] = {"losses": [], "norms": [], "metrics": 0.0, "clipped": True}
    for step in range(updates):
        groups = make_groups(step, truncated=truncated)
        ours, expected = (learner.update(groups, objective) for learner, _ in learners)
        assert ours.tokens_trained == expected.tokens_trained > 0
        report["losses"] += [abs(a - b) for a, b in zip(ours.losses, expected.losses, strict=True)]
        report["norms"] += [
            abs(a / b - 1) for a, b in zip(ours.grad_norms, expected.grad_norms, strict=True)
        ]
        report["clipped"] &= min(expected.grad_norms) > 0.05
        assert ours.kernel_metrics.keys() == expected.kernel_metrics.keys()
        for name, value in expected.kernel_metrics.items():
            ours_value = ours.kernel_metrics[name]
            assert (ours_value is None) == (value is None), name
            if value is not None and ours_value is not None:
                gap = abs(ours_value - value) / max(1.0, abs(value))
                report["metrics"] = max(report["metrics"], gap)
    found, expected = (optimiser.found for _, optimiser in learners)
    assert len(found) == updates * minibatches
    of_all = [gradient for update in found for gradient in update.values()]
    assert {gradient.dtype for gradient in of_all} == {torch.float32}
    report["gradients"] = [
        furthest(update, wanted) for update, wanted in zip(found, expected, strict=True)
    ]
    names = dict(alone.named_weights())
    report["weights"] = max(distance(w, names[name]) for name, w in together.named_weights())
    assert {name for name, _ in together.named_weights()} == names.keys()
    prompts = Ragged.of([t.question.prompt_ids for g in make_groups(9) for t in g.trajectories])
    responses = Ragged.of([t.token_ids for g in make_groups(9) for t in g.trajectories])
    scores = [policy.score(prompts, responses) for policy in (together, alone)]
    report["scores"] = max(
        distance(a, b) for a, b in zip(scores[0][:2], scores[1][:2], strict=True)
    )
    return report


def broken(processes: Processes) -> dict[str, Any]:
    """A batch that is not finite on one process leaves the weights of all alone."""
    policy = ShardedPolicy(
        make_model(tied=True),
        mesh=mesh_of(processes),
        processes=processes,
        max_tokens_per_microbatch=60,
    )
    learner, _ = make_learner(policy)
    before = {name: weight.clone() for name, weight in policy.named_weights()}
    norm = policy.model.model.norm
    if not processes.is_main:
        norm.register_forward_hook(lambda *_: _[2] * math.nan)
    report = learner.update(make_groups(0), PolicyObjective())
    after = dict(policy.named_weights())
    return {
        "skipped": dict(report.skipped),
        "same": all(torch.equal(before[name], after[name]) for name in before),
    }


def few_packs(processes: Processes) -> dict[str, Any]:
    """One group in one pack: all processes but one work for the company alone."""
    model = make_model(tied=False)
    alone = Policy(copy.deepcopy(model), max_tokens_per_microbatch=1000)
    together = ShardedPolicy(
        model, mesh=mesh_of(processes), processes=processes, max_tokens_per_microbatch=1000
    )
    groups = [replace(group) for group in make_groups(0, count=1)]
    reports = [
        make_learner(policy)[0].update(groups, PolicyObjective()) for policy in (together, alone)
    ]
    return {"loss": abs(reports[0].loss - reports[1].loss), "tokens": reports[0].tokens_trained}


def synced(processes: Processes, lora_rank: int = 0) -> dict[str, Any]:
    """An engine whose weights are verified: it takes weights and scores from the parts."""
    model = make_model(tied=True, lora_rank=lora_rank)
    copied = Policy(make_model(tied=True))
    policy = ShardedPolicy(model, mesh=mesh_of(processes), processes=processes)
    learner, _ = make_learner(policy)
    engine = None
    if processes.is_main:
        announced: Any = AnnouncedPolicy(policy, processes)
        own = CopiedEngine(
            TransformersEngine(copied, eos_token_ids=[0], pad_token_id=0), copied, announced
        )
        engine = VerifiedEngine(
            own, announced, prompt_ids=[5, 6, 7], max_model_len=400, tolerance=1e-4
        )
    shared = SharedEngine(engine, policy, processes)
    learner.update(make_groups(0), PolicyObjective())
    figures = shared.sync(1)
    requests = [Request((5, 6, 7), seed) for seed in range(3)]
    drawn = shared.generate(requests, Sampling(6))
    cut = shared.generate(requests, Sampling(6, top_k=3, top_p=0.9))
    ids = [Ragged.of(of) for of in ([r.prompt_ids for r in requests], [c.token_ids for c in cut])]
    over_sets = policy.score(*ids, kept=kept_sets(cut)).logprobs
    cut_gap = (over_sets - torch.cat([c.logprobs for c in cut])).abs().max()
    weights = dict(policy.named_weights())
    same = all(torch.equal(weights[n], w) for n, w in copied.named_weights())
    return {
        "gap": figures["sync_gap"],
        "tokens": [completion.token_ids.tolist() for completion in drawn],
        "cut gap": float(cut_gap),
        "kept": [[c.kept.ids.tolist(), c.kept.counts.tolist()] for c in cut if c.kept],
        "same": same or not processes.is_main,
    }


class MemoryFault:
    """A hook that is out of memory `left` times, where `applies`."""

    def __init__(self, left: int, applies: Callable[[], bool]) -> None:
        self.left = left
        self.applies = applies

    def __call__(self, *_: Any) -> None:
        if self.left and self.applies():
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words")

    def in_backward(self, module: Any, taken: Any, made: Tensor) -> None:
        """A forward hook: the fault comes with the gradient of what the module has made."""
        if made.requires_grad:
            made.register_hook(self)


def without_memory(processes: Processes, where: str) -> dict[str, Any]:
    """Memory runs out twice, on the last process alone: all go on with smaller pieces."""
    model = make_model(tied=True)
    alone = Policy(copy.deepcopy(model), max_tokens_per_microbatch=60)
    together = ShardedPolicy(
        model,
        mesh=mesh_of(processes),
        processes=processes,
        max_tokens_per_microbatch=60,
        gradient_checkpointing=where == "recomputation",
    )
    is_last = processes.place.rank == processes.count - 1
    full = MemoryFault(2 * is_last, lambda: together.model.training == (where != "scoring"))
    mlp: Any = together.model.model.layers[1].mlp
    if where in ("forward", "scoring"):
        mlp.act_fn.register_forward_hook(full)
    elif where == "loss":
        head_for = together.head_for
        together.head_for = lambda hidden_ND: full() or head_for(hidden_ND)  # pyright: ignore
    else:  # the gradient of down_proj is there, those of its layer's other weights are not
        mlp.act_fn.register_forward_hook(full.in_backward)
    learners = [make_learner(policy) for policy in (together, alone)]
    reports = [
        [learner.update(make_groups(step), PolicyObjective()) for step in range(2)]
        for learner, _ in learners
    ]
    prompts = Ragged.of([t.question.prompt_ids for g in make_groups(9) for t in g.trajectories])
    responses = Ragged.of([t.token_ids for g in make_groups(9) for t in g.trajectories])
    scores = [policy.score(prompts, responses).logprobs for policy in (together, alone)]
    found, expected = (optimiser.found for _, optimiser in learners)
    return {
        "left": full.left,
        "losses": max(abs(a.loss - b.loss) for a, b in zip(*reports, strict=True)),
        "gradients": max(furthest(a, b) for a, b in zip(found, expected, strict=True)),
        "scores": distance(*scores),
        "sizes": together.sizes.state_dict(),
        "halvings": [(report.chunk_halvings, report.microbatch_halvings) for report in reports[0]],
    }


def rehearsed(processes: Processes) -> str:
    """The second process has too little memory."""
    policy = ShardedPolicy(
        make_model(tied=False),
        mesh=mesh_of(processes),
        processes=processes,
        max_tokens_per_microbatch=100,
    )
    hidden_states = policy.hidden_states

    def full(packed: Pack) -> Tensor:
        if torch.is_grad_enabled() and not processes.is_main:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More words")
        return hidden_states(packed)

    policy.hidden_states = full  # pyright: ignore[reportAttributeAccessIssue]
    rehearse(
        make_learner(policy)[0],
        PolicyObjective(),
        prompt_tokens=10,
        completion_tokens=16,
        state_bytes=0.0,
        processes=processes.count,
    )
    return "it fits"


# What `compare` is called with. In bfloat16 without a clip: a ratio at its edge would fall on either
# side of it.
BFLOAT16: dict[str, Any] = {"dtype": torch.bfloat16, "clip_low": 1.0, "clip_high": None}
COMPARISONS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True, "kl": 0.1},
    "untied": {"tied": False},
    "checkpointing": {"tied": True, "gradient_checkpointing": True, "minibatches": 2},
    "offloading": {"tied": False, "offload_activations": True},
    "tiles": {"tied": True, "tile_tokens": 7, "kl": 0.1},
    "tiles and checkpointing": {"tied": False, "tile_tokens": 7, "gradient_checkpointing": True},
    "bfloat16": {"tied": False, **BFLOAT16},
    # once: AdamW makes more of what the order of a sum has changed
    "tiles beside whole packs": {
        "tied": True,
        "updates": 1,
        "tile_tokens": 7,
        "of_one": {"tile_tokens": 0},
    },
    "bfloat16 tiles": {
        "tied": True,
        **BFLOAT16,
        "tile_tokens": 7,
        "gradient_checkpointing": True,
    },
    "adapters": {"tied": True, "lora_rank": 4, "kl": 0.1},
    # of a rank below the number of processes one has no rows of A
    "adapters and checkpointing": {"tied": False, "lora_rank": 1, "gradient_checkpointing": True},
    "adapters and tiles": {"tied": False, "lora_rank": 3, "tile_tokens": 7},
    "kept sets": {"tied": True, "truncated": True, "kl": 0.1, "updates": 2},
    "distillation": {"tied": True, "distils": True, "gradient_checkpointing": True},
    "distillation and adapters": {"tied": False, "lora_rank": 4, "distils": True},
    "adapters with dropout": {
        "tied": True,
        "lora_rank": 4,
        "lora_dropout": 0.3,
        "minibatches": 2,
        "gradient_checkpointing": True,
    },
    "bfloat16 adapters": {
        "tied": True,
        **BFLOAT16,
        "weights": torch.bfloat16,
        "lora_rank": 4,
        "kl": 0.1,
    },
}


def every_comparison(processes: Processes) -> dict[str, Any]:
    return {
        **{name: compare(processes, **settings) for name, settings in COMPARISONS.items()},
        "broken": broken(processes),
        "few": few_packs(processes),
        "synced": synced(processes),
        "synced adapters": synced(processes, lora_rank=4),
    }


if __name__ == "__main__":
    if sys.argv[4:] == ["too little memory"]:
        try:
            with met(sys.argv[1:4]) as processes:
                print(json.dumps(rehearsed(processes)))
        except DoesNotFit as error:
            print(json.dumps(f"{type(error).__name__}: {error}"))
        sys.exit()
    with met(sys.argv[1:4]) as processes:
        if sys.argv[4:] == ["full"]:
            print(json.dumps({where: without_memory(processes, where) for where in FULL_IN}))
        else:
            print(json.dumps(every_comparison(processes)))
