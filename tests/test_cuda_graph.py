"""CUDA graphs on a machine without CUDA: recording and replaying are stand-ins, what is copied to and fro is real."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from forward_diffusion import NoiseScheduler
from models.pipeline import Pipeline
from models.space import PixelSpace
from utils.cuda_graph import CUDAGraphed


class Tape:
    """Stands for torch.cuda.CUDAGraph: repeats the work that was done while it was recording."""

    recording: Tape | None = None
    made: list[Tape] = []

    def __init__(self):
        Tape.made.append(self)

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

    monkeypatch.setattr(Tape, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def recordable(function: Callable[..., torch.Tensor]) -> tuple[Callable[..., torch.Tensor], list[int]]:
    """Return the function, whose work goes to the tape that is recording, and the batch sizes it was called with."""
    calls = []

    def call(*inputs):
        calls.append(len(inputs[0]))
        output = function(*inputs).clone()
        if Tape.recording:
            Tape.recording.work = lambda: output.copy_(function(*inputs))
        return output

    return call, calls


def double_and_add(x, y):
    return 2 * x + y


# ---------------------------------------------------------------------------------------------------------------------
# a training step: the first calls are ordinary, one shape is recorded


def test_it_is_recorded_once_and_returns_what_the_function_does(cuda):
    function, calls = recordable(double_and_add)
    graphed = CUDAGraphed(function)
    outputs = [graphed(torch.full((3,), float(i)), torch.ones(3)) for i in range(9)]
    assert [output[0].item() for output in outputs] == [2 * i + 1 for i in range(9)]  # none was overwritten
    assert len(calls) == CUDAGraphed.ORDINARY_CALLS + 1 and len(Tape.made) == 1


def test_other_shapes_run_as_usual(cuda):
    function, calls = recordable(double_and_add)
    graphed = CUDAGraphed(function)
    for _ in range(7):
        graphed(torch.ones(3), torch.ones(3))
    assert graphed(torch.ones(2), torch.ones(2)).tolist() == [3, 3] and calls[-1] == 2
    assert graphed(torch.ones(3), torch.zeros(3)).tolist() == [2, 2, 2] and calls[-1] == 2


@pytest.mark.parametrize("repeatable", [False, True])
def test_a_function_that_cannot_be_recorded_runs_as_usual_after_one_note(cuda, monkeypatch, capsys, repeatable):
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphed = CUDAGraphed(recordable(double_and_add)[0], repeatable)
    assert all(graphed(torch.ones(n), torch.ones(n)).tolist() == [3] * n for n in (1, 1, 2, 1, 1, 1, 1, 2, 2))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "not permitted" in printed and "more" not in printed


# ---------------------------------------------------------------------------------------------------------------------
# a forward pass: recorded within the first call, once for each shape


def test_a_repeatable_function_is_recorded_within_its_first_call(cuda):
    function, calls = recordable(double_and_add)
    graphed = CUDAGraphed(function, repeatable=True)
    assert graphed(torch.full((3,), 4.0), torch.ones(3)).tolist() == [9, 9, 9]
    assert len(Tape.made) == 1 and len(calls) == CUDAGraphed.ORDINARY_CALLS + 1
    outputs = [graphed(torch.full((3,), float(i)), torch.ones(3)) for i in range(6)]
    assert [output[0].item() for output in outputs] == [2 * i + 1 for i in range(6)]
    assert len(Tape.made) == 1 and len(calls) == CUDAGraphed.ORDINARY_CALLS + 1  # replayed, without the function


def test_each_shape_of_a_repeatable_function_has_a_recording_up_to_a_number(cuda):
    function, calls = recordable(double_and_add)
    graphed = CUDAGraphed(function, repeatable=True)
    most = CUDAGraphed.MAX_RECORDINGS
    for n in [*range(1, most + 3), *range(1, most + 3)]:
        assert graphed(torch.arange(n).float(), torch.ones(n)).tolist() == [2 * i + 1 for i in range(n)]
    assert len(Tape.made) == most
    by_shape = [calls.count(n) for n in range(1, most + 3)]
    assert by_shape == [CUDAGraphed.ORDINARY_CALLS + 1] * most + [2, 2]  # the last two run as usual


class OnCPU(Pipeline):
    """A pipeline that takes its device for CUDA, while its tensors are on the CPU."""

    device = property(lambda self: torch.device("cpu"), lambda self, device: None)


def test_a_pipeline_records_its_network_once_for_all_samples(cuda):
    """Also for a sampler of as few steps as there are ordinary calls; with weights that change, as an EMA's do."""
    weights = torch.tensor(0.5)

    def network(x_t, t, labels=None):
        return weights * x_t if labels is None else weights * x_t + labels.sum(1)[:, None, None, None]

    settings = dict(image_size=8, prediction="x0", label_dropout=0.1)
    plain, graphed = (of_class(network, NoiseScheduler(50), PixelSpace(), settings, ("fire", "ice"),
                               SimpleNamespace(type=device), "fp32")
                      for of_class, device in ((OnCPU, "cpu"), (OnCPU, "cuda")))
    assert isinstance(graphed._network, CUDAGraphed)
    graphed._network.function, calls = recordable(graphed._network.function)
    draw = dict(sampler="ddim", steps=3)
    assert graphed.sample([1, 2], **draw).equal(plain.sample([1, 2], **draw))
    assert len(Tape.made) == 1 and len(calls) == CUDAGraphed.ORDINARY_CALLS + 1
    weights += 0.25
    assert graphed.sample([3, 4], **draw).equal(plain.sample([3, 4], **draw))
    assert len(Tape.made) == 1 and len(calls) == CUDAGraphed.ORDINARY_CALLS + 1

    # Guidance doubles the batch: another shape, and another recording.
    guided = dict(labels=torch.eye(2), guidance=2.0, sampler="dpm++", steps=2)
    for seeds in ([1, 2], [5, 6]):
        assert graphed.sample(seeds, **guided).equal(plain.sample(seeds, **guided))
    assert len(Tape.made) == 2
