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
    def record(tape, pool, stream, capture_error_mode):
        assert pool == "pool" and isinstance(stream, Stream) and capture_error_mode == "thread_local"
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
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
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
# a training step: one shape is recorded


def test_it_is_recorded_once_and_returns_what_the_function_does(cuda):
    function, calls = recordable(double_and_add)
    graphed = CUDAGraphed(function)
    outputs = [graphed(torch.full((3,), float(i)), torch.ones(3)) for i in range(9)]
    assert [output[0].item() for output in outputs] == [2 * i + 1 for i in range(9)]  # none was overwritten
    assert len(calls) == graphed.ordinary_calls + 1 and len(Tape.made) == 1


def test_other_shapes_run_as_usual(cuda):
    function, calls = recordable(double_and_add)
    graphed = CUDAGraphed(function)
    for _ in range(7):
        graphed(torch.ones(3), torch.ones(3))
    for _ in range(7):
        assert graphed(torch.ones(2), torch.ones(2)).tolist() == [3, 3] and calls[-1] == 2
    assert graphed(torch.ones(3), torch.zeros(3)).tolist() == [2, 2, 2] and calls[-1] == 2
    assert len(Tape.made) == 1


@pytest.mark.parametrize("max_recordings", [1, 4])
def test_a_function_that_cannot_be_recorded_runs_as_usual_after_one_note(cuda, monkeypatch, capsys, max_recordings):
    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graphed = CUDAGraphed(recordable(double_and_add)[0], max_recordings)
    assert all(graphed(torch.ones(n), torch.ones(n)).tolist() == [3] * n for n in [1, 2] * 9)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "not permitted" in printed and "more" not in printed


# ---------------------------------------------------------------------------------------------------------------------
# a forward pass: a recording for each of a few shapes


def test_each_shape_has_a_recording_up_to_a_number(cuda):
    function, calls = recordable(double_and_add)
    graphed = CUDAGraphed(function, max_recordings=2, ordinary_calls=3)
    for n in [1, 2, 3] * 8:
        assert graphed(torch.arange(n).float(), torch.ones(n)).tolist() == [2 * i + 1 for i in range(n)]
    assert len(Tape.made) == 2
    assert [calls.count(n) for n in (1, 2, 3)] == [4, 4, 8]  # the last shape runs as usual


class OnCPU(Pipeline):
    """A pipeline that takes its device for CUDA, while its tensors are on the CPU."""

    device = property(lambda self: torch.device("cpu"), lambda self, device: None)


def test_a_pipeline_records_its_network_once_for_all_samples(cuda):
    """Also for a sampler of few steps; with weights that change, as an EMA's do."""
    weights = torch.tensor(0.5)

    def network(x_t, t, labels=None):
        return weights * x_t if labels is None else weights * x_t + labels.sum(1)[:, None, None, None]

    settings = dict(image_size=8, prediction="x0", label_dropout=0.1)
    plain, graphed = (OnCPU(network, NoiseScheduler(50), PixelSpace(), settings, ("fire", "ice"),
                            SimpleNamespace(type=device), "fp32") for device in ("cpu", "cuda"))
    assert isinstance(graphed._network, CUDAGraphed)
    graphed._network.function, calls = recordable(graphed._network.function)
    few_steps = dict(sampler="ddim", steps=4)
    assert graphed.sample([1, 2], **few_steps).equal(plain.sample([1, 2], **few_steps))
    assert len(Tape.made) == 1 and len(calls) < 4  # recorded within the first sample
    weights += 0.25
    assert graphed.sample([3, 4], **few_steps).equal(plain.sample([3, 4], **few_steps))
    assert len(Tape.made) == 1 and len(calls) < 4  # and the second needs no call at all

    # Guidance doubles the batch: another shape, and another recording.
    guided = dict(labels=torch.eye(2), guidance=2.0, sampler="dpm++", steps=2)
    for seeds in ([1, 2], [5, 6], [7, 8]):
        assert graphed.sample(seeds, **guided).equal(plain.sample(seeds, **guided))
    assert len(Tape.made) == 2
