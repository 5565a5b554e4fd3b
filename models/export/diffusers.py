"""A folder that the library diffusers loads, in a Python without PokeDiff.

    write_folder(pipeline, Path("outputs/critters_diffusers"), card)

`UNet` is diffusers' `UNet2DModel` exactly, with two of that class's convolutions set to what we have without weights:
averaging over 2x2 pixels, and doubling each pixel. `DDPMPipeline` passes no types to its network, so the folder holds
the unconditional network as a pipeline and, beside it, the network with types, whose class numbers are sets of types.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from models.export.card import Card, card_text, draw_samples
from models.pipeline import Pipeline
from unet import UNet
from utils.errors import UserError, first_line
from utils.files import replacing_folder
from utils.packages import optional_package

MOST_SETS = 5000  # of types, each a row of numbers
TOLERANCE = 1e-3  # largest difference from PokeDiff that a written folder may have, in units of the largest output
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}

TOP_LEVEL = {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out",
             "time_mlp.0": "time_embedding.linear_1", "time_mlp.2": "time_embedding.linear_2",
             "middle.0": "mid_block.resnets.0", "middle.2": "mid_block.resnets.1"}
IN_A_BLOCK = {"norm_1": "norm1", "conv_1": "conv1", "scale_shift": "time_emb_proj", "norm_2": "norm2",
              "conv_2": "conv2", "shortcut": "conv_shortcut"}
ATTENTION = "mid_block.attentions.0"


def write_folder(pipeline: Pipeline, folder: Path, card: Card, max_types: int = 2) -> None:
    """Write the pipeline folder, whole or not at all, and check what it computes.

    Args:
        max_types: the largest set of types that the network with types can be asked for.

    Raises:
        UserError: for a model that diffusers cannot hold, and for a missing package.
        OSError: if the folder cannot be written.
    """
    library = optional_package("diffusers", "--to diffusers", "requirements-export.txt")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    check_expressible(pipeline, max_types)
    sets = type_sets(pipeline.class_names, max_types)
    with replacing_folder(folder) as temporary:
        # The pipeline, and the network with types.
        scheduler = library.DDPMScheduler(**scheduler_config(pipeline))
        unet = to_diffusers(pipeline.net, pipeline.image_size)
        _save(library.DDPMPipeline(unet=unet, scheduler=scheduler), temporary)
        if pipeline.class_names:
            _save(to_diffusers(pipeline.net, pipeline.image_size, sets), temporary / "typed_unet")
            names = [[pipeline.class_names[i] for i in members] for members in sets]
            (temporary / "types.json").write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")
        _check(library, pipeline, temporary, sets)

        # The card.
        if card.num_images:
            draw_samples(pipeline, card.num_images, temporary / "samples.png")
        (temporary / "README.md").write_text(card_text(pipeline, card), encoding="utf-8")


def _save(part: Any, folder: Path) -> None:
    """Save a pipeline or a network, its weights readable by all who can read its other files."""
    safetensors = optional_package("safetensors", "--to diffusers", "requirements-export.txt")
    try:
        part.save_pretrained(folder, safe_serialization=True)
    except safetensors.SafetensorError as error:  # a full disk
        raise OSError(first_line(error)) from error
    mode = next(folder.glob("*.json")).stat().st_mode
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)  # the library makes them private


def check_expressible(pipeline: Pipeline, max_types: int) -> None:
    """Raise UserError, naming what can hold it, for a model that diffusers cannot."""
    config, others = pipeline.net.config, "--to onnx, web and safetensors can"
    if pipeline.space.is_latent:
        raise UserError(f"diffusers' DDPMPipeline cannot hold a model of latents with its autoencoder; {others}")
    if pipeline.tuned:
        raise UserError(f"diffusers' DDPMPipeline takes many small steps, and this model was tuned to few: export the "
                        f"one it was tuned from ({pipeline.settings.get('init')}); {others}")
    if pipeline.scheduler.schedule not in BETA_SCHEDULES or pipeline.prediction not in PREDICTION_TYPES:
        raise UserError(f"diffusers has no {pipeline.scheduler.schedule} schedule, or no prediction "
                        f"{pipeline.prediction}; {others}")
    if type(pipeline.net) is not UNet:
        raise UserError(f"diffusers cannot hold a network of this kind, {type(pipeline.net).__name__}; {others}")
    if config.multipliers[0] != 1:
        raise UserError(f"diffusers' UNet2DModel cannot hold a network whose first multiplier is "
                        f"{config.multipliers[0]}, only 1; {others}")
    count, largest = len(pipeline.class_names), min(max_types, len(pipeline.class_names))
    sets = sum(math.comb(count, size) for size in range(largest + 1))
    if sets > MOST_SETS:
        raise UserError(f"{count} types make {sets:,} sets of up to {max_types}, a class each, and diffusers' table is "
                        f"held to {MOST_SETS:,}: give a smaller --max_types; --to onnx and web take any set")


def type_sets(class_names: Sequence[str], max_types: int) -> list[tuple[int, ...]]:
    """Return the sets of up to `max_types` types, as indices: none first, then each, then each pair, ..."""
    return [members for size in range(min(max_types, len(class_names)) + 1)
            for members in itertools.combinations(range(len(class_names)), size)]


def scheduler_config(pipeline: Pipeline) -> dict[str, Any]:
    """Return the arguments of diffusers' schedulers that give our reverse process."""
    scheduler = pipeline.scheduler
    return dict(
        num_train_timesteps=scheduler.num_timesteps, beta_schedule=BETA_SCHEDULES[scheduler.schedule],
        beta_start=scheduler.beta_start, beta_end=scheduler.beta_end,
        prediction_type=PREDICTION_TYPES[pipeline.prediction], rescale_betas_zero_snr=scheduler.zero_terminal_snr,
        variance_type="fixed_small",  # beta_tilde
        clip_sample=True, clip_sample_range=1.0, timestep_spacing="trailing",
    )


def to_diffusers(net: UNet, image_size: int, sets: Sequence[Sequence[int]] | None = None) -> Any:
    """Return the network as diffusers' UNet2DModel.

    Args:
        sets: sets of types, as indices; class number i is sets[i]. None: unconditional.
    """
    library = optional_package("diffusers", "--to diffusers", "requirements-export.txt")
    config, levels = net.config, len(net.config.widths)
    twin = library.UNet2DModel(
        sample_size=image_size, in_channels=config.channels, out_channels=config.channels,
        block_out_channels=config.widths, layers_per_block=config.blocks, dropout=config.dropout,
        down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels, downsample_padding=1,
        attention_head_dim=config.head_width, norm_num_groups=config.groups, norm_eps=1e-5,
        attn_norm_num_groups=config.groups,  # without it the middle attention has no norm
        resnet_time_scale_shift="scale_shift", flip_sin_to_cos=True, freq_shift=0,
        num_class_embeds=None if sets is None else len(sets))
    weights = _renamed_weights(net) | _resampling_weights(config.widths)
    if sets is not None:
        vectors = net.type_vectors.weight.T  # [K, 4 width]
        weights["class_embedding.weight"] = torch.stack([vectors[list(members)].sum(dim=0) for members in sets])
    try:
        twin.load_state_dict(weights)
    except RuntimeError as error:  # a layer of another shape, as a network that patches its input has
        raise UserError("diffusers' UNet2DModel has other layers than this network; --to onnx, web and safetensors "
                        "can hold it") from error
    return twin.eval()


def _renamed_weights(net: UNet) -> dict[str, torch.Tensor]:
    """Return the network's weights, but those of the types, by diffusers' names."""
    weights = {}
    for name, weight in net.state_dict().items():
        part, kind = name.rsplit(".", 1)
        if part == "type_vectors":
            continue
        if part == "middle.1.qkv":
            for target, third in zip(("to_q", "to_k", "to_v"), weight.chunk(3)):
                weights[f"{ATTENTION}.{target}.{kind}"] = third.flatten(1) if kind == "weight" else third
        elif part == "middle.1.out":
            weights[f"{ATTENTION}.to_out.0.{kind}"] = weight.flatten(1) if kind == "weight" else weight
        elif part == "middle.1.norm":
            weights[f"{ATTENTION}.group_norm.{kind}"] = weight
        else:
            weights[f"{_renamed(part)}.{kind}"] = weight
        if part.endswith(".shortcut"):
            weights[f"{_renamed(part)}.bias"] = torch.zeros(len(weight))
    return weights


def _renamed(part: str) -> str:
    """Return diffusers' name of a layer."""
    if part in TOP_LEVEL:
        return TOP_LEVEL[part]
    block, _, layer = part.rpartition(".")
    match = re.fullmatch(r"(down|up)\.(\d+)\.(\d+)", block)
    if layer not in IN_A_BLOCK or not (match or block in TOP_LEVEL):
        raise UserError(f"diffusers' UNet2DModel has no counterpart of this network's {part}; --to onnx, web and "
                        f"safetensors can hold it")
    place = f"{match[1]}_blocks.{match[2]}.resnets.{match[3]}" if match else TOP_LEVEL[block]
    return f"{place}.{IN_A_BLOCK[layer]}"


def _resampling_weights(widths: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return convolutions that average 2x2 pixels after each level but the last, and that change nothing after
    diffusers has doubled each pixel."""
    weights = {}
    for level, width in enumerate(widths[:-1]):
        average = torch.zeros(width, width, 3, 3)
        average[range(width), range(width), 1:, 1:] = 1 / 4
        weights |= {f"down_blocks.{level}.downsamplers.0.conv.weight": average,
                    f"down_blocks.{level}.downsamplers.0.conv.bias": torch.zeros(width)}
    for level, width in enumerate(reversed(widths[1:])):
        same = torch.zeros(width, width, 3, 3)
        same[range(width), range(width), 1, 1] = 1
        weights |= {f"up_blocks.{level}.upsamplers.0.conv.weight": same,
                    f"up_blocks.{level}.upsamplers.0.conv.bias": torch.zeros(width)}
    return weights


@torch.no_grad()
def _check(library: Any, pipeline: Pipeline, folder: Path, sets: Sequence[Sequence[int]]) -> None:
    """Raise UserError if what was written computes something else than our network."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *pipeline.space.shape(pipeline.image_size), generator=generator)
    t = torch.tensor([0, pipeline.scheduler.num_timesteps - 1])
    pairs = [(library.DDPMPipeline.from_pretrained(folder).unet(x_t, t).sample, pipeline.net(x_t, t))]
    if pipeline.class_names:
        rows = torch.tensor([len(sets) - 1, 0])
        labels = torch.zeros(2, len(pipeline.class_names))
        labels[0, list(sets[-1])] = 1
        typed = library.UNet2DModel.from_pretrained(folder / "typed_unet")
        pairs.append((typed(x_t, t, rows).sample, pipeline.net(x_t, t, labels)))
    for theirs, ours in pairs:
        if not (theirs - ours).abs().max() <= TOLERANCE * max(1, ours.abs().max()):
            raise UserError("the network in the folder computes something else than this one; another version of "
                            "diffusers may help")
    difference = max((theirs - ours).abs().max().item() for theirs, ours in pairs)
    print(f"diffusers and PyTorch differ by {difference:.1e} at most")
