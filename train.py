"""Train a diffusion model on a folder of images.

    python train.py --preset quick                       # creatures in minutes, on a CPU, from nothing
    python train.py                                      # the reference model on data/pokemon_jpg/, for a GPU
    python train.py --data my_pictures --image_size 32   # your own folder
    python train.py --resume                             # go on where a stopped run was
    torchrun --nproc_per_node=8 train.py --batch_size 128 # on eight GPUs

Sample grids, the loss curve and metrics.csv go to outputs/, weights to checkpoints/; see `python train.py --help`.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm

from augmentation import AUGMENT_MODES, augment
from checkpoint import load_model, restore
from dataset import DataError, find_images, held_out_names, image_names, load_images, make_loader
from devices import PRECISIONS, autocast, describe, memory_format, pick_precision
from distributed import Processes
from forward_diffusion import LOSS_WEIGHTINGS, PREDICTIONS, SCHEDULES, NoiseScheduler, seed_from
from reverse_diffusion import SAMPLERS, sample_seeds
from runs import (Run, announce_duration, find_run, flag, memory_advice, one_line_errors, parse_flags, run_folder,
                  settle)
from unet import UNet, UNetConfig, count_parameters

POKEMON_FOLDER = "data/pokemon_jpg"
POKEMON_SOURCE = "https://www.kaggle.com/datasets/kvpratama/pokemon-images-dataset"


@dataclass
class Config:
    """Every setting of a training run. The defaults are the reference configuration."""

    data: str = flag(POKEMON_FOLDER, "folder of images, at any depth; or 'critters', the built-in creatures")
    num_critters: int = flag(2000, "how many critters to draw, where those are the data", above=0)
    labels: str = flag("auto", "the images' types; auto: labels.csv in the folder (columns file,types), else the names "
                               "of its sub-folders; none; or another csv file")
    holdout: float = flag(0.0, "share of the images kept aside from training, for evaluate.py; 0 to below 1",
                          least=0, below=1)
    image_size: int = flag(64, "side of the images, in pixels; a multiple of 8 for the reference network", most=4096)
    augment: str = flag("full", "full: flips, rotations to 15 degrees, colour jitter; flip: flips alone", AUGMENT_MODES)

    init: str = flag("", "checkpoint of such a network, whose averaged weights to start from (default: random ones)")
    width: int = flag(64, "channels at the network's first level")
    multipliers: tuple[int, ...] = flag((1, 2, 4, 8), "of the width, one a level")
    blocks: int = flag(2, "residual blocks a level")
    groups: int = flag(32, "groups of the group normalisations")
    dropout: float = flag(0.0, "in the residual blocks, from 0 to 1")
    label_dropout: float = flag(0.1, "share of the images whose types are not told, so that the network also learns to "
                                     "draw without; 0 to below 1", least=0, below=1)

    timesteps: int = flag(1000, "steps T of the diffusion", above=0)
    schedule: str = flag("linear", "how the noise grows over the timesteps", SCHEDULES)
    prediction: str = flag("eps", "what the network predicts: the noise, the velocity, or the image", PREDICTIONS)
    zero_terminal_snr: bool = flag(False, "the last timestep is noise alone; not where the network predicts eps")
    loss_weighting: str = flag("uniform", "how the squared errors of the timesteps count", LOSS_WEIGHTINGS)

    epochs: int = flag(2000, "passes over the data", above=0)
    max_steps: int = flag(0, "stop after so many steps, 0: never", least=0)
    batch_size: int = flag(16, "images a step, of all processes together", above=0)
    grad_accum: int = flag(1, "parts in which a step's images go through the network one after the other: more parts "
                              "take less memory and change nothing else", above=0)
    lr: float = flag(1e-4, "learning rate of Adam", above=0)
    lr_schedule: str = flag("constant", "cosine: the rate falls to 0 at the end", ("constant", "cosine"))
    warmup_steps: int = flag(0, "steps over which the rate rises from 0", least=0)
    clip_grad: float = flag(1.0, "largest norm of the gradient", above=0)
    ema_decay: float = flag(0.9999, "decay a step of the weights' moving average, from 0 to 1; lower at the start",
                            least=0, below=1)
    seed: int = flag(0, "of the weights, the order, the noise and the augmentation", least=0)

    sample_every: int = flag(10, "epochs between sample grids and updates of the loss curve", above=0)
    num_samples: int = flag(16, "images in a sample grid", above=0)
    sampler: str = flag("ddim", "how a sample grid is drawn", SAMPLERS)
    sample_steps: int = flag(50, "network passes for a sample grid", above=0)
    guidance: float = flag(1.0, "how strongly the images of a sample grid are pushed towards their types; 1: not "
                                "beyond what the network says of them")
    milestone_every: int = flag(100, "epochs between checkpoints that are kept, epoch_0100.pt and so on", above=0)
    keep: int = flag(0, "how many of those to keep, the newest ones; 0: all", least=0)
    save_every: float = flag(10.0, "minutes between saves of checkpoints/latest.pt", least=0)

    workers: int = flag(-1, "processes that decode images, when the folder does not fit in memory, for each process "
                            "that trains; -1: one a core, at most 8", least=-1)
    device: str = flag("auto", "auto, cuda, cuda:1, mps, cpu, ...; auto: CUDA, else MPS, else the CPU")
    precision: str = flag("auto", "of the network's arithmetic; auto: bf16 where the device has it; fp16 is for GPUs "
                                  "that have not", PRECISIONS)
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
    "epochs", "max_steps", "grad_accum", "sample_every", "num_samples", "sampler", "sample_steps", "guidance",
    "milestone_every", "keep", "save_every", "workers", "device", "precision", "run_name",
}

# What latest.pt holds beside the settings, so that a run can go on from it.
NEEDED_TO_RESUME = dict(model=dict, ema=dict, optimizer=dict, scaler=dict, step=int, tally=torch.Tensor, history=list,
                        num_images=int, fingerprint=str, types=list, held_out=list)

COLUMNS = ("epoch", "step", "loss", "lr", "skipped")  # of metrics.csv
MAX_SKIPPED = 20  # steps in a row without a finite gradient, after which training stops


def main() -> None:
    with one_line_errors():
        given = parse_flags(Config, PRESETS, "Train a diffusion model on a folder of images.")
        checkpoint = find_run(given, Config, NEEDED_TO_RESUME)
        config = settle(given, checkpoint, Config, PRESETS, MAY_CHANGE_ON_RESUME)
        if config.data == POKEMON_FOLDER and "data" not in given and checkpoint is None and not has_images(config.data):
            print(f"{POKEMON_FOLDER}/ has no images: put those of {POKEMON_SOURCE} there, or name a folder with "
                  f"--data; training on critters, the built-in creatures, for now")
            config.data = "critters"
        with memory_advice(config.batch_size, config.grad_accum):
            train(config, checkpoint)


def train(config: Config, checkpoint: dict | None) -> None:
    """The whole run, in the order in which it happens."""
    processes = Processes()  # this one, unless torchrun has started several
    device = processes.pick_device(config.device)
    precision = pick_precision(config.precision, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    share = processes.share(config.batch_size, config.grad_accum)
    if config.zero_terminal_snr and config.prediction == "eps":
        raise ValueError("--zero_terminal_snr needs --prediction v or x0: of noise alone, the noise tells nothing")

    unet_config = UNetConfig(
        width=config.width, multipliers=config.multipliers, blocks=config.blocks, groups=config.groups,
        dropout=config.dropout,
    )
    if config.image_size % unet_config.size_multiple or config.image_size < 8:
        raise ValueError(f"--image_size must be a multiple of {unet_config.size_multiple} that is at least 8, "
                         f"for this network; {config.image_size} is not")

    # The data, without what is kept aside. A resumed run keeps aside what it kept before, whatever was added since.
    if checkpoint is None:
        names = image_names(config.data, config.num_critters)
        held_out = held_out_names(names, config.holdout)
        if len(held_out) == len(names):
            raise ValueError(f"--holdout {config.holdout} keeps all of the {len(names)} images aside; give less")
    else:
        held_out = checkpoint["held_out"]
    aside = set(held_out)
    dataset = load_images(config.data, config.image_size, labels=config.labels, keep=lambda name: name not in aside,
                          num_critters=config.num_critters, seed=config.seed)
    fingerprint = dataset.fingerprint()
    if checkpoint is not None:
        if len(dataset) != checkpoint["num_images"]:
            raise ValueError(f"{config.data} has {len(dataset)} usable images and the run to resume had "
                             f"{checkpoint['num_images']}; bring those back, or start another run with --run_name")
        if list(dataset.types) != checkpoint["types"]:
            raise ValueError(f"{config.data} has the types {' '.join(dataset.types) or '(none)'} and the run to resume "
                             f"had {' '.join(checkpoint['types']) or '(none)'}; bring its labels back")
        if fingerprint != checkpoint["fingerprint"]:
            raise ValueError(f"{config.data} has other file names or other labels than when the run to resume began; "
                             f"bring those back, or start another run with --run_name")
    unet_config.num_types = len(dataset.types)

    # The network, its moving average, and what changes them.
    torch.manual_seed(seed_from(config.seed, stream="weights"))
    model = UNet(unet_config).to(device, memory_format=memory_format(device))
    if config.init and checkpoint is None:
        start, _, its_config = load_model(config.init, device)
        its = start.config, its_config["types"], its_config["prediction"]
        if its != (unet_config, dataset.types, config.prediction):
            raise ValueError(f"--init {config.init} is of another network (its size, its types or what it predicts); "
                             f"give the flags that it was trained with")
        model.load_state_dict(start.state_dict())
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=device.type in ("cuda", "cpu"))
    # float16 has no room for small gradients: the scaler multiplies the loss by as much as does not overflow.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    scheduler = NoiseScheduler(config.timesteps, schedule=config.schedule, zero_terminal_snr=config.zero_terminal_snr)

    # Where it stands, and what will happen.
    steps_per_epoch = math.ceil(len(dataset) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    last_step = min(total_steps, config.max_steps or total_steps)
    # Sums that stay on the device, since to read them is to wait for it: the losses of this epoch, the steps skipped
    # in this epoch, and those skipped in a row until now.
    step, history, tally = 0, [], torch.zeros(3, device=device)
    if checkpoint is not None:
        restore(run_folder("checkpoints", config.run_name) / "latest.pt", checkpoint, optimizer, scaler, model=model,
                ema=ema)
        step, history = checkpoint["step"], checkpoint["history"]
        tally += checkpoint["tally"].to(device)
        print(f"resuming at step {step:,} of {last_step:,}")
    several = f", {processes.size} processes" if processes.size > 1 else ""
    print(f"device     {describe(device)}, {precision}{several}")
    print(f"network    {count_parameters(model):,} parameters, predicting {config.prediction} on the {config.schedule} "
          f"schedule")
    print(f"images     {len(dataset):,} of {config.image_size} x {config.image_size}, augmentation: {config.augment}"
          + (f"; {len(held_out):,} kept aside" if held_out else ""))
    if dataset.types:
        print(f"types      {', '.join(dataset.types)}")
    run = Run(config, history, COLUMNS, new=checkpoint is None, writes=processes.first)
    print(f"training   {config.epochs:,} epochs of {steps_per_epoch:,} steps of {config.batch_size} images; "
          f"grids in {run.outputs}/, weights in {run.checkpoints}/")
    if scheduler.alpha_bar(config.timesteps - 1) > 1e-3:
        print(f"warning: {config.timesteps} timesteps of the linear schedule leave some of the image, but sampling "
              f"starts from pure noise; use --schedule cosine, which ends at noise for any number")

    def save(name: str, **more) -> bool:
        return run.save(name, ema=ema.state_dict(), unet=asdict(unet_config), scheduler=scheduler.config(),
                        config=asdict(config), types=list(dataset.types), held_out=held_out, step=step,
                        epoch=step // steps_per_epoch, **more)

    def save_latest() -> bool:
        return save("latest.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                    tally=tally.cpu(), history=history, num_images=len(dataset), fingerprint=fingerprint)

    def draw_grid(path: Path) -> None:
        # Always from the same noise, so that one sees the same creature grow.
        images = sample_seeds(
            ema, scheduler, range(config.num_samples), config.image_size, device, precision, sampler=config.sampler,
            steps=min(config.sample_steps, config.timesteps), prediction=config.prediction,
            types=each_type_in_turn(config.num_samples, len(dataset.types)),
            guidance=config.guidance if dataset.types else 1.0,
        )
        nrow = math.ceil(math.sqrt(len(images)))
        save_image(images, path, nrow=nrow, normalize=True, value_range=(-1, 1), pad_value=1)

    def show_progress() -> None:
        if step == last_step or (step % steps_per_epoch == 0 and step // steps_per_epoch % config.sample_every == 0):
            run.write("loss.png", run.draw_loss)
            run.write(grid_name(), draw_grid)

    def grid_name() -> str:
        return f"generated_epoch_{math.ceil(step / steps_per_epoch):04d}.png"

    processes.join(device)
    processes.check_same((fingerprint, step), "images and checkpoint")
    network = processes.wrap(model)
    weights, averages = list(model.parameters()), list(ema.parameters())
    generator = torch.Generator(device)
    bar = tqdm(total=last_step * config.batch_size, initial=step * config.batch_size, unit="img", smoothing=0.1,
               dynamic_ncols=True, mininterval=0.5)
    model.train()
    started, first_step = time.monotonic(), step
    stop, saved, reported = 0, True, tally[1].item()  # asked to stop? the last save worked? skipped steps we spoke of
    if step > 0 and not (run.outputs / grid_name()).exists():
        show_progress()  # a kill came between the save and the grid
    if step >= last_step:
        print("nothing to do: the run has reached its end; raise --epochs (or --max_steps) to go on")

    for images, types in make_loader(dataset, config.batch_size, config.seed, step, last_step, config.workers, share):
        # All randomness of a step comes from the seed and its number, so that a resumed run repeats it exactly. It is
        # drawn for the whole batch, of which this process takes its share: that costs little next to the network, and
        # gives the same step in any number of processes and parts.
        generator.manual_seed(seed_from(config.seed, step, stream="step"))
        shape = (config.batch_size, 3, config.image_size, config.image_size)
        u = torch.rand(shape[0], 8, generator=generator, device=device)
        t = draw_timesteps(shape[0], config.timesteps, generator)
        noise = torch.randn(shape, generator=generator, device=device)
        told = torch.rand(shape[0], 1, generator=generator, device=device) >= config.label_dropout
        batch = (images.to(device, non_blocking=True), types.to(device, non_blocking=True),
                 u[share], t[share], noise[share], told[share])

        loss = torch.zeros((), device=device)
        for part, (images, types, u, t, noise, told) in enumerate(zip(*(x.chunk(config.grad_accum) for x in batch))):
            if config.dropout:  # the one thing that is drawn inside of the network, and so part by part
                torch.manual_seed(seed_from(config.seed, step, share.start, part, stream="dropout"))
            x_0, augmentation = augment(images, mode=config.augment, u=u)
            x_t = scheduler.add_noise(x_0, t, noise).contiguous(memory_format=memory_format(device))
            network.require_backward_grad_sync = part == config.grad_accum - 1  # the processes meet at the last part
            with autocast(device, precision):
                output = network(x_t, t, types * told, augmentation=augmentation)
            error = F.mse_loss(output.float(), scheduler.target(config.prediction, x_0, t, noise), reduction="none")
            weight = scheduler.loss_weight(config.loss_weighting, config.prediction, t)
            part_loss = (error.mean(dim=(1, 2, 3)) * weight).mean() / config.grad_accum
            scaler.scale(part_loss).backward()
            loss += part_loss.detach()

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(weights, config.clip_grad)
        loss = processes.mean(loss)
        # A step whose loss or gradient is not finite is skipped: nothing changes. This is decided on the device, where
        # fused Adam and the factor of the average look at `finite`; asking for it here would make the host wait.
        finite = torch.isfinite(loss + norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total_steps)
        optimizer.found_inf = 1 - finite.float()
        if optimizer.defaults["fused"] or finite:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # The average follows the weights closely at first: with the full decay it would stay near the random start.
        with torch.no_grad():
            change = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(change, finite * (1 - min(config.ema_decay, (1 + step) / (10 + step))))
            torch._foreach_add_(averages, change)
        skip = 1 - finite.float()
        tally = torch.stack([tally[0] + loss.where(finite, 0), tally[1] + skip, (tally[2] + 1) * skip])
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
        stop = processes.largest(run.stop.signal)  # the processes stop after the same step
        save_now = stop or step == last_step or run.save_due()
        if save_now or in_epoch == 0 or step % 20 == 0:
            losses, skipped, in_a_row = tally.tolist()
            if skipped > reported:
                tqdm.write(f"warning: skipped {skipped - reported:.0f} of the steps up to {step:,}, whose loss or "
                           f"gradient was not finite", file=sys.stderr)
                reported = skipped
            if in_a_row >= MAX_SKIPPED:
                raise ValueError(f"no finite loss and gradient in {in_a_row:.0f} steps up to {step:,}: --lr is too "
                                 f"high (start another run with a lower one, or with --warmup_steps), or float16 too "
                                 f"narrow (--resume --precision fp32); {run.checkpoints}/ has the weights from before")
        if in_epoch == 0:
            mean = losses / (steps_per_epoch - skipped) if skipped < steps_per_epoch else math.nan
            run.log(dict(epoch=epoch, step=step, loss=mean, lr=learning_rate(config, step - 1, total_steps),
                         skipped=int(skipped)))
            tally[:2] = reported = 0
            if epoch % config.milestone_every == 0 and step < total_steps:
                save(f"epoch_{epoch:04d}.pt")
                run.keep_milestones(config.keep)
        if save_now:
            saved = save_latest()
        if step == last_step or not stop:
            show_progress()
        if stop:
            break

    bar.close()
    processes.leave()
    if not saved:
        raise OSError(f"the training stands at step {step:,} but could not be saved; {run.checkpoints}/latest.pt is "
                      f"from before. Make room, and --resume repeats the steps since then, to the same result")
    if stop and step < last_step:
        name = f" --run_name {config.run_name}" if config.run_name else ""
        print(f"stopped at step {step:,} of {last_step:,} and saved; go on with: python train.py --resume{name}")
        sys.exit(128 + stop)
    if not save("final_model.pt"):
        raise OSError(f"the training is done, but {run.checkpoints}/final_model.pt could not be written. Make room, "
                      f"and --resume writes it")
    if step > first_step:
        print(f"done: {run.outputs}/{grid_name()} shows samples; for more:\n"
              f"  python generate.py --checkpoint {run.checkpoints}/final_model.pt --num_images 64")


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


def has_images(folder: str) -> bool:
    try:
        return bool(find_images(folder))
    except DataError:
        return False


if __name__ == "__main__":
    main()
