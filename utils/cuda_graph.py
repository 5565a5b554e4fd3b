"""CUDA graphs: record the kernels of a function once, then replay them without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from utils.errors import first_line


class CUDAGraphed:
    """A function of CUDA tensors that is recorded as a CUDA graph and replayed.

    A small network's pass consists of hundreds of kernels of a few microseconds each, more than Python can launch in
    that time. The function must do the same work on each call: no synchronisation, no shape that depends on a value.
    Libraries load and choose their kernels in a few ordinary calls before the recording. Inputs of a shape that was
    not recorded run as usual, and so does everything if recording fails, which is reported in one line.

    Args:
        function: maps CUDA tensors to a tensor or None.
        repeatable: the function changes nothing (a forward pass), so the ordinary calls are made with the first
            inputs of each shape, and each shape gets a recording of its own. Otherwise (a training step) the first
            calls run as usual, and only the first shape is recorded.
    """

    ORDINARY_CALLS = 4
    MAX_RECORDINGS = 4  # each keeps the memory of its tensors

    def __init__(self, function: Callable[..., torch.Tensor | None], repeatable: bool = False):
        self.function, self.repeatable = function, repeatable
        self.calls, self.failed, self.side = 0, False, torch.cuda.Stream()
        self.recordings: dict[tuple[torch.Size, ...], tuple[Any, list[torch.Tensor], torch.Tensor | None]] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | None:
        self.calls += 1
        if not self.repeatable and self.calls <= self.ORDINARY_CALLS:
            return self._on_a_side_stream(*inputs)
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recordings and not self.failed and len(self.recordings) < self._max_recordings():
            self._record(shapes, *inputs)
        if shapes not in self.recordings:
            return self.function(*inputs)
        graph, static_inputs, output = self.recordings[shapes]
        for static, new in zip(static_inputs, inputs):
            static.copy_(new)
        graph.replay()
        return None if output is None else output.clone()  # the next replay overwrites it

    def _max_recordings(self) -> int:
        return self.MAX_RECORDINGS if self.repeatable else 1

    def _on_a_side_stream(self, *inputs: torch.Tensor) -> torch.Tensor | None:
        """Run as the recording will: what autograd remembers of a stream must not belong to the one outside."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.side)
        return output

    def _record(self, shapes: tuple[torch.Size, ...], *inputs: torch.Tensor) -> None:
        graph, static_inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        try:
            for _ in range(self.ORDINARY_CALLS if self.repeatable else 0):
                self._on_a_side_stream(*static_inputs)
            # Only this thread is watched for calls that a graph cannot hold: the one that pins memory may go on. The
            # outer context restores the stream where an older PyTorch would not after a failure.
            with (torch.cuda.stream(torch.cuda.current_stream()),
                  torch.cuda.graph(graph, capture_error_mode="thread_local")):
                output = self.function(*static_inputs)
            self.recordings[shapes] = graph, static_inputs, output
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failed = True
            print(f"note: no CUDA graph here ({first_line(error)}); continuing without")
