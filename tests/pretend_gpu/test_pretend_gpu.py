"""The pretend GPU refuses, counts and computes what a GPU would: seeded faults are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from pretend_gpu.machine import PretendGpu, pretend_gpu
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@pytest.fixture
def gpu() -> Iterator[PretendGpu]:
    with pretend_gpu() as gpu:
        yield gpu


def device_values(count: int = 6) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device="cuda")


# ---- seeded faults: refused ----------------------------------------------------------------------

REFUSED: dict[str, Callable[[], object]] = {
    "a sum of host and device": lambda: device_values() + torch.ones(6),
    "a CPU index for index_select": lambda: device_values().index_select(0, torch.tensor([1])),
    "a CPU index for gather": lambda: device_values().gather(0, torch.tensor([1])),
    "a device index into a CPU tensor": lambda: torch.ones(3)[torch.zeros(1, device="cuda").long()],
    "a mask on the host for masked_fill": lambda: device_values().masked_fill(torch.ones(6) > 0, 0),
    "a mask on the host for where": lambda: torch.where(torch.ones(6) > 0, device_values(), 0.0),
    "concatenated devices": lambda: torch.cat([device_values(), torch.ones(2)]),
    "stacked devices": lambda: torch.stack([device_values()[0], torch.tensor(1.0)]),
    "numpy of a device tensor": lambda: device_values().numpy(),
    "a CPU generator": lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    "a device generator on the CPU": lambda: torch.rand(2, generator=torch.Generator("cuda")),
    "in-place draws by a CPU generator": lambda: device_values().normal_(
        generator=torch.Generator()
    ),
    "a product of two dtypes": lambda: device_values().half()[None] @ device_values()[:, None],
    "a product of integers": lambda: device_values().long()[None] @ device_values().long()[:, None],
    "a failed assert": lambda: torch._assert_async(device_values().sum() < 0, "negative"),
    "pinning a device tensor": lambda: device_values().pin_memory(),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refuses(gpu: PretendGpu, fault: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[fault]()


def test_out_dtype_follows_the_rules_of_the_blas(gpu: PretendGpu) -> None:
    a = torch.ones(2, 3, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(2, 2, device="cuda")
    torch.mm(a, a.t(), out_dtype=torch.float32, out=out)
    assert out.cpu().tolist() == [[3.0, 3.0], [3.0, 3.0]]
    torch.addmm(out, a, a.t(), out_dtype=torch.float32, beta=1, out=out)
    assert out.cpu().tolist() == [[6.0, 6.0], [6.0, 6.0]]
    with pytest.raises(RuntimeError, match="out_dtype"):
        torch.mm(a.float(), a.float().t(), out_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="out_dtype"):
        torch.mm(a, a.t(), out_dtype=torch.float32, out=torch.empty(2, 2, device="cuda").half())


def test_refuses_what_has_no_deterministic_version(
    gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = device_values()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic implementation"):
            values.cumsum(0)
        assert values.long().cumsum(0).cpu().tolist() == [0, 1, 3, 6, 10, 15]
        with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
            values[None] @ values[:, None]
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert float(values[None] @ values[:, None]) == 55
    finally:
        torch.use_deterministic_algorithms(False)


# ---- seeded faults: counted ----------------------------------------------------------------------

WAITING: dict[str, Callable[[], object]] = {
    "item()": lambda: device_values()[0].item(),
    "a branch": lambda: bool(device_values()[0] > 0),
    "tolist": lambda: device_values().tolist(),
    "cpu()": lambda: device_values().cpu(),
    "a blocking copy": lambda: torch.ones(6).to("cuda"),
    "a copy from pageable memory": lambda: torch.ones(6).to("cuda", non_blocking=True),
    "a list": lambda: torch.tensor([1, 2], device="cuda"),
    "a list like another tensor": lambda: device_values().new_tensor([1, 2]),
    "a list as index": lambda: device_values()[[1, 2]],
    "nonzero": lambda: device_values().nonzero(),
    "a boolean mask": lambda: device_values()[device_values() > 2],
    "a mask on the host": lambda: device_values()[torch.ones(6) > 0],
    "a CPU index": lambda: device_values()[torch.tensor([1, 2])],
    "unique": lambda: device_values().unique(),
    "repeat_interleave": lambda: device_values(2).repeat_interleave(device_values(2).long()),
    "equal": lambda: torch.equal(device_values(), device_values()),
    "synchronize": lambda: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("fault", WAITING)
def test_counts_waits(gpu: PretendGpu, fault: str) -> None:
    WAITING[fault]()
    assert len(gpu.waits) >= 1
    assert "test_pretend_gpu.py" in gpu.waits.log[0].place
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        WAITING[fault]()


def test_does_not_wait_where_a_gpu_does_not(gpu: PretendGpu) -> None:
    values = device_values()
    index, mask = values[:2].long(), values > 2
    pinned = torch.ones(6).pin_memory()
    values[index] = values.masked_fill(mask, 0.0)[index]
    torch.where(mask, values, 0.0)
    values[mask] = 0.0
    values.index_add_(0, index, values[:2].clone())
    values[:2].repeat_interleave(index, output_size=1)
    values[2].fill_(1.0)
    pinned.to("cuda", non_blocking=True)
    torch.zeros(3, device="cuda").normal_(generator=torch.Generator("cuda"))
    values.sum().div(2).add_(torch.tensor(3.0))  # a number of the host
    assert len(gpu.waits) == 0, gpu.waits.report()


def test_a_copy_that_is_not_waited_for_has_not_arrived(gpu: PretendGpu) -> None:
    values, target = device_values(), torch.zeros(6, pin_memory=True)
    target.copy_(values, non_blocking=True)
    values.add_(1)  # the copy was asked for before
    assert len(gpu.waits) == 0 and bool(target.isnan().all())
    torch.cuda.synchronize()
    assert target.tolist() == [0, 1, 2, 3, 4, 5]


# ---- the values of the CPU -----------------------------------------------------------------------


def mlp(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(lambda x: F.silu(x @ w).softmax(-1), x, use_reentrant=False)


def test_gradients_are_those_of_the_cpu(gpu: PretendGpu) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    w = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for device in ("cpu", "cuda"):
        leaf, weight = x.clone().requires_grad_(), w.clone().to(device).requires_grad_()
        mlp(leaf.to(device), weight).square().sum().backward()
        assert weight.grad is not None and weight.grad.device == weight.device
        assert leaf.grad is not None and leaf.grad.device.type == "cpu"
        found.append((leaf.grad, weight.grad.cpu()))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*found, strict=True))


def test_autocast_of_cuda(gpu: PretendGpu) -> None:
    weight = torch.eye(4, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        product = torch.ones(2, 4, device="cuda") @ weight
        assert product.dtype == torch.bfloat16
        assert product.softmax(-1).dtype == torch.float32
        assert (product + 1).dtype == torch.bfloat16
        out = torch.zeros(2, 4, device="cuda")
        assert (
            torch.mm(product.detach(), weight.detach().bfloat16(), out_dtype=out.dtype, out=out)
            is out
        )
    product.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_a_module_moves_with_its_ties(gpu: PretendGpu) -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False) for _ in range(2)])
    module[1].weight = module[0].weight
    module.to("cuda")
    assert module[0].weight is module[1].weight and module[0].weight.is_cuda
    assert isinstance(module[0].weight, torch.nn.Parameter)


def test_generators_of_the_device_have_a_state_of_their_own(gpu: PretendGpu) -> None:
    host = torch.get_rng_state()
    first = torch.rand(3, device="cuda").cpu()
    assert torch.equal(torch.get_rng_state(), host)
    torch.cuda.set_rng_state(torch.Generator().manual_seed(0).get_state())
    assert torch.equal(torch.rand(3, device="cuda").cpu(), first)
    one, two = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    drawn = [torch.rand(3, device="cuda", generator=g).cpu() for g in (one, two)]
    assert torch.equal(*drawn)
