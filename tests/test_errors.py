"""one_line_errors: one line and a status for what a user can cause, a traceback for bugs."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from utils.checkpoint import CheckpointError
from utils.errors import UserError, first_line, one_line_errors, printable


def exit_code(error: BaseException, **options) -> int | str | None:
    with pytest.raises(SystemExit) as stopped, one_line_errors(**options):
        raise error
    return stopped.value.code


@pytest.mark.parametrize("error, line", [
    (UserError("no folder x; make one"), "error: no folder x; make one"),
    (CheckpointError("x.pt is truncated"), "error: x.pt is truncated"),
    (ValueError("--steps must be more than 0"), "error: --steps must be more than 0"),
    (OSError(28, "No space left on device", "a.png"), "error: [Errno 28] No space left on device: 'a.png'"),
    (FileNotFoundError(2, "No such file", "b"), "error: [Errno 2] No such file: 'b'"),
    (ValueError("two\nlines\x1b[2J"), "error: two\\nlines\\x1b[2J"),
])
def test_what_a_user_can_cause_is_one_line(error, line):
    assert exit_code(error) == line


def test_the_status_of_ctrl_c_is_130():
    assert exit_code(KeyboardInterrupt()) == 130


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n...")])
def test_out_of_memory_says_what_to_try(error):
    assert exit_code(error) == "error: out of memory; give a smaller --batch_size"
    assert exit_code(error, out_of_memory="close something") == "error: out of memory; close something"


@pytest.mark.parametrize("error", [KeyError, TypeError, RuntimeError, AssertionError])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(error, match="a bug"), one_line_errors():
        raise error("a bug")


def test_without_an_error_nothing_happens():
    with one_line_errors():
        value = 3
    assert value == 3
    assert exit_code(SystemExit(5)) == 5


def test_a_terminal_that_cannot_show_a_name_is_no_error(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with one_line_errors():
        print("é", flush=True)
    assert stream.buffer.getvalue() == b"\\xe9\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a stream that cannot be configured is left as it is
    with one_line_errors():
        print("é")


def test_printable():
    assert printable("plain é 日") == "plain é 日" and printable(ValueError("a\tb")) == "a\\tb"
    assert printable("\x1b[31mred\u202e\udcff") == "\\x1b[31mred\\u202e\\udcff"


def test_first_line():
    assert first_line(RuntimeError("\n  \nCUDA error: \x1b[31mno kernel\nmore")) == "CUDA error: [31mno kernel"
    assert first_line(RuntimeError("x" * 500)) == "x" * 200 and first_line(RuntimeError()) == "RuntimeError"
