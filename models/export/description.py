"""What a program needs to know of a network that it got without PokeDiff: shapes, types, schedule, sampler."""

from __future__ import annotations

from typing import Any

from models.pipeline import BY_EARLIER, DEFAULT_GUIDANCE, Pipeline
from reverse_diffusion import SAMPLERS

FORMAT = 1


def describe(pipeline: Pipeline, name: str, max_types: int = 2, with_earlier: bool = True) -> dict[str, Any]:
    """Return the content of a model.json: plain values.

    `alpha_bar` has the schedule's float64 in full. `clip` says whether a sampler keeps the predicted x_0 within plus
    and minus `clip_range`. `guide` is what guidance goes away from, of GUIDES, or None; `guidance` is the default
    scale; 1 is off. `max_types` is the largest set that a program should offer. `samplers` is there for a model that
    was tuned to few steps: the only samplers that suit it.

    Args:
        with_earlier: whether the program also gets the earlier network, if there is one.
    """
    guide = next((guide for guide in pipeline.guides if with_earlier or guide != BY_EARLIER), None)
    channels, height, width = pipeline.space.shape(pipeline.image_size)
    sampler, steps = pipeline.default_sampler
    timesteps = pipeline.scheduler.num_timesteps
    return dict(
        format=FORMAT, name=name, latent=pipeline.space.is_latent,
        image_size=pipeline.image_size, channels=channels, height=height, width=width,
        types=list(pipeline.class_names), max_types=min(max_types, len(pipeline.class_names)),
        guide=guide, guidance=DEFAULT_GUIDANCE if guide else 1.0, supports_guidance=guide is not None,
        sampler=dict(name=sampler, steps=steps), clip=True, clip_range=pipeline.space.latent_range,
        prediction=pipeline.prediction, timesteps=timesteps,
        alpha_bar=[pipeline.scheduler.alpha_bar(t) for t in range(timesteps)],
        **(dict(samplers=[key for key in SAMPLERS if SAMPLERS[key].tuned]) if pipeline.tuned else {}),
    )
