"""Errors that a user can cause: one line on stderr, a non-zero exit status, no traceback.

    def main() -> None:
        with one_line_errors():
            ...
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

import torch


class UserError(Exception):
    """A problem that the user can solve. The message is one line: what is wrong, where, and what to do."""


@contextlib.contextmanager
def one_line_errors(out_of_memory: str = "give a smaller --batch_size") -> Iterator[None]:
    """End the program with `error: ...` and status 1 for what a user can cause, with 130 for Ctrl-C.

    Args:
        out_of_memory: what to try when memory runs out.
    """
    for stream in (sys.stdout, sys.stderr):  # file names can hold characters that a terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"error: {printable(error)}")
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: out of memory; {out_of_memory}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the device or the machine did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(  # what a CPU's allocator raises
        re.search("allocate memory|not enough memory|size calculation overflowed", str(error)))


def printable(text: object) -> str:
    """Return the text as one line that any terminal can show, with other characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without control characters, at most 200 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "".join(filter(str.isprintable, lines[0]))[:200] if lines else type(error).__name__
