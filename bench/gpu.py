"""What a GPU is wanted for, in stages: what decides most comes first.

    PYTHONPATH=kernels:. python bench/gpu.py ceilings correct safe ratios tiles rows --out DIR

Every measurement is one line of DIR/results.jsonl, written as soon as it is there; one that fails is
a line too, and stops no other. `report_gpu.py` makes tables of them. Inputs are drawn on the GPU.

    ceilings  rate of a copy, of a square GEMM, and of the head's three products with `out_dtype`
    correct   the losses beside float64 of plain PyTorch on the same device
    safe      waits of the host, the same bits again, memory that is read before it is written
    ratios    full passes of the loss beside its peers at the sizes of the predictions
    tiles     the products over kept tiles beside dense ones: the density where they break even
    rows      the row kernel over blocks, warps, programs a multiprocessor; its first sweep alone
    trainer   three steps of a random policy of 0.5 B, its peak of memory beside the plan's line

Legend: N tokens, V vocabulary, D hidden, R rows of one chunk.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import Batch, make_batch
from loss import machine, peak_extra_bytes, run, timed
from peers import PROVIDERS
from torch import Tensor

from exgrpo_kernels import PolicyObjective, linear_policy_loss, rowwise, runtime, sparse_backward
from exgrpo_kernels.linear_head import RowInputs
from exgrpo_kernels.objective import LossColumns

Found = dict[str, Any]
LOW, HIGH = torch.bfloat16, torch.float32


class Sizes(NamedTuple):
    tokens: int = 8192
    vocab: int = 151_936
    hiddens: tuple[int, ...] = (2048, 1536, 4096)
    copied_bytes: int = 2**32
    square: int = 8192
    chunks: tuple[int, ...] = (4096, 2048)
    checked: tuple[int, int, int] = (768, 32_037, 512)  # N, V, D of `correct` and `safe`
    sweep_rows: int = 4096
    runs: int = 50  # that have to give the same bits
    repeats: int = 5


SMALL = Sizes(128, 384, (64,), 4096, 16, (128,), (130, 300, 16), 128, 2, 1)


class Recorder:
    """One line of JSON a measurement. `seconds`: the time that all stages together have."""

    def __init__(self, path: Path, seconds: float, first: int | None = None) -> None:
        """`first`: as many measurements of each stage; None: all."""
        self.file = path.open("a")
        self.first = first
        self.began = time.perf_counter()
        self.seconds = seconds
        self.stage = ""
        self.num_failed = 0
        self.num_measured = 0  # in this stage

    def begin(self, stage: str, found: Found) -> None:
        self.stage, self.num_measured = stage, 0
        self.write("begins", found)

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def write(self, name: str, found: Found) -> None:
        row = {"stage": self.stage, "name": name, "at": round(self.seconds - self.left(), 1)}
        self.file.write(json.dumps(row | found) + "\n")
        self.file.flush()
        print(self.stage, name, found, flush=True)

    def measure(self, name: str, work: Callable[[], Found], *, needs: float = 5.0) -> None:
        """Write what `work` finds, or its error; nothing where fewer seconds are left than it needs."""
        if self.left() < needs or self.num_measured == self.first:
            return
        self.num_measured += 1
        try:
            self.write(name, work())
        except Exception as error:  # whatever a launch or a peer raises is a result
            self.num_failed += 1
            self.write(name, {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            if "CUDA error" in str(error):
                sys.exit("gpu.py: the CUDA context is lost; no later result could be believed")


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median by events, after two runs to warm up."""
    times = []
    for repeat in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def normal(*shape: int, dtype: torch.dtype = LOW) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def batch_of(tokens: int, vocab: int, hidden: int, inputs: str = "realistic") -> Batch:
    """In bfloat16, a fifth of the tokens without advantage."""
    sizes = {"tokens": tokens, "vocab": vocab, "hidden": hidden, "seed": 0}
    return make_batch(
        argparse.Namespace(
            **sizes, inputs=inputs, dtype="bfloat16", device="cuda", zero_advantages=0.2
        )
    )


# ---- ceilings ------------------------------------------------------------------------------------


def ceilings(recorder: Recorder, sizes: Sizes) -> None:
    def copy_rate() -> Found:
        source = torch.zeros(sizes.copied_bytes // 4, device="cuda")
        target = torch.empty_like(source)
        spent = milliseconds(lambda: target.copy_(source), sizes.repeats)
        return {"tb_per_s": 2 * sizes.copied_bytes / spent / 1e9}

    a, b = normal(sizes.square, sizes.square), normal(sizes.square, sizes.square)
    recorder.measure("copy", copy_rate)
    product = partial(torch.matmul, a, b)
    recorder.measure("square GEMM", partial(flop_rate, product, 2 * sizes.square**3, sizes.repeats))
    for rows, hidden in itertools.product(sizes.chunks, sizes.hiddens[:2]):
        for name, call in head_products(rows, sizes.vocab, hidden):
            flops = 2 * rows * sizes.vocab * hidden
            where = f"{name}, R={rows}, D={hidden}"
            recorder.measure(where, partial(flop_rate, call, flops, sizes.repeats))


def flop_rate(call: Callable[[], object], flops: int, repeats: int) -> Found:
    return {"tflops": flops / milliseconds(call, repeats) / 1e9}


def head_products(rows: int, vocab: int, hidden: int) -> Iterator[tuple[str, Callable[[], None]]]:
    x, w = normal(rows, hidden), normal(vocab, hidden)
    for dtype in (LOW, HIGH):
        z = runtime.empty_logits(rows, vocab, dtype, x.device)
        yield f"logits {dtype}", partial(runtime.logits_into, z, x, w)
        del z
    dz, dx, dw = normal(rows, vocab), torch.empty_like(x), torch.zeros(vocab, hidden, device="cuda")
    yield "dX", lambda: runtime.hidden_gradient_into(dx, dz, w)
    yield "dW float32 +=", lambda: runtime.weight_gradient_add(dw, dz, x, overwrite=False)


# ---- correct -------------------------------------------------------------------------------------

OBJECTIVES: dict[str, Found] = {
    "clip": {},
    "entropy": {"entropy_coef": 0.01},
    "gspo": {"ratio_level": "sequence"},
    "k3": {"kl_coef": 0.1},
    "cispo": {"surrogate": "cispo"},
    "sapo": {"surrogate": "sapo"},
    "dual clip": {"dual_clip": 3.0},
}
SETTINGS: dict[str, Found] = {
    "dense": {"sparsity": "off"},
    "dense, several chunks": {"sparsity": "off", "chunk_rows": 128},
    "bfloat16 logits": {"sparsity": "off", "logits_dtype": LOW},
    "sparsity 1e-6": {"sparsity": 1e-6},
    "sparsity 1e-4, centroids": {"sparsity": 1e-4, "tail": "centroid"},
}
MOST_TIMES_PLAIN = 2.0  # of the error of plain PyTorch with logits of the same dtype


def call_loss(batch: Batch, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Log-probs and both gradients with the head in `dtype`."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (batch.hidden, batch.weight))
    wide = torch.promote_types(dtype, HIGH)
    behaviour = batch.behaviour_logprobs.to(wide)
    if options["objective"].kl_coef:
        options["ref_logprobs"] = behaviour - 0.1
    result = linear_policy_loss(
        hidden,
        weight,
        batch.targets,
        advantages=batch.advantages.to(wide),
        behaviour_logprobs=behaviour,
        weights=batch.weights.to(wide),
        **options,
    )
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"logprobs": result.logprobs.detach(), "dX": hidden.grad, "dW": weight.grad}


def correct(recorder: Recorder, sizes: Sizes) -> None:
    batch = batch_of(*sizes.checked)
    ids = torch.arange(len(batch.targets), device="cuda") // 50
    for name, fields in OBJECTIVES.items():
        objective = PolicyObjective(**fields)
        same: Found = {"objective": objective, "sequence_ids": ids}
        plain: Found = same | {"backend": "torch", "sparsity": "off"}
        exact = call_loss(batch, torch.float64, **plain)
        usual = {
            dtype: relative_errors(call_loss(batch, LOW, logits_dtype=dtype, **plain), exact)
            for dtype in (None, LOW)
        }
        for setting, options in SETTINGS.items():
            if setting == "dense" or name in ("clip", "entropy", "gspo"):
                ours = partial(call_loss, batch, LOW, **same, **options)
                compare = partial(
                    compared, ours, exact, usual[options.get("logits_dtype")], setting
                )
                recorder.measure(f"{name}, {setting}", compare)


def compared(
    call: Callable[[], dict[str, Tensor]],
    exact: dict[str, Tensor],
    usual: dict[str, float],
    setting: str,
) -> Found:
    """Errors, and how many times those of plain PyTorch they are."""
    found = relative_errors(call(), exact)
    times = max(found[name] / max(usual[name], 1e-6) for name in found)
    judged = "sparsity" not in setting  # what is dropped is an error of another kind
    return found | {"times_plain": times, "ok": times <= MOST_TIMES_PLAIN or not judged}


def relative_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((found[name].double() - exact[name]).norm() / exact[name].norm())
        for name in exact
    }


# ---- safe ----------------------------------------------------------------------------------------


def safe(recorder: Recorder, sizes: Sizes) -> None:
    batch = batch_of(*sizes.checked)
    ids = torch.arange(len(batch.targets), device="cuda") // 50
    several: Found = {"chunk_rows": 128, "sequence_ids": ids}

    def call(**options: Any) -> dict[str, Tensor]:
        return call_loss(batch, LOW, **({"objective": PolicyObjective()} | options))

    def never_waits(options: Found) -> Found:
        call(**options)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(**options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"ok": True}

    def same_bits(sparsity: str | float) -> Found:
        first = call(sparsity=sparsity)
        for _ in range(sizes.runs):
            again = call(sparsity=sparsity)
            if not all(torch.equal(again[name], first[name]) for name in first):
                return {"ok": False}
        return {"ok": True, "runs": sizes.runs}

    def nothing_unwritten(options: Found) -> Found:
        with poisoned_memory():
            outputs = call(**options)
        bad = [name for name, value in outputs.items() if not bool(value.isfinite().all())]
        return {"ok": not bad, "unwritten": bad}

    sequence = several | {"objective": PolicyObjective(ratio_level="sequence")}
    cases = {"auto": {}, "three chunks, sequence ids": several, "gspo, three chunks": sequence}
    for name, options in cases.items():
        recorder.measure(f"the host never waits: {name}", partial(never_waits, options))
    for sparsity in ("off", 1e-4):
        recorder.measure(f"the same bits: sparsity {sparsity}", partial(same_bits, sparsity))
    tails: dict[str, Found] = {"dense": {"sparsity": "off"}, "sparse": {"sparsity": 1e-3}}
    tails["centroids"] = {"sparsity": 1e-3, "tail": "centroid"}
    for name, options in tails.items():
        recorder.measure(f"nothing unwritten: {name}", partial(nothing_unwritten, options))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """What PyTorch allocates is full of NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- ratios --------------------------------------------------------------------------------------


def ratios(recorder: Recorder, sizes: Sizes) -> None:
    """Full passes, each provider alone; the first hidden size with every peer that is there."""
    for place, hidden in enumerate(sizes.hiddens):
        batch = batch_of(sizes.tokens, sizes.vocab, hidden)
        names = [n for n in PROVIDERS if place == 0 or n.startswith(("linear", "three"))]
        names.sort(key=lambda name: not name.startswith(("three", "linear_policy")))
        for name in names:
            where = f"{name}, D={hidden}"
            if reason := PROVIDERS[name].unavailable(True, 0.0):
                recorder.write(where, {"absent": reason})
                continue
            recorder.measure(where, partial(one_ratio, name, batch, sizes.repeats))
            torch.cuda.empty_cache()


def one_ratio(provider: str, batch: Batch, repeats: int) -> Found:
    run(provider, batch, 0.0)  # compiles
    spent = [timed(provider, batch, 0.0) for _ in range(repeats + 1)][1:]
    return {
        "ms": statistics.median(times.full for times in spent),
        "forward_ms": statistics.median(times.forward for times in spent),
        "extra_mib": peak_extra_bytes(provider, batch, 0.0) / 2**20,
    }


# ---- tiles ---------------------------------------------------------------------------------------


def tiles(recorder: Recorder, sizes: Sizes) -> None:
    from exgrpo_kernels import sparse_kernels

    rows, vocab, hidden = sizes.sweep_rows, sizes.vocab, sizes.hiddens[0]
    dz, w, x = normal(rows, vocab), normal(vocab, hidden), normal(rows, hidden)
    dx, dw = torch.empty_like(x), torch.zeros(vocab, hidden, device="cuda")

    def spent(module: Any, *kept: Tensor) -> tuple[float, float]:
        return (
            milliseconds(lambda: module.hidden_gradient_into(dx, dz, w, *kept), sizes.repeats),
            milliseconds(
                lambda: module.weight_gradient_add(dw, dz, x, *kept, overwrite=False), sizes.repeats
            ),
        )

    dense = spent(runtime)
    shape = -(-rows // sparse_backward.ROWS), sparse_backward.num_tiles(vocab)

    def beside_dense(density: float) -> Found:
        kept = torch.rand(shape, device="cuda") < density
        of_hidden, of_weight = spent(sparse_kernels, kept)
        return {"dX_to_dense": of_hidden / dense[0], "dW_to_dense": of_weight / dense[1]}

    for density in (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0):
        recorder.measure(f"density {density}", partial(beside_dense, density))


# ---- rows ----------------------------------------------------------------------------------------

SHAPES = [(4096, 8), (8192, 16), (8192, 8), (2048, 4), (2048, 8), (16384, 16)]  # columns, warps


def rows(recorder: Recorder, sizes: Sizes) -> None:
    """GB/s of both sweeps at itemsize + 2 bytes a logit, and of the first alone."""
    count, vocab = sizes.sweep_rows, sizes.vocab
    ones = torch.ones(count, device="cuda")
    objective = PolicyObjective()
    columns = LossColumns(ones, -12 * ones, ones).checked(objective, count, HIGH, ones.device)
    inputs = RowInputs(torch.randint(vocab, (count,), device="cuda"))

    def rates(logits: Tensor, block: int, warps: int, programs: int) -> Found:
        kernel = rowwise.TritonRows(logits.clone(), operand_dtype=LOW)
        kernel.shape = runtime.RowKernelShape(block, warps)
        kernel.num_programs = programs * runtime.num_programs(logits.device)
        full = milliseconds(
            lambda: kernel.policy_gradient(inputs, objective, columns), sizes.repeats
        )
        first = milliseconds(lambda: kernel.statistics(inputs), sizes.repeats)
        itemsize = logits.element_size()
        return {
            "ms": full,
            "gb_per_s": logits.numel() * (itemsize + 2) / full / 1e6,
            "first_sweep_gb_per_s": logits.numel() * itemsize / first / 1e6,
        }

    for dtype in (LOW, HIGH):
        logits = normal(count, vocab, dtype=dtype)
        for (block, warps), programs in itertools.product(SHAPES, (1, 2, 4)):
            name = f"{dtype} block {block}, {warps} warps, {programs} programs"
            work = partial(rates, logits, block, warps, programs)
            recorder.measure(name.removeprefix("torch."), work)
        del logits


# ---- trainer -------------------------------------------------------------------------------------

TRAINED = {
    "float32 weights, adamw": "float32",
    "bfloat16 weights, flash_adamw": "bfloat16",
}


def trainer(recorder: Recorder, sizes: Sizes) -> None:
    """Three steps of GRPO; needs the packages of the extras `train` and `optim8`."""
    from exgrpo_fast.cli import main as command

    with tempfile.TemporaryDirectory() as folder:
        words = [*trainer_inputs(Path(folder), sizes), "--max-steps", "3", "--no-supervise"]

        def steps(weights: str) -> Found:
            out = Path(folder) / weights
            try:
                command([*words, "--out", str(out), "--model.weights", weights])
            except SystemExit as end:
                if end.code:
                    raise RuntimeError((out / "run.log").read_text()[-300:]) from None
            return figures_of(out)

        for name, weights in TRAINED.items():
            recorder.measure(name, partial(steps, weights))


def trainer_inputs(folder: Path, sizes: Sizes) -> list[str]:
    """A random policy of the shape of Qwen2.5-0.5B with its data; the words of the command."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from exgrpo_fast.build.quickstart.toy_model import make_tokenizer

    is_small = sizes is SMALL
    tokenizer: Any = make_tokenizer(["What is 1 + 2? <answer>3</answer>\n"] * 3, vocab_size=300)
    config = Qwen3Config(
        vocab_size=max(sizes.vocab, len(tokenizer)),
        hidden_size=64 if is_small else 896,
        intermediate_size=128 if is_small else 4864,
        num_hidden_layers=2 if is_small else 24,
        num_attention_heads=1 if is_small else 14,
        num_key_value_heads=1 if is_small else 2,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def even(completions, **columns):\n    return [float(len(c) % 2) for c in completions]\n"
    )
    tokens = 8 if is_small else 512
    return [
        *("train", "grpo", "--device", "cuda", "--model.name", str(folder / "model")),
        *("--data.train", str(folder / "rows.jsonl"), "--data.check_answers", "false"),
        *("--reward.functions", f"[{folder / 'reward.py'}:even]", "--reward.workers", "1"),
        *("--rollout.engine", "transformers", "--rollout.max_completion_tokens", str(tokens)),
        *("--rollout.prompts_per_step", "4" if is_small else "32", "--rollout.group_size", "4"),
        *("--data.max_prompt_tokens", "64", "--checkpoint.every", "3", "--eval.every", "0"),
        *(("--train.max_tokens_per_microbatch", "160") if is_small else ()),
    ]


def figures_of(out: Path) -> Found:
    """Of the last step, and the peak of the rehearsal of the worst one beside the plan's, in GiB."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rehearsed = re.search(r"peak ([0-9.]+) GiB, planned ([0-9.]+)", (out / "run.log").read_text())
    last = {k: v for k, v in steps[-1].items() if k.startswith(("seconds", "peak", "tokens"))}
    if rehearsed is None:
        return last
    peak, planned = map(float, rehearsed.groups())
    return {**last, "rehearsed_gib": peak, "planned_gib": planned}


# ---- all -----------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Recorder, Sizes], None]] = {
    stage.__name__: stage for stage in (ceilings, correct, safe, ratios, tiles, rows, trainer)
}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stages", nargs="+", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0)
    parser.add_argument("--small", action="store_true", help="sizes to try the program with")
    parser.add_argument("--first", type=int, help="so many measurements of each stage")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.exit(2, "gpu.py: needs a CUDA device\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(arguments.out / "results.jsonl", arguments.seconds, arguments.first)
    sizes = SMALL if arguments.small else Sizes()
    today = datetime.date.today().isoformat()
    for stage in arguments.stages:
        recorder.begin(stage, {"date": today, **machine("cuda"), "sizes": sizes._asdict()})
        try:
            STAGES[stage](recorder, sizes)
        except Exception as error:  # of its inputs: the next stage may do
            recorder.num_failed += 1
            recorder.write("ends", {"error": f"{type(error).__name__}: {str(error)[:300]}"})
    return 1 if recorder.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
