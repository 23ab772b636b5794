"""How sparse is the logit gradient of a policy while it learns?

    python bench/density.py RUN... [--dense RUN...] [--out DIR]

Each RUN is the folder of a run with `--train.sparsity THETA`, whose metrics.jsonl holds, for every
step, the density of kept tiles, the mass that was skipped and the entropy. With --dense, runs of
the same recipe without sparsity stand beside them: held-out accuracy and entropy, for drift.
Writes density.json and density.png.
"""

import argparse
import datetime
import json
from pathlib import Path
from statistics import fmean

from figures import panels

KEYS = ("step", "density", "skipped_mass", "rows_skipped", "num_trained", "entropy", "pass_at_1")


def read_run(folder: Path) -> dict:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "seed": summary.get("seed", folder.name),
        "before": summary["eval_before"]["avg_at_n"],
        "after": summary["eval_after"]["avg_at_n"],
        "steps": [{key: step.get(key) for key in KEYS} for step in steps],
    }


def draw(results: dict, path: Path) -> None:
    with panels(path, 3, size=(13, 3.8)) as axes:
        for run in results["sparse"]:
            steps = [s for s in run["steps"] if s["density"] is not None]
            x = [s["entropy"] for s in steps]
            places = axes[0].scatter(
                x, [s["density"] for s in steps], c=[s["step"] for s in steps], s=9, cmap="viridis"
            )
            axes[1].plot([s["step"] for s in steps], [s["skipped_mass"] for s in steps], lw=0.9)
        axes[0].figure.colorbar(places, ax=axes[0], label="step")
        axes[0].set(xlabel="entropy of fresh tokens, nats", ylabel="density of kept tiles")
        axes[1].set(xlabel="step", ylabel="share of gradient mass skipped")
        for name, colour in (("dense", "#e09f3e"), ("sparse", "#2a6f97")):
            for i, run in enumerate(results[name]):
                axes[2].plot(
                    [s["step"] for s in run["steps"]],
                    [s["entropy"] for s in run["steps"]],
                    c=colour,
                    lw=0.9,
                    label=name if i == 0 else None,
                )
        axes[2].set(xlabel="step", ylabel="entropy of fresh tokens, nats")
        axes[2].legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--dense", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    arguments = parser.parse_args()
    results = {
        "bench": "density",
        "date": datetime.date.today().isoformat(),
        "sparse": [read_run(run) for run in arguments.runs],
        "dense": [read_run(run) for run in arguments.dense],
    }
    for name in ("dense", "sparse"):
        for run in results[name]:
            found = [s["density"] for s in run["steps"] if s["density"] is not None]
            density = f"density {fmean(found):.3f}" if found else ""
            entropy = fmean(s["entropy"] for s in run["steps"][-20:])
            print(
                f"{name:6} {run['seed']}: {100 * run['before']:.1f} -> {100 * run['after']:.1f} %, "
                f"entropy of the last 20 steps {entropy:.4f} {density}"
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "density.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
