"""Running another Python program of this repository, and stopping it in such a way that a training saves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence


def interrupt_on_sigterm() -> None:
    """Treat SIGTERM, by which schedulers and timeouts stop a process, as Ctrl-C from now on."""
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def run_python(command: Sequence[object], deadline: float | None = None) -> int:
    """Run a Python program, its path first, and return its exit status.

    At the deadline, or when this process is interrupted, the program gets SIGTERM, on which a training saves.

    Args:
        deadline: by `time.monotonic`; None: never.

    Raises:
        subprocess.TimeoutExpired: at the deadline.
    """
    process = subprocess.Popen([sys.executable, *map(str, command)])
    try:
        return process.wait(timeout=deadline and max(0.0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.terminate()
        process.wait()
        raise
