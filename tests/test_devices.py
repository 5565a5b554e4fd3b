"""A CUDA graph on a machine without CUDA: what records and repeats is a stand-in; what is copied to and fro is real."""

import contextlib

import pytest
import torch

import devices
from devices import Recorded


class Tape:
    """Stands for torch.cuda.CUDAGraph: it repeats the work that was done while it was recording."""

    recording = None

    def replay(self):
        self.work()


@pytest.fixture
def cuda(monkeypatch):
    @contextlib.contextmanager
    def record(tape, capture_error_mode):
        assert capture_error_mode == "thread_local"
        Tape.recording = tape
        try:
            yield
        finally:
            Tape.recording = None

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def doubling():
    """A function whose work goes to the tape while one records, and the list of the sizes it was called with."""
    calls = []

    def double(x, y):
        calls.append(len(x))
        output = torch.empty_like(x)

        def work():
            output.copy_(2 * x + y)

        work()
        if Tape.recording:
            Tape.recording.work = work
        return output

    return double, calls


def test_it_is_recorded_once_and_answers_as_the_function_does(cuda):
    double, calls = doubling()
    recorded = Recorded(double)
    outputs = [recorded(torch.full((3,), float(i)), torch.ones(3)) for i in range(9)]
    assert [output[0].item() for output in outputs] == [2 * i + 1 for i in range(9)]  # none was overwritten
    assert len(calls) == Recorded.ORDINARY_CALLS + 1


def test_other_shapes_run_as_usual(cuda):
    double, calls = doubling()
    recorded = Recorded(double)
    for i in range(7):
        recorded(torch.ones(3), torch.ones(3))
    assert recorded(torch.ones(2), torch.ones(2)).tolist() == [3, 3] and calls[-1] == 2
    assert recorded(torch.ones(3), torch.zeros(3)).tolist() == [2, 2, 2] and calls[-1] == 2


def test_what_cannot_be_recorded_runs_as_usual_and_says_so_once(cuda, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    recorded = Recorded(doubling()[0])
    assert all(recorded(torch.ones(1), torch.ones(1)).item() == 3 for _ in range(9))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "not permitted" in said and "more" not in said


@pytest.mark.parametrize("device, training, last", [("cuda", True, True), ("cpu", True, False), ("cpu", False, True),
                                                    ("mps", False, False)])
def test_the_order_of_numbers_in_memory(device, training, last):
    found = devices.memory_format(torch.device(device), training)
    assert found == (torch.channels_last if last else torch.contiguous_format)
