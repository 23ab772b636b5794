"""One of several processes that release gradients, beside the usual update of one process."""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import Any, cast

import torch
from learner_worker import VOCABULARY, MemoryFault, furthest, make_groups, make_model
from several_processes import met
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from exgrpo_fast.core.dtensor import from_local_shard, full_tensor
from exgrpo_fast.core.errors import UserError
from exgrpo_fast.core.process_group import Processes, mesh_of
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.model.sharded_policy import ShardedPolicy
from exgrpo_fast.training.batch import WeightRule
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.optim import optimiser as optimiser_module
from exgrpo_fast.training.optim.adamw import make_adamw
from exgrpo_fast.training.optim.gradient_release import ReleasingOptimiser
from exgrpo_fast.training.optim.optimiser import Optimiser
from exgrpo_kernels import PolicyObjective

UPDATES, OBJECTIVE = 3, PolicyObjective(entropy_coef=0.01)
ROOM = 1000  # tokens of a pack: more than any update has


class Descent(torch.optim.SGD):
    """Its steps are as far from each other as the gradients are: AdamW divides by small numbers.
    It keeps the gradients that it applies."""

    def __init__(self, kind: Any, parameters: list[nn.Parameter], **settings: Any) -> None:
        super().__init__(parameters, lr=settings["lr"])
        self.applied: list[tuple[nn.Parameter, Tensor]] = []

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.applied.append((p, p.grad.clone()))
        super().step()


def applied(learner: Learner) -> list[dict[str, Tensor]]:
    """Gathered, of each update, by name."""
    optimiser, kept = learner.optimiser, cast(Descent, learner.optimiser.adamw)
    names = {p: name for name, p in learner.policy.model.named_parameters()}
    whole = dict(zip(optimiser.shards, optimiser.parameters, strict=True))
    found: list[dict[str, Tensor]] = []
    for place, (shard, gradient) in enumerate(kept.applied):
        if place % len(whole) == 0:
            found.append({})
        parameter: Any = whole[shard]
        if isinstance(parameter, DTensor):
            gradient = full_tensor(from_local_shard(parameter, gradient, parameter.device_mesh))
        found[-1][names[whole[shard]]] = gradient
    return found


def make_learner(
    policy: Policy, *, releases: bool, max_grad_norm: float = 0.05, kind: str = "adamw"
) -> Learner:
    lr = 4.0 if optimiser_module.make_adamw is Descent else 1e-3
    settings: dict[str, Any] = {"lr": lr, "max_grad_norm": max_grad_norm, "kind": kind}
    parameters = policy.trainable_parameters
    optimiser = Optimiser(parameters, **settings)
    if releases:
        optimiser = ReleasingOptimiser(parameters, all_or_none=policy.all_or_none, **settings)
    return Learner(policy, optimiser, weights=WeightRule("token_mean", 16))


def sharded(processes: Processes, model: Any, **settings: Any) -> ShardedPolicy:
    settings = {"max_tokens_per_microbatch": ROOM, **settings}
    return ShardedPolicy(model, mesh=mesh_of(processes), processes=processes, **settings)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in policy.named_weights()}


class Live:
    """Gradients of parameters that exist at the same time, on this rank."""

    def __init__(self, policy: Policy) -> None:
        self.parameters = policy.trainable_parameters
        self.most = 0
        self.calls = 0
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self.count)

    def count(self, _: Tensor) -> None:
        self.calls += 1
        self.most = max(self.most, sum(p.grad is not None for p in self.parameters))


class Packs:
    """How many of the packs that this rank went through have a weight."""

    def __init__(self, policy: Policy) -> None:
        self.counted: list[list[bool]] = []
        self.assign = policy.assign_packs
        policy.assign_packs = self

    def __call__(self, packs: Any) -> Any:
        found = self.assign(packs)
        self.counted.append([each.counts for each in found])
        return found


def compare(
    processes: Processes,
    *,
    tied: bool,
    sizes: tuple[int, ...] = (5, 5, 5),
    plain: bool = True,
    max_grad_norm: float = 0.05,
    **settings: Any,
) -> dict[str, Any]:
    """Updates of `sizes` groups, released on all ranks, and usual ones of one process in packs of 60.

    `plain`: by gradient descent, otherwise by AdamW.
    """
    optimiser_module.make_adamw = Descent if plain else make_adamw
    model = make_model(tied=tied)
    alone = Policy(copy.deepcopy(model), **{"max_tokens_per_microbatch": 60, **settings})
    together = sharded(processes, model, **settings)
    learners = [
        make_learner(policy, releases=policy is together, max_grad_norm=max_grad_norm)
        for policy in (together, alone)
    ]
    live, packs = Live(together), Packs(together)
    before = weights_of(alone)
    reports = [
        [learner.update(make_groups(step, count), OBJECTIVE) for learner in learners]
        for step, count in enumerate(sizes)
    ]
    ours, expected = weights_of(together), weights_of(alone)
    ours_applied, expected_applied = map(applied, learners) if plain else ([], [])
    assert len(ours_applied) == len(expected_applied) == (len(sizes) if plain else 0)
    changes = {name: weight - before[name] for name, weight in expected.items()}
    norms = [(a.grad_norms[0], b.grad_norms[0]) for a, b in reports]
    assert all(a.tokens_trained == b.tokens_trained > 0 for a, b in reports)
    assert all(parameter.grad is None for parameter in together.trainable_parameters)
    return {
        "losses": max(abs(a.loss - b.loss) for a, b in reports),
        "norms": max(abs(a / b - 1) for a, b in norms),
        "clipped": all(b > max_grad_norm for _, b in norms),
        "gradients": max(map(furthest, ours_applied, expected_applied), default=0.0),
        "weights": furthest({n: w - before[n] for n, w in ours.items()}, changes),
        "live": live.most,
        "hooks": live.calls,
        "parameters": len(live.parameters),
        "packs": packs.counted,
    }


def wide_model() -> Any:
    """Its matrices are large enough for moments of 8 bits."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            tie_word_embeddings=True,
        )
    )


def beside_the_usual(processes: Processes, model: Any, kind: str = "adamw") -> bool:
    """Whether updates that are not clipped are, with AdamW, bit for bit the usual ones of these ranks
    on the same packs."""
    policies = [sharded(processes, copy.deepcopy(model)) for _ in range(2)]
    releasing, usual = (
        make_learner(policy, releases=policy is policies[0], max_grad_norm=1e9, kind=kind)
        for policy in policies
    )
    usual.policy.sizes.one_pack = True  # the same packs, and the head's gradient at the same place
    usual.optimiser.sums_packs = False
    for step in range(UPDATES):
        ours, expected = (each.update(make_groups(step), OBJECTIVE) for each in (releasing, usual))
        assert ours.losses == expected.losses
    moments = usual.optimiser.adamw.state.values()
    quantised = {type(m["exp_avg"]).__name__ for m in moments} - {"Tensor", "Parameter"}
    assert quantised == ({"OptimState8bit"} if kind == "adamw_8bit" else set())
    first, second = map(weights_of, policies)
    return all(torch.equal(first[name], weight) for name, weight in second.items())


def refused(processes: Processes, where: str) -> dict[str, Any]:
    """The last rank's numbers are not finite: in its hidden states, or in gradients alone."""
    policy = sharded(processes, make_model(tied=True))
    learner = make_learner(policy, releases=True)
    learner.update(make_groups(0), OBJECTIVE)
    before, updates = weights_of(policy), learner.optimiser.num_updates
    if processes.place.rank == processes.count - 1:
        base: Any = policy.model.model
        if where == "hidden states":
            base.norm.register_forward_hook(lambda *_: _[2] * math.nan)
        else:
            base.layers[0].mlp.register_forward_hook(
                lambda *_: _[2].register_hook(lambda gradient: gradient * math.nan) and None
            )
    report = learner.update(make_groups(1), OBJECTIVE)
    after = weights_of(policy)
    return {
        "skipped": dict(report.skipped),
        "same": all(torch.equal(before[name], weight) for name, weight in after.items()),
        "counted": learner.optimiser.num_updates - updates,
    }


def without_memory(processes: Processes, times: int, where: str) -> dict[str, Any]:
    """Memory runs out on the last rank alone, in the middle of a layer of a backward pass.

    `where`: the pass, "first" or "second"; `times`: how often.
    """
    model = make_model(tied=True)
    alone = Policy(copy.deepcopy(model), max_tokens_per_microbatch=60)
    together = sharded(processes, model, gradient_checkpointing=True)
    learners = [make_learner(policy, releases=policy is together) for policy in (together, alone)]
    ours: Any = learners[0].optimiser
    is_second = [False]
    second_pass = ours._second_pass

    def watched(norm: Tensor) -> None:
        is_second[0] = True
        second_pass(norm)

    ours._second_pass = watched

    is_last = processes.place.rank == processes.count - 1
    full = MemoryFault(times * is_last, lambda: is_second[0] == (where == "second"))
    mlp: Any = together.model.model.layers[1].mlp
    mlp.act_fn.register_forward_hook(full.in_backward)
    try:
        reports = [learner.update(make_groups(0), OBJECTIVE) for learner in learners]
    except UserError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "left": full.left,
        "losses": abs(reports[0].loss - reports[1].loss),
        "norms": abs(reports[0].grad_norms[0] / reports[1].grad_norms[0] - 1),
        "halvings": [reports[0].chunk_halvings, reports[0].microbatch_halvings],
    }


def too_many(processes: Processes) -> str:
    policy = sharded(processes, make_model(tied=False), max_tokens_per_microbatch=30)
    try:
        make_learner(policy, releases=True).update(make_groups(0), OBJECTIVE)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "it went"


def every_case(processes: Processes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tied in (True, False):
        for checkpointing in (True, False):
            name = f"{'tied' if tied else 'untied'}{' checkpointing' if checkpointing else ''}"
            found[name] = compare(processes, tied=tied, gradient_checkpointing=checkpointing)
    found["tiles"] = compare(processes, tied=True, tile_tokens=7, gradient_checkpointing=True)
    found["offloading"] = compare(processes, tied=False, offload_activations=True)
    found["few"] = compare(processes, tied=True, sizes=(1, 5, 1))
    found["adamw"] = compare(processes, tied=True, plain=False)
    found["bits"] = [beside_the_usual(processes, make_model(tied=tied)) for tied in (True, False)]
    for where in ("hidden states", "gradients"):
        found[f"refused: {where}"] = refused(processes, where)
    for where, times in (("first", 1), ("first", 9), ("second", 1)):
        found[f"{where} {times}"] = without_memory(processes, times, where)
    found["too many"] = too_many(processes)
    return found


if __name__ == "__main__":
    with met(sys.argv[1:4]) as processes:
        if sys.argv[4:]:
            print(json.dumps(beside_the_usual(processes, wide_model(), sys.argv[4])))
        else:
            print(json.dumps(every_case(processes)))
