"""The card of an exported model: what it is, how to use it, what was measured, how it was trained.

The text is Markdown with a YAML head, as the Hugging Face Hub reads it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.pipeline import BY_TYPES, DEFAULT_GUIDANCE, Pipeline
from reverse_diffusion import SAMPLERS
from unet import count_parameters
from utils.errors import printable
from utils.images import save_image, square_grid

MANY_STEPS = 100  # from here on, the card's pictures are drawn by a faster sampler
FAST_SAMPLER = "sde-dpm++"
NOT_OF_THE_MODEL = {"device", "precision", "workers", "run_name", "save_every", "compile"}  # settings of a machine


@dataclass
class Card:
    """What a model does not know of itself.

    Attributes:
        name: of the model.
        license: its identifier on the Hub, as mit.
        credit: who made, and who owns, the pictures it was trained on.
        evaluation: the figures, as Markdown; empty for none.
        num_images: pictures to draw for the card; 0 for none.
    """

    name: str
    license: str
    credit: str
    evaluation: str = ""
    num_images: int = 16


def draw_samples(pipeline: Pipeline, count: int, path: Path) -> None:
    """Write a grid of pictures of any type."""
    sampler, steps = pipeline.default_sampler
    if steps > MANY_STEPS:
        sampler, steps = FAST_SAMPLER, min(SAMPLERS[FAST_SAMPLER].steps, pipeline.scheduler.num_timesteps)
    images = pipeline.sample(range(count), sampler=sampler, steps=steps)
    save_image(square_grid(images), path, seeds=list(range(count)), sampler=sampler, steps=steps)


def card_text(pipeline: Pipeline, card: Card) -> str:
    """Return README.md of a diffusers folder."""
    name, size = printable(card.name), pipeline.image_size
    head = dict(license=card.license, library_name="diffusers", pipeline_tag="unconditional-image-generation",
                tags=["diffusers", "diffusion", "ddpm", "pytorch"])
    parts = [_front_matter(head), f"# {name}", f"""\
A denoising diffusion model of {size}×{size} images with {count_parameters(pipeline.net):,} parameters, trained with
PokeDiff. It predicts {pipeline.prediction} on the {pipeline.scheduler.schedule} schedule of
{pipeline.scheduler.num_timesteps} steps; its weights are the moving average of the training's."""]
    if card.num_images:
        parts.append("![pictures drawn by the model](samples.png)")
    parts += ["## Use", _usage()]
    if pipeline.class_names:
        parts += ["## Types", _typed_usage(pipeline)]
    parts += ["## Evaluation", card.evaluation or "This model was not measured with evaluate.py."]
    parts += ["## Training", f"```\n{training_command(pipeline.settings)}\n```", "## Images", printable(card.credit)]
    return "\n\n".join(parts) + "\n"


def _front_matter(head: dict[str, Any]) -> str:
    """Return a YAML head. A JSON string is also one of YAML."""
    lines = []
    for key, value in head.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(part)}" for part in value)]
        else:
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(["---", *lines, "---"])


def _usage() -> str:
    return """\
```python
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

folder = "."  # of this card, or its name on the Hub
pipeline = DDPMPipeline.from_pretrained(folder)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
    pipeline.scheduler.config, algorithm_type="sde-dpmsolver++", thresholding=True)
images = pipeline(batch_size=4, num_inference_steps=20).images
images[0].save("creature.png")
```

Without the second scheduler, `pipeline()` runs the full reverse process, one step for each timestep of the training.
With `thresholding` (and `sample_max_value` at its default, 1) each predicted image is clipped to [-1, 1], as PokeDiff
does. `DDIMScheduler` does so with `use_clipped_model_output=True` in each call of `step`, and needs a number of steps
that divides the training's."""


def _typed_usage(pipeline: Pipeline) -> str:
    wanted = ", ".join(json.dumps(name, ensure_ascii=False) for name in pipeline.class_names[:1])
    channels, height, width = pipeline.space.shape(pipeline.image_size)
    known = ", ".join(map(printable, pipeline.class_names))
    guidance = DEFAULT_GUIDANCE if BY_TYPES in pipeline.guides else 1.0
    return f"""\
It knows {known}.

`typed_unet` takes a class number for each picture: the place of a set of types in `types.json`, where 0 is the empty
set, any type. With guidance above 1 pictures become more typical of their types, and less varied.

```python
import json
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel

folder, wanted, guidance = ".", {{{wanted}}}, {guidance}
unet = UNet2DModel.from_pretrained(folder, subfolder="typed_unet")
scheduler = DPMSolverMultistepScheduler.from_pretrained(
    folder, subfolder="scheduler", algorithm_type="sde-dpmsolver++", thresholding=True)
sets = [set(names) for names in json.load(open(f"{{folder}}/types.json", encoding="utf-8"))]
rows = torch.tensor([sets.index(wanted)] * 4 + [0] * 4)
x = torch.randn(4, {channels}, {height}, {width})
scheduler.set_timesteps(20)
with torch.no_grad():
    for t in scheduler.timesteps:
        typed, untyped = unet(torch.cat([x, x]), t, rows).sample.chunk(2)
        x = scheduler.step(untyped + guidance * (typed - untyped), t, x).prev_sample
pixels = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
DDPMPipeline.numpy_to_pil(pixels)[0].save("typed.png")
```"""


def training_command(settings: dict[str, Any]) -> str:
    """Return the command that repeats the training, without what depends on the machine.

    Of an absolute path only the last part stays: a card is public.
    """
    lines = ["python train.py"]
    for name, value in settings.items():
        if name in NOT_OF_THE_MODEL or value is None or value is False or value in ("", (), []):
            continue
        values = value if isinstance(value, (tuple, list)) else [] if value is True else [value]
        flag = " ".join([f"--{name}", *(_public(part) for part in values)])
        if len(lines[-1]) + len(flag) < 110:
            lines[-1] += f" {flag}"
        else:
            lines.append(f"    {flag}")
    return " \\\n".join(lines)


def _public(value: Any) -> str:
    text = str(value)
    if Path(text).is_absolute() or text.startswith("~"):
        text = Path(text).name
    return shlex.quote(text)
