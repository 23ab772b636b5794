"""Where the numbers of a run go: metrics.jsonl, TensorBoard, W&B, completion tables.

The trainer makes one flat dict per step and hands it to one sink. Logging never ends a run and never
slows it: a local file that cannot be written keeps its lines for later, a sink that raises is switched
off with one warning, and a remote one has its own thread.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from exgrpo_fast.core.text import clean_line, clean_text
from exgrpo_fast.core.types import Metrics
from exgrpo_fast.run.directory import whole_file

logger = logging.getLogger(__name__)


# --- values --------------------------------------------------------------------------------------


def strict(value: Any) -> Any:
    """Any metric value -> what strict JSON can hold: NaN and infinities become None."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None  # float(): numpy's is a subclass
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean_text(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [strict(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors of any rank
        return strict(value.tolist())
    return clean_text(value)


def numbers(metrics: Metrics, prefix: str = "") -> dict[str, float]:
    """The finite numbers of a metrics dict, nested ones under `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        plain = strict(value)
        if isinstance(plain, dict):
            found |= numbers(plain, f"{prefix}{key}/")
        elif isinstance(plain, bool | int | float):
            found[f"{prefix}{key}"] = float(plain)
    return found


# --- sinks ---------------------------------------------------------------------------------------


class MetricSink:
    """Writes the metrics of steps somewhere; this one nowhere."""

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def close(self) -> None:
        pass


class JsonlSink(MetricSink):
    """One strict-JSON object a line; the record of a run, so it is never switched off.

    The file is opened anew for each line: whoever moves, links or repairs the folder under a
    running process finds the next line in the new place. Lines that cannot be written (disk full,
    folder gone) wait in memory and follow as soon as writing works again.
    """

    MAX_WAITING = 100_000  # lines, about 100 MB: days of steps

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._waiting: list[bytes] = []
        self._failing = False

    def log(self, step: int, metrics: Metrics) -> None:
        record = {"step": step} | {k: v for k, v in strict(metrics).items() if k != "step"}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        self._waiting = [*self._waiting, line.encode()][-self.MAX_WAITING :]
        self._flush()

    def close(self) -> None:
        if self._waiting:
            self._flush()

    def truncate_after(self, step: int) -> None:
        """Drop every line of a later step, and lines that are torn: the run resumes at `step`."""
        self._waiting = [line for line in self._waiting if _step_of(line, default=step) <= step]
        if not self.path.exists():
            return
        kept = [
            line
            for line in self.path.read_bytes().splitlines(keepends=True)
            if _step_of(line, default=step + 1) <= step
        ]
        with whole_file(self.path, durable=True) as temporary:
            temporary.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in kept))

    def _flush(self) -> None:
        try:
            _append(self.path, b"".join(self._waiting))
        except OSError as error:
            if not self._failing:
                logger.warning("%s: %s; its lines wait in memory", self.path, error.strerror)
            self._failing = True
        else:
            self._waiting, self._failing = [], False


def _append(path: Path, data: bytes) -> None:
    """All of `data` at the end of the file, or nothing; a torn last line is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = False
        if size:
            file.seek(size - 1)
            torn = file.read(1) != b"\n"
        left = memoryview(b"\n" + data if torn else data)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)  # half a line would hide the whole one that follows later
            raise


def _step_of(line: bytes, *, default: int) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return default
    return step if isinstance(step, int) else default


class TensorBoardSink(MetricSink):
    """The numbers of each step as TensorBoard scalars; `resumed_from` hides the later events."""

    def __init__(self, folder: Path | str, *, resumed_from: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resumed_from is None else resumed_from + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in numbers(metrics).items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink(MetricSink):
    """Weights & Biases in a separate thread, so that a slow or absent server costs no step.

    A failed start is not retried offline: in the same process that fails too, and metrics.jsonl
    already holds everything.
    """

    MAX_QUEUED = 10_000  # steps; more means that the server never answers, and new ones are lost
    CLOSE_SECONDS = 10.0

    def __init__(self, project: str, name: str | None = None, config: Metrics | None = None):
        self._wandb: Any = importlib.import_module("wandb")
        self._settings = {"project": project, "name": name, "config": strict(config or {})}
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(self.MAX_QUEUED)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if self._error:
            raise self._error
        try:
            self._queue.put_nowait((step, numbers(metrics)))
        except queue.Full:
            raise TimeoutError("the W&B server has not answered for a long time") from None

    def close(self) -> None:
        if not self._error and not self._queue.full():
            self._queue.put_nowait(None)
            self._thread.join(self.CLOSE_SECONDS)

    def _work(self) -> None:
        try:
            run = self._wandb.init(**self._settings)
            while (item := self._queue.get()) is not None:
                step, values = item
                run.log(values, step=step)
            run.finish()
        except Exception as error:  # whatever W&B raises becomes one warning in the main thread
            self._error = error


class FanOut(MetricSink):
    """A list of sinks; one that raises is switched off with one warning."""

    def __init__(
        self, sinks: Sequence[MetricSink], *, warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.sinks = list(sinks)
        self._warn = warn

    def log(self, step: int, metrics: Metrics) -> None:
        for sink in list(self.sinks):
            self._guard(sink, "log", step, metrics)

    def close(self) -> None:
        for sink in list(self.sinks):
            self._guard(sink, "close")

    def _guard(self, sink: MetricSink, method: str, *arguments: Any) -> None:
        try:
            getattr(sink, method)(*arguments)
        except Exception as error:  # a logger's fault must not cost the run
            self.sinks.remove(sink)
            kind, cause = type(sink).__name__, clean_line(error, max_line=300)
            self._warn(f"{kind} is switched off: {type(error).__name__}: {cause}")


# --- completions ---------------------------------------------------------------------------------

COMPLETION_COLUMNS = {
    "step": pa.int64(),
    "question_id": pa.string(),
    "source": pa.string(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "answer": pa.string(),
    "reward": pa.float32(),
    "reason": pa.string(),
    "num_tokens": pa.int32(),
    "truncated": pa.bool_(),
    "advantage": pa.float32(),
    "mean_entropy": pa.float32(),
    "mean_logprob": pa.float32(),
}


class CompletionLog:
    """completions/step_000012.parquet: one row a trajectory, for people and for data tools."""

    def __init__(self, folder: Path | str, *, keeps: bool = True) -> None:
        """`keeps` False: on ranks other than 0, whose rows rank 0 has as well."""
        self.folder = Path(folder)
        self.keeps = keeps
        self._failing = False

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.parquet"

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path | None:
        """Write the rows of one step; None when the disk refuses (warned once, never raised)."""
        if not self.keeps:
            return None
        path = self.path(step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                _write_parquet(temporary, [{**row, "step": step} for row in rows])
        except OSError as error:
            if not self._failing:
                logger.warning("%s: %s; completions are not kept", path, error.strerror or error)
            self._failing = True
            return None
        self._failing = False
        return path

    def truncate_after(self, step: int) -> None:
        """Remove the tables of later steps: the run resumes at `step`."""
        for path in self.folder.glob("step_*.parquet"):
            number = path.stem.removeprefix("step_")
            if number.isdigit() and int(number) > step:
                path.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    arrays = {
        name: pa.array([_cell(row.get(name), kind) for row in rows], kind)
        for name, kind in COMPLETION_COLUMNS.items()
    }
    pq.write_table(pa.table(arrays), path, compression="zstd")


def _cell(value: Any, kind: pa.DataType) -> Any:
    if kind == pa.string() and value is not None:
        # The text stays as the policy wrote it; only what UTF-8 cannot hold is escaped.
        return str(value).encode("utf-8", "backslashreplace").decode()
    return strict(value) if hasattr(value, "tolist") else value
