"""The training loop. One step is `Trainer.step`; it sets the order and computes nothing itself."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from exgrpo_fast.core.errors import Interrupted, NumericalStop
from exgrpo_fast.core.heartbeat import HEARTBEAT
from exgrpo_fast.core.process_group import SINGLE_PROCESS, Processes
from exgrpo_fast.core.rng import random_state, restore_random_state
from exgrpo_fast.core.types import Question
from exgrpo_fast.experience.question_stream import QuestionStream
from exgrpo_fast.experience.replay.protocol import Replay
from exgrpo_fast.rollout.engine import RolloutEngine
from exgrpo_fast.run.checkpoint.format import Checkpoints
from exgrpo_fast.run.checkpoint.writer import CheckpointWriter
from exgrpo_fast.run.display import Screen
from exgrpo_fast.run.sinks import CompletionLog, MetricSink
from exgrpo_fast.training.collector import Batch, Collector, PhaseTimer
from exgrpo_fast.training.evaluate import Evaluation, Evaluator
from exgrpo_fast.training.learner import Learner
from exgrpo_fast.training.saved_updates import BadBatches, UpdateLog
from exgrpo_fast.training.step_metrics import completion_rows, peak_memory_gib, step_metrics
from exgrpo_kernels import PolicyObjective

# Every rank computes these on its own, so a rank that has diverged differs in them.
REPLICATED = ("loss_hex", "tokens_trained", "reward_mean", "entropy", "completion_len_mean")
MAX_BAD_UPDATES = 3  # consecutive steps whose gradient was refused, before the run stops


@dataclass(eq=False, kw_only=True)
class Trainer:
    """Collect groups, learn from them, remember the best of them; evaluate and save on the way."""

    stream: QuestionStream
    replay: Replay
    collector: Collector
    learner: Learner
    engine: RolloutEngine
    objective: PolicyObjective
    evaluator: Evaluator
    eval_questions: Sequence[Question]
    writer: CheckpointWriter
    bad_batches: BadBatches
    update_log: UpdateLog
    sink: MetricSink
    completion_log: CompletionLog
    screen: Screen
    max_steps: int
    eval_every: int = 0
    checkpoint_every: int = 0
    completions_every: int = 10
    generate_ahead: bool = False  # for a step while the one before is trained on
    processes: Processes = SINGLE_PROCESS  # the ranks of this run
    num_steps: int = field(default=0, init=False)
    bad_updates: int = field(default=0, init=False)
    stop_signal: int | None = field(default=None, init=False)

    def step(self) -> tuple[Batch, dict[str, Any]]:
        """One step, in the order of ExGRPO's algorithm 1; without replay it is plain GRPO."""
        step, clock = self.num_steps + 1, PhaseTimer()
        HEARTBEAT.begin_step(step)
        batch = self.collector.collect(step, clock, self._raise_if_stopped)
        replay = self.replay.finish(batch.plan, batch.generated, self.objective)
        if self.generate_ahead and step < self.max_steps:
            self.collector.begin(step + 1, clock)
        self.engine.on_update_start()
        with clock.measure("update"), self.screen.phase("update") as advance:
            groups = batch.groups if replay.groups is None else replay.groups
            self.update_log.write(step, groups, replay.objective)
            update = self.learner.update(groups, replay.objective, advance)
        with clock.measure("sync"), self.screen.phase("sync"):
            sync = self.engine.sync(step)
        metrics = step_metrics(step, batch, update, clock) | replay.metrics | sync
        metrics["save_failures"] = self.writer.num_failures
        self.bad_batches.write(step, update.refused)
        self.num_steps = step
        self._check_update(metrics)
        return batch, metrics

    def train(self, *, stop_after: int | None = None) -> None:
        """Go on to `max_steps`, or for `stop_after` more steps, or until SIGINT or SIGTERM."""
        last = self.max_steps
        if stop_after is not None:
            last = min(last, self.num_steps + stop_after)
        with self._listen_to_signals():
            try:
                with contextlib.suppress(Interrupted):  # the step stays begun
                    while self.num_steps < last and not self._should_stop():
                        batch, metrics = self.step()
                        self._publish(batch, metrics | self._evaluation_due())
                        self._save_if_due()
                self.save()
            except Exception:  # must not take along a checkpoint that is being written
                self.writer.join()
                raise

    def evaluate(self) -> Evaluation:
        return self.evaluator(self.eval_questions)

    def _evaluation_due(self) -> dict[str, Any]:
        if not self._due(self.eval_every) or self.num_steps == self.max_steps:
            return {}
        with contextlib.suppress(Interrupted):
            found = self.evaluator(self.eval_questions, self._raise_if_stopped)
            return {"eval_avg_at_n": found.avg_at_n, "eval_pass_at_k": found.pass_at_k}
        return {}

    # --- saving ---

    @property
    def checkpoints(self) -> Checkpoints:
        return self.writer.checkpoints

    def save(self) -> Path:
        """The folder of a checkpoint of this step, once it is durable."""
        with HEARTBEAT.phase("save"), self.screen.phase("save"):
            self.writer.wait()
            if self.processes.broadcast(self.writer.committed == self.num_steps):
                return self.checkpoints.folder / f"step_{self.num_steps}"
            return self.writer.finish(self.num_steps, self.state_dict())

    def _save_if_due(self) -> None:
        """Start a checkpoint if one is due; raise if the previous one failed."""
        self.writer.poll()
        if self._due(self.checkpoint_every):
            with HEARTBEAT.phase("save"), self.screen.phase("save"):
                self.writer.save(self.num_steps, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's weights, which lie in the checkpoint's hf/ folder."""
        return {
            "num_steps": self.num_steps,
            "stream": self.stream.state_dict(),
            "replay": self.replay.state_dict(),
            "begun": self.collector.state_dict(),
            "learner": self.learner.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_steps = state["num_steps"]
        self.stream.load_state_dict(state["stream"])
        if state["replay"]:  # an on-policy run that goes on with replay starts with none
            self.replay.load_state_dict(state["replay"])
        self.learner.load_state_dict(state["learner"])
        self.collector.load_state_dict(state["begun"], step=self.num_steps + 1)
        restore_random_state(state["random"])

    # --- metrics and signals ---

    def _due(self, every: int) -> bool:
        return every > 0 and self.num_steps % every == 0

    def _publish(self, batch: Batch, metrics: dict[str, Any]) -> None:
        metrics["peak_memory_gib"] = peak_memory_gib(self.learner.policy.device)
        self.sink.log(self.num_steps, metrics)
        self.screen.step(metrics, total_steps=self.max_steps)
        if self.num_steps == 1 or self._due(self.completions_every):
            decode = self.collector.verifier.decode
            table = completion_rows(self.num_steps, batch.generated, decode)
            self.completion_log.write(self.num_steps, table)
            shown = next((g for g in batch.groups if g.learnable), batch.generated[0])
            self.screen.completions([r for r in table if r["question_id"] == shown.question.id])

    def _should_stop(self) -> bool:
        """A signal to any rank stops all of them after the same step."""
        self.stop_signal = int(self.processes.all_reduce_max(self.stop_signal or 0)) or None
        return self.stop_signal is not None

    def _check_update(self, metrics: Mapping[str, Any]) -> None:
        figures = {name: metrics[name] for name in REPLICATED}
        self.processes.require_same(f"step {self.num_steps}", figures)
        refused = {"update_not_finite", "update_gradient_too_large"} & metrics["reasons"].keys()
        self.bad_updates = self.bad_updates + 1 if refused else 0
        if self.bad_updates >= MAX_BAD_UPDATES:
            raise NumericalStop(
                f"step {self.num_steps}: {', '.join(sorted(refused))} for {MAX_BAD_UPDATES} steps "
                f"in a row (gradient norm {metrics['grad_norm']}); the weights are those of the "
                f"last good update"
            )

    def _raise_if_stopped(self) -> None:
        """Gives up a generation; not beside other ranks, which must stop after the same step."""
        if self.stop_signal is not None and self.processes.count == 1:
            raise Interrupted

    @contextlib.contextmanager
    def _listen_to_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets what is being learned be finished and gives up what is
        being generated; the second one ends the run at once."""

        def remember(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.screen.note("stopping with a checkpoint; once more to stop at once")

        previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
