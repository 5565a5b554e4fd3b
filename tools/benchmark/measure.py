"""What the benchmark measures: speed of training and sampling, arithmetic, memory."""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.pipeline import Pipeline
from reverse_diffusion import SAMPLERS, default_steps
from tools.benchmark.baselines import PLAIN, CompiledPokeDiff, PokeDiff, Trainer
from tools.benchmark.roofline import synchronize
from utils.device import memory_format

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------------------------------
# training


def measure_training(trainers: dict[str, Trainer], settings: Any) -> dict[str, dict[str, Any]]:
    """Return, for each trainer, images per second in each round, and what follows from them.

    In every round all trainers take turns, since a machine's speed drifts.
    """
    # Time.
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    waits: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.run(settings.warmup)
    for _ in range(settings.rounds):
        for name, trainer in trainers.items():
            elapsed, waited = trainer.run(settings.steps)
            seconds[name].append(elapsed / settings.steps)
            waits[name].append(waited / elapsed)

    # Compare.
    results = {}
    for name, trainer in trainers.items():
        step_flops, forward_flops = count_training_flops(trainer, settings.batch_size)
        speeds = sorted(settings.batch_size / s for s in seconds[name])
        results[name] = dict(images_per_second=speeds, median=statistics.median(speeds),
                             data_wait=statistics.median(waits[name]), gflop_forward=forward_flops / 1e9,
                             gflop_step=step_flops / 1e9, precision=trainer.precision)
        if PLAIN in seconds:
            results[name]["speedup"] = statistics.median(a / b for a, b in zip(seconds[PLAIN], seconds[name]))
        if isinstance(trainer, CompiledPokeDiff):
            results[name]["compile_seconds"] = trainer.compile_seconds
    return results


def count_training_flops(trainer: Trainer, batch_size: int) -> tuple[float, float]:
    """Count the network's floating-point operations in a step, and in the forward pass of one image.

    An encoder that runs in each step, in latents with --augment full, is not counted.
    """
    net = copy.deepcopy(trainer.net).to("meta")
    net = getattr(net, "model", net)  # the network in denoising-diffusion-pytorch's GaussianDiffusion
    x = torch.empty(batch_size, *trainer.shape, device="meta")
    t = torch.zeros(batch_size, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as forward:
        output = net(x, t)
    with FlopCounterMode(display=False) as backward:
        getattr(output, "sample", output).sum().backward()
    return forward.get_total_flops() + backward.get_total_flops(), forward.get_total_flops() / batch_size


# ---------------------------------------------------------------------------------------------------------------------
# memory


def measure_memory(name: str, flags: Sequence[str]) -> int:
    """Return the peak memory in bytes of a few steps of a trainer, measured in a process of its own.

    Args:
        flags: of the benchmark's command line, without the program.

    Raises:
        ValueError: if the process fails.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # from whatever folder we are run
    done = subprocess.run([sys.executable, "-m", "tools.benchmark", *flags, "--memory_of", name], capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
        raise ValueError(f"could not measure the memory of {name}: {lines[-1].removeprefix('error: ')}")
    return int(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# sampling


class TimedEnough(Exception):
    """Raised inside of a sampler when it has been timed for long enough."""


def measure_sampling(trainer: PokeDiff, settings: Any, precisions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return, by precision and sampler, images per second in each round, with the sampler's default number of steps.

    Args:
        precisions: the last one is what the others are compared with.
    """
    pipelines = {precision: make_pipeline(trainer, settings.image_size, precision) for precision in precisions}
    forward, decoding = count_training_flops(trainer, settings.batch_size)[1], count_decoding_flops(trainer)
    results: dict[str, dict[str, Any]] = {precision: {} for precision in precisions}
    for sampler in (name for name in SAMPLERS if not SAMPLERS[name].tuned):
        steps = default_steps(sampler, trainer.scheduler.num_timesteps)
        seconds: dict[str, list[float]] = {precision: [] for precision in precisions}
        for _ in range(settings.rounds):
            for precision, pipeline in pipelines.items():
                per_pass, passes = time_passes(pipeline, sampler, steps, settings)
                seconds[precision].append(steps * per_pass + time_decoding(pipeline, settings.num_images))
        for precision in precisions:
            speeds = sorted(settings.num_images / s for s in seconds[precision])
            results[precision][f"{sampler}-{steps}"] = dict(
                images_per_second=speeds, median=statistics.median(speeds), passes=passes,
                gflop_image=(steps * forward + decoding) / 1e9,
                speedup=statistics.median(a / b for a, b in zip(seconds[precisions[-1]], seconds[precision])))
    return results


def make_pipeline(trainer: PokeDiff, image_size: int, precision: str) -> Pipeline:
    """Return a pipeline that samples from the averaged weights of a trainer."""
    net = copy.deepcopy(trainer.training_step.ema).to(memory_format=memory_format(trainer.device))
    settings = dict(image_size=image_size, prediction="eps")
    return Pipeline(net, trainer.scheduler, trainer.space, settings, (), trainer.device, precision)


def time_passes(pipeline: Pipeline, sampler: str, steps: int, settings: Any) -> tuple[float, int]:
    """Return the mean seconds of a sampler's network passes, and how many were timed.

    All passes cost the same, so a slow machine makes only some of them, at least `settings.passes`, and stops after
    `settings.seconds`.
    """
    ends: list[float] = []
    seeds = range(settings.num_images)
    if pipeline.device.type == "cuda":  # the first passes choose kernels and record them
        pipeline.sample(seeds, sampler=sampler, steps=min(steps, 4), batch_size=settings.num_images)

    def after_step(*_: Any) -> None:
        synchronize(pipeline.device)
        ends.append(time.perf_counter())
        if len(ends) > settings.passes and ends[-1] - ends[0] > settings.seconds:
            raise TimedEnough

    try:
        pipeline.sample(seeds, sampler=sampler, steps=steps, batch_size=settings.num_images, callback=after_step)
    except TimedEnough:
        pass
    passes = len(ends) - 1
    return (ends[-1] - ends[0]) / passes, passes


def time_decoding(pipeline: Pipeline, num_images: int) -> float:
    """Return the seconds from x_0 to images on the CPU."""
    x_0 = torch.zeros(num_images, *pipeline.space.shape(pipeline.image_size), device=pipeline.device)
    synchronize(pipeline.device)
    started = time.perf_counter()
    pipeline.decode(x_0)
    return time.perf_counter() - started


def count_decoding_flops(trainer: Trainer) -> float:
    """Count the floating-point operations of decoding one image; none in pixels."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(trainer.space).to("meta").decode(torch.empty(1, *trainer.shape, device="meta"))
    return counter.get_total_flops()
