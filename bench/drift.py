"""Do hundreds of sparse updates lead elsewhere than dense ones? Per-step error cannot say.

    PYTHONPATH=kernels python bench/drift.py [--steps 400]

A head with learned states is trained by policy gradient on a contextual bandit: a context, a token
drawn from the policy, reward 1 for one of three right tokens. All runs draw with the same random
numbers, so what separates them is their gradients alone. Beside the dense run stand sparse ones by
threshold and tail, one with the gradient of the logits rounded to bfloat16, which every dense
kernel does, and a dense one with other random numbers: the spread that training has anyway.
Writes drift.json: mean KL(dense || other) over contexts, and accuracy, every 50 steps.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exgrpo_kernels import PolicyObjective, linear_logprob, linear_policy_loss

CONTEXTS, VOCAB, HIDDEN = 512, 4096, 64
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": "off"},
    "1e-4 drop": {"sparsity": 1e-4},
    "1e-4 centroid": {"sparsity": 1e-4, "tail": "centroid"},
    "1e-4 dense_dw": {"sparsity": 1e-4, "tail": "dense_dw"},
    "1e-3 drop": {"sparsity": 1e-3},
    "1e-2 drop": {"sparsity": 1e-2},
    "dz in bfloat16": {"rounds": True},
    "dense, other draws": {"sparsity": "off", "seed": 1},
}


class Bandit:
    """One run; `step` draws, judges and updates."""

    def __init__(self, *, seed: int = 0, rounds: bool = False, **settings: Any) -> None:
        fixed = torch.Generator().manual_seed(7)
        self.states = torch.randn(CONTEXTS, HIDDEN, generator=fixed).requires_grad_()
        self.weight = (torch.randn(VOCAB, HIDDEN, generator=fixed) / 8).requires_grad_()
        self.right = torch.randint(VOCAB, (CONTEXTS, 3), generator=fixed)
        with torch.no_grad():  # the right tokens start likely enough to be found
            self.states += 8.0 * self.weight[self.right].sum(1)
        self.optimiser = torch.optim.AdamW([self.states, self.weight], lr=3e-3, weight_decay=0.0)
        self.draws = torch.Generator().manual_seed(100 + seed)
        self.rounds, self.settings = rounds, settings
        self.densities: list[float] = []

    def log_policy(self) -> Tensor:
        return (self.states @ self.weight.t()).log_softmax(-1)

    def step(self) -> None:
        with torch.no_grad():
            p = self.log_policy().exp()
            uniform = torch.rand(CONTEXTS, 1, generator=self.draws)
            tokens = (p.cumsum(-1) < uniform).sum(-1).clamp(max=VOCAB - 1)
            rewards = (self.right == tokens[:, None]).any(1).float()
            expected = p.gather(1, self.right).sum(1)
        columns = {
            "advantages": rewards - expected,
            "weights": torch.full((CONTEXTS,), 1 / CONTEXTS),
        }
        if self.rounds:
            self._rounded_backward(tokens, columns["advantages"])
        else:
            old = linear_logprob(self.states.detach(), self.weight.detach(), tokens).logprobs
            result = linear_policy_loss(
                self.states,
                self.weight,
                tokens,
                behaviour_logprobs=old,
                objective=PolicyObjective(),
                **columns,
                **self.settings,
            )
            result.loss.backward()
            self.densities.append(float(result.metrics["density"]))
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def _rounded_backward(self, tokens: Tensor, advantages: Tensor) -> None:
        dz = self.log_policy().exp()
        dz[torch.arange(CONTEXTS), tokens] -= 1.0
        dz = (dz * advantages[:, None] / CONTEXTS).to(torch.bfloat16).float()
        self.states.grad, self.weight.grad = dz @ self.weight, dz.t() @ self.states

    @torch.no_grad()
    def accuracy(self) -> float:
        return float(self.log_policy().exp().gather(1, self.right).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()
    runs = {name: Bandit(**settings) for name, settings in VARIANTS.items()}
    rows = []
    for step in range(1, arguments.steps + 1):
        for run in runs.values():
            run.step()
        if step % 50 == 0:
            dense = runs["dense"].log_policy().detach()
            for name, run in runs.items():
                kl = (dense.exp() * (dense - run.log_policy().detach())).sum(-1).mean()
                recent = run.densities[-50:]
                rows.append(
                    {
                        "step": step,
                        "variant": name,
                        "kl_to_dense": float(kl),
                        "accuracy": run.accuracy(),
                        "density": sum(recent) / len(recent) if recent else None,
                    }
                )
    for row in rows[-len(runs) :]:
        density = "" if row["density"] is None else f"density {row['density']:.3f}"
        print(
            f"step {row['step']}  {row['variant']:20} KL to dense {row['kl_to_dense']:.2e}  "
            f"accuracy {row['accuracy']:.4f}  {density}"
        )
    results = {
        "bench": "drift",
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "torch": torch.__version__,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "drift.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
