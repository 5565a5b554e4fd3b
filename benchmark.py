"""How fast does it train and draw on this machine, how much memory does it take, and against what?

    python benchmark.py                                        # the reference network, 16 images of 64 x 64 a step
    python benchmark.py --width 32 --multipliers 1 2 2 --blocks 1 --groups 8 --image_size 32   # that of --preset quick
    python benchmark.py --compile                              # also with torch.compile
    python benchmark.py --against                              # also other trainers, where they are installed
    python benchmark.py --alone --image_size 256 --autoencoder checkpoints/autoencoder/final_model.pt --batch_size 2
    python benchmark.py --profile                              # where the time of a step goes, and its floor

Everything is compared with a plain loop: the same network in float32, as one writes it first. All take turns in one
run, because machines do not run at one speed; a figure is the median of the rounds, with the smallest and the largest.
The table goes to the screen, all that was measured to outputs/benchmark.json. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from augmentation import AUGMENT_MODES
from checkpoint import CheckpointError, load_codec
from contenders import PEERS, YARDSTICK, Compiled, Contender, Ours, contenders
from devices import (Recorded, autocast, describe, memory_format, peak_memory, pick_device, pick_precision,
                     use_fast_kernels)
from flags import Parser, positive
from profiling import Rates, as_table, machine_rates, profile, synchronize
from reverse_diffusion import sample_seeds
from unet import UNetConfig, default_multipliers

SAMPLERS = {"ddpm": 1000, "ddim": 50, "dpm++": 20}


def main() -> None:
    args = parse_flags()
    try:
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        args.steps = args.steps or (100 if device.type == "cuda" else 1)
        args.warmup = args.warmup or (20 if device.type == "cuda" else 2)
        use_fast_kernels()
        codec = load_codec(args.autoencoder)
        unet = UNetConfig(channels=codec.channels, width=args.width, blocks=args.blocks, groups=args.groups,
                          multipliers=args.multipliers or default_multipliers(codec.shape(args.image_size)[-1]))
        if args.image_size % (unet.size_multiple * codec.factor):
            raise ValueError(f"--image_size must be a multiple of {unet.size_multiple * codec.factor}, not "
                             f"{args.image_size}")
        if args.autoencoder and args.against:
            raise ValueError("--against compares in pixels: leave out --autoencoder")
        if args.memory_of:  # the part of the benchmark that runs in a process of its own
            kind, its_precision = contenders(precision)[args.memory_of]
            kind(unet, args, device, its_precision)(Recorded.ORDINARY_CALLS + 2 if device.type == "cuda" else 3)
            print(peak_memory())
            return
        args.output.parent.mkdir(parents=True, exist_ok=True)
        if args.profile:
            show_profile(unet, args, device, precision)
        else:
            compare(unet, args, device, precision)
    except (ValueError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(f"error: out of memory; give a --batch_size smaller than {args.batch_size}")
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def compare(unet: UNetConfig, args: argparse.Namespace, device: torch.device, precision: str) -> None:
    all_of_them = contenders(precision)
    left_out = [*PEERS.values()] + [Compiled] * (not args.compile)
    names = [name for name, (kind, _) in all_of_them.items() if kind not in left_out]
    names = names[:1] if args.alone else names
    for package, kind in PEERS.items() if args.against else ():
        try:
            __import__(package.replace("-", "_"))
            names += [name for name, (its_kind, _) in all_of_them.items() if its_kind is kind]
        except ImportError:
            print(f"{package} is not installed and is left out; to compare with it: pip install {package}")
    report = dict(device=describe(device), processor=platform.processor() or platform.machine(),
                  torch=torch.__version__, unet=vars(unet), image_size=args.image_size, batch_size=args.batch_size,
                  rounds=args.rounds, steps=args.steps)
    # First of all, since on Linux a process that is started counts the memory of the one that started it as its own.
    memory = {name: memory_in_own_process(name) for name in names}
    rates = {name: machine_rates(device, name) for name in dict.fromkeys((precision, "fp32"))}
    chosen = {name: all_of_them[name][0](unet, args, device, all_of_them[name][1]) for name in names}
    trainings = report["training"] = measure_training(chosen, args)
    drawings = report["sampling"] = measure_sampling(chosen[names[0]], args, device, precision)
    for name, before in rates.items():  # once more at the end, as the machine may have slept at first
        after = machine_rates(device, name)
        rates[name] = Rates(max(before.flops, after.flops), max(before.bytes, after.bytes))
    report["machine"] = {name: vars(rate) for name, rate in rates.items()}
    for name, figures in trainings.items():
        figures["peak_memory"] = memory[name]
        figures["of_machine"] = (1e9 * figures["gflop_step"] * figures["median"] / args.batch_size
                                 / rates[figures["precision"]].flops)
    args.output.write_text(json.dumps(report, indent=1))
    for name, rate in rates.items():
        print(f"machine    {rate.flops / 1e12:.2f} TFLOP/s in a {name} matrix product, {rate.bytes / 1e9:.0f} GB/s in "
              f"a copy")
    print(f"\n{training_table(trainings)}\n\n{sampling_table(drawings)}\n\nwrote {args.output}")


def measure_training(contenders: dict[str, Contender], args: argparse.Namespace) -> dict[str, dict]:
    """For each contender: images a second in each round, and what follows from them."""
    for contender in contenders.values():
        contender(args.warmup)
    seconds = {name: [] for name in contenders}
    waited = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, contender in contenders.items():
            took, waiting = contender(args.steps)
            seconds[name].append(took / args.steps)
            waited[name].append(waiting / took)
    results = {}
    for name, contender in contenders.items():
        flops, forward = flops_of_step(contender, args)
        speed = sorted(args.batch_size / s for s in seconds[name])
        results[name] = dict(
            images_per_second=speed, median=statistics.median(speed), waiting=statistics.median(waited[name]),
            gflop_forward=forward / 1e9, gflop_step=flops / 1e9, precision=contender.precision,
        )
        if YARDSTICK in seconds:
            results[name]["times_plain"] = statistics.median(a / b for a, b in zip(seconds[YARDSTICK], seconds[name]))
        if isinstance(contender, Compiled):
            results[name]["compile_seconds"] = contender.compile_seconds
    return results


def flops_of_step(contender: Contender, args: argparse.Namespace) -> tuple[float, float]:
    """Floating-point operations of the network in a step, forward and backward, and in one image's forward pass. (An
    encoder that runs in each step, in latents with --augment full, is not counted.)"""
    model = copy.deepcopy(contender.model).to("meta")
    x = torch.empty(args.batch_size, *contender.shape, device="meta")
    t = torch.zeros(args.batch_size, dtype=torch.long, device="meta")
    network = getattr(model, "model", model)  # that of GaussianDiffusion
    with FlopCounterMode(display=False) as forward:
        output = network(x, t)
    with FlopCounterMode(display=False) as backward:
        getattr(output, "sample", output).sum().backward()
    return forward.get_total_flops() + backward.get_total_flops(), forward.get_total_flops() / args.batch_size


def memory_in_own_process(name: str) -> int:
    """Peak memory, in bytes, of three steps of a contender, which nothing else shares."""
    done = subprocess.run([sys.executable, *sys.argv, "--memory_of", name], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the memory of {name} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.splitlines()[-1])


class Enough(Exception):
    """Raised inside of a sampler, when it has been timed for long enough."""


def measure_sampling(ours: Ours, args: argparse.Namespace, device: torch.device, precision: str) -> dict[str, dict]:
    """Images a second of each of SAMPLERS, as generate.py draws them, and the same in float32.

    All passes of a sampler cost the same, but for the first on CUDA, where one is recorded. So on a slow machine only
    some of them are made, and the time of the whole is worked out from their mean; `passes` says how many were timed.
    """
    model = copy.deepcopy(ours.make_step.average).to(memory_format=memory_format(device))
    codec, results = ours.codec, {}
    forward, decoding = flops_of_step(ours, args)[1], flops_of_decoding(codec, args)
    for sampler, steps in SAMPLERS.items():
        seconds, passes = {its: [] for its in ([precision] if args.alone else [precision, "fp32"])}, 0
        for _ in range(args.rounds):
            for its_precision, times in seconds.items():
                ends = []

                def after_step(*_) -> None:
                    synchronize(device)
                    ends.append(time.perf_counter())
                    if len(ends) > args.passes and ends[-1] - ends[0] > args.seconds:
                        raise Enough

                try:
                    sample_seeds(model, ours.scheduler, range(args.num_images), args.image_size, device, its_precision,
                                 codec=codec, batch_size=args.num_images, sampler=sampler, steps=steps,
                                 callback=after_step)
                except Enough:
                    pass
                passes = len(ends) - 1
                times.append(steps * (ends[-1] - ends[0]) / passes + time_to_decode(ours, args, its_precision))
        for its_precision, times in seconds.items():
            speed = sorted(args.num_images / s for s in times)
            results.setdefault(its_precision, {})[f"{sampler}-{steps}"] = dict(
                images_per_second=speed, median=statistics.median(speed), passes=passes,
                gflop_image=(steps * forward + decoding) / 1e9,
                times_fp32=statistics.median(a / b for a, b in zip(seconds.get("fp32", times), times)),
            )
    return results


def time_to_decode(ours: Ours, args: argparse.Namespace, precision: str) -> float:
    """Seconds from what a sampler leaves to pictures: of pixels, nothing."""
    x_0 = torch.zeros(args.num_images, *ours.shape, device=ours.device)
    started = time.perf_counter()
    with autocast(ours.device, precision):
        for few in x_0.split(16):  # as sample_seeds does
            ours.codec.decode(few)
    synchronize(ours.device)
    return time.perf_counter() - started


def flops_of_decoding(codec, args: argparse.Namespace) -> float:
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(codec).to("meta").decode(torch.empty(1, *codec.shape(args.image_size), device="meta"))
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# telling


def spread(figures: dict) -> str:
    """The median with the smallest and the largest."""
    speeds = figures["images_per_second"]  # from the smallest
    return f"{figures['median']:.3g} ({speeds[0]:.3g} ... {speeds[-1]:.3g})"


def training_table(results: dict[str, dict]) -> str:
    lines = ["| training | images/s | times plain | GFLOP an image, forward | of the matrix rate | waiting for images "
             "| peak memory |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, figures in results.items():
        compiled = f" in {figures['compile_seconds']:.0f} s" if "compile_seconds" in figures else ""
        times = f"{figures['times_plain']:.2f}" if "times_plain" in figures else "–"
        lines.append(f"| {name}{compiled} | {spread(figures)} | {times} | "
                     f"{figures['gflop_forward']:.1f} | {figures['of_machine']:.0%} | {figures['waiting']:.1%} | "
                     f"{figures['peak_memory'] / 1e9:.2f} GB |")
    return "\n".join(lines)


def sampling_table(results: dict[str, dict]) -> str:
    precision, *fp32 = results
    head = ["sampling", *(f"images/s, {name}" for name in results), *["ratio"] * len(fp32), "GFLOP an image",
            "passes timed"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    for sampler, figures in results[precision].items():
        cells = [sampler, *(spread(results[name][sampler]) for name in results),
                 *[f"{figures['times_fp32']:.2f}"] * len(fp32), f"{figures['gflop_image']:,.0f}",
                 str(figures["passes"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show_profile(unet: UNetConfig, args: argparse.Namespace, device: torch.device, precision: str) -> None:
    """Where the time of a training step goes, as train.py makes it; without a CUDA graph, which shows no operations."""
    rates = machine_rates(device, precision)
    contender = (Compiled if args.compile else Ours)(unet, args, device, precision)
    contender.make_step.compute = contender.make_step._compute
    contender(args.warmup)
    rows = profile(lambda: contender(1), device, rates)
    table = as_table(rows)
    args.output.write_text(json.dumps(dict(device=describe(device), precision=precision, rates=vars(rates),
                                           rows=[vars(row) for row in rows]), indent=1))
    print(f"a step of {args.batch_size} images of {args.image_size} x {args.image_size} on {describe(device)}, "
          f"{precision}; floors for {rates.flops / 1e12:.2f} TFLOP/s and {rates.bytes / 1e9:.0f} GB/s\n\n{table}\n\n"
          f"wrote {args.output}")


def parse_flags() -> argparse.Namespace:
    parser = Parser(description="Measure how fast PokeDiff trains and draws, and how much memory that takes.")
    parser.add_argument("--width", type=positive, default=64, help="channels at the first level (default: 64)")
    parser.add_argument("--multipliers", type=positive, nargs="+",
                        help="of the width, one a level (default: those of unet.LEVELS)")
    parser.add_argument("--blocks", type=positive, default=2, help="residual blocks a level (default: 2)")
    parser.add_argument("--groups", type=positive, default=32, help="groups of the normalisations (default: 32)")
    parser.add_argument("--image_size", type=positive, default=64, help="side of the images, in pixels (default: 64)")
    parser.add_argument("--autoencoder", default="", help="checkpoint of autoencoder.py: in its latents (default: in "
                        "pixels)")
    parser.add_argument("--augment", choices=AUGMENT_MODES, default="full", help="how the pictures are augmented "
                        "(default: full)")
    parser.add_argument("--batch_size", type=positive, default=16, help="images a training step (default: 16)")
    parser.add_argument("--num_images", type=positive, default=16, help="images drawn at a time (default: 16)")
    parser.add_argument("--rounds", type=positive, default=5, help="in each of which all take their turn (default: 5)")
    parser.add_argument("--steps", type=positive, help="training steps a turn (default: 1; on a GPU 100)")
    parser.add_argument("--warmup", type=positive, help="training steps before the first turn (default: 2; on a GPU "
                        "20)")
    parser.add_argument("--passes", type=positive, default=2, help="network passes to time at least, each time a "
                        "sampler is measured (default: 2)")
    parser.add_argument("--seconds", type=positive, default=3, help="then it goes on to its end, or for so long "
                        "(default: 3)")
    parser.add_argument("--alone", action="store_true", help="measure PokeDiff alone, and compare with nothing")
    parser.add_argument("--compile", action="store_true", help="also measure training with torch.compile")
    parser.add_argument("--against", action="store_true", help="also measure the training of "
                        "denoising-diffusion-pytorch and diffusers, where installed")
    parser.add_argument("--profile", action="store_true", help="instead: where the time of a training step goes")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.json"), help="all that was measured "
                        "(default: outputs/benchmark.json)")
    parser.add_device_flags()
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
