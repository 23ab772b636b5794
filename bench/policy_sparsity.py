"""What sparsity costs on a real policy: density and gradient error at points of a run.

    python bench/policy_sparsity.py RUN [--questions 64 --name policy_sparsity --out DIR]

RUN is the folder of a run. Its starting policy and every checkpoint complete held-out questions, four
times each; their hidden states, weights and behaviour log-probabilities are those of a training step,
and the advantages +-1 by a coin. The gradient of the loss over all their tokens, by threshold and
tail, is compared with the dense one. Writes NAME.json.
"""

import argparse
import datetime
import json
from pathlib import Path

import torch
from loss import machine

from exgrpo_fast.build.data import load_data
from exgrpo_fast.build.engines import make_transformers_engine
from exgrpo_fast.build.models import make_policy
from exgrpo_fast.build.pretrained import model_folder
from exgrpo_fast.config import Config, load_config
from exgrpo_fast.model.folder_reading import load_tokenizer
from exgrpo_fast.model.packing import Ragged, pack
from exgrpo_fast.rollout.engine import Request, Sampling, request_seed
from exgrpo_fast.run.display import Screen
from exgrpo_kernels import linear_logprob, linear_policy_loss

THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5)


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def measure(config, model: Path, num_questions: int) -> list[dict]:
    """Rows of density and error for one policy."""
    tokenizer = load_tokenizer(str(model))
    policy = make_policy(config, str(model), device="cpu")
    engine = make_transformers_engine(config, policy, tokenizer)
    questions = load_data(config, tokenizer, Screen())[1][:num_questions]
    requests = [
        Request(q.prompt_ids, request_seed(0, "sparsity", q.id, k))
        for q in questions
        for k in range(4)
    ]
    completions = engine.generate(requests, Sampling(config.rollout.max_completion_tokens))
    (packed,) = pack(
        Ragged.of([r.prompt_ids for r in requests]),
        Ragged.of([c.token_ids for c in completions]),
        max_tokens=10**9,
    )
    with torch.no_grad():
        hidden = policy.hidden_states(packed).float()
        weight, bias, softcap = policy.head_for(hidden)
        weight = weight.detach().float()
        behaviour = linear_logprob(hidden, weight, packed.targets, bias=bias, softcap=softcap)
    coin = torch.Generator().manual_seed(0)
    signs = 1.0 - 2.0 * torch.randint(2, (len(requests),), generator=coin)
    advantages = signs[list(packed.index)].repeat_interleave(torch.tensor(packed.lengths))

    def gradients(sparsity: str | float, tail: str):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        result = linear_policy_loss(
            states,
            head,
            packed.targets,
            advantages=advantages,
            behaviour_logprobs=behaviour.logprobs,
            weights=torch.full_like(advantages, 1 / len(advantages)),
            bias=bias,
            softcap=softcap,
            sparsity=sparsity,
            tail=tail,
        )
        return result.metrics, torch.autograd.grad(result.loss, [states, head])

    _, (dx, dw) = gradients("off", "drop")
    rows = []
    for threshold in THRESHOLDS:
        for tail in ("drop", "centroid"):
            metrics, (ours_dx, ours_dw) = gradients(threshold, tail)
            rows.append(
                {
                    "threshold": threshold,
                    "tail": tail,
                    "tokens": len(advantages),
                    "vocabulary": len(weight),
                    "entropy": float(behaviour.entropy.mean()),
                    "density": float(metrics["density"]),
                    "skipped_mass": float(metrics["skipped_mass"]),
                    "dx": relative(ours_dx, dx),
                    "dw": relative(ours_dw, dw),
                }
            )
    return rows


def points_of(run: Path, config: Config) -> dict[int, Path]:
    """Folders of the policy by finished steps."""
    name, warm_start = config.model.name or "", run / "warm_start"
    start = warm_start if warm_start.exists() else Path(model_folder(name, Screen()))
    checkpoints = {
        int(folder.name.removeprefix("step_")): folder / "hf"
        for folder in run.glob("checkpoints/step_*")
    }
    return {0: start} | dict(sorted(checkpoints.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--name", default="policy_sparsity")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()
    config = load_config(str(arguments.run / "config.yaml"))
    results = {
        "bench": "policy_sparsity",
        "date": datetime.date.today().isoformat(),
        **machine("cpu"),
        "model": config.model.name,
        "questions": arguments.questions,
        "points": [],
    }
    for step, model in points_of(arguments.run, config).items():
        for row in measure(config, model, arguments.questions):
            results["points"].append({"step": step} | row)
            print(
                "  ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in results["points"][-1].items()
                ),
                flush=True,
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
