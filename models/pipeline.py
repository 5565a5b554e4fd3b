"""A trained model, ready to draw: network, schedule, space and settings, from one checkpoint.

    pipeline = Pipeline.load("checkpoints/critters.pt")
    images = pipeline.sample(range(16), labels=pipeline.class_labels([("fire", "flying")] * 16), guidance=3.0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from forward_diffusion import PREDICTIONS, NoiseScheduler
from models.reproducible import in_full_batches, seeded_noise, seeded_steps
from models.space import LatentSpace, PixelSpace, space_from_state
from reverse_diffusion import Inpainting, default_steps, find_sampler, sample
from unet import UNet, UNetConfig
from utils.checkpoint import CheckpointError, build_module, check_finite, load_checkpoint
from utils.cuda_graph import CUDAGraphed
from utils.device import memory_format, pick_precision

NETWORKS = {"unet": (UNetConfig, UNet)}  # kind of network -> its configuration and class, see contributing.md
DEFAULT_GUIDANCE = 3.0  # where there is something to guide away from
BY_EARLIER, BY_TYPES = "earlier", "types"  # guidance away from the network after less training, or from any type
GUIDES = (BY_EARLIER, BY_TYPES)
GRID_SAMPLER = ("ddim", 50)  # of sample grids during training, unless the training chose another
DECODE_BATCH = 16  # images whose latents are decoded at a time
BUNDLED = ("critters_128.pt", "critters_128_fast.pt", "critters.pt")  # in the repository; the first is the default


class Pipeline:
    """Network, noise schedule, space and settings of one checkpoint; draws images from seeds.

    Args:
        net: the network, on `device`; usually the EMA.
        scheduler: the noise schedule that it was trained with.
        space: pixels, or the latents that it denoises, on `device`.
        settings: the training's settings, with "image_size" and "prediction" among them.
        class_names: in the order of the label columns; empty for an unconditional model.
        device: where it runs.
        precision: "bf16", "fp16" or "fp32".
        earlier: the network after less training, on `device`, which guidance goes away from; None: there is none.

    All are attributes of the same name; so are `image_size` and `prediction`.
    """

    def __init__(self, net: nn.Module, scheduler: NoiseScheduler, space: PixelSpace | LatentSpace,
                 settings: dict[str, Any], class_names: Sequence[str], device: torch.device, precision: str,
                 earlier: nn.Module | None = None):
        self.net, self.scheduler, self.space, self.settings = net, scheduler, space, settings
        self.class_names, self.device, self.precision, self.earlier = tuple(class_names), device, precision, earlier
        self.image_size, self.prediction = settings["image_size"], settings["prediction"]
        self.earlier_name = BY_EARLIER  # in messages and reports; after `load_guide`, its file
        self._in_full_batches = functools.partial(in_full_batches, precision)  # not a method: that would be a cycle
        self._network = self._prepare(net, device)
        self._earlier_network = None if earlier is None else self._prepare(earlier, device)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", precision: str = "auto") -> Pipeline:
        """Load the averaged weights of a checkpoint, and all that belongs to them.

        Raises:
            CheckpointError: if the file is missing, damaged, not a diffusion model, or inconsistent.
        """
        device = torch.device(device)
        content = load_checkpoint(path)
        if "network" not in content:
            raise CheckpointError(f"{path} holds no diffusion model; choose the checkpoint of a train.py run")
        try:
            net = _build_network(content["network"], content["ema"])
            earlier = _build_network(content["network"], content["earlier"]) if "earlier" in content else None
            scheduler = NoiseScheduler(**content["scheduler"])
            space = space_from_state(content.get("autoencoder"))
            settings, class_names = content["config"], tuple(content.get("types", ()))
            _check_consistent(net.config, space, settings, class_names)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{path} is incomplete or of another version of PokeDiff; choose another "
                                  f"file") from error
        networks = [net] if earlier is None else [net, earlier]
        check_finite(path, *networks)
        for network in networks:
            network.to(device, memory_format=memory_format(device)).eval()
        space = space.to(device, memory_format=memory_format(device))
        return cls(net, scheduler, space, settings, class_names, device, pick_precision(precision, device), earlier)

    def _prepare(self, net: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
        """Return `net` as it is called: in full batches, and on CUDA recorded once per shape, for all samples."""
        network = functools.partial(self._in_full_batches, net)
        return CUDAGraphed(network, max_recordings=4, ordinary_calls=2) if device.type == "cuda" else network

    # -----------------------------------------------------------------------------------------------------------------
    # what to draw, and how

    @property
    def tuned(self) -> bool:
        """Whether the network was tuned to few steps, and so is drawn by jumps alone."""
        return self.settings.get("objective") == "consistency"

    @property
    def default_sampler(self) -> tuple[str, int]:
        """The sampler and steps that the training chose for its grids, else the full reverse process."""
        if self._grid_settings == GRID_SAMPLER:
            return "ddpm", self.scheduler.num_timesteps
        return self.grid_sampler

    @property
    def grid_sampler(self) -> tuple[str, int]:
        """The sampler and steps of the training's own sample grids."""
        name, steps = self._grid_settings
        return name, min(steps, self.scheduler.num_timesteps)

    @property
    def _grid_settings(self) -> tuple[str, int]:
        return self.settings.get("sampler", GRID_SAMPLER[0]), self.settings.get("sample_steps", GRID_SAMPLER[1])

    def choose_sampler(self, sampler: str | None = None, steps: int | None = None,
                       start: int | None = None) -> tuple[str, int]:
        """Fill in what is not given: the default sampler, and its number of steps, fewer from a timestep `start`.

        Raises:
            ValueError: for an unknown sampler, one that is not for this network, or steps out of 1 ... T.
        """
        if sampler is None:
            sampler, own_steps = self.default_sampler
        else:
            own_steps = self.grid_sampler[1] if self.tuned else default_steps(sampler, self.scheduler.num_timesteps)
        if find_sampler(sampler).tuned != self.tuned:
            raise ValueError(self._wrong_sampler(sampler))
        part = 1.0 if start is None else (start + 1) / self.scheduler.num_timesteps
        steps = max(1, round(part * own_steps)) if steps is None else steps
        if not 1 <= steps <= self.scheduler.num_timesteps:
            raise ValueError(f"--steps must be 1 ... {self.scheduler.num_timesteps} for this checkpoint, not {steps}")
        return sampler, steps

    def _wrong_sampler(self, sampler: str) -> str:
        if not self.tuned:
            return (f"--sampler {sampler} is for a model that was tuned to few steps, and this one was not: leave "
                    f"--sampler out, or tune it with train.py --objective consistency")
        return (f"--sampler {sampler} takes small steps, and this checkpoint was tuned to jump: leave --sampler out, "
                f"or draw with the model it was tuned from ({self.settings.get('init')})")

    @property
    def built_in_guidance(self) -> float:
        """The guidance scale that tuning has put into the conditional output; 1: none."""
        return self.settings.get("teacher_guidance", 0.0) or 1.0

    @property
    def guides(self) -> tuple[str, ...]:
        """What guidance can go away from, of GUIDES, the default first.

        Not BY_TYPES where the training dropped no labels, nor where guidance is built in: that would be guidance twice.
        """
        drops_types = self.class_names and self.settings.get("label_dropout", 0.1) > 0
        possible = {BY_EARLIER: self.earlier is not None, BY_TYPES: drops_types and self.built_in_guidance == 1}
        return tuple(guide for guide in GUIDES if possible[guide])

    @property
    def default_guide(self) -> str:
        return BY_TYPES if self.earlier is None else BY_EARLIER

    def default_guidance(self, has_types: bool, guide: str | None = None) -> float:
        """The guidance scale where none is given: above 1 with a `guide`, or something to guide away from."""
        return DEFAULT_GUIDANCE if guide or BY_EARLIER in self.guides or has_types and BY_TYPES in self.guides else 1.0

    def choose_guide(self, guidance: float, labels: torch.Tensor | None, guide: str | None = None) -> str | None:
        """Return what to guide away from, `default_guide` if `guide` is None; None for a scale of 1.

        Raises:
            ValueError: for a guidance scale or a guide that this model cannot follow.
        """
        flag = "--guide" if guide else "--guidance"
        guide = guide or self.default_guide
        if guide not in GUIDES:
            raise ValueError(f"unknown guide {guide!r}: choose {' or '.join(GUIDES)}")
        if guide == BY_EARLIER and self.earlier is None:
            raise ValueError("this checkpoint holds no earlier network to guide away from, which train.py --guide_at "
                             "keeps: leave --guide out")
        if guidance == 1 or guide == BY_EARLIER:
            return None if guidance == 1 else guide
        if self.built_in_guidance != 1:
            raise ValueError(f"this checkpoint has guidance {self.built_in_guidance:g} built in by its training: leave "
                             f"{flag} out")
        if not self.class_names:
            raise ValueError(f"guidance strengthens types, and this checkpoint knows none: leave {flag} out")
        if labels is None:
            raise ValueError(f"guidance strengthens types, and none is given: add --types, with one or more of "
                             f"{', '.join(self.class_names)}")
        if BY_TYPES not in self.guides:
            raise ValueError(f"guidance compares with images of any type, which this checkpoint was trained without "
                             f"(--label_dropout 0): leave {flag} out")
        return guide

    def use_guide(self, guide: str | None) -> str | None:
        """Load the guide if it is a file, see `load_guide`; return BY_EARLIER for it, else the guide itself."""
        if guide is None or guide in GUIDES:
            return guide
        self.load_guide(guide)
        return BY_EARLIER

    def load_guide(self, path: str | Path) -> None:
        """Guide away from the network of another checkpoint, of less training or smaller (Karras et al. 2024).

        Raises:
            CheckpointError: as `load` does.
            ValueError: if there is no such file, or its network cannot be compared with this one, or is the same.
        """
        if not Path(path).is_file():
            raise ValueError(f"no guide {path}: choose {', '.join(GUIDES)}, or the file of a checkpoint")
        other = Pipeline.load(path, self.device, self.precision)
        if self.tuned or other.tuned:
            raise ValueError(f"{path} cannot guide this checkpoint, since {'this' if self.tuned else 'that'} one was "
                             f"tuned to jump, which is no prediction to compare with: leave --guide out")
        ours, theirs = (dict(image_size=pipeline.image_size, **pipeline.interface) for pipeline in (self, other))
        different = [name for name in ours if ours[name] != theirs[name]]
        if different:
            raise ValueError(f"{path} cannot guide this checkpoint, since they differ in {' and '.join(different)}: "
                             f"choose an earlier checkpoint of the same training, or a smaller network trained alike")
        if self.net.config == other.net.config and all(map(torch.equal, self.net.parameters(), other.net.parameters())):
            raise ValueError(f"{path} holds the network that it would guide, away from which guidance does nothing: "
                             f"choose a checkpoint of less training")
        self.earlier, self._earlier_network = other.net, other._network
        self.earlier_name = "/".join(Path(path).parts[-2:])

    @property
    def interface(self) -> dict[str, Any]:
        """What the network's inputs and outputs mean; where it is equal, one network can take another's place."""
        return dict(types=self.class_names, prediction=self.prediction, schedule=self.scheduler.config(),
                    autoencoder=self.space.fingerprint())

    def class_labels(self, class_names: Sequence[Sequence[str]]) -> torch.Tensor:
        """Return multi-hot labels, float32 [N, K], of the classes of each image.

        Raises:
            ValueError: for a class that the model does not know.
        """
        labels = torch.zeros(len(class_names), len(self.class_names))
        for row, names in zip(labels, class_names):
            for name in names:
                if name not in self.class_names:
                    raise ValueError(f"unknown type {name!r}: choose one or more of {', '.join(self.class_names)}")
                row[self.class_names.index(name)] = 1
        return labels

    def noise(self, seeds: Iterable[int]) -> torch.Tensor:
        """Return x_T, standard normal [B, *shape] on the CPU, image i from seeds[i] alone, equal on every device."""
        return seeded_noise(seeds, self.space.shape(self.image_size))

    # -----------------------------------------------------------------------------------------------------------------
    # drawing

    def sample(self, seeds: Sequence[int], *, labels: torch.Tensor | None = None, guidance: float = 1.0,
               guide: str | None = None, sampler: str | None = None, steps: int | None = None,
               x_T: torch.Tensor | None = None, start: int | None = None,
               toward: tuple[int, Sequence[float]] | None = None, batch_size: int = 64,
               callback: Callable | None = None, **options: Any) -> torch.Tensor:
        """Draw images [N, 3, S, S] in [-1, 1], float32 on the CPU.

        Image i depends on seeds[i], labels[i] and x_T[i] alone, whatever batch it is in: to the last bit on CPUs
        (checked with one thread and with two, in float32 and bfloat16), up to the choice of kernels on GPUs.

        Args:
            seeds: one integer an image.
            labels: multi-hot [N, K], see `class_labels`.
            guidance: scale of the guidance; 1 is off.
            guide: what it goes away from, see `choose_guide`.
            sampler, steps: see `choose_sampler`.
            x_T: [N, *space.shape(image_size)], to start from; the seeds then determine only the noise of the steps.
            start: the timestep of x_T; None: the last.
            toward: (seed, weights): the noise of image i's steps lies on the arc from that of seeds[i] (weight 0) to
                that of this seed (weight 1), at weights[i]. None: it is that of seeds[i].
            batch_size: images at a time; fewer if a GPU's memory does not suffice.
            callback: see `reverse_diffusion.sample`.
            options: of the sampler, `timesteps`, `clip`, and `inpainting` in the space of x_0.

        Raises:
            ValueError: as `choose_sampler`, `choose_guide` and `reverse_diffusion.sample` do, and for a number of
                rows of labels or x_T other than that of the seeds.
        """
        for name, given in (("labels", labels), ("x_T", x_T)):
            if given is not None and len(given) != len(seeds):
                raise ValueError(f"{len(given)} rows of {name} for {len(seeds)} seeds")
        sampler, steps = self.choose_sampler(sampler, steps, start)
        worse = self._earlier_network if self.choose_guide(guidance, labels, guide) == BY_EARLIER else None
        options = dict(clip=self.space.latent_range) | options
        images: list[torch.Tensor] = []
        i = 0
        while i < len(seeds):
            part = slice(i, i + batch_size)
            noise = (self.noise(seeds[part]) if x_T is None else x_T[part]).to(self.device)
            try:
                x_0 = sample(
                    self.denoise, self.scheduler, noise, sampler=sampler, steps=steps, prediction=self.prediction,
                    labels=None if labels is None else labels[part], guidance=guidance, worse=worse, start=start,
                    draw_noise=seeded_steps(noise, seeds[part], toward and (toward[0], toward[1][part])),
                    callback=callback, **options,
                )
            except torch.OutOfMemoryError:
                if len(noise) == 1:
                    raise
                batch_size = len(noise) // 2  # what was begun of this batch is drawn anew
                print(f"note: too little memory for {len(noise)} images at a time; continuing with {batch_size}")
                continue
            images.append(self.decode(x_0))
            i += batch_size
        return torch.cat(images)

    def inpaint(self, seeds: Sequence[int], image: torch.Tensor, redraw: torch.Tensor, *, resample: int = 10,
                jump: int | None = None, **options: Any) -> torch.Tensor:
        """Draw part of an image anew: images [N, 3, S, S] that equal `image` elsewhere, to the last bit.

        In latents, a cell is drawn anew if one of its pixels is, and the kept pixels of such a cell are put back after
        decoding. So is what the autoencoder lost of all others.

        Args:
            image: [3, S, S] in [-1, 1].
            redraw: boolean [S, S], true where the image is drawn anew.
            resample, jump: see `reverse_diffusion.Inpainting`.
            options: as `sample` has them.

        Raises:
            ValueError: for a tuned model, whose few jumps leave new and kept parts no time to meet; and as `sample`.
        """
        if self.tuned:
            raise ValueError(f"--mask needs many small steps, and this checkpoint was tuned to jump: draw with the "
                             f"model it was tuned from ({self.settings.get('init')})")
        cells = F.max_pool2d(redraw[None].float(), self.space.factor) > 0
        x_0 = self.encode(image[None])
        inpainting = Inpainting(x_0.to(self.device), cells.to(self.device), resample, jump)
        return torch.where(redraw, self.sample(seeds, inpainting=inpainting, **options), image)

    def denoise(self, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the network's output for x_t [B, C, H, W], t [B] and labels [B, K], all on the device."""
        return self._network(x_t, t) if labels is None else self._network(x_t, t, labels)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return x_0 of images [N, 3, S, S] in [-1, 1], float32 on the CPU."""
        return self._in_parts(self.space.encode, images)

    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        """Return the images [N, 3, S, S] of x_0, float32 on the CPU."""
        return self._in_parts(self.space.decode, x_0)

    def _in_parts(self, function: Callable, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._in_full_batches(function, part.to(self.device)).float().cpu()
                          for part in x.split(DECODE_BATCH)])


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def _build_network(network: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    """Build a network from a checkpoint's {kind, config} and load its weights. Raises ValueError if they do not fit."""
    if network["kind"] not in NETWORKS:
        raise ValueError(f"unknown kind of network {network['kind']!r}")
    config_class, network_class = NETWORKS[network["kind"]]
    config = config_class(**network["config"])
    if config.least_tensors > len(weights):
        raise ValueError("a network that would take for ever to build")
    return build_module(lambda: network_class(config), weights, "network")


def _check_consistent(config: UNetConfig, space: PixelSpace | LatentSpace, settings: dict[str, Any],
                      class_names: tuple[str, ...]) -> None:
    """Raise ValueError if network, space and settings do not belong together."""
    size, prediction = settings["image_size"], settings["prediction"]
    if config.channels != space.channels:
        raise ValueError("an autoencoder of another network")
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}")
    if type(size) is not int or not 0 < size <= 4096 or size % (config.size_multiple * space.factor):
        raise ValueError(f"impossible image size {size!r}")
    if len(class_names) != config.num_types or not all(type(name) is str for name in class_names):
        raise ValueError("classes without names")


def newest_checkpoint(folder: str | Path = "checkpoints") -> Path:
    """Return the diffusion checkpoint that was written last, at any depth below `folder`; else the first of BUNDLED.

    Raises:
        CheckpointError: if there is none.
    """
    folder = Path(folder)
    paths = [path for path in folder.rglob("*.pt") if path.is_file() and not path.name.startswith(".")]
    bundled = [folder / name for name in BUNDLED if folder / name in paths]
    own = sorted(set(paths) - set(bundled), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in own + bundled:
        try:
            if "network" in load_checkpoint(path, mmap=True):
                return path
        except CheckpointError:
            return path  # loading it will say what is wrong with it
    raise CheckpointError(f"no checkpoint in {folder}/; `python train.py --preset quick` trains one in minutes")
