"""How fast does it train and draw on this machine, how much memory does it take, and against what?

    python benchmark.py                                        # the reference network, 16 images of 64 x 64 a step
    python benchmark.py --width 32 --multipliers 1 2 2 --blocks 1 --groups 8 --image_size 32   # that of --preset quick
    python benchmark.py --compile                              # also with torch.compile
    python benchmark.py --against                              # also other trainers, where they are installed
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
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from augmentation import augment
from dataset import load_images, make_loader
from denoising import Denoising
from devices import DEVICES, PRECISIONS, describe, memory_format, peak_memory, pick_device, pick_precision
from distributed import Processes
from flags import Parser, positive
from forward_diffusion import NoiseScheduler
from latents import Pixels
from profiling import as_table, machine_rates, profile, synchronize
from reverse_diffusion import sample_seeds
from training_step import Task, TrainingStep
from unet import UNet, UNetConfig

SAMPLERS = {"ddpm": 1000, "ddim": 50, "dpm++": 20}
PEERS = {  # package on PyPI -> what it takes to install it
    "denoising-diffusion-pytorch": "pip install denoising-diffusion-pytorch",
    "diffusers": "pip install diffusers",
}
STEPS = 1_000_000  # of a run that has no end in sight


def main() -> None:
    args = parse_flags()
    try:
        device = pick_device(args.device)
        precision = pick_precision(args.precision, device)
        args.steps = args.steps or (100 if device.type == "cuda" else 1)
        args.warmup = args.warmup or (20 if device.type == "cuda" else 2)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        unet = UNetConfig(width=args.width, multipliers=args.multipliers, blocks=args.blocks, groups=args.groups)
        if args.image_size % unet.size_multiple:
            raise ValueError(f"--image_size must be a multiple of {unet.size_multiple}, not {args.image_size}")
        if args.memory_of:  # the part of the benchmark that runs in a process of its own
            CONTENDERS[args.memory_of](unet, args, device, precision)(3)
            print(peak_memory())
            return
        args.output.parent.mkdir(parents=True, exist_ok=True)
        if args.profile:
            show_profile(unet, args, device, precision)
        else:
            compare(unet, args, device, precision)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except (torch.OutOfMemoryError, MemoryError):
        sys.exit(f"error: out of memory; give a --batch_size smaller than {args.batch_size}")
    except KeyboardInterrupt:
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# contenders: each trains for so many steps when called, and says how many of its seconds it waited for images


class Contender:
    """A network, and a loop that trains it on 256 critters, which are decoded once and augmented anew each time."""

    precision = "fp32"

    def __init__(self, unet: UNetConfig, args: argparse.Namespace, device: torch.device, precision: str):
        self.args, self.device, self.done = args, device, 0
        self.scheduler = NoiseScheduler()
        images = load_images("critters", args.image_size, labels="none", num_critters=256)
        self.shape, self.prepare = Pixels().shape(args.image_size), Pixels().prepare(images, "full", precision)[1]
        self.batches = iter(make_loader(images, args.batch_size, 0, 0, STEPS))
        self.model = self.build(unet).to(device)

    def build(self, unet: UNetConfig) -> nn.Module:
        return UNet(unet)

    def __call__(self, steps: int) -> tuple[float, float]:
        """Train: the seconds that it took, and those of them that passed before the images were there."""
        waited, started = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            images, types = next(self.batches)
            waited += time.perf_counter() - asked
            self.step(images, types)
        synchronize(self.device)
        return time.perf_counter() - started, waited

    def step(self, images: torch.Tensor, types: torch.Tensor) -> None:
        raise NotImplementedError


class Ours(Contender):
    """What train.py does."""

    compiled = False

    def __init__(self, unet, args, device, precision):
        super().__init__(unet, args, device, precision)
        self.precision = precision
        self.model.to(memory_format=memory_format(device, training=True))
        denoising = Denoising(self.scheduler, self.prepare, self.shape, device, precision)
        config = SimpleNamespace(batch_size=args.batch_size, grad_accum=1, lr=1e-4, lr_schedule="constant", seed=0,
                                 warmup_steps=0, clip_grad=1.0, ema_decay=0.9999, image_size=args.image_size)
        task = Task(self.model, denoising.draw, denoising.loss, lambda average, path: None)
        self.make_step = TrainingStep(task, config, device, precision, Processes(), STEPS)
        self.make_step.begin()
        self.compile_seconds = 0.0
        if self.compiled:
            started = time.perf_counter()
            if not self.make_step.compile(*next(self.batches)):
                raise ValueError("--compile needs a compiler: a C++ one for a CPU, Triton for a GPU")
            self.compile_seconds = time.perf_counter() - started

    def step(self, images, types):
        self.make_step(images, types, self.done)
        self.done += 1


class Compiled(Ours):
    compiled = True


class Plain(Contender):
    """The loop that one writes first: float32, Adam as it comes, the average weight by weight, each loss printed."""

    def __init__(self, unet, args, device, precision):
        super().__init__(unet, args, device, precision)
        self.average = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def step(self, images, types):
        x_0, told = augment(images.to(self.device), torch.Generator(self.device), "full")
        loss = self.loss(x_0, told)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.model.parameters()):
                mean.lerp_(weight, 1e-4)
        self.last_loss = loss.item()

    def loss(self, x_0: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        noise, t = torch.randn_like(x_0), torch.randint(self.scheduler.num_timesteps, (len(x_0),), device=self.device)
        return F.mse_loss(self.predict(self.scheduler.add_noise(x_0, t, noise), t, told), noise)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return self.model(x_t, t, augmentation=told)


class Diffusers(Plain):
    """diffusers' UNet2DModel with the blocks of ours; float32, as its train_unconditional.py runs without flags."""

    def build(self, unet):
        from diffusers import UNet2DModel

        levels = len(unet.widths)
        return UNet2DModel(
            sample_size=self.args.image_size, block_out_channels=unet.widths, layers_per_block=unet.blocks,
            down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=unet.groups, attention_head_dim=unet.head_width, resnet_time_scale_shift="scale_shift",
        )

    def predict(self, x_t, t, told):
        return self.model(x_t, t).sample


class DenoisingDiffusionPytorch(Plain):
    """denoising-diffusion-pytorch's Unet and loss, with their defaults; float32, as its Trainer runs without flags."""

    def build(self, unet):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

        network = Unet(dim=unet.width, dim_mults=unet.multipliers)
        return GaussianDiffusion(network, image_size=self.args.image_size, timesteps=1000, auto_normalize=False)

    def loss(self, x_0, told):
        return self.model(x_0)


CONTENDERS: dict[str, type[Contender]] = {
    "PokeDiff": Ours, "PokeDiff, compiled": Compiled, "plain float32": Plain,
    "denoising-diffusion-pytorch": DenoisingDiffusionPytorch, "diffusers": Diffusers,
}


# ---------------------------------------------------------------------------------------------------------------------
# measuring


def compare(unet: UNetConfig, args: argparse.Namespace, device: torch.device, precision: str) -> None:
    names = ["PokeDiff", "plain float32"] + ["PokeDiff, compiled"] * args.compile
    for package, command in PEERS.items() if args.against else ():
        try:
            __import__(package.replace("-", "_"))
            names.append(package)
        except ImportError:
            print(f"{package} is not installed and is left out; to compare with it: {command}")
    report = dict(device=describe(device), processor=platform.processor() or platform.machine(),
                  torch=torch.__version__, unet=vars(unet), image_size=args.image_size, batch_size=args.batch_size,
                  rounds=args.rounds, steps=args.steps)
    # First of all, since on Linux a process that is started counts the memory of the one that started it as its own.
    memory = {name: memory_in_own_process(name) for name in names}
    rates = {name: machine_rates(device, name) for name in dict.fromkeys((precision, "fp32"))}
    report["machine"] = {name: dict(flops=rate.flops, bytes=rate.bytes) for name, rate in rates.items()}
    for name, rate in rates.items():
        print(f"machine    {rate.flops / 1e12:.2f} TFLOP/s in a {name} matrix product, {rate.bytes / 1e9:.0f} GB/s in "
              f"a copy")

    contenders = {name: CONTENDERS[name](unet, args, device, precision) for name in names}
    trainings = report["training"] = measure_training(contenders, rates, args)
    for name in names:
        trainings[name]["peak_memory"] = memory[name]
    drawings = report["sampling"] = measure_sampling(contenders, args, device, precision)
    args.output.write_text(json.dumps(report, indent=1))
    print(f"\n{training_table(trainings)}\n\n{sampling_table(drawings)}\n\nwrote {args.output}")


def measure_training(contenders: dict[str, Contender], rates: dict, args: argparse.Namespace) -> dict[str, dict]:
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
            of_machine=flops / statistics.median(seconds[name]) / rates[contender.precision].flops,
            times_plain=statistics.median(a / b for a, b in zip(seconds["plain float32"], seconds[name])),
        )
        if isinstance(contender, Compiled):
            results[name]["compile_seconds"] = contender.compile_seconds
    return results


def flops_of_step(contender: Contender, args: argparse.Namespace) -> tuple[float, float]:
    """Floating-point operations of a step, forward and backward, and of one image's forward pass alone."""
    model = copy.deepcopy(contender.model).to("meta")
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    x, t = torch.empty(shape, device="meta"), torch.zeros(args.batch_size, dtype=torch.long, device="meta")
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


def measure_sampling(contenders: dict[str, Contender], args: argparse.Namespace, device: torch.device,
                     precision: str) -> dict[str, dict]:
    """Images a second of each sampler, as generate.py draws them and in float32.

    All passes of a sampler cost the same. So on a slow machine only some of them are made, and the time of the whole is
    worked out from their mean; `passes` says how many were made.
    """
    model = contenders["PokeDiff"].make_step.average
    scheduler, results = contenders["PokeDiff"].scheduler, {}
    for sampler, steps in SAMPLERS.items():
        seconds, passes = {"PokeDiff": [], "plain float32": []}, 0
        for _ in range(args.rounds):
            for name, its_precision in (("PokeDiff", precision), ("plain float32", "fp32")):
                ends = []

                def after_step(*_) -> None:
                    synchronize(device)
                    ends.append(time.perf_counter())
                    if len(ends) > args.passes and ends[-1] - ends[0] > args.seconds:
                        raise Enough

                try:
                    sample_seeds(model, scheduler, range(args.num_images), args.image_size, device, its_precision,
                                 batch_size=args.num_images, sampler=sampler, steps=steps, callback=after_step)
                except Enough:
                    pass
                seconds[name].append(steps * (ends[-1] - ends[0]) / (len(ends) - 1))
                passes = len(ends) - 1
        for name, its_seconds in seconds.items():
            speed = sorted(args.num_images / s for s in its_seconds)
            results.setdefault(name, {})[f"{sampler}-{steps}"] = dict(
                images_per_second=speed, median=statistics.median(speed), passes=passes,
                times_plain=statistics.median(a / b for a, b in zip(seconds["plain float32"], its_seconds)),
            )
    return results


# ---------------------------------------------------------------------------------------------------------------------
# telling


def spread(figures: dict) -> str:
    """The median with the smallest and the largest."""
    low, *_, high = figures["images_per_second"]
    return f"{figures['median']:.3g} ({low:.3g} ... {high:.3g})"


def training_table(results: dict[str, dict]) -> str:
    lines = ["| training | images/s | times plain | GFLOP an image, forward | of the matrix rate | waiting for images "
             "| peak memory |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, figures in results.items():
        compiled = f", after {figures['compile_seconds']:.0f} s" if "compile_seconds" in figures else ""
        lines.append(f"| {name}, {figures['precision']}{compiled} | {spread(figures)} | {figures['times_plain']:.2f} | "
                     f"{figures['gflop_forward']:.1f} | {figures['of_machine']:.0%} | {figures['waiting']:.1%} | "
                     f"{figures['peak_memory'] / 1e9:.2f} GB |")
    return "\n".join(lines)


def sampling_table(results: dict[str, dict]) -> str:
    names = list(results)
    lines = ["| sampling, images/s | " + " | ".join(names) + " | times plain | passes timed |",
             "| --- |" + " ---: |" * (len(names) + 2)]
    for sampler, figures in results["PokeDiff"].items():
        cells = [spread(results[name][sampler]) for name in names]
        lines.append(f"| {sampler} | {' | '.join(cells)} | {figures['times_plain']:.2f} | {figures['passes']} |")
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
    parser.add_argument("--multipliers", type=positive, nargs="+", default=[1, 2, 4, 8],
                        help="of the width, one a level (default: 1 2 4 8)")
    parser.add_argument("--blocks", type=positive, default=2, help="residual blocks a level (default: 2)")
    parser.add_argument("--groups", type=positive, default=32, help="groups of the normalisations (default: 32)")
    parser.add_argument("--image_size", type=positive, default=64, help="side of the images, in pixels (default: 64)")
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
    parser.add_argument("--compile", action="store_true", help="also measure training with torch.compile")
    parser.add_argument("--against", action="store_true", help="also measure the training of "
                        "denoising-diffusion-pytorch and diffusers, where installed")
    parser.add_argument("--profile", action="store_true", help="instead: where the time of a training step goes")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.json"), help="all that was measured "
                        "(default: outputs/benchmark.json)")
    parser.add_argument("--device", default="auto", help=f"{', '.join(DEVICES)}, cuda:1, ... (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of PokeDiff's arithmetic "
                        "(default: auto)")
    parser.add_argument("--memory_of", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
