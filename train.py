"""Train a diffusion model on a folder of images.

    python train.py --preset quick                       # creatures in minutes, on a CPU, from nothing
    python train.py                                      # the reference model on data/pokemon_jpg/, for a GPU
    python train.py --data my_pictures --image_size 32   # your own folder
    python train.py --resume                             # go on where a stopped run was

Sample grids, the loss curve and metrics.csv go to outputs/, weights to checkpoints/; see `python train.py --help`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

from augmentation import AUGMENT_MODES, augment
from checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from dataset import DataError, find_images, held_out_names, image_names, load_images, make_loader
from devices import PRECISIONS, autocast, describe, memory_format, pick_device, pick_precision
from forward_diffusion import LOSS_WEIGHTINGS, PREDICTIONS, SCHEDULES, NoiseScheduler, seed_from
from reverse_diffusion import SAMPLERS, sample_seeds
from unet import UNet, UNetConfig, count_parameters

POKEMON_FOLDER = "data/pokemon_jpg"
POKEMON_SOURCE = "https://www.kaggle.com/datasets/kvpratama/pokemon-images-dataset"


def flag(default, help: str, choices: Sequence[str] | None = None):
    """A setting of `Config` with its help line; the command line is made from these."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting of a training run. The defaults are the reference configuration."""

    data: str = flag(POKEMON_FOLDER, "folder of images, at any depth; or 'critters', the built-in creatures")
    num_critters: int = flag(2000, "how many critters to draw, where those are the data")
    labels: str = flag("auto", "the images' types; auto: labels.csv in the folder (columns file,types), else the names of "
                               "its sub-folders; none; or another csv file")
    holdout: float = flag(0.0, "share of the images kept aside from training, for evaluate.py; 0 to below 1")
    image_size: int = flag(64, "side of the images, in pixels; a multiple of 8 for the reference network")
    augment: str = flag("full", "full: flips, rotations to 15 degrees, colour jitter; flip: flips alone", AUGMENT_MODES)

    width: int = flag(64, "channels at the network's first level")
    multipliers: tuple[int, ...] = flag((1, 2, 4, 8), "of the width, one a level")
    blocks: int = flag(2, "residual blocks a level")
    groups: int = flag(32, "groups of the group normalisations")
    dropout: float = flag(0.0, "in the residual blocks, from 0 to 1")
    label_dropout: float = flag(0.1, "share of the images whose types are not told, so that the network also learns to "
                                     "draw without; 0 to 1")

    timesteps: int = flag(1000, "steps T of the diffusion")
    schedule: str = flag("linear", "how the noise grows over the timesteps", SCHEDULES)
    prediction: str = flag("eps", "what the network predicts: the noise, the velocity, or the image", PREDICTIONS)
    loss_weighting: str = flag("uniform", "how the squared errors of the timesteps count", LOSS_WEIGHTINGS)

    epochs: int = flag(2000, "passes over the data")
    max_steps: int = flag(0, "stop after so many steps, 0: never")
    batch_size: int = flag(16, "images a step")
    lr: float = flag(1e-4, "learning rate of Adam")
    lr_schedule: str = flag("constant", "cosine: the rate falls to 0 at the end", ("constant", "cosine"))
    warmup_steps: int = flag(0, "steps over which the rate rises from 0")
    clip_grad: float = flag(1.0, "largest norm of the gradient")
    ema_decay: float = flag(0.9999, "decay a step of the weights' moving average, from 0 to 1; lower at the start")
    seed: int = flag(0, "of the weights, the order, the noise and the augmentation")

    sample_every: int = flag(10, "epochs between sample grids and updates of the loss curve")
    num_samples: int = flag(16, "images in a sample grid")
    sampler: str = flag("ddim", "how a sample grid is drawn", SAMPLERS)
    sample_steps: int = flag(50, "network passes for a sample grid")
    guidance: float = flag(1.0, "how strongly the images of a sample grid are pushed towards their types; 1: not beyond "
                                "what the network says of them")
    milestone_every: int = flag(100, "epochs between checkpoints that are kept")
    save_every: float = flag(10.0, "minutes between saves of checkpoints/latest.pt")

    workers: int = flag(2, "processes that decode images, when the folder does not fit in memory")
    device: str = flag("auto", "auto, cuda, cuda:1, mps, cpu, ...; auto: CUDA, else MPS, else the CPU")
    precision: str = flag("auto", "of the network's arithmetic; auto: bf16 where the device has it", PRECISIONS)
    run_name: str = flag("", "sub-folder of outputs/ and checkpoints/ for this run (default: none)")


PRESETS = {
    "reference": {},
    # A small network that learns the built-in critters on a laptop's CPU. Predicting v on the cosine schedule is what
    # makes minutes enough: no timestep multiplies the network's error (DIFFUSION_THEORY.md, "What to predict").
    "quick": dict(
        data="critters", image_size=32, augment="flip", width=32, multipliers=(1, 2, 2), blocks=1, groups=8,
        schedule="cosine", prediction="v", loss_weighting="min_snr", epochs=15, batch_size=16, lr=2.5e-3,
        lr_schedule="cosine", warmup_steps=100, ema_decay=0.999, sampler="ddpm", sample_steps=50, sample_every=8,
        num_samples=64,
    ),
}

# What a resumed run may change; anything else would make it another run.
MAY_CHANGE_ON_RESUME = {
    "epochs", "max_steps", "sample_every", "num_samples", "sampler", "sample_steps", "guidance", "milestone_every",
    "save_every", "workers", "device", "precision", "run_name",
}


def main() -> None:
    try:
        given = parse_flags()
        checkpoint = find_run(run_folder("checkpoints", given) / "latest.pt", resume=given.pop("resume"))
        config = settle(given, checkpoint)
        train(config, checkpoint)
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of GPU memory; give a smaller --batch_size, --num_samples, --image_size or --width")
    except KeyboardInterrupt:
        sys.exit(130)


def train(config: Config, checkpoint: dict | None) -> None:
    """The whole run, in the order in which it happens."""
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    outputs, checkpoints = run_folder("outputs", asdict(config)), run_folder("checkpoints", asdict(config))

    unet_config = UNetConfig(
        width=config.width, multipliers=config.multipliers, blocks=config.blocks, groups=config.groups,
        dropout=config.dropout,
    )
    if config.image_size % unet_config.size_multiple or config.image_size < 8:
        raise ValueError(f"--image_size must be a multiple of {unet_config.size_multiple} that is at least 8, "
                         f"for this network; {config.image_size} is not")

    # The data, without what is kept aside. A resumed run keeps aside what it kept before, whatever was added since.
    if checkpoint is None:
        held_out = held_out_names(image_names(config.data, config.num_critters), config.holdout)
    else:
        held_out = checkpoint["held_out"]
    aside = set(held_out)
    dataset = load_images(config.data, config.image_size, labels=config.labels, keep=lambda name: name not in aside,
                          num_critters=config.num_critters, seed=config.seed)
    if checkpoint is not None:
        if len(dataset) != checkpoint["num_images"]:
            raise ValueError(f"{config.data} has {len(dataset)} usable images and the run to resume had "
                             f"{checkpoint['num_images']}; bring those back, or start another run with --run_name")
        if list(dataset.types) != checkpoint["types"]:
            raise ValueError(f"{config.data} has the types {' '.join(dataset.types) or '(none)'} and the run to resume "
                             f"had {' '.join(checkpoint['types']) or '(none)'}; bring its labels back")
    unet_config.num_types = len(dataset.types)

    # The network, its moving average, and the two things that change them.
    torch.manual_seed(seed_from(config.seed, stream="weights"))
    model = UNet(unet_config).to(device, memory_format=memory_format(device))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=device.type in ("cuda", "cpu"))
    scheduler = NoiseScheduler(config.timesteps, schedule=config.schedule)

    # Where it stands, and what will happen.
    steps_per_epoch = math.ceil(len(dataset) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    last_step = min(total_steps, config.max_steps or total_steps)
    step, history, loss_sum = 0, [], torch.zeros((), device=device)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, history = checkpoint["step"], checkpoint["history"]
        loss_sum += checkpoint["loss_sum"].to(device)
        print(f"resuming at step {step:,} of {last_step:,}")
    print(f"device     {describe(device)}, {precision}")
    print(f"network    {count_parameters(model):,} parameters, predicting {config.prediction} on the {config.schedule} "
          f"schedule")
    print(f"images     {len(dataset):,} of {config.image_size} x {config.image_size}, augmentation: {config.augment}"
          + (f"; {len(held_out):,} kept aside" if held_out else ""))
    if dataset.types:
        print(f"types      {', '.join(dataset.types)}")
    print(f"training   {config.epochs:,} epochs of {steps_per_epoch:,} steps of {config.batch_size} images; "
          f"grids in {outputs}/, weights in {checkpoints}/")
    if scheduler.alpha_bar(config.timesteps - 1) > 1e-3:
        print(f"warning: {config.timesteps} timesteps of the linear schedule leave some of the image, but sampling "
              f"starts from pure noise; use --schedule cosine, which ends at noise for any number")

    def save(path: Path, **more) -> None:
        save_checkpoint(path, ema=ema.state_dict(), unet=asdict(unet_config), scheduler=scheduler.config(),
                        config=asdict(config), types=list(dataset.types), held_out=held_out, step=step, epoch=step // steps_per_epoch, **more)

    def save_latest() -> None:
        save(checkpoints / "latest.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), history=history,
             loss_sum=loss_sum.cpu(), num_images=len(dataset))

    if step >= last_step:
        save(checkpoints / "final_model.pt")
        print("nothing to do: the run has reached its end; raise --epochs (or --max_steps) to go on")
        return
    outputs.mkdir(parents=True, exist_ok=True)
    restart_metrics(outputs / "metrics.csv", history)

    generator = torch.Generator(device)
    weights, averages = list(model.parameters()), list(ema.parameters())
    stop = StopOnSignal()
    bar = tqdm(total=last_step * config.batch_size, initial=step * config.batch_size, unit="img", smoothing=0.1,
               dynamic_ncols=True, mininterval=0.5)
    model.train()
    started = saved = epoch_started = time.monotonic()
    first_step = step

    for images, types in make_loader(dataset, config.batch_size, config.seed, step, last_step, config.workers):
        # All randomness of a step comes from the seed and its number, so that a resumed run repeats it exactly.
        generator.manual_seed(seed_from(config.seed, step, stream="step"))
        if config.dropout:
            torch.manual_seed(seed_from(config.seed, step, stream="dropout"))
        x_0, told = augment(images.to(device, non_blocking=True), generator, config.augment)
        t = draw_timesteps(len(x_0), config.timesteps, generator)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        x_t = scheduler.add_noise(x_0, t, noise).contiguous(memory_format=memory_format(device))
        told_types = torch.rand(len(x_0), 1, generator=generator, device=device) >= config.label_dropout
        types = types.to(device, non_blocking=True) * told_types

        with autocast(device, precision):
            output = model(x_t, t, types, augmentation=told)
        error = F.mse_loss(output.float(), scheduler.target(config.prediction, x_0, t, noise), reduction="none")
        loss = (error.mean(dim=(1, 2, 3)) * scheduler.loss_weight(config.loss_weighting, config.prediction, t)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, config.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The average follows the weights closely at first: with the full decay it would stay near the random start.
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(config.ema_decay, (1 + step) / (10 + step)))
        loss_sum += loss.detach()  # kept on the device: reading it here would make the host wait at every step
        step += 1

        bar.update(config.batch_size)
        if step % 20 == 0:
            bar.set_postfix(epoch=1 + (step - 1) // steps_per_epoch, loss=f"{loss.item():.4f}")
        if step == first_step + 5:
            loss.item()  # waits for the device; the first steps also load and choose kernels, so the clock starts here
            started = time.monotonic()
        if step == first_step + 25 and step < last_step:
            loss.item()
            announce_duration((time.monotonic() - started) / 20 * (last_step - step), device)

        epoch, in_epoch = divmod(step, steps_per_epoch)
        save_now = stop or step == last_step or time.monotonic() - saved > 60 * config.save_every
        if (in_epoch == 0 or save_now) and not math.isfinite(loss_sum.item()):
            raise ValueError(f"the loss is no longer a finite number at step {step:,}; try a lower --lr or --precision "
                             f"fp32. What {checkpoints}/ has is from before")
        if in_epoch == 0:
            seconds = time.monotonic() - epoch_started
            speed = min(steps_per_epoch, step - first_step) * config.batch_size / seconds
            row = dict(epoch=epoch, step=step, loss=loss_sum.item() / steps_per_epoch,
                       lr=learning_rate(config, step - 1, total_steps), images_per_second=round(speed, 1))
            history.append(row)
            append_metrics(outputs / "metrics.csv", row)
            loss_sum.zero_()
            if epoch % config.milestone_every == 0 and step < total_steps:
                save(checkpoints / f"epoch_{epoch:04d}.pt")
        if save_now:
            save_latest()
            saved = time.monotonic()
        if step == last_step or (in_epoch == 0 and epoch % config.sample_every == 0 and not stop):
            # Always from the same noise, so that one sees the same creature grow.
            images = sample_seeds(
                ema, scheduler, range(config.num_samples), config.image_size, device, precision,
                sampler=config.sampler, steps=min(config.sample_steps, config.timesteps), prediction=config.prediction,
                types=each_type_in_turn(config.num_samples, len(dataset.types)),
                guidance=config.guidance if dataset.types else 1.0,
            )
            path = outputs / f"generated_epoch_{math.ceil(step / steps_per_epoch):04d}.png"
            nrow = math.ceil(math.sqrt(len(images)))
            save_image(images, path, nrow=nrow, normalize=True, value_range=(-1, 1), pad_value=1)
            draw_loss(outputs / "loss.png", history)
        if in_epoch == 0:
            epoch_started = time.monotonic()  # so that images a second leave out the grids and the saves
        if stop:
            break

    bar.close()
    if stop and step < last_step:
        name = f" --run_name {config.run_name}" if config.run_name else ""
        print(f"stopped at step {step:,} of {last_step:,} and saved; go on with: python train.py --resume{name}")
        sys.exit(128 + stop.signal)
    save(checkpoints / "final_model.pt")
    print(f"done: {outputs}/generated_epoch_{math.ceil(step / steps_per_epoch):04d}.png shows samples; for more:\n"
          f"  python generate.py --checkpoint {checkpoints}/final_model.pt --num_images 64")


def draw_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Random timesteps [B] in 0 ... T-1, spread evenly over the batch: one in each of B equal parts of the range.

    Since images come in random order, each one's timestep is still uniform and the mean of the loss stays what it is;
    its variance falls (in the manner of Kingma et al. 2021, whose parts share one random offset).
    """
    u = torch.rand(batch_size, generator=generator, device=generator.device)
    u = (torch.arange(batch_size, device=generator.device) + u) / batch_size
    return (u * num_timesteps).long().clamp(max=num_timesteps - 1)  # in float32, u can round up to 1


def learning_rate(config: Config, step: int, total_steps: int) -> float:
    """The rate at one step: a linear rise, then level, or half a cosine down to 0."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    fall = 0.5 * (1 + math.cos(math.pi * step / total_steps)) if config.lr_schedule == "cosine" else 1.0
    return config.lr * rise * fall


def each_type_in_turn(num_images: int, num_types: int) -> torch.Tensor | None:
    """The types [num_images, num_types] of a sample grid: a single one each, in their order, over and over."""
    return torch.eye(num_types)[torch.arange(num_images) % num_types] if num_types else None


class StopOnSignal:
    """True once Ctrl-C or SIGTERM came: the loop finishes its step and saves. A second one stops at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __bool__(self) -> bool:
        return self.signal != 0


def announce_duration(seconds: float, device: torch.device) -> None:
    """Say how long the rest will take, and name the way out when that is more than an evening on a CPU."""
    if seconds < 90 * 60:
        words = f"{max(1, round(seconds / 60))} min"
    else:
        words = f"{seconds / 3600:.1f} hours" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
    tqdm.write(f"at this speed, training takes about {words} more")
    if device.type == "cpu" and seconds > 6 * 3600:
        tqdm.write("this configuration is made for a GPU; on a CPU, `python train.py --preset quick` takes minutes "
                   "(Ctrl-C stops this run and saves it)")


def restart_metrics(path: Path, history: list[dict]) -> None:
    """Write metrics.csv anew: its heading, and the epochs that a resumed run has behind it."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", "loss", "lr", "images_per_second"])
        writer.writeheader()
        writer.writerows(history)


def append_metrics(path: Path, row: dict) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, list(row)).writerow(row)


def draw_loss(path: Path, history: list[dict]) -> None:
    """The loss of each epoch as a curve, on logarithmic axes, where a steady improvement is a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.loglog([row["epoch"] for row in history], [row["loss"] for row in history])
    axis.set_xlabel("epoch")
    axis.set_ylabel("mean squared error")
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run_folder(top: str, settings: dict) -> Path:
    """outputs/ or checkpoints/, or this run's folder in it."""
    return Path(top) / settings.get("run_name", "")


def has_images(folder: str) -> bool:
    try:
        return bool(find_images(folder))
    except DataError:
        return False


def find_run(latest: Path, resume: bool) -> dict | None:
    """The checkpoint to go on from, or None for a new run, which may not take the place of another."""
    if not resume:
        if latest.exists():
            raise ValueError(f"{latest} is from an earlier run; go on with it: --resume, or keep it and give this one "
                             f"a folder of its own: --run_name NAME")
        return None
    checkpoint = load_checkpoint(latest)
    missing = {"model", "ema", "optimizer", "step", "history", "loss_sum", "num_images", "config", "types", "held_out"} - checkpoint.keys()
    if missing or set(checkpoint["config"]) != {setting.name for setting in fields(Config)}:
        raise CheckpointError(f"{latest} cannot be resumed: it is not the latest.pt of a run of this version")
    return checkpoint


def settle(given: dict, checkpoint: dict | None) -> Config:
    """The settings of this run, out of the flags given, the preset, and the checkpoint where one is resumed."""
    preset = given.pop("preset", "reference")
    if checkpoint is None:
        config = Config(**{**PRESETS[preset], **given})
        if config.data == POKEMON_FOLDER and "data" not in given and not has_images(POKEMON_FOLDER):
            print(f"{POKEMON_FOLDER}/ has no images: put those of {POKEMON_SOURCE} there, or name a folder with "
                  f"--data; training on critters, the built-in creatures, for now")
            config.data = "critters"
    else:
        before = checkpoint["config"]
        wrong = [f"--{name} {before[name]}" for name in given
                 if name not in MAY_CHANGE_ON_RESUME and given[name] != before[name]]
        if wrong:
            raise ValueError(f"the run to resume has {', '.join(wrong)}: leave these flags out, or start another run")
        config = Config(**{**before, **given})
    for name in ("num_critters", "epochs", "batch_size", "timesteps", "sample_every", "num_samples", "sample_steps",
                 "milestone_every", "lr", "clip_grad"):
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name} must be more than 0, not {getattr(config, name)}")
    for name in ("max_steps", "seed", "workers", "warmup_steps", "save_every"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"--{name} must be 0 or more, not {getattr(config, name)}")
    if not math.isfinite(config.lr):
        raise ValueError(f"--lr must be a finite number, not {config.lr}")
    for name in ("ema_decay", "holdout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"--{name} must be in [0, 1), not {getattr(config, name)}")
    if not 0 <= config.label_dropout <= 1:
        raise ValueError(f"--label_dropout must be in [0, 1], not {config.label_dropout}")
    return config


def parse_flags() -> dict:
    """The flags that were given, and no others: so that a preset's values, or a checkpoint's, fill the rest."""
    parser = argparse.ArgumentParser(
        description="Train a diffusion model on a folder of images.", argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from (default: reference); "
                        "a flag given beside it wins")
    parser.add_argument("--resume", action="store_true", default=False, help="go on from checkpoints/latest.pt, or "
                        "that of --run_name, with its settings")
    for setting in fields(Config):
        many = setting.name == "multipliers"
        shown = " ".join(map(str, setting.default)) if many else setting.default
        text = setting.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
        parser.add_argument(f"--{setting.name}", help=text.replace("%", "%%"), choices=setting.metadata["choices"],
                            type=int if many else type(setting.default), **({"nargs": "+"} if many else {}))
    given = vars(parser.parse_args())
    if "multipliers" in given:
        given["multipliers"] = tuple(given["multipliers"])
    return given


if __name__ == "__main__":
    main()
