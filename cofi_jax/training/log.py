"""The log of a run, one line of JSON for each event, and its copy for TensorBoard."""

import json
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from cofi_jax.errors import reject
from cofi_jax.files import write_atomically


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, except a last line that is cut off.

    Raises:
      UserError: if a line before the last is damaged.
    """
    lines = pathlib.Path(path).read_bytes().splitlines()
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
            if not (isinstance(found["stage"], str) and isinstance(found["step"], int)):
                raise ValueError("neither a stage nor a step")
            metrics.append(found)
        except (KeyError, TypeError, ValueError) as error:
            if number < len(lines):
                legal = f"line {number} is damaged; without it the run goes on"
                raise reject("metrics", str(path), legal) from error
    return metrics


class MetricsLog:
    """A `metrics.jsonl` that lines are appended to, each a JSON object.

    Each line goes to the operating system at once, so a killed run loses at most the
    line that it was writing. The next `MetricsLog` of the file removes a broken line.
    """

    def __init__(self, path: str | os.PathLike, mirror: "Events | None" = None):
        """Opens a new or an existing log at `path`; `mirror` receives a copy of it."""
        self.path, self._mirror = pathlib.Path(path), mirror
        self._rewrite(read_metrics(path) if self.path.exists() else [])

    def rewind(self, stage: str, step: int) -> float:
        """Removes the lines of a stage after the step from which it goes on.

        The lines of `step` itself stay, because a run logs a step before it saves it. A
        stage that starts over passes -1.

        Returns:
          The seconds that the stage had taken at the last line that stays, or 0.
        """
        lines = [
            line
            for line in read_metrics(self.path)
            if line["stage"] != stage or line["step"] <= step
        ]
        self._rewrite(lines)
        taken = (line.get("seconds", 0.0) for line in lines if line["stage"] == stage)
        return max(taken, default=0.0)

    def write(self, *, stage: str, step: int, **values: Any) -> None:
        """Appends a line of scalars, which may be of Python, NumPy or JAX."""
        line = _line({"stage": stage, "step": step} | values)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
        if self._mirror:
            self._mirror.write(json.loads(line))

    def _rewrite(self, metrics: list[dict[str, Any]]) -> None:
        write_atomically(self.path, "".join(map(_line, metrics)))
        if self._mirror:
            self._mirror.rewrite(metrics)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, default=lambda scalar: scalar.item()) + "\n"


def check() -> None:
    """Checks that tensorboardX is installed.

    Raises:
      UserError: if it is not.
    """
    try:
        import tensorboardX.event_file_writer  # noqa: F401
    except ImportError as error:
        legal = "needs tensorboardX: pip install 'cofi-jax[tensorboard]'"
        raise reject("tensorboard", True, legal) from error


class Events:
    """The event files of TensorBoard, as the `mirror` of a `MetricsLog`.

    TensorBoard does not forget what it has read if a file changes or disappears. So if
    lines were removed or a run goes on, a new file begins, which declares all steps
    from 0 on void and repeats the lines that remain.
    """

    def __init__(self, folder: str | os.PathLike):
        """Prepares a mirror in `folder`, which the first `write` creates."""
        check()
        self._folder, self._writer = pathlib.Path(folder), None
        self._lines: list[dict[str, Any]] = []

    def rewrite(self, lines: Iterable[dict[str, Any]]) -> None:
        """Replaces all lines by these, as soon as the next line is written."""
        lines = list(lines)
        if self._writer and lines != self._lines:
            self._writer.close()
            self._writer = None
        self._lines = lines

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line and writes it to the disk."""
        # The flush of tensorboardX.SummaryWriter does not wait for its queue, so with
        # it a killed run would lose its last lines.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._lines.append(line)
        new, now = [line], time.time()
        if not self._writer:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The names of two files from the same second differ in the suffix only.
            prefix, suffix = str(self._folder / "events"), f".{time.time_ns()}"
            self._writer, new = EventsWriter(prefix, suffix), self._lines
            void = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=now, step=0, session_log=void))
        for some in new:
            for key in some.keys() - {"stage", "step"}:
                summary = scalar(f"{some['stage']}/{key}", some[key])
                event = Event(wall_time=now, step=some["step"], summary=summary)
                self._writer.write_event(event)
        self._writer.flush()
