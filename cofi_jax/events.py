"""A copy of `metrics.jsonl` as an event file, for TensorBoard.

Every number of a line is a point of the curve `<stage>/<key>` at the line's step:

    {"stage": "prune", "step": 50, "loss": 0.4}    ->    prune/loss at 50: 0.4

`tensorboard --logdir <workdir>/tensorboard` shows them while the run goes on.
"""

import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

from cofi_jax.config import reject


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
