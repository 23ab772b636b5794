"""The registered operators: one node for torch.compile, true shapes without values, true schemas."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cases import Case, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from exgrpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss, runtime
from exgrpo_kernels.linear_head import HeadGradients, HeadOptions, linear_head
from exgrpo_kernels.linear_logprob import linear_logprob_backward_operator, linear_logprob_operator
from exgrpo_kernels.objective import LossColumns
from exgrpo_kernels.policy_loss import linear_policy_loss_operator
from exgrpo_kernels.policy_loss_from_logits import policy_loss_from_logits_operator

BACKENDS = ["torch"] + (["triton"] if runtime.is_interpreting() else [])
OBJECTIVE = PolicyObjective(entropy_coef=0.01)
CASE = Case(num_rows=6, num_tokens=70, num_hidden=8)


def example(backend: str):
    """(fields of the head, fields of the columns) of a small batch."""
    batch = make_batch(CASE)
    options = HeadOptions(temperature=0.9, backend=backend)
    head = linear_head(batch.hidden, batch.weight, batch.targets, options)
    columns = {k: v for k, v in batch.columns.items() if k != "sequence_ids"}
    columns = LossColumns(**columns).checked(OBJECTIVE, 6, torch.float32, batch.hidden.device)
    return head, columns


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_keep_their_schemas(backend):
    """No hidden mutation or alias, fakes of the true shapes, gradients that autograd accepts."""
    head, columns = example(backend)
    arguments = [
        a.detach().requires_grad_() if i < 2 else a for i, a in enumerate(head.arguments())
    ]
    torch.library.opcheck(linear_logprob_operator, tuple(arguments))
    vectors = [torch.randn(6) for _ in range(5)]
    backward = (*head.arguments(), *vectors, None, [True, False, False])
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear_logprob_backward_operator, backward, test_utils=utilities)
    objective = OBJECTIVE.as_text()
    loss = (*head.arguments(), columns.arguments(), objective, [True, True, False])
    for main_grad in (None, torch.zeros_like(head.weight_VD)):
        torch.library.opcheck(
            linear_policy_loss_operator,
            (*loss, main_grad, 1e-4, "centroid", False),
            test_utils=utilities,
        )
    inputs = head.inputs.arguments()
    from_logits = (torch.randn(6, 70), *inputs, backend, columns.arguments(), objective)
    torch.library.opcheck(policy_loss_from_logits_operator, from_logits, test_utils=utilities)


def test_a_weight_without_a_gradient_takes_no_room():
    """No [V, D] is made for the gradient of a frozen head."""
    head, _ = example("torch")
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.append(tuple(out.shape))
            return out

    for needs_weight in (False, True):
        made.clear()
        with Watch():
            gradients = HeadGradients.like(head, (True, needs_weight, False))
        assert ((70, 8) in made) == needs_weight == (gradients.weight_VD is not None)
        assert (6, 8) in made


class NoWaits(TorchDispatchMode):
    """Fails where the host would wait for a GPU: an operator whose result it has to read."""

    WAITS = ("_local_scalar_dense", "_unique2", "nonzero", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.WAITS, f"the host waits in {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_no_wait_in_any_chunk(level, softcap, monkeypatch):
    """As on a GPU, whose values the host cannot read, with sequence ids and several chunks."""
    monkeypatch.setattr(runtime, "can_read_values", lambda device: False)
    # below an operator no mode is active: call its body
    body = linear_policy_loss_operator._init_fn
    monkeypatch.setitem(linear_policy_loss.__globals__, "linear_policy_loss_operator", body)
    batch = make_batch(Case(num_rows=6, num_tokens=70, num_hidden=8, masked=0.3, silent=0.3))
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    with NoWaits():
        result = linear_policy_loss(
            hidden,
            weight,
            batch.targets,
            objective=PolicyObjective(ratio_level=level, entropy_coef=0.01),
            softcap=softcap,
            chunk_rows=2,
            backend="torch",
            **batch.columns,
        )
        result.loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_a_token_level_loss_does_not_touch_sequence_ids():
    """On the CPU beside columns on a GPU they would be indexed by rows of another device."""
    ids, ones = torch.arange(6), torch.ones(6, device="meta")
    columns = LossColumns(ones, ones, ones, sequence_ids=ids)
    checked = columns.checked(OBJECTIVE, 6, torch.float32, ones.device)
    assert checked.sequence_ids is None
    sequence = PolicyObjective(ratio_level="sequence")
    assert columns.checked(sequence, 6, torch.float32, ones.device).sequence_ids is ids


def policy_step(hidden, weight, targets, columns, backend):
    result = linear_policy_loss(
        hidden * 1.0, weight, targets, objective=OBJECTIVE, backend=backend, **columns
    )
    return result.loss, result.logprobs, result.metrics["ratio_mean"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_is_one_node_and_the_same_numbers(backend):
    torch._dynamo.reset()
    batch = make_batch(CASE)
    columns = {k: v for k, v in batch.columns.items() if k != "sequence_ids"}
    nodes: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, inputs):
        nodes.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    outcomes = []
    for function in (policy_step, torch.compile(policy_step, fullgraph=True, backend=count)):
        hidden = batch.hidden.clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_()
        loss, logprobs, ratio = function(hidden, weight, batch.targets, columns, backend)
        loss.backward()
        outcomes.append((loss.detach(), logprobs, ratio, hidden.grad, weight.grad))
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
    ours = {name: n for name, n in nodes.items() if "exgrpo_kernels" in name}
    assert ours == {"exgrpo_kernels.linear_policy_loss.default": 1}
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_log_probabilities_have_the_same_gradients(backend):
    torch._dynamo.reset()
    batch = make_batch(CASE)

    def total(hidden, weight):
        out = linear_logprob(hidden * 1.0, weight, batch.targets, temperature=0.7, backend=backend)
        return (out.logprobs - 0.1 * out.entropy).sum()

    gradients = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        hidden = batch.hidden.clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(hidden, weight), [hidden, weight]))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


def test_a_compiled_graph_asserts_values():
    """It cannot branch on a value, so a bad target is an assertion inside the graph."""
    torch._dynamo.reset()
    batch = make_batch(CASE)

    def score(targets):
        return linear_logprob(batch.hidden, batch.weight, targets).logprobs

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch.targets), score(batch.targets))
    with pytest.raises(RuntimeError, match=r"targets must lie in \[0, 70\)"):
        compiled(torch.full_like(batch.targets, 70))
    torch._dynamo.reset()
