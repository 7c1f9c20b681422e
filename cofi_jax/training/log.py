"""What came out of a run, from plain data: `report.json`, log and tables.

Everything is written atomically: a reader sees the old file or the new one,
whatever moment the run is killed at.
"""

import json
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from cofi_jax.errors import reject
from cofi_jax.files import write_atomically


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; one cut off at the end is left out.

    Raises:
      ValueError: a line before the last is not JSON.
    """
    lines = pathlib.Path(path).read_bytes().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            metrics.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON") from error
    return metrics


class MetricsLog:
    """Appends to a `metrics.jsonl`, one JSON object a line.

    Each line goes to the operating system at once, so a killed run loses at most
    the line it was writing; the next run's `MetricsLog` removes a broken one.
    """

    def __init__(self, path: str | os.PathLike, mirror: Any = None):
        """Opens the log at `path`, new or continued; `mirror`: an `events.Events`."""
        self.path, self._mirror = pathlib.Path(path), mirror
        self._rewrite(read_metrics(path) if self.path.exists() else [])

    def rewind(self, stage: str, step: int) -> float:
        """Forgets the lines of `stage` after `step`, where the stage resumes.

        Lines at `step` itself stay, so a run logs a step before it saves it. A
        stage that starts over passes -1.

        Returns:
          The seconds that the stage had taken at the last line left, or 0.
        """
        lines = [
            line
            for line in read_metrics(self.path)
            if line["stage"] != stage or line["step"] <= step
        ]
        self._rewrite(lines)
        return max(
            (line.get("seconds", 0.0) for line in lines if line["stage"] == stage),
            default=0.0,
        )

    def write(self, *, stage: str, step: int, **values: Any) -> None:
        """Adds a line; scalars may be Python's, NumPy's or JAX's."""
        line = _line({"stage": stage, "step": step} | values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
        if self._mirror:
            self._mirror.write(json.loads(line))

    def _rewrite(self, metrics: Iterable[dict[str, Any]]) -> None:
        write_atomically(self.path, "".join(map(_line, metrics)))
        if self._mirror:
            self._mirror.rewrite(metrics)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, default=lambda scalar: scalar.item()) + "\n"


def check() -> None:
    """Raises UserError where tensorboardX is not installed."""
    try:
        import tensorboardX.event_file_writer  # noqa: F401
    except ImportError as error:
        legal = "needs tensorboardX: pip install 'cofi-jax[tensorboard]'"
        raise reject("tensorboard", True, legal) from error


class Events:
    """The event files that follow a `report.MetricsLog`, as its `mirror`.

    What TensorBoard has read it does not forget when a file changes or goes. So where
    lines were taken back, or a run goes on, a new file begins, which says that all
    steps before it, from 0 on, are void, and repeats the lines that stand. The times in
    it are those of its writing.
    """

    def __init__(self, folder: str | os.PathLike):
        """Prepares a mirror in `folder`, which the first `write` creates."""
        check()
        self.folder = pathlib.Path(folder)
        self._lines: list[dict[str, Any]] = []
        self._writer = None

    def rewrite(self, lines: Iterable[dict[str, Any]]) -> None:
        """Makes these the only lines, from the next `write` on."""
        lines = list(lines)
        if self._writer and lines != self._lines:
            self._writer.close()
            self._writer = None
        self._lines = lines

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line, which is on the disk when this returns."""
        self._lines.append(line)
        if self._writer:
            self._writer.write_event(_event(line))
        else:
            self._writer = self._begin()
        self._writer.flush()

    def _begin(self):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.folder.mkdir(parents=True, exist_ok=True)
        # The names are seconds; two files of one second are of one name without it.
        writer = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")
        void = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=0, session_log=void))
        for line in self._lines:
            writer.write_event(_event(line))
        return writer


def _event(line):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=f"{line['stage']}/{key}", simple_value=float(number))
        for key, number in line.items()
        if key not in ("stage", "step")
    ]
    summary = Summary(value=values)
    return Event(wall_time=time.time(), step=line["step"], summary=summary)
