"""Train a diffusion model on a folder of images.

    python train.py --preset quick                       # creatures in minutes, on a CPU, from nothing
    python train.py --preset few_steps                   # tune that model to draw in two steps
    python train.py --preset maker --data my_images      # 128 x 128, from a few hundred images; hours on a CPU
    python train.py                                      # the reference model on data/pokemon_jpg/, for a GPU
    python train.py --data my_images --image_size 32     # your own folder
    python train.py --resume                             # continue a stopped run
    torchrun --nproc_per_node=8 train.py --batch_size 128 # on eight GPUs

Sample grids, the loss curve and metrics.csv go to outputs/, weights to checkpoints/; see `python train.py --help`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from forward_diffusion import LOSS_WEIGHTINGS, PREDICTIONS, SCHEDULES, NoiseScheduler
from models.autoencoder import Autoencoder
from models.pipeline import NETWORKS, Pipeline
from models.space import LatentSpace, PixelSpace, checked_space, load_space
from reverse_diffusion import SAMPLERS
from training.augment import AUGMENT_DIM, augment, fixed_augmentations
from training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from training.config import TrainingConfig, configure, memory_advice
from training.consistency import CONSISTENCY, OBJECTIVES, ConsistencyLoss, Teacher, check_objective, check_tunable
from training.dataset import encode_dataset, held_out_names, image_names
from training.distributed import DistEnv
from training.loop import Stage, time_training, training_loop
from training.loss import DiffusionLoss
from training.run_dir import FIRST_STAGE, find_run, run_folder
from training.run_images import load_run_images, plain_batches
from training.step import TrainingStep, adam_options
from training.timetable import Timetable
from unet import UNet, UNetConfig, count_parameters, default_multipliers
from utils.cli import setting
from utils.device import memory_format, pick_precision, use_fast_kernels
from utils.errors import one_line_errors
from utils.images import square_grid
from utils.seeding import seed_from

OWN = "own"  # --autoencoder: train one in the same run
T = TypeVar("T")


@dataclass
class Config(TrainingConfig):
    """Every setting of a training run; the defaults are the reference configuration."""

    labels: str = setting("auto", "source of the images' types; auto: labels.csv in the folder (columns file,types), "
                                  "else Hugging Face's metadata.csv or metadata.jsonl, else the names of its "
                                  "sub-folders; folders: these alone; none; or another file of either format")
    label_column: tuple[str, ...] = setting((), "columns of the metadata that hold the types (default: those named as "
                                                "label, type, class or category)", kind=str, metavar="NAME")
    autoencoder: str = setting("", "checkpoint of a tools.train_autoencoder run, to learn the latents of the images; "
                                   "own: train one first, in the same run (default: learn the pixels)")
    autoencoder_epochs: int = setting(40, "epochs of an autoencoder of one's own", above=0)
    fixed_augmentations: int = setting(0, "rotations and colour jitters that are made of each image once, before the "
                                          "training, and encoded; for latents with --augment full, to make steps "
                                          "faster; 0: new ones in each step", least=0)
    init: str = setting("", "start from the EMA weights of this checkpoint of the same architecture, or of one with "
                            "fewer --blocks, whose function is kept (default: random weights)")
    objective: str = setting("denoising", "consistency: tune the model of --init, which predicts v, to draw in "
                                          "--sample_steps jumps, with --sampler consistency", OBJECTIVES)
    teacher_steps: int = setting(8, "consistency: steps in which the model of --init, kept as it is, draws the images "
                                    "at the ends of paths", above=0)
    teacher_guidance: float = setting(0.0, "consistency: guidance scale of the model of --init as it draws and judges, "
                                           "which is then built in: away from its earlier network (--guide_at) if it "
                                           "has one, else by types; 0: as it draws by default", least=0)
    width: int = setting(64, "channels at the network's first level")
    multipliers: tuple[int, ...] = setting((), "of the width, one per level (default: those of unet.LEVELS for the "
                                               "image size; 1 2 4 8 for 64 pixels)")
    blocks: int = setting(2, "residual blocks per level")
    groups: int = setting(32, "groups of the group normalisations")
    dropout: float = setting(0.0, "dropout in the residual blocks; below 1", least=0, below=1)
    grad_checkpoint: bool = setting(False, "compute the network's blocks a second time in the backward pass: less "
                                           "memory, a fifth more arithmetic, the same training")
    label_dropout: float = setting(0.1, "fraction of the images whose labels are dropped, for classifier-free "
                                        "guidance; below 1", least=0, below=1)

    timesteps: int = setting(1000, "steps T of the diffusion", least=2, most=1_000_000)
    schedule: str = setting("linear", "noise schedule", SCHEDULES)
    prediction: str = setting("eps", "what the network predicts: the noise, the velocity, or the image", PREDICTIONS)
    zero_terminal_snr: bool = setting(False, "make the last timestep pure noise; for predictions v and x0, with "
                                             "uniform loss weighting")
    loss_weighting: str = setting("uniform", "weights of the squared errors of the timesteps", LOSS_WEIGHTINGS)
    lognormal: tuple[float, ...] = setting((), "mean and deviation of the logarithm of noise over signal, to draw "
                                               "log-normal noise levels; without numbers: uniform timesteps "
                                               "(default: the same)", kind=float, count="*", metavar=("MEAN", "STD"))

    sampler: str = setting("ddim", "sampler of the sample grids; if it and --sample_steps differ from ddim in 50 "
                                   "steps, generate.py uses them by default", tuple(SAMPLERS))
    sample_steps: int = setting(50, "network passes for a sample grid; with consistency: the jumps to tune to, "
                                    "2 unless given", above=0)
    guidance: float = setting(1.0, "guidance scale of the sample grids (1 = off)")
    guide_at: float = setting(0.0, "keep the EMA as it is after this fraction of the training, as 0.3: "
                                   "guidance then goes away from it (autoguidance), with types or without; 0: do not",
                              least=0, below=1)


PRESETS = {
    "reference": {},
    # A small network that learns the built-in critters on a laptop's CPU. Predicting v on the cosine schedule is what
    # makes minutes enough: no timestep multiplies the network's error (DIFFUSION_THEORY.md, "What to predict").
    # Autoguidance corrects at sampling time what so short a training leaves.
    "quick": dict(
        data="critters", image_size=32, augment="flip", width=32, multipliers=(1, 2, 2), blocks=1, groups=8,
        schedule="cosine", prediction="v", lognormal=(-0.8, 1.0), epochs=15, batch_size=16, lr=2.5e-3,
        lr_schedule="cosine", warmup_steps=100, ema_decay=0.999, sampler="sde-dpm++", sample_steps=20,
        guide_at=0.3, guidance=3.0, sample_every=8, num_samples=64,
    ),
    # The same at 128 x 128, in the latents of `python -m tools.train_autoencoder --preset quick`.
    "latents": dict(
        data="critters", image_size=128, autoencoder="checkpoints/autoencoder/final_model.pt", augment="flip", width=32,
        multipliers=(1, 2, 4), blocks=1, groups=8, schedule="cosine", prediction="v", lognormal=(0.0, 1.2),
        epochs=45, batch_size=16, lr=2e-3, lr_schedule="cosine", warmup_steps=200, ema_decay=0.999,
        sampler="sde-dpm++", sample_steps=20, guide_at=0.25, guidance=3.0, sample_every=15, num_samples=64,
    ),
    # A few hundred images of one's own at 128 x 128: an autoencoder first, then a diffusion in its latents. The noise
    # levels, roughly EDM2's, are where one body and one colour to it are decided (docs/latents.md, "What was tried").
    "maker": dict(
        image_size=128, autoencoder="own", autoencoder_epochs=22, augment="flip", width=48, multipliers=(1, 2, 4),
        blocks=1, groups=16, label_dropout=0.2, schedule="cosine", prediction="v", lognormal=(0.0, 1.2), epochs=350,
        lr=1.5e-3, lr_schedule="cosine", warmup_steps=200, ema_decay=0.999, sampler="sde-dpm++", sample_steps=20,
        guide_at=0.17, guidance=3.0, sample_every=30, num_samples=64,
    ),
}

# The quick preset's model, tuned to draw in two jumps.
PRESETS["few_steps"] = PRESETS["quick"] | dict(
    objective=CONSISTENCY, teacher_guidance=1.5, init="checkpoints/final_model.pt", run_name="few_steps", epochs=4,
    lr=5e-4, ema_decay=0.99, sample_every=2,
)
# Settings that go with another one, unless flags say otherwise.
IMPLIED = {("objective", CONSISTENCY): dict(sampler="consistency", sample_steps=2, lognormal=(),
                                            loss_weighting="uniform", guidance=1.0, guide_at=0.0)}


def main() -> None:
    with one_line_errors():
        dist = DistEnv()
    with dist.main_process_output(), one_line_errors():
        launch = configure(Config, PRESETS, "Train a diffusion model on a folder of images.", "python train.py",
                           IMPLIED)
        config = launch.config
        launch.print_notice()
        with memory_advice(config.batch_size, config.grad_accum, dist.world_size):
            if config.autoencoder == OWN and launch.checkpoint is None and config.objective != CONSISTENCY:
                train_own_autoencoder(config, launch.resume, dist)
            final = train(config, launch.checkpoint, dist)
        print(f"done: samples in {run_folder('outputs', config.run_name)}/; for more: python generate.py --checkpoint "
              f"{shlex.quote(str(final))}")
        launch.print_notice()


def train(config: Config, checkpoint: dict[str, Any] | None, dist: DistEnv,
          space: PixelSpace | LatentSpace | None = None, loop: Callable[..., T] = training_loop) -> T:
    """Train a U-Net to denoise images.

    Args:
        checkpoint: latest.pt to resume from, or None.
        space: to train in, as it is; None: the one that the settings name, whose latents a new run measures.
        loop: what is done with all that is wired here: `training_loop`, or `time_training`.

    Returns:
        What the loop returns: of a training, the path of the final checkpoint.
    """
    # Device.
    device = dist.pick_device(config.device)
    check_objective(config, checkpoint)
    precision = pick_precision(config.precision, device)
    use_fast_kernels()
    dist.rank_slice(config.batch_size, config.grad_accum)  # can the batch be divided? before the data is read

    # Noise schedule, and the space that it works in: pixels, or the latents of an autoencoder.
    start = Pipeline.load(config.init) if config.init and checkpoint is None else None
    if start and config.objective == CONSISTENCY:
        check_tunable(config, start)
        space = start.space
    scheduler = NoiseScheduler(config.timesteps, schedule=config.schedule, zero_terminal_snr=config.zero_terminal_snr)
    measure = space is None and checkpoint is None
    space = (space or find_space(config, checkpoint)).to(device, memory_format=memory_format(device))
    check_settings(config, scheduler, space)
    unet_config = choose_size(config, space)

    # Data.
    run_images = load_run_images(config, checkpoint)
    class_names = run_images.dataset.class_names
    check_guidance(config, len(class_names))
    if space.is_latent and measure:
        measure_latents(space, config, plain_batches(run_images.dataset), precision)
    run_images.dataset = encode_dataset(run_images.dataset, space, config.augment, precision,
                                        config.fixed_augmentations, blank=loop is time_training)

    # Model.
    torch.manual_seed(seed_from(config.seed, stream="weights"))
    net = UNet(replace(unet_config, num_types=len(class_names)))
    if start:
        check_same_network(config, start, net, scheduler, space, class_names)
        net.load_shallower(start.net)
    net = net.to(device, memory_format=memory_format(device, training=True))
    net.grad_checkpoint = config.grad_checkpoint
    print(f"network    {count_parameters(net):,} parameters, predicting {config.prediction} on the {config.schedule} "
          f"schedule")

    # Loss, optimizer and step.
    total_steps = Timetable(config, len(run_images.dataset)).total_steps
    loss = make_loss(config, scheduler, space, precision, net, make_teacher(config, net, start, checkpoint))
    optimizer = torch.optim.Adam(loss.parameter_groups(net), **adam_options(config.lr, device))
    step = TrainingStep(net, loss, optimizer, config, device, precision, dist, total_steps,
                        guide_step=math.ceil(config.guide_at * total_steps))

    # Loop, with sample grids that always start from the same noise, so that one sees the same images grow.
    def draw_grid(path: Path) -> None:
        pipeline = Pipeline(step.ema, scheduler, space, asdict(config), class_names, device, precision, step.earlier)
        sampler, steps = pipeline.grid_sampler
        guidance = 1.0 if config.guide_at and step.earlier is None else config.guidance
        labels = each_class_in_turn(config.num_samples, len(class_names))
        square_grid(pipeline.sample(range(config.num_samples), labels=labels, guidance=guidance,
                                    sampler=sampler, steps=steps)).save(path)

    kind = next(kind for kind, (_, network_class) in NETWORKS.items() if type(net) is network_class)
    content = dict(network=dict(kind=kind, config=asdict(net.config)), scheduler=scheduler.config(),
                   autoencoder=space.state())
    return loop(config, run_images, step, draw_grid, content, checkpoint)


def make_teacher(config: Config, net: UNet, start: Pipeline | None, checkpoint: dict[str, Any] | None
                 ) -> Teacher | None:
    """Return the teacher of a tuning: a copy of the network as it starts, guided as that model draws.

    On --resume its weights come from latest.pt.
    """
    if config.objective != CONSISTENCY:
        return None
    has_worse = (config.teacher_guidance != 1 and start.earlier is not None if checkpoint is None else
                 any(name.startswith("worse.") for name in checkpoint["teacher"]))
    worse = copy.deepcopy(net) if has_worse else None
    if start and worse:
        worse.load_shallower(start.earlier)
    return Teacher(copy.deepcopy(net), config.teacher_guidance, worse)


def make_loss(config: Config, scheduler: NoiseScheduler, space: PixelSpace | LatentSpace, precision: str, net: UNet,
              teacher: Teacher | None) -> DiffusionLoss:
    """Return the loss that the settings name; its critic, if it has one, starts as a copy of the network."""
    common = dict(augment=config.augment, prediction=config.prediction, loss_weighting=config.loss_weighting,
                  label_dropout=config.label_dropout, lognormal=config.lognormal)
    if teacher is None:
        return DiffusionLoss(scheduler, space, config.image_size, precision, **common)
    critic = copy.deepcopy(net)
    for part in critic.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # what it sees would differ from what the teacher sees by dropout alone
    return ConsistencyLoss(scheduler, space, config.image_size, precision, **common, teacher=teacher, critic=critic,
                           teacher_steps=config.teacher_steps, jumps=config.sample_steps)


def train_own_autoencoder(config: Config, resume: bool, dist: DistEnv) -> None:
    """Train the autoencoder of `--autoencoder own`, or continue with it, as the first stage of a run."""
    shared = {name: getattr(config, name) for name in (
        "data", "num_critters", "data_seed", "holdout", "splits", "image_size", "augment", "seed", "save_every",
        "log", "workers", "device", "precision", "compile")}
    own = AutoencoderTrainingConfig(**shared, sample_every=5, epochs=config.autoencoder_epochs,
                                    run_name=str(Path(config.run_name, FIRST_STAGE)))
    if own.batch_size % dist.world_size:
        raise ValueError(f"--autoencoder own takes {own.batch_size} images a step, which {dist.world_size} processes "
                         f"cannot share evenly; train one with tools.train_autoencoder, and give --autoencoder FILE")
    own.grad_accum = math.gcd(config.grad_accum, own.batch_size // dist.world_size)
    folder = run_folder("checkpoints", own.run_name)
    if resume and (folder / "final_model.pt").exists():
        return
    checkpoint = find_run(own.run_name, AutoencoderTrainingConfig, resume and (folder / "latest.pt").exists(),
                          as_stage=True)
    print(f"stage 1 of 2: an autoencoder, in {folder}/")
    stage = Stage(config.run_name, asdict(config), estimate_diffusion(config, dist))
    with memory_advice(own.batch_size, own.grad_accum, dist.world_size):
        train_autoencoder(own, checkpoint, dist, stage)
    print("stage 2 of 2: a diffusion in its latents")


def estimate_diffusion(config: Config, dist: DistEnv) -> float:
    """Estimate the seconds of the second stage, from some steps in the latents of an untrained autoencoder."""
    if dist.world_size > 1:  # the processes meet only once, in the first stage
        return 0.0
    untrained = Autoencoder(AutoencoderTrainingConfig().network)
    space = LatentSpace(untrained.eval().requires_grad_(False))
    with contextlib.redirect_stdout(io.StringIO()):
        training = train(replace(config), None, dist, space, loop=time_training)  # a copy: `train` writes into it
    return training + estimate_encoding(config, space)


def estimate_encoding(config: Config, space: LatentSpace) -> float:
    """Estimate the seconds that encoding the images in advance takes, from one batch."""
    if config.augment == "full" and not config.fixed_augmentations:
        return 0.0
    names = image_names(config.data, config.num_critters)
    num_images = len(names) - len(held_out_names(names, config.holdout, config.splits))
    versions = fixed_augmentations(config.augment, config.fixed_augmentations)
    images = torch.zeros(32, 3, config.image_size, config.image_size, dtype=torch.uint8, device=space.device)
    for _ in range(2):  # the first pass is slower
        started = time.monotonic()
        x, _ = augment(images, mode=config.augment, augment_rand=versions[-1:].repeat(len(images), 1))
        space.encode(x, pick_precision(config.precision, space.device)).cpu()
    return (time.monotonic() - started) / len(images) * num_images * len(versions)


def find_space(config: Config, checkpoint: dict[str, Any] | None) -> PixelSpace | LatentSpace:
    """Return the space of a new run, or that of the run to resume."""
    if checkpoint is None:
        own = run_folder("checkpoints", config.run_name) / FIRST_STAGE / "final_model.pt"
        return load_space(own if config.autoencoder == OWN else config.autoencoder)
    return checked_space(run_folder("checkpoints", config.run_name) / "latest.pt", checkpoint.get("autoencoder"))


def check_settings(config: Config, scheduler: NoiseScheduler, space: PixelSpace | LatentSpace) -> None:
    """Raise ValueError for settings that contradict each other; warn of a schedule that does not end at noise."""
    if config.zero_terminal_snr and config.prediction == "eps":
        raise ValueError("--zero_terminal_snr needs --prediction v or x0: from pure noise, eps says nothing about x_0")
    if config.zero_terminal_snr and (config.loss_weighting == "min_snr" or config.lognormal):
        raise ValueError("--zero_terminal_snr needs --loss_weighting uniform and no --lognormal: else the last "
                         "timestep, from which sampling starts, is not trained")
    if config.lognormal and not (len(config.lognormal) == 2 and config.lognormal[1] > 0):
        raise ValueError("--lognormal needs a mean and a deviation above 0, or nothing, for uniform timesteps")
    if config.fixed_augmentations and not (space.is_latent and config.augment == "full"):
        raise ValueError("--fixed_augmentations is for latents, which it encodes in advance, and for --augment full: "
                         "leave it out")
    if scheduler.alpha_bar(config.timesteps - 1) > 1e-3:
        print(f"warning: {config.timesteps} timesteps of the {config.schedule} schedule leave some of the image, but "
              f"sampling starts from pure noise; use --schedule cosine, which ends at noise for any number")


def choose_size(config: Config, space: PixelSpace | LatentSpace) -> UNetConfig:
    """Return the size of the network; the levels go into `config` as well, and so into checkpoints.

    Raises:
        ValueError: for a size that cannot be built, or that does not fit the images.
    """
    config.multipliers = config.multipliers or default_multipliers(space.shape(config.image_size)[-1])
    unet_config = UNetConfig(channels=space.channels, width=config.width, multipliers=config.multipliers,
                             blocks=config.blocks, groups=config.groups, dropout=config.dropout,
                             augment_dim=AUGMENT_DIM)
    multiple = unet_config.size_multiple * space.factor
    if config.image_size % multiple or config.image_size < 8:
        raise ValueError(f"--image_size must be a multiple of {multiple} that is at least 8, for this network; "
                         f"{config.image_size} is not")
    return unet_config


def measure_latents(space: LatentSpace, config: Config, batches: Iterable[torch.Tensor], precision: str) -> None:
    """Normalise the latents over the images to be learned, and print how well these come back."""
    db = space.measure(batches, precision)
    print(f"latents    {' x '.join(map(str, space.shape(config.image_size)))} for 3 x {config.image_size} x "
          f"{config.image_size}; reconstructions have a PSNR of {db:.1f} dB")


def check_guidance(config: Config, num_classes: int) -> None:
    """Raise ValueError for guidance that the sample grids could not follow."""
    if config.guide_at:
        return
    if config.guidance != 1 and not num_classes:
        raise ValueError(f"--guidance {config.guidance} needs types, and the images have none: give --guidance 1")
    if config.guidance != 1 and not config.label_dropout:
        raise ValueError(f"--guidance {config.guidance} needs --label_dropout above 0, or the network does not learn "
                         f"the unconditional prediction; without it, give --guidance 1")


def check_same_network(config: Config, start: Pipeline, net: UNet, scheduler: NoiseScheduler,
                       space: PixelSpace | LatentSpace, class_names: tuple[str, ...]) -> None:
    """Raise ValueError if the weights of --init mean something else than this network's would."""
    ours = dict(size=net.config, types=tuple(class_names), prediction=config.prediction, schedule=scheduler.config(),
                autoencoder=space.fingerprint())
    size = replace(start.net.config, dropout=net.config.dropout, num_types=net.config.num_types,
                   blocks=max(start.net.config.blocks, net.config.blocks))
    theirs = dict(size=size, **start.interface)
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        advice = "images with the same types" if different == ["types"] else "the flags that it was trained with"
        raise ValueError(f"--init {config.init} is of another network, which differs in its {' and '.join(different)}; "
                         f"give {advice}")


def each_class_in_turn(num_images: int, num_classes: int) -> torch.Tensor | None:
    """Return labels [num_images, num_classes] of a single class each, in turn; None for an unconditional model."""
    return torch.eye(num_classes)[torch.arange(num_images) % num_classes] if num_classes else None


if __name__ == "__main__":
    main()
