"""The body of `exgrpo-fast train --from-rollouts`: the updates of a run's saved steps, made again."""

from __future__ import annotations

import contextlib
from pathlib import Path

from exgrpo_fast.build.past_updates import PastRun, refuse_fixed, train_again
from exgrpo_fast.config import Config, dump_yaml
from exgrpo_fast.run.directory import RunFolder
from exgrpo_fast.run.report.reading import flat
from exgrpo_fast.run.sinks import JsonlSink


def train_on_saved(
    run: Path,
    steps: tuple[int, int],
    before: Config,
    config: Config,
    *,
    out: Path,
    device: str,
    deterministic: bool,
) -> int:
    """Exit code 0. `before`: the run's own config; every loss is compared with the run's.

    UserError for steps that were not saved and for keys that cannot differ.
    """
    refuse_fixed(dict(flat(before.model_dump())), dict(flat(config.model_dump())), config)
    past = PastRun(run, before, *steps)
    past.check()
    with contextlib.closing(RunFolder(out, resume=False)) as folder:
        folder.write_text("config.yaml", dump_yaml(config))
        sink = JsonlSink(folder.metrics)
        for metrics in train_again(past, config, out, device=device, deterministic=deterministic):
            sink.log(metrics["step"], metrics)
            same = metrics["loss_hex"] == metrics["run_loss_hex"]
            print(
                f"step {metrics['step']}  loss {metrics['loss']:.6g}  "
                f"{'the same as in the run' if same else 'other than in the run'}  "
                f"grad norm {metrics['grad_norm']}",
                flush=True,
            )
    return 0
