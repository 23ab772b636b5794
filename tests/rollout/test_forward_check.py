"""The check of the forward pass: right models pass, and a fault seeded in any part is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import exit_code
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from exgrpo_fast.model import lora, policy
from exgrpo_fast.model.attention import sdpa
from exgrpo_fast.model.policy import Policy
from exgrpo_fast.rollout import forward_check
from exgrpo_fast.rollout.forward_check import ForwardMismatch, ForwardReport, check_forward
from exgrpo_fast.rollout.hf import decoding, packed_decoder
from exgrpo_fast.rollout.hf.engine import TransformersEngine
from exgrpo_fast.rollout.plain_model import hooked

PROMPT, EOS = tuple(range(5, 45)), [2]
SHARED: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=16, attention_dropout=0.1))


def gemma3() -> PreTrainedModel:
    """Sliding windows, a softcapped and tied head."""
    layers = ["sliding_attention", "full_attention"]
    more: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "layer_types": layers}
    return Gemma3ForCausalLM(Gemma3TextConfig(**SHARED, **more, final_logit_softcapping=20.0))


def gpt_oss() -> PreTrainedModel:
    """Attention sinks, sliding windows, experts."""
    more: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(**SHARED, **more, num_experts_per_tok=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.uniform_(-1.0, 2.0)
    return model


def gpt2() -> PreTrainedModel:
    """Learned positions, Conv1D layers, dropout of three kinds."""
    more: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "n_positions": 256}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, **more))


def granite() -> PreTrainedModel:
    """Logits, residuals, embeddings and attention are scaled."""
    more: dict[str, Any] = {"residual_multiplier": 0.3, "embedding_multiplier": 3.0}
    return GraniteForCausalLM(GraniteConfig(**SHARED, **more, logits_scaling=8.0))


def qwen2_moe() -> PreTrainedModel:
    """Its layers hand no window to their attention; it is in the mask alone."""
    more: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 200}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHARED, **more, **window, max_window_layers=1))


def phimoe() -> PreTrainedModel:
    """While training, its router draws the experts."""
    more: dict[str, Any] = {"num_local_experts": 4, "router_jitter_noise": 0.01}
    return PhimoeForCausalLM(PhimoeConfig(**SHARED, **more))


def mixtral() -> PreTrainedModel:
    more: dict[str, Any] = {"num_local_experts": 4, "router_jitter_noise": 0.02}
    return MixtralForCausalLM(MixtralConfig(**SHARED, **more))


def stablelm() -> PreTrainedModel:
    """Attention of its own, which takes no notice of a pack."""
    return StableLmForCausalLM(StableLmConfig(**SHARED))


def made(make: Callable[[], PreTrainedModel], *, adapter: bool = False, **settings: Any) -> Policy:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # as large as after training: attention then has a say
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    if adapter:
        lora.add_adapter(model, rank=4, alpha=8.0)
    return Policy(model, **settings)


def checked(policy: Policy, *, eos: list[int] = EOS) -> ForwardReport:
    engine = TransformersEngine(policy, eos_token_ids=eos, pad_token_id=0)
    return check_forward(policy, engine, prompt_ids=PROMPT, eos_token_ids=EOS)


def fault_in(policy: Policy, **options: Any) -> str:
    with pytest.raises(ForwardMismatch) as found:
        checked(policy, **options)
    assert str(found.value).startswith(f"{policy.model.config.model_type}: ")
    return found.value.part


# --- right models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [qwen3, gemma3, gpt_oss, gpt2, granite, mixtral])
@pytest.mark.parametrize("adapter", [False, True])
def test_right_models_pass(make: Callable[[], PreTrainedModel], adapter: bool) -> None:
    policy = made(make, adapter=adapter)
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    random_state = torch.get_rng_state()
    report = checked(policy)
    assert set(report.gaps) == {"packed", "update", "engine"} | ({"adapter"} if adapter else set())
    assert max(report.gaps.values()) < 2e-6 and report.tolerance < 1e-4
    assert str(report).startswith("forward pass checked: packed ")
    after = policy.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert torch.equal(random_state, torch.get_rng_state()), "the run would go another way"
    assert policy.model.training and policy.model.config._attn_implementation == "exgrpo_packed"


def test_a_model_of_few_positions_is_checked_within_them() -> None:
    more: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "n_positions": 24}
    sizes: dict[str, Any] = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}
    policy = made(lambda: GPT2LMHeadModel(GPT2Config(**sizes, **more)))
    engine = TransformersEngine(policy, eos_token_ids=EOS, pad_token_id=0)
    options: dict[str, Any] = {"prompt_ids": PROMPT, "eos_token_ids": EOS}
    assert check_forward(policy, engine, longest=24, **options).gaps["engine"] < 2e-6
    with pytest.raises(ForwardMismatch):
        check_forward(policy, engine, **options)
    lengths = [len(prompt) for prompt in forward_check.probe_prompts(PROMPT, longest=24)]
    assert lengths == [12, 12, 5, 21]
    assert [len(p) for p in forward_check.probe_prompts((3,))] == [1, 1, 1, 129]


def test_bfloat16_is_allowed_its_rounding() -> None:
    report = checked(made(qwen3, compute_dtype=torch.bfloat16))
    assert 1e-4 < report.gaps["packed"] < report.tolerance < 0.3


# --- seeded faults --------------------------------------------------------------------------------


def test_a_dropped_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a pack read those before them."""

    def causal(
        query: Any, key: Any, value: Any, *, scaling: Any, sinks: Any = None, **_: Any
    ) -> Any:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    monkeypatch.setitem(policy.BACKENDS, "sdpa", lambda layout, device: causal)  # type: ignore
    assert fault_in(made(qwen3)) == "packed"


def test_a_fault_of_the_long_sequence_alone_is_the_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read in training mode, and the fault is not of that mode."""
    pack = policy.pack

    def shifted(*args: Any, **options: Any) -> Any:
        # A rotary model sees no shift of a whole sequence, so every second position.
        return [
            replace(p, position_ids=torch.where(p.position_ids > 100, 2, 1) * p.position_ids)
            for p in pack(*args, **options)
        ]

    monkeypatch.setattr(policy, "pack", shifted)
    assert fault_in(made(qwen3)) == "packed"


def test_the_least_tolerance_follows_the_size_of_the_logits() -> None:
    def least(scale: float, *, masked: bool = False) -> float:
        subject = made(qwen3)
        prompts = [PROMPT, PROMPT[:3]]
        probe = forward_check.Probe(prompts, [torch.tensor([5, 6]), torch.tensor([7])])
        with torch.no_grad():
            subject.head.weight.mul_(scale)
        if not masked:
            return forward_check.Reference(subject, probe).least
        rows = slice(90, None)  # of a padded vocabulary, as some models mask them
        with hooked(
            subject.model.get_output_embeddings(),
            lambda m, i, logits: logits.index_fill(2, torch.arange(96)[rows], -torch.inf),
        ):
            return forward_check.Reference(subject, probe).least

    assert least(1e-3) == 5e-6
    assert 5e-6 < least(150.0) < 5e-3
    assert least(300.0) == pytest.approx(2 * least(150.0), rel=1e-3)
    assert least(300.0, masked=True) == pytest.approx(least(300.0), rel=0.2)


def test_shifted_positions_in_a_pack_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = policy.pack

    def shifted(*args: Any, **options: Any) -> Any:
        made = pack(*args, **options)
        starts = [int(p.layout.prompt_lengths[0]) for p in made]
        moved = [
            p.position_ids + (torch.arange(len(p.position_ids)) >= s)
            for p, s in zip(made, starts, strict=True)
        ]
        return [replace(p, position_ids=m) for p, m in zip(made, moved, strict=True)]

    monkeypatch.setattr(policy, "pack", shifted)
    assert fault_in(made(qwen3)) == "packed"


def mask_of(change: Callable[[Any], Any], kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in the scoring of layers of one kind alone: those with a window, or those without."""

    def seed(monkeypatch: pytest.MonkeyPatch) -> None:
        call = sdpa.SideBySide.__call__

        def changed(self: Any, query: Any, key: Any, value: Any, scoring: Any, *more: Any) -> Any:
            if (scoring.window is not None) == (kind == "sliding"):
                scoring = change(scoring)
            return call(self, query, key, value, scoring, *more)

        monkeypatch.setattr(sdpa.SideBySide, "__call__", changed)

    return seed


def shifted_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are off by one for the tokens that are drawn, and right in the prompt."""
    begin = packed_decoder.Branches.__init__

    def shifted(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.positions_B = self.positions_B + 1

    monkeypatch.setattr(packed_decoder.Branches, "__init__", shifted)


def shifted_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    read = decoding._Forward.__call__

    def shifted(self: Any, ids_Bn: Any) -> Any:
        if not self.num_read:
            return read(self, ids_Bn)
        self.mask_BS[:, 0] += 1  # one more token before each
        return read(self, ids_Bn)

    monkeypatch.setattr(decoding._Forward, "__call__", shifted)


def doubled_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = lora._delta
    monkeypatch.setattr(lora, "_delta", lambda layer: 2.0 * delta(layer))


def scaled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multiplier of the embeddings, in what scores and updates read alone."""
    states = policy.Policy.hidden_states

    def twice(self: Any, packed: Any) -> Any:
        embedding = self.model.get_input_embeddings()
        with hooked(embedding, lambda module, inputs, out: 3.0 * out):
            return states(self, packed)

    monkeypatch.setattr(policy.Policy, "hidden_states", twice)


@pytest.mark.parametrize(
    "make, seed, part",
    [
        (gemma3, mask_of(lambda s: s._replace(window=None), "sliding"), "packed"),
        (gemma3, mask_of(lambda s: s._replace(window=s.window + 1), "sliding"), "packed"),
        (gemma3, mask_of(lambda s: s._replace(window=s.window - 1), "sliding"), "packed"),
        (gemma3, mask_of(lambda s: s._replace(window=8), "full"), "packed"),
        (gpt_oss, mask_of(lambda s: s._replace(scaling=0.3), "full"), "packed"),
        (qwen3, shifted_decoding, "engine"),
        (gpt2, shifted_cache, "engine"),
        (qwen3, doubled_adapter, "adapter"),
        (gpt2, doubled_adapter, "adapter"),
        (granite, scaled_twice, "packed"),
    ],
)
def test_seeded_faults_are_found(
    make: Callable[[], PreTrainedModel],
    seed: Callable[[pytest.MonkeyPatch], None],
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = part == "adapter"
    checked(made(make, adapter=adapter))
    seed(monkeypatch)
    assert fault_in(made(make, adapter=adapter)) == part


def test_shifted_positions_behind_padding_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    init = decoding._Forward.__init__

    def without_positions(self: Any, *args: Any) -> None:
        init(self, *args)
        self.takes_positions = False

    monkeypatch.setattr(decoding._Forward, "__init__", without_positions)
    assert fault_in(made(gpt2)) == "engine"


@pytest.mark.parametrize("where", ["exgrpo_fast.model.attention.sdpa", "interface"])
def test_a_dropped_sink_is_found(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = sdpa.attend_with_sinks

    def without(query: Any, key: Any, value: Any, sinks: Any, **options: Any) -> Any:
        return attend(query, key, value, torch.full_like(sinks, -1e4), **options)

    module = where if "." in where else f"exgrpo_fast.model.attention.{where}"
    monkeypatch.setattr(f"{module}.attend_with_sinks", without)
    assert fault_in(made(gpt_oss)) == ("engine" if where == "interface" else "packed")


@pytest.mark.parametrize("make", [qwen3, gpt2])
def test_a_transposed_adapter_is_found(
    make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = lora._delta

    def transposed(layer: Any) -> Any:
        right = delta(layer)
        return right.T if right.shape[0] == right.shape[1] else right

    monkeypatch.setattr(lora, "_delta", transposed)
    assert fault_in(made(make, adapter=True)) == "adapter"


def test_dropout_in_the_update_is_found() -> None:
    subject = made(qwen3)
    for layer in subject.model.base_model.layers:  # pyright: ignore
        layer.self_attn.attention_dropout = 0.1  # pyright: ignore
    assert fault_in(subject) == "update"
    subject.dropout = True  # as model.dropout asks for it
    assert "update" not in checked(subject).gaps


def test_small_dropout_is_found_where_bfloat16_rounds_more() -> None:
    subject = made(qwen3, compute_dtype=torch.bfloat16)
    subject.model.base_model.layers[0].self_attn.attention_dropout = 1e-4  # pyright: ignore
    with pytest.raises(ForwardMismatch, match=r"update: it draws random numbers"):
        checked(subject)


def test_a_kernel_that_draws_in_both_modes_is_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    call = sdpa.SideBySide.__call__

    def drawing(self: Any, *args: Any) -> Any:
        torch.rand(2)
        return call(self, *args)

    monkeypatch.setattr(sdpa.SideBySide, "__call__", drawing)
    checked(made(qwen3))


@pytest.mark.parametrize("seed", range(3))
def test_a_router_that_draws_is_found_whatever_it_draws(seed: int) -> None:
    subject = made(phimoe)
    torch.manual_seed(seed)
    assert fault_in(subject) == "update"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gemma3, granite])
def test_a_cap_or_scale_of_logits_that_the_loss_leaves_out_is_found(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits may be so small at the start that a cap changes none of them visibly."""
    head = policy.Policy.head
    bare = property(lambda self: head.fget(self)._replace(softcap=None))  # pyright: ignore
    monkeypatch.setattr(policy.Policy, "head", bare)
    monkeypatch.setattr(policy, "logit_scale", lambda config: 1.0)
    torch.manual_seed(0)
    model = make()  # weights as small as at the start of a pre-training
    assert fault_in(Policy(model, compute_dtype=dtype)) == "head"


def test_a_dropped_bias_of_the_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = made(lambda: PhiForCausalLM(PhiConfig(**SHARED)))
    with torch.no_grad():
        subject.model.lm_head.bias.normal_()  # pyright: ignore
    checked(subject)
    whole = policy.Policy.head
    bare = property(lambda self: whole.fget(self)._replace(bias=None))  # pyright: ignore
    monkeypatch.setattr(policy.Policy, "head", bare)
    assert fault_in(subject) == "head"


def test_a_window_longer_than_the_sequences_of_the_check_is_compared() -> None:
    """Of 200 tokens: what it hides is in none of the sequences, and the mask has it all the same."""
    with pytest.raises(ForwardMismatch, match=r"packed: Qwen2MoeAttention sees 200 tokens by its"):
        checked(made(qwen2_moe))
    subject = made(gemma3)
    subject.model.base_model.layers[0].self_attn.sliding_window = 9  # pyright: ignore
    assert fault_in(subject) == "packed"


@pytest.mark.parametrize(
    "more", [{}, {"layer_types": ["full_attention", "sliding_attention"]}], ids=["all", "of a type"]
)
def test_a_window_of_the_config_that_the_model_does_not_have_is_found(more: dict[str, Any]) -> None:
    """Llama has none, and the cache would forget what lies beyond."""
    config: dict[str, Any] = SHARED | {"sliding_window": 200} | more
    policy = made(lambda: LlamaForCausalLM(LlamaConfig(**config)))
    with pytest.raises(ForwardMismatch, match=r"engine: layer \d sees all tokens, and .* 200 tok"):
        checked(policy)


def test_a_cap_below_the_usual_logits_leaves_the_end_token_certain() -> None:
    subject = made(gemma3)
    subject.model.config.final_logit_softcapping = 0.5
    checked(subject)


@pytest.mark.parametrize("eos", [[5], [5, 2], []])
def test_a_wrong_end_token_is_found(eos: list[int]) -> None:
    """One that is not the model's, or none: the first is seen where a completion ends with it."""
    subject = made(qwen3)
    with torch.no_grad():
        subject.head.weight[5] *= 0.0
        subject.head.weight[5] += 0.05
    if eos == [5, 2]:
        with torch.no_grad():  # the token that is drawn first, whatever it is, is an end token
            engine = TransformersEngine(subject, eos_token_ids=[2], pad_token_id=0)
            (first,) = engine.generate(
                [forward_check.Request(PROMPT[:12], 0)], forward_check.Sampling(1)
            )
        eos = [int(first.token_ids[0]), 2]
    assert fault_in(subject, eos=eos) == "end token"


def test_an_incomplete_checkpoint_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = forward_check.merged_weights

    def without_one(*args: Any, **options: Any) -> Iterator[Any]:
        return ((n, w) for n, w in whole(*args, **options) if not n.endswith("o_proj.weight"))

    monkeypatch.setattr(forward_check, "merged_weights", without_one)
    assert fault_in(made(qwen3, adapter=True)) == "checkpoint"


def test_attention_that_cannot_be_replaced_is_found() -> None:
    with pytest.raises(ForwardMismatch, match=r"stablelm: .* \(packed: its attention cannot be"):
        checked(made(stablelm))


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def stablelm_folder(tmp_path: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = SHARED | {"vocab_size": len(tokenizer), "eos_token_id": 1}
    config = StableLmConfig(**sizes)
    path = tmp_path / "stablelm"
    StableLmForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def train(folder: Path, tmp_path: Path, *more: str) -> int:
    tmp_path.mkdir(exist_ok=True)
    rows = [{"prompt": f"{i} + 1?", "answer": "3"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"""train grpo --model.name {folder} --data.train {tmp_path / "rows.jsonl"}
        --out {tmp_path / "run"} --data.check_answers false --rollout.prompts_per_step 2
        --rollout.group_size 2 --rollout.max_completion_tokens 8 --train.max_steps 1
        --reward.workers 1 --device cpu --no-supervise""".split()
    return exit_code(*words, *more)


def test_train_ends_in_one_line_or_goes_on_where_it_is_told_to(
    stablelm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(stablelm_folder, tmp_path / "refused") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "exgrpo-fast:" in line]
    assert "stablelm: the forward pass is not that of the plain model (packed: " in line
    assert line.endswith("--train.allow_mismatch true goes on all the same")
    assert train(stablelm_folder, tmp_path / "allowed", "--train.allow_mismatch", "true") == 0
    assert "warning: stablelm" in "".join(capsys.readouterr())


def test_train_says_what_it_found(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model_folder, tmp_path / "run") == 0
    assert "forward pass checked: packed " in "".join(capsys.readouterr())
