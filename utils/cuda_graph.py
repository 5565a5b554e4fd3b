"""CUDA graphs: record the kernels of a function once, then replay them without Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from utils.errors import first_line

ORDINARY_CALLS = 4  # per shape, before it is recorded


class CUDAGraphed:
    """A function of CUDA tensors that is recorded as a CUDA graph and replayed.

    A small network's pass consists of hundreds of kernels of a few microseconds each, more than Python can launch in
    that time. The function must do the same work on each call: no synchronisation, no shape that depends on a value.

    The first calls with inputs of a shape run as usual, since libraries load and choose their kernels then; the next
    one is recorded. Inputs beyond the allowed number of recordings run as usual, and so does everything if recording
    fails (or memory does not suffice for it), which is reported in one line.

    Args:
        function: maps CUDA tensors to a tensor or None.
        max_recordings: shapes that are recorded. All recordings share one memory pool.
        ordinary_calls: calls per shape before it is recorded.
    """

    def __init__(self, function: Callable[..., torch.Tensor | None], max_recordings: int = 1,
                 ordinary_calls: int = ORDINARY_CALLS):
        self.function, self.max_recordings, self.ordinary_calls = function, max_recordings, ordinary_calls
        self.calls: Counter[tuple] = Counter()
        self.failed, self.side, self.pool = False, torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.recordings: dict[tuple, tuple[Any, list[torch.Tensor], torch.Tensor | None]] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | None:
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key not in self.recordings:
            self.calls[key] += 1
            if self.failed or len(self.recordings) >= self.max_recordings:
                return self.function(*inputs)
            if self.calls[key] <= self.ordinary_calls:
                return self._on_side_stream(*inputs)
            self._record(key, *inputs)
            if self.failed:
                return self.function(*inputs)
        graph, static_inputs, output = self.recordings[key]
        for static, new in zip(static_inputs, inputs):
            static.copy_(new)
        graph.replay()
        return None if output is None else output.clone()  # the next replay overwrites it

    def _on_side_stream(self, *inputs: torch.Tensor) -> torch.Tensor | None:
        """Run on the stream of the recording: what autograd remembers of a stream must not belong to another."""
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.side)
        return output

    def _record(self, key: tuple, *inputs: torch.Tensor) -> None:
        graph, static_inputs = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
        try:
            # Only this thread is watched for calls that a graph cannot hold: the one that pins memory may go on. The
            # outer context restores the stream where an older PyTorch would not after a failure.
            with (torch.cuda.stream(torch.cuda.current_stream()),
                  torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local")):
                output = self.function(*static_inputs)
            self.recordings[key] = graph, static_inputs, output
        except RuntimeError as error:
            self.failed = True
            print(f"note: no CUDA graph here ({first_line(error.__context__ or error)}); continuing without")
