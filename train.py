"""Train a diffusion model on a folder of images.

    python train.py --preset quick                       # creatures in minutes, on a CPU, from nothing
    python train.py                                      # the reference model on data/pokemon_jpg/, for a GPU
    python train.py --data my_pictures --image_size 32   # your own folder
    python train.py --resume                             # go on where a stopped run was
    torchrun --nproc_per_node=8 train.py --batch_size 128 # on eight GPUs

Sample grids, the loss curve and metrics.csv go to outputs/, weights to checkpoints/; see `python train.py --help`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torchvision.utils import save_image

from checkpoint import codec_in, load_codec, load_model
from denoising import Denoising
from devices import memory_format
from forward_diffusion import LOSS_WEIGHTINGS, PREDICTIONS, SCHEDULES, NoiseScheduler, seed_from
from reverse_diffusion import SAMPLERS, sample_seeds
from runs import flag, run_folder
from training import Training, TrainingConfig, command
from training_step import Task
from unet import UNet, UNetConfig, count_parameters, default_multipliers


@dataclass
class Config(TrainingConfig):
    """Every setting of a training run, with those of training.py. The defaults are the reference configuration."""

    labels: str = flag("auto", "the images' types; auto: labels.csv in the folder (columns file,types), else the names "
                               "of its sub-folders; none; or another csv file")
    autoencoder: str = flag("", "checkpoint of an autoencoder.py run, to learn the latents of the pictures (default: "
                                "learn their pixels)")
    init: str = flag("", "checkpoint of such a network, whose averaged weights to start from (default: random ones)")
    width: int = flag(64, "channels at the network's first level")
    multipliers: tuple[int, ...] = flag((), "of the width, one a level (default: those of unet.LEVELS for the image "
                                            "size; 1 2 4 8 for 64 pixels)")
    blocks: int = flag(2, "residual blocks a level")
    groups: int = flag(32, "groups of the group normalisations")
    dropout: float = flag(0.0, "in the residual blocks, from 0 to 1")
    grad_checkpoint: bool = flag(False, "compute the network's blocks a second time in the backward pass: less memory, "
                                        "a fifth more arithmetic, the same training")
    label_dropout: float = flag(0.1, "share of the images whose types are not told, so that the network also learns to "
                                     "draw without; 0 to below 1", least=0, below=1)

    timesteps: int = flag(1000, "steps T of the diffusion", above=0)
    schedule: str = flag("linear", "how the noise grows over the timesteps", SCHEDULES)
    prediction: str = flag("eps", "what the network predicts: the noise, the velocity, or the image", PREDICTIONS)
    zero_terminal_snr: bool = flag(False, "the last timestep is noise alone; not where the network predicts eps")
    loss_weighting: str = flag("uniform", "how the squared errors of the timesteps count", LOSS_WEIGHTINGS)

    sampler: str = flag("ddim", "how a sample grid is drawn", SAMPLERS)
    sample_steps: int = flag(50, "network passes for a sample grid", above=0)
    guidance: float = flag(1.0, "how strongly the images of a sample grid are pushed towards their types; 1: not "
                                "beyond what the network says of them")


PRESETS = {
    "reference": {},
    # A small network that learns the built-in critters on a laptop's CPU. Predicting v on the cosine schedule is what
    # makes minutes enough: no timestep multiplies the network's error (DIFFUSION_THEORY.md, "What to predict").
    "quick": dict(
        data="critters", image_size=32, augment="flip", width=32, multipliers=(1, 2, 2), blocks=1, groups=8,
        schedule="cosine", prediction="v", loss_weighting="min_snr", epochs=15, batch_size=16, lr=2.5e-3,
        lr_schedule="cosine", warmup_steps=100, ema_decay=0.999, sampler="sde-dpm++", sample_steps=20,
        sample_every=8, num_samples=64,
    ),
    # The same at 128 x 128, in the latents of `python autoencoder.py --preset quick`.
    "latents": dict(
        data="critters", image_size=128, autoencoder="checkpoints/autoencoder/final_model.pt", augment="flip", width=32,
        multipliers=(1, 2, 4), blocks=1, groups=8, schedule="cosine", prediction="v", loss_weighting="min_snr",
        epochs=45, batch_size=16, lr=2e-3, lr_schedule="cosine", warmup_steps=200, ema_decay=0.999,
        sampler="sde-dpm++", sample_steps=20, sample_every=15, num_samples=64, compile="off",
    ),
}


def main() -> None:
    command(Config, PRESETS, "Train a diffusion model on a folder of images.", train)


def train(config: Config, checkpoint: dict | None) -> None:
    """Teach a U-Net to denoise the images: what it is taught is in denoising.py, and the loop in training.py."""
    if config.zero_terminal_snr and config.prediction == "eps":
        raise ValueError("--zero_terminal_snr needs --prediction v or x0: of noise alone, the noise tells nothing")
    if checkpoint is None:
        codec = load_codec(config.autoencoder)
    else:
        codec = codec_in(run_folder("checkpoints", config.run_name) / "latest.pt", checkpoint.get("autoencoder"))
    config.multipliers = config.multipliers or default_multipliers(codec.shape(config.image_size)[-1])
    unet_config = UNetConfig(
        width=config.width, multipliers=config.multipliers, blocks=config.blocks, groups=config.groups,
        dropout=config.dropout, channels=codec.channels,
    )
    multiple = unet_config.size_multiple * codec.factor
    if config.image_size % multiple or config.image_size < 8:
        raise ValueError(f"--image_size must be a multiple of {multiple} that is at least 8, for this network; "
                         f"{config.image_size} is not")
    training = Training(config, checkpoint)
    device, precision, types = training.device, training.precision, training.dataset.types
    codec = codec.to(device, memory_format=memory_format(device))
    if checkpoint is None:
        codec.measure(training.dataset, precision)
    training.dataset, prepare = codec.prepare(training.dataset, config.augment, precision)
    unet_config.num_types = len(types)

    torch.manual_seed(seed_from(config.seed, stream="weights"))
    model = UNet(unet_config).to(device, memory_format=memory_format(device, training=True))
    if config.init and checkpoint is None:
        start, _, its_codec, its_config = load_model(config.init, device)
        its = start.config, its_config["types"], its_config["prediction"], its_codec.fingerprint()
        if its != (unet_config, types, config.prediction, codec.fingerprint()):
            raise ValueError(f"--init {config.init} is of another network (its size, its types, its autoencoder or "
                             f"what it predicts); give the flags that it was trained with")
        model.load_state_dict(start.state_dict())
    model.grad_checkpoint = config.grad_checkpoint
    scheduler = NoiseScheduler(config.timesteps, schedule=config.schedule, zero_terminal_snr=config.zero_terminal_snr)
    print(f"network    {count_parameters(model):,} parameters, predicting {config.prediction} on the {config.schedule} "
          f"schedule")
    if scheduler.alpha_bar(config.timesteps - 1) > 1e-3:
        print(f"warning: {config.timesteps} timesteps of the linear schedule leave some of the image, but sampling "
              f"starts from pure noise; use --schedule cosine, which ends at noise for any number")

    denoising = Denoising(scheduler, prepare, codec.shape(config.image_size), device, precision, config.prediction,
                          config.loss_weighting, config.label_dropout)
    # Of a checkpoint, besides the weights.
    content = dict(unet=asdict(unet_config), scheduler=scheduler.config(), autoencoder=codec.saved())

    def picture(average: UNet, path: Path) -> None:
        """A grid of samples, always from the same noise, so that one sees the same creature grow."""
        images = sample_seeds(
            average, scheduler, range(config.num_samples), config.image_size, device, precision, codec=codec,
            sampler=config.sampler, steps=min(config.sample_steps, config.timesteps), prediction=config.prediction,
            types=each_type_in_turn(config.num_samples, len(types)), guidance=config.guidance if types else 1.0,
        )
        nrow = math.ceil(math.sqrt(len(images)))
        save_image(images, path, nrow=nrow, normalize=True, value_range=(-1, 1), pad_value=1)

    training.run(Task(model, denoising.draw, denoising.loss, picture, content))


def each_type_in_turn(num_images: int, num_types: int) -> torch.Tensor | None:
    """The types [num_images, num_types] of a sample grid: a single one each, in their order, over and over."""
    return torch.eye(num_types)[torch.arange(num_images) % num_types] if num_types else None


if __name__ == "__main__":
    main()
