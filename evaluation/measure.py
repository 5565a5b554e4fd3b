"""Measurement of one checkpoint or one folder of samples: every figure of the report.

    measurement = Measurement("checkpoints/critters.pt", epoch=20)
    measurement.samples, measurement.sampling = draw_samples(pipeline, data, 1000)
    measure_bits(measurement, pipeline, data)
    measure_samples(measurement, data)
    measurement.figures["recall"]              # {"value": ..., "low": ..., "high": ..., "real": {"value": ..., ...}}
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from evaluation.artifacts import find_artifacts
from evaluation.data import EvaluationData
from evaluation.distances import compare, comparison_sets, feature_scores, inception_distances
from evaluation.efficientnet import EfficientNetFeatures
from evaluation.error_bars import Score, fraction_figure, mean_figure, score_figure, widened
from evaluation.image_statistics import image_statistics
from evaluation.likelihood import generalisation_gap, png_bits, variational_bound
from evaluation.memorization import find_copies, warp_uint8
from models.pipeline import Pipeline
from utils.images import to_uint8
from utils.seeding import seed_from

NUM_PAIRS = 24  # closest pairs that are shown
OTHER_SAMPLER_STEPS = 50  # steps of a sampler other than that of the training's grids
FRACTIONS = ("precision", "recall", "coverage")
OUTSIDE = "efficientnet_"  # begins the names of figures in the features of the outside network
OUTSIDE_NOTE = (
    "The figures of EfficientNet are measured in the features of a network that others trained to classify photographs "
    "(EfficientNet-Lite0, ImageNet); samples and real images are enlarged to its 224 x 224 pixels in the same way. "
    "Nothing is trained with it. They are no FIDs, and cannot be put beside published ones.")


@dataclass
class Measurement:
    """What was measured of one checkpoint, or of one folder of samples.

    name: of the checkpoint or folder.
    trained_on: the model's data set; None for samples of an unknown model.
    samples: uint8 [N, 3, S, S].
    sampling: sampler, steps, seed and guidance of samples that were drawn here.
    figures: by name (see meanings.py): a figure (see error_bars.py) with, under "real", that of real images in the
        place of the samples, the best that can be expected.
    bits: details of the variational bounds, "train" and "held_out".
    compared: number of samples in the distances, or None.
    copies: details of the search for copies, or None.
    pairs: the closest pairs, uint8 [NUM_PAIRS, 3, S, 2 S + 2]: sample and training image; or None.
    notes: what could not be measured, and why.
    """

    name: str
    epoch: int = 0
    trained_on: str | None = None
    samples: torch.Tensor | None = None
    sampling: dict[str, Any] | None = None
    figures: dict[str, dict] = field(default_factory=dict)
    bits: dict[str, dict] = field(default_factory=dict)
    compared: int | None = None
    copies: dict[str, Any] | None = None
    pairs: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# the model


def draw_samples(pipeline: Pipeline, data: EvaluationData, num_samples: int, *, sampler: str | None = None,
                 steps: int | None = None, guidance: float = 1.0, seed: int = 0, batch_size: int = 64
                 ) -> tuple[torch.Tensor, dict[str, Any]]:
    """Draw samples, uint8 [num_samples, 3, S, S]; also return the sampler, steps, seed and guidance.

    A model with types gets the labels of random training images, so that the samples have the types of the data.

    Args:
        sampler: default: that of the training's sample grids.
        steps: default: as for those grids; 50 for another sampler.
        seed: sample i is drawn from seed + i.

    Raises:
        ValueError: for guidance that the model cannot follow, or that has no labels.
    """
    # Settings
    grid_sampler, grid_steps = pipeline.grid_sampler
    sampler = sampler or grid_sampler
    steps = steps or (grid_steps if sampler == grid_sampler else OTHER_SAMPLER_STEPS)
    steps = min(steps, pipeline.scheduler.num_timesteps)
    labels = _random_labels(data, num_samples, seed)
    if guidance != 1 and pipeline.class_names and labels is None:
        raise ValueError("--guidance strengthens types, and the images of the data have none: leave --guidance out")
    pipeline.check_guidance(guidance, labels)

    # Batches, each converted to uint8 at once: floats would take four times the memory
    batches = []
    with tqdm(total=steps * math.ceil(num_samples / batch_size), desc="sampling", unit="step",
              dynamic_ncols=True) as bar:
        for low in range(0, num_samples, batch_size):
            high = min(low + batch_size, num_samples)
            images = pipeline.sample(
                range(seed + low, seed + high), labels=None if labels is None else labels[low:high],
                guidance=guidance, sampler=sampler, steps=steps, batch_size=batch_size,
                callback=lambda *_: bar.update(),
            )
            batches.append(to_uint8(images))
    return torch.cat(batches), dict(sampler=sampler, steps=steps, seed=seed, guidance=guidance)


def _random_labels(data: EvaluationData, count: int, seed: int) -> torch.Tensor | None:
    """Return the labels of `count` random training images; None if they have none."""
    if data.train_labels is None or not data.train_labels.any():
        return None
    generator = torch.Generator().manual_seed(seed_from(seed, stream="types"))
    return data.train_labels[torch.randint(len(data.train_labels), (count,), generator=generator)]


def measure_bits(measurement: Measurement, pipeline: Pipeline, data: EvaluationData, num_images: int = 200,
                 num_timesteps: int = 16, *, seed: int = 0, batch_size: int = 64) -> None:
    """Measure the bits per dimension of training and of unseen images, and the gap between them.

    Args:
        num_images, num_timesteps: images of each kind, and timesteps that are visited for each image.
    """
    latent_range = pipeline.space.latent_range
    measurement.notes += pipeline.space.notes
    sets = {"train": (data.train, data.train_labels), "held_out": (data.unseen, data.unseen_labels)}
    bounds, details = {}, {}
    for name, (images, labels) in sets.items():
        if len(images) < 2:
            continue
        generator = torch.Generator().manual_seed(seed_from(seed, stream=f"likelihood {name}"))
        chosen = torch.randperm(len(images), generator=generator)[:num_images]
        # What the model sees, in 256 levels: latents are rounded to them, pixels are these levels.
        levels = to_uint8(pipeline.encode(images[chosen].float() / 127.5 - 1) / latent_range)
        with tqdm(total=len(chosen) * (1 + num_timesteps), desc=f"bits, {name.replace('_', ' ')}", unit="pass",
                  dynamic_ncols=True) as bar:
            bound = variational_bound(
                pipeline.denoise, pipeline.scheduler, levels, latent_range=latent_range,
                prediction=pipeline.prediction, labels=None if labels is None else labels[chosen],
                num_timesteps=num_timesteps, seed=seed, batch_size=batch_size, device=pipeline.device,
                callback=bar.update,
            )
        bounds[name], details[name] = bound, png_bits(images[chosen])
        measurement.figures[f"bits_{name}"] = score_figure(Score(bound.mean, bound.stderr))
        measurement.bits[name] = dict(num_images=len(chosen), prior=bound.prior.mean().item(), ranges=bound.ranges,
                                      steps=bound.steps.mean(dim=0).tolist(), decoder=bound.decoder.mean().item())
    if len(bounds) == 2:
        gap, error = generalisation_gap(bounds["train"], bounds["held_out"], (details["train"], details["held_out"]))
        measurement.figures["bits_gap"] = score_figure(Score(gap, error))


# ---------------------------------------------------------------------------------------------------------------------
# the samples


def measure_samples(measurement: Measurement, data: EvaluationData, outside: EfficientNetFeatures | None = None,
                    fid: bool = False, cuda: bool = False) -> None:
    """Measure distances, copies, artifacts and image statistics of the samples; note what cannot be measured.

    Args:
        outside: features of an outside network, to measure distances in as well.
        fid: also FID and KID, with torch-fidelity.
        cuda: compute those on the GPU.
    """
    try:
        _measure_distances(measurement, data, outside, fid, cuda)
    except ValueError as error:
        measurement.notes.append(f"Distances were not measured: {error}.")
    try:
        _measure_copies(measurement, data)
    except ValueError as error:
        measurement.notes.append(f"Copies were not searched for: {error}.")
    samples, figures = measurement.samples, measurement.figures
    for name, mask in find_artifacts(samples).items():
        figures[name] = {**fraction_figure(mask), "real": fraction_figure(data.real_artifacts[name])}
    for name, values in image_statistics(samples).items():
        figures[name] = {**mean_figure(values), "real": mean_figure(data.real_statistics[name])}


def _measure_distances(measurement: Measurement, data: EvaluationData, outside: EfficientNetFeatures | None,
                       fid: bool, cuda: bool) -> None:
    samples, real, other_real = comparison_sets(measurement.samples, data.train, data.unseen)
    scores = _scores(samples, real, data, outside, fid, cuda)
    real_scores = _scores(other_real, real, data, outside, fid, cuda)
    for name, score in scores.items():
        figure, real_figure = score_figure(score), score_figure(real_scores[name])
        if name.removeprefix(OUTSIDE) in FRACTIONS:
            figure, real_figure = widened(figure, len(samples)), widened(real_figure, len(real))
        measurement.figures[name] = {**figure, "real": real_figure}
    measurement.compared = len(samples)
    if outside is not None:
        measurement.notes.append(OUTSIDE_NOTE)


def _scores(samples: torch.Tensor, real: torch.Tensor, data: EvaluationData, outside: EfficientNetFeatures | None,
            fid: bool, cuda: bool) -> dict[str, Score]:
    """Compare two sets of images; the finest and the coarsest scale of the patch distance get names of their own."""
    scores = compare(samples, real, data.feature_space)
    if outside is not None:
        scores |= {OUTSIDE + name: score for name, score in feature_scores(outside(samples), outside(real)).items()}
    if fid:
        scores |= inception_distances(samples, real, cuda)
    scales = [name for name in scores if name.startswith("wasserstein_")]  # from the finest
    scores["wasserstein_fine"], scores["wasserstein_coarse"] = scores[scales[0]], scores[scales[-1]]
    return scores


def _measure_copies(measurement: Measurement, data: EvaluationData) -> None:
    """Measure the fraction of copies among the samples and among unseen images; find the closest pairs."""
    samples, thresholds = measurement.samples, data.copy_thresholds
    matches, is_copy = find_copies(samples, data.train, thresholds, data.feature_space)
    for name, kind in (("copies", "pixels"), ("copies_features", "features")):
        measurement.figures[name] = fraction_figure(is_copy[kind])
        if data.false_alarms is not None:
            measurement.figures[name]["real"] = fraction_figure(data.false_alarms[kind])

    # Closest pairs
    order = matches.distance.argsort()[:NUM_PAIRS]
    closest = [dict(sample=i, image=data.names[matches.index[i]], distance=matches.distance[i].item(),
                    mirrored=matches.pose[i, 0].item() < 0, degrees=matches.pose[i, 1].item()) for i in order.tolist()]
    measurement.pairs = _side_by_side(samples[order], warp_uint8(data.train[matches.index[order]], matches.pose[order]))
    pixels, features = thresholds["pixels"], thresholds["features"]
    measurement.copies = dict(
        explanation=_explain_threshold(data), threshold=pixels.distance, alarm=pixels.false_alarm,
        planted_found=pixels.planted_found, compared=pixels.compared, duplicates=pixels.duplicates,
        features_threshold=features.distance, features_planted_found=features.planted_found, closest=closest,
    )


def _explain_threshold(data: EvaluationData) -> str:
    """Say in sentences how the threshold for copies was found, and how well it works."""
    threshold = data.copy_thresholds["pixels"]
    text = (f"A sample counts as a copy if its distance is at most {threshold.distance:.3f}. "
            f"{100 * threshold.false_alarm:.1f} % of {threshold.compared - threshold.duplicates:,} training images are "
            f"that close to another one. Of copies planted on purpose (rotated, shifted, recoloured), "
            f"{100 * threshold.planted_found[0]:.0f} % are found.")
    if threshold.duplicates:
        text += (f" {threshold.duplicates:,} of {threshold.compared:,} training images have a duplicate among the "
                 f"others, and were not used for the threshold.")
    if data.false_alarms is not None:
        false_alarms = data.false_alarms["pixels"]
        text += (f" Of {len(false_alarms):,} images that the model has not seen, {false_alarms.sum():,} would count as "
                 f"copies.")
    return text


def _side_by_side(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Join images, uint8 [N, 3, S, S] each, to pairs [N, 3, S, 2 S + 2] with a white gap."""
    gap = torch.full((*left.shape[:3], 2), 255, dtype=torch.uint8)
    return torch.cat([left, gap, right], dim=3)
