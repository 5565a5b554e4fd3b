"""What a program needs to know of a network that it got without PokeDiff: shapes, types, schedule, sampler."""

from __future__ import annotations

from typing import Any

from models.pipeline import BY_TYPES, DEFAULT_GUIDANCE, Pipeline
from reverse_diffusion import SAMPLERS

FORMAT = 1


def describe(pipeline: Pipeline, name: str, max_types: int = 2) -> dict[str, Any]:
    """Return the content of a model.json: plain values.

    `alpha_bar` has the schedule's float64 in full. `clip` says whether a sampler keeps the predicted x_0 within plus
    and minus `clip_range`. `guidance` is the default scale where types are chosen; 1 is off. `max_types` is the largest
    set that a program should offer. `samplers` is there for a model that was tuned to few steps: the only samplers
    that suit it.
    """
    channels, height, width = pipeline.space.shape(pipeline.image_size)
    sampler, steps = pipeline.default_sampler
    timesteps = pipeline.scheduler.num_timesteps
    return dict(
        format=FORMAT, name=name, latent=pipeline.space.is_latent,
        image_size=pipeline.image_size, channels=channels, height=height, width=width,
        types=list(pipeline.class_names), max_types=min(max_types, len(pipeline.class_names)),
        guidance=DEFAULT_GUIDANCE if BY_TYPES in pipeline.guides else 1.0,
        supports_guidance=BY_TYPES in pipeline.guides,
        sampler=dict(name=sampler, steps=steps), clip=True, clip_range=pipeline.space.latent_range,
        prediction=pipeline.prediction, timesteps=timesteps,
        alpha_bar=[pipeline.scheduler.alpha_bar(t) for t in range(timesteps)],
        **(dict(samplers=[key for key in SAMPLERS if SAMPLERS[key].tuned]) if pipeline.tuned else {}),
    )
