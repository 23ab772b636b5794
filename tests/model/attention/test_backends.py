"""Every back end against each completion alone behind its prompt: outputs and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex_attention
from attention_cases import SHAPES, FlashAttn, VarlenAttn, each_alone, layout_of
from transformers import DeepseekV3Config, LlamaConfig, Qwen3Config

from exgrpo_fast.model.attention import backends, sdpa, varlen
from exgrpo_fast.model.attention.backends import BACKENDS, BackendName, choose, refusal
from exgrpo_fast.model.attention.blocks import greedy_blocks
from exgrpo_fast.model.attention.layout import Scoring

CPU, NAMES = torch.device("cpu"), list(BACKENDS)
# flex_attention is slow where it is not compiled
CASES = [(name, shape) for name in NAMES for shape in SHAPES if name != "flex"]
CASES += [("flex", "groups"), ("flex", "completions of one token")]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, FlashAttn]:
    """In the place of what runs on CUDA alone; flex_attention's backward needs no more than leave."""
    found = {"flash": FlashAttn(), "varlen": VarlenAttn()}
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    monkeypatch.setattr(varlen, "flash_kernel", lambda: found["flash"])
    monkeypatch.setattr(varlen, "varlen_kernel", lambda: partial(found["varlen"], enable_gqa=True))
    return found


def random_heads(
    num_tokens: int, *, heads: int, key_heads: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + heads)
    counts = (heads, key_heads, key_heads, heads)  # the last: the gradient that comes back
    return [torch.randn(num_tokens, n, 8, generator=generator).to(dtype) for n in counts]


def outputs_and_gradients(attend: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    *qkv, cotangent = (x.clone().requires_grad_() for x in inputs)
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad((out * cotangent.detach()).sum(), qkv)]


@pytest.mark.parametrize("heads, key_heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("window, scaling", [(None, None), (3, 0.3), (1, None), (12, 0.3)])
@pytest.mark.parametrize("name, shape", CASES)
def test_outputs_and_gradients_are_those_of_each_completion_alone(
    name: BackendName,
    shape: str,
    window: int | None,
    scaling: float | None,
    heads: int,
    key_heads: int,
    kernels: dict[str, FlashAttn],
) -> None:
    layout = layout_of(SHAPES[shape])
    attention = BACKENDS[name](layout, CPU)
    how: dict[str, Any] = {"scaling": scaling, "window": window}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        inputs = random_heads(layout.num_tokens, heads=heads, key_heads=key_heads, dtype=dtype)
        found = outputs_and_gradients(partial(attention, scoring=Scoring(**how)), inputs)
        expected = outputs_and_gradients(partial(each_alone, SHAPES[shape], **how), inputs)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window, scaling", [(None, None), (3, 0.3)])
@pytest.mark.parametrize(
    "name, shape", [("sdpa", "groups"), ("sdpa", "one long among short"), ("flex", "groups")]
)
def test_attention_sinks_take_their_share_of_each_softmax(
    name: BackendName, shape: str, window: int | None, scaling: float | None, kernels: Any
) -> None:
    """Outputs and gradients, that of the sinks as well."""
    layout = layout_of(SHAPES[shape])
    attention = BACKENDS[name](layout, CPU)
    how: dict[str, Any] = {"scaling": scaling, "window": window}
    qkv = random_heads(layout.num_tokens, heads=4, key_heads=2, dtype=torch.float64)
    sinks = torch.tensor([-1.0, 0.0, 1.5, 3.0], dtype=torch.float64)
    inputs = [*qkv[:3], sinks, qkv[3]]
    found = outputs_and_gradients(lambda q, k, v, s: attention(q, k, v, Scoring(**how), s), inputs)
    expected = outputs_and_gradients(
        lambda q, k, v, s: each_alone(SHAPES[shape], q, k, v, sinks=s, **how), inputs
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    without = attention(*qkv[:3], scoring=Scoring(**how))
    assert (found[0] - without).abs().max() > 0.1


@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_prompts_are_gathered_within_bounds(name: BackendName, kernels: Any) -> None:
    """A prompt of 40 behind 8 short completions would be 335 keys for 55 tokens."""
    shape = SHAPES["a long prompt"]
    layout = layout_of(shape)
    inputs = random_heads(layout.num_tokens, heads=2, key_heads=1, dtype=torch.float64)
    attention = BACKENDS[name](layout, CPU)
    attention(*inputs[:3], scoring=Scoring())
    keys = kernels[name].keys
    assert sum(keys) == sum(40 + length for length in shape[0][1]) == 335
    assert len(keys) == 8 and max(keys) <= layout.num_tokens
    del keys[:]
    outputs_and_gradients(partial(attention, scoring=Scoring()), inputs)
    assert sorted(keys) == sorted(2 * keys[:8]), "each block is made again in the backward pass"


def test_nothing_is_gathered_twice_where_nothing_is_shared() -> None:
    layout = layout_of(SHAPES["nothing shared"])
    (run,) = varlen.query_runs(layout, CPU)
    assert run.key_rows.tolist() == list(range(layout.num_tokens))
    assert torch.equal(run.cu_seqlens_q, run.cu_seqlens_k)


def test_padding_stays_within_the_size_of_the_pack() -> None:
    for shape in SHAPES.values():
        layout = layout_of(shape)
        blocks = sdpa.SideBySide(layout, CPU).blocks
        longest = int(layout.sequence_lengths.max())
        room = layout.num_tokens // min(len(blocks), 2)
        assert all(len(b.query_rows) <= max(room, longest) for b in blocks)  # pyright: ignore
        answered = torch.cat([torch.as_tensor(block.answered) for block in blocks])
        assert answered.sort().values.tolist() == list(range(layout.num_tokens))
    assert greedy_blocks([5, 1, 2, 9, 3, 3], capacity=6) == [[0, 1], [2], [3], [4, 5]]


# --- which of them -------------------------------------------------------------------------------


def test_a_cpu_has_sdpa() -> None:
    same: Any = {"device": "cpu", "dtype": torch.bfloat16}
    assert choose("auto", **same) == "sdpa"
    assert [refusal(name, **same) is None for name in NAMES] == [False, False, False, True]
    assert refusal("flash", **same) == "needs a CUDA device, not cpu; take sdpa or auto"


@pytest.mark.parametrize(
    "installed, dtype, capability, expected",
    [
        (True, torch.bfloat16, (9, 0), "flash"),
        (False, torch.bfloat16, (9, 0), "varlen"),
        (True, torch.float32, (9, 0), "sdpa"),
        (True, torch.float16, (7, 5), "sdpa"),
    ],
)
def test_auto_takes_the_best_that_runs(
    installed: bool, dtype: torch.dtype, capability: tuple[int, int], expected: str, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: installed or None)
    assert choose("auto", device="cuda", dtype=dtype) == expected


def test_a_model_may_be_too_much_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)

    def chosen(config: Any) -> str:
        return choose("auto", device="cuda", dtype=torch.bfloat16, model=config)

    assert chosen(Qwen3Config(head_dim=128)) == "flash"
    assert chosen(Qwen3Config(head_dim=512)) == "sdpa"
    assert chosen(LlamaConfig(hidden_size=48, num_attention_heads=4)) == "sdpa"
    assert chosen(DeepseekV3Config()) == "sdpa"  # heads of 192 and of 128
    dropout = LlamaConfig(hidden_size=64, num_attention_heads=4, attention_dropout=0.1)
    same: Any = {"device": "cuda", "dtype": torch.bfloat16, "model": dropout}
    assert choose("auto", dropout=True, **same) == "flash"
    assert choose("auto", sinks=True, **same) == "sdpa"
    for name in ("varlen", "flex"):
        assert "has no dropout" in str(refusal(name, dropout=True, **same))
        assert refusal(name, dropout=False, **same) is None
    for name in ("varlen", "flash"):
        assert "has no attention sinks" in str(refusal(name, sinks=True, **same))
    assert refusal("flex", sinks=True, **same) is None


def test_varlen_wants_scale_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch 2.10, 2.11 and 2.13."""
    module = pytest.importorskip("torch.nn.attention.varlen")

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False) -> None: ...
    def new(query, key, value, *rest, scale=None, window_size=(-1, -1)) -> None: ...

    def told(query, key, value, *rest, scale=None, window_size=None, enable_gqa=False) -> None: ...

    assert varlen.varlen_kernel() is not None  # of every torch that is supported
    monkeypatch.setattr(module, "varlen_attn", told)
    found = varlen.varlen_kernel()
    assert found is not None and found.keywords == {"enable_gqa": True}  # pyright: ignore
    monkeypatch.setattr(module, "varlen_attn", old)
    assert varlen.varlen_kernel() is None
    monkeypatch.setattr(module, "varlen_attn", new)
    untold = varlen.varlen_kernel()
    assert untold is not None and untold.keywords == {}  # pyright: ignore
