"""TensorBoard event files of a run: the columns of metrics.csv, the sample grids, and the settings as hparams.

    events = EventLog(Path("outputs/mine"), settings, history, columns)
    events.add_row(row), events.add_grid(step, path)

One file holds the whole run. A run that resumes writes it anew from its history, so that no point is there twice,
whatever a kill has left: the new file appears when it is whole, tells TensorBoard to forget what came before, and then
the old one is emptied. Records are appended directly: torch's SummaryWriter starts another file whenever a run starts,
and writes in a thread of its own, whose errors, as of a full disk, cannot be caught.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.grids import GRID_NAME, read_grid
from utils.errors import printable
from utils.files import replacing
from utils.packages import optional_package

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

LOGS = ("none", "tensorboard")
GRIDS = "samples"  # tag of the grids
# Event files of runs, and what a kill left of one; those of other programs in the folder are theirs.
FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.pokediff|\.events\.out\.tfevents\.\d+\.tmp\.pokediff")


def check_tensorboard() -> None:
    """Raise UserError if the optional package tensorboard is not installed, or does not work."""
    optional_package("torch.utils.tensorboard", "--log tensorboard", "requirements-tensorboard.txt")


class EventLog:
    """The event file of a run.

    Args:
        folder: of the event file and the grids.
        settings: of the run.
        history: rows of metrics.csv; the list that the run adds to.
        columns: their names.
        step: steps that are done; later grids in the folder are from before a kill.

    Every method raises OSError if the file cannot be written; the next call then writes all of it anew.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], history: list[dict], columns: Sequence[str],
                 step: int = 0):
        self.folder, self.settings, self.history, self.columns = folder, settings, history, columns
        self.step = step
        self.grid_steps: set[int] = set()  # of the grids in the file
        self.path: Path | None = None  # once it is whole

    def rewrite(self) -> None:
        """Write the file anew, with all of the history, and the grids so far that can be read."""
        found = {path: FILE.fullmatch(path.name) for path in self.folder.iterdir()}
        old = sorted(path for path, match in found.items() if match)
        # A run may have ended, with a grid, within an epoch.
        times, grids = _read_back(old, max(self.step, self.history[-1]["step"] if self.history else 0))
        newest = max((int(found[path][1]) for path in old if found[path][1]), default=0)
        path = self.folder / f"events.out.tfevents.{max(int(time.time()), newest + 1):010d}.pokediff"
        for row in self.history:
            if row["step"] not in grids:
                event = _grid_event(row["step"], self.folder / GRID_NAME.format(row["epoch"]))
                if event is not None:
                    grids[row["step"]] = event
        with replacing(path) as temporary:
            temporary.unlink(missing_ok=True)  # a kill may have left it
            _append(temporary, _head(self.settings, self.columns))
            _append(temporary, (event for row in self.history
                                for event in self._row_events(row, times.get(row["step"], time.time()))))
            _append(temporary, (grids[step] for step in sorted(grids)))
        self.path, self.grid_steps = path, set(grids)
        for other in old[:-1]:
            other.unlink(missing_ok=True)
        for other in old[-1:]:  # a TensorBoard goes on to the next file from an empty one, not from none
            os.truncate(other, 0)

    def add_row(self, row: dict) -> None:
        """Add a row of metrics.csv, which is in the history already."""
        self.step = row["step"]
        if self.path is None:
            self.rewrite()
            return
        self._add(self._row_events(row, time.time()))

    def add_grid(self, step: int, picture: Path) -> None:
        """Add a sample grid, unless it is there or cannot be read."""
        self.step = step
        if self.path is None:
            self.rewrite()
        event = None if step in self.grid_steps else _grid_event(step, picture)
        if event is not None:
            self._add([event])
            self.grid_steps.add(step)

    def _add(self, events: Iterable[Event]) -> None:
        path, self.path = self.path, None  # in case that it fails, and leaves half a record
        _append(path, events)
        self.path = path

    def _row_events(self, row: dict, wall_time: float) -> Iterator[Event]:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard import summary

        for column in self.columns:
            if column != "step" and row.get(column, "") != "":
                yield Event(step=row["step"], wall_time=wall_time, summary=summary.scalar(column, row[column]))


def _head(settings: dict[str, Any], columns: Sequence[str]) -> Iterator[Event]:
    """Yield the first events of a file: its version, the order to forget earlier files, and the settings."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from torch.utils.tensorboard import summary

    now = time.time()
    yield Event(wall_time=now, file_version="brain.Event:2")
    yield Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START))
    plain = {}
    for name, value in settings.items():
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        plain[name] = printable(text) if isinstance(text, str) else text  # the name of a folder need not be Unicode
    measured = {column: 0.0 for column in columns if column not in ("epoch", "step", "lr", "skipped")}
    for part in summary.hparams(plain, measured):
        yield Event(wall_time=now, summary=part)


def _grid_event(step: int, picture: Path) -> Event | None:
    """Return a sample grid as an event; None for one that cannot be read."""
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard import summary

    image = read_grid(picture)
    if image is None:
        return None
    pixels = np.asarray(image)
    return Event(step=step, wall_time=picture.stat().st_mtime, summary=summary.image(GRIDS, pixels, dataformats="HWC"))


def _append(path: Path, events: Iterable[Event]) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("ab") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event.SerializeToString())


def _read_back(paths: Sequence[Path], last_step: int) -> tuple[dict[int, float], dict[int, Event]]:
    """Return when the rows were written, and the grids, both by step, up to `last_step`."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    times: dict[int, float] = {}
    grids: dict[int, Event] = {}
    for path in paths:
        with contextlib.suppress(Exception):  # a damaged file gives what comes before the damage
            for event in LegacyEventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    if value.tag == GRIDS and 0 < event.step <= last_step:
                        grids[event.step] = event
                    elif value.tag == "loss":
                        times.setdefault(event.step, event.wall_time)
    return times, grids
