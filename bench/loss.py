"""How fast is the fused policy loss, and what does it hold in memory?

    PYTHONPATH=kernels python bench/loss.py [--tokens 4096 --vocab 32768 --hidden 512]

Every provider does the same work: the PPO clip loss of N tokens from their hidden states, the
log-probabilities and entropies of all tokens, and the gradients of hidden states and weight.
They run interleaved, round-robin, in one process; a machine that slows down slows all of them.
The last line of stdout is JSON; --out gives the folder of loss.json and loss.png.

Legend: N tokens, V vocabulary, D hidden.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from exgrpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss

CLIP_LOW, CLIP_HIGH, ENTROPY_COEF = 0.2, 0.28, 1e-3
CHUNK = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    weights: Tensor


# ---- inputs --------------------------------------------------------------------------------------


def realistic_head(tokens: int, vocab: int, hidden: int, generator: torch.Generator):
    """(N, D), (V, D) of a policy that is nearly certain of most tokens, without any model.

    The weight is noise plus a Zipf unigram along one direction u. Each row chooses 12 candidates
    from the unigram and how the mass is shared: half the rows leave 1e-5 .. 1e-2 to others than
    their first choice, 30 % up to 0.12, 20 % up to 0.6, and 15 % of what is left goes to the
    tail. Solving a 12 x 12 system gives the hidden state with those logits.
    """
    candidates, tail_share = min(12, vocab), 0.15

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    u = torch.nn.functional.normalize(torch.randn(hidden, generator=generator), dim=0)
    unigram = -1.15 * torch.log(torch.arange(vocab) + 3.0)
    unigram = (unigram - unigram.mean()).double()
    noise = torch.randn(vocab, hidden, generator=generator) / math.sqrt(hidden)
    noise -= (noise @ u)[:, None] * u
    weight = noise + unigram.float()[:, None] * u

    kind = uniform(tokens)
    rest = torch.where(
        kind < 0.5,
        10 ** (-5 + 3 * uniform(tokens)),
        torch.where(kind < 0.8, 0.01 + 0.11 * uniform(tokens), 0.12 + 0.48 * uniform(tokens)),
    )
    shares = torch.arange(1, candidates).double() ** -1.4
    shares = (1 - tail_share) * rest[:, None] * shares / shares.sum()
    wanted = torch.cat([(1 - rest)[:, None], shares], 1).log()
    wanted += (torch.logsumexp(unigram, 0) - (tail_share * rest).log())[:, None]

    states = []
    for rows in torch.arange(tokens).split(CHUNK):
        odds = torch.softmax(unigram, 0).expand(len(rows), -1)
        chosen = torch.multinomial(odds, candidates, generator=generator)
        basis = noise[chosen].double()
        gram = basis @ basis.transpose(1, 2) + 1e-9 * torch.eye(candidates)
        coefficients = torch.linalg.solve(gram, wanted[rows] - unigram[chosen])
        states.append(u + (coefficients[:, None] @ basis).squeeze(1).float())
    return torch.cat(states), weight


def make_batch(arguments: argparse.Namespace) -> Batch:
    generator = torch.Generator().manual_seed(arguments.seed)
    tokens, vocab = arguments.tokens, arguments.vocab
    if arguments.inputs == "realistic":
        hidden, weight = realistic_head(tokens, vocab, arguments.hidden, generator)
    else:
        hidden = torch.randn(tokens, arguments.hidden, generator=generator)
        weight = torch.randn(vocab, arguments.hidden, generator=generator)
        weight /= math.sqrt(arguments.hidden)
    dtype, device = DTYPES[arguments.dtype], arguments.device
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    targets = torch.cat(
        [
            torch.multinomial(torch.softmax((h @ weight.t()).float(), -1), 1, generator=generator)
            for h in hidden.split(CHUNK)
        ]
    ).squeeze(1)
    logprobs = linear_logprob(hidden, weight, targets).logprobs
    advantages = torch.randn(tokens, generator=generator)
    silent = torch.rand(tokens, generator=generator) < arguments.zero_advantages
    behaviour = logprobs + 0.05 * torch.randn(tokens, generator=generator)
    batch = Batch(
        hidden,
        weight,
        targets,
        advantages.masked_fill(silent, 0.0),
        behaviour,
        torch.full((tokens,), 1.0 / tokens),
    )
    batch = Batch(*(t.to(device) for t in batch))
    batch.hidden.requires_grad_()
    batch.weight.requires_grad_()
    return batch


# ---- providers: each runs forward and backward and returns log-probabilities and entropy ---------


def clip_loss(logprobs: Tensor, batch: Batch) -> Tensor:
    ratio = (logprobs - batch.behaviour_logprobs).exp()
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    return -torch.min(ratio * batch.advantages, clipped * batch.advantages)


def naive(batch: Batch, *, entropy_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    """Full logits and autograd; the entropy joins the graph only if its gradient is wanted."""
    logits = batch.hidden @ batch.weight.t()
    log_p = torch.log_softmax(logits.to(batch.advantages.dtype), -1)
    del logits
    logprobs = log_p.gather(1, batch.targets[:, None]).squeeze(1)
    with torch.set_grad_enabled(entropy_coef != 0):
        entropy = -(log_p.exp() * log_p).sum(-1)
    losses = clip_loss(logprobs, batch) - entropy_coef * entropy
    (batch.weights * losses).sum().backward()
    return logprobs.detach(), entropy.detach()


def plain_chunked(batch: Batch, *, entropy_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    """What one writes in half an hour: `naive` on slices, backward at once, autograd adds up."""
    hidden = batch.hidden.detach()
    gradient, outputs = torch.empty_like(hidden), []
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        part = hidden[rows].requires_grad_()
        taken = Batch(part, batch.weight, *(column[rows] for column in batch[2:]))
        outputs.append(naive(taken, entropy_coef=entropy_coef))
        assert part.grad is not None
        gradient[rows] = part.grad
    batch.hidden.grad = gradient
    logprobs, entropy = (torch.cat(values) for values in zip(*outputs, strict=True))
    return logprobs, entropy


def fused(batch: Batch, *, entropy_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    objective = PolicyObjective(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, entropy_coef=entropy_coef)
    result = linear_policy_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        advantages=batch.advantages,
        behaviour_logprobs=batch.behaviour_logprobs,
        weights=batch.weights,
        objective=objective,
    )
    result.loss.backward()
    assert result.entropy is not None
    return result.logprobs, result.entropy


def composed(batch: Batch, *, entropy_coef: float = 0.0) -> tuple[Tensor, Tensor]:
    objective = PolicyObjective(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, entropy_coef=entropy_coef)
    out = linear_logprob(batch.hidden, batch.weight, batch.targets)
    entropy = out.entropy if entropy_coef else out.entropy.detach()
    result = policy_loss(
        out.logprobs,
        entropy,
        advantages=batch.advantages,
        behaviour_logprobs=batch.behaviour_logprobs,
        weights=batch.weights,
        objective=objective,
    )
    result.loss.backward()
    return out.logprobs.detach(), out.entropy.detach()


PROVIDERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "naive": naive,
    "plain chunked": plain_chunked,
    "linear_policy_loss": fused,
    "linear_logprob + policy_loss": composed,
}
CASES = {"without entropy gradient": 0.0, "with entropy gradient": ENTROPY_COEF}


# ---- measurements --------------------------------------------------------------------------------


def run(provider: str, batch: Batch, entropy_coef: float) -> tuple[Tensor, Tensor]:
    batch.hidden.grad = batch.weight.grad = None
    return PROVIDERS[provider](batch, entropy_coef=entropy_coef)


def timed(provider: str, batch: Batch, entropy_coef: float) -> float:
    """Milliseconds of one forward and backward."""
    if batch.hidden.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(provider, batch, entropy_coef)
    if batch.hidden.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_extra_bytes(provider: str, batch: Batch, entropy_coef: float) -> int:
    """What one forward and backward adds to the inputs at its peak, gradients included.

    CUDA: the allocator's own maximum. CPU: the peak resident set, in a process that does nothing
    else (see `peak_in_subprocess`), because it counts what every library allocates, GEMM
    workspaces included, and only pages that were really used. The kernel's high-water mark is
    reset after the inputs exist and the thread pools have run.
    """
    if batch.hidden.is_cuda:
        run(provider, batch, entropy_coef)
        batch.hidden.grad = batch.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(provider, batch, entropy_coef)
        return torch.cuda.max_memory_allocated() - before
    small = Batch(
        batch.hidden[:2, :8].detach().requires_grad_(),
        batch.weight[:64, :8].detach().requires_grad_(),
        batch.targets[:2] % 64,
        *(column[:2] for column in batch[3:]),
    )
    run(provider, small, entropy_coef)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = resident("VmRSS")
    run(provider, batch, entropy_coef)
    return resident("VmHWM") - before


def peak_in_subprocess(provider: str, batch_file: Path, entropy_coef: float) -> int | None:
    """`peak_extra_bytes` in a fresh process with the saved batch; None where it cannot run."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--batch-file", str(batch_file), "--peak-of", provider]
    command += ["--peak-entropy", str(entropy_coef)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])["peak_extra_bytes"]


class Truth(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def first_rows(batch: Batch, dtype: torch.dtype, rows: int = 256) -> Batch:
    """A batch of the first rows with the head in `dtype` and float columns no narrower."""
    hidden, weight = (t.detach().to(dtype) for t in (batch.hidden[:rows], batch.weight))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    columns = (column[:rows].to(wide) for column in batch[3:])
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), batch.targets[:rows], *columns)


def truth(batch: Batch, entropy_coef: float) -> Truth:
    """float64 on the first rows."""
    exact = first_rows(batch, torch.float64)
    logprobs, entropy = naive(exact, entropy_coef=entropy_coef)
    assert exact.hidden.grad is not None and exact.weight.grad is not None
    return Truth(logprobs, entropy, exact.hidden.grad, exact.weight.grad)


def errors(provider: str, batch: Batch, entropy_coef: float, exact: Truth) -> dict[str, float]:
    """On the same rows: largest error of the vectors, relative Frobenius error of dX and dW."""
    small = first_rows(batch, batch.hidden.dtype)
    logprobs, entropy = run(provider, small, entropy_coef)

    def relative(gradient: Tensor | None, expected: Tensor) -> float:
        assert gradient is not None
        return float((gradient - expected).norm() / expected.norm())

    return {
        "logprobs_max": float((logprobs - exact.logprobs).abs().max()),
        "entropy_max": float((entropy - exact.entropy).abs().max()),
        "hidden_grad_rel": relative(small.hidden.grad, exact.hidden_grad),
        "weight_grad_rel": relative(small.weight.grad, exact.weight_grad),
    }


def machine(device: str) -> dict[str, str | int]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def peaks(batch: Batch) -> dict[tuple[str, str], int | None]:
    """Peak extra bytes of every case and provider."""
    every = [(case, provider) for case in CASES for provider in PROVIDERS]
    if batch.hidden.is_cuda:
        return {key: peak_extra_bytes(key[1], batch, CASES[key[0]]) for key in every}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "batch.pt"
        torch.save(tuple(t.detach() for t in batch), saved)
        return {key: peak_in_subprocess(key[1], saved, CASES[key[0]]) for key in every}


def measure(arguments: argparse.Namespace) -> dict:
    batch = make_batch(arguments)
    entropy = linear_logprob(batch.hidden.detach(), batch.weight.detach(), batch.targets).entropy
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(arguments.repeats + 1):
        for case, entropy_coef in CASES.items():
            for provider in PROVIDERS:
                milliseconds = timed(provider, batch, entropy_coef)
                if repeat > 0:  # the first round warms up
                    times.setdefault((case, provider), []).append(milliseconds)
    load_average = os.getloadavg()[0]  # above `threads`: other processes slowed this one
    rows, exact = [], {case: truth(batch, coef) for case, coef in CASES.items()}
    for (case, provider), peak in peaks(batch).items():
        entropy_coef = CASES[case]
        spent, of_naive = times[case, provider], times[case, "naive"]
        row = {
            "case": case,
            "provider": provider,
            "median_ms": statistics.median(spent),
            "fastest_ms": min(spent),
            # round by round, so that a slow minute weighs on both sides of the quotient
            "time_to_naive": statistics.median(a / b for a, b in zip(spent, of_naive, strict=True)),
            "peak_extra_mib": None if peak is None else peak / 2**20,
            **errors(provider, batch, entropy_coef, exact[case]),
        }
        # the fastest rounds are the ones that no other process disturbed
        row["fastest_to_naive"] = row["fastest_ms"] / min(of_naive)
        first = next((r for r in rows if r["case"] == case), row)
        base = first["peak_extra_mib"]
        row["memory_to_naive"] = None if base is None else row["peak_extra_mib"] / base
        rows.append(row)
    shape = {k: getattr(arguments, k) for k in ("tokens", "vocab", "hidden", "dtype", "inputs")}
    return {
        "bench": "loss",
        "date": datetime.date.today().isoformat(),
        **machine(arguments.device),
        **shape,
        "zero_advantages": arguments.zero_advantages,
        "repeats": arguments.repeats,
        "load_average": round(load_average, 2),
        "mean_entropy": float(entropy.mean()),
        "rows": rows,
    }


# ---- report --------------------------------------------------------------------------------------


def print_table(results: dict) -> None:
    print(f"{'':30} {'ms':>8} {'x naive':>8} {'fastest':>8} {'x naive':>8}", end=" ")
    print(f"{'MiB':>8} {'x naive':>8}", end=" ")
    print(f"{'logp':>8} {'H':>8} {'dX':>8} {'dW':>8}")
    for case in CASES:
        print(f"{case}, error against float64 at the right")
        for row in (r for r in results["rows"] if r["case"] == case):
            mib, share = row["peak_extra_mib"] or math.nan, row["memory_to_naive"] or math.nan
            print(f"  {row['provider']:28} {row['median_ms']:8.0f}", end=" ")
            print(f"{row['time_to_naive']:8.3f} {row['fastest_ms']:8.0f}", end=" ")
            print(f"{row['fastest_to_naive']:8.3f} {mib:8.0f} {share:8.3f}", end=" ")
            for name in ("logprobs_max", "entropy_max", "hidden_grad_rel", "weight_grad_rel"):
                print(f"{row[name]:8.1e}", end=" ")
            print()


def draw(results: dict, path: Path) -> None:
    """Two panels from the JSON alone: time and peak memory beside naive PyTorch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    providers = list(dict.fromkeys(row["provider"] for row in results["rows"]))
    cases = list(dict.fromkeys(row["case"] for row in results["rows"]))
    for offset, (case, colour) in enumerate(zip(cases, ("#2a6f97", "#e09f3e"), strict=True)):
        rows = {row["provider"]: row for row in results["rows"] if row["case"] == case}
        places = [i + 0.38 * offset for i in range(len(providers))]
        for axis, value, share in (
            (axes[0], "median_ms", "time_to_naive"),
            (axes[1], "peak_extra_mib", "memory_to_naive"),
        ):
            lengths = [rows[p][value] or 0.0 for p in providers]
            bars = axis.barh(places, lengths, height=0.36, color=colour, label=case)
            shares = [f" {rows[p][share]:.2f}x" if rows[p][share] else "" for p in providers]
            axis.bar_label(bars, shares, fontsize=8)
            axis.margins(x=0.12)
    axes[0].set_yticks([i + 0.19 for i in range(len(providers))], providers)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("forward + backward, median ms")
    axes[1].set_xlabel("peak extra memory, MiB")
    axes[1].legend(frameon=False, loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"policy loss, N={results['tokens']} V={results['vocab']} D={results['hidden']} "
        f"{results['dtype']}, {results['inputs']} inputs, {results['device']} "
        f"({results['threads']} threads), torch {results['torch']}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the policy loss.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--inputs", choices=("realistic", "random"), default="realistic")
    parser.add_argument("--zero-advantages", type=float, default=0.0, help="share of rows with A=0")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--batch-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    parser.add_argument("--peak-entropy", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        batch = Batch(*torch.load(arguments.batch_file))
        batch.hidden.requires_grad_()
        batch.weight.requires_grad_()
        peak = peak_extra_bytes(arguments.peak_of, batch, arguments.peak_entropy)
        print(json.dumps({"peak_extra_bytes": peak}))
        return
    results = measure(arguments)
    print_table(results)
    device = results["device"].lower().replace(" ", "-")
    out = arguments.out or Path(__file__).parent / "results" / device
    out.mkdir(parents=True, exist_ok=True)
    (out / "loss.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads((out / "loss.json").read_text()), out / "loss.png")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
