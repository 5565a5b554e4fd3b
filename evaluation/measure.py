"""Measurement of one checkpoint or one folder of samples: every figure of the report.

    measurement = Measurement("checkpoints/critters.pt", epoch=20)
    measurement.samples, measurement.sampling = draw_samples(pipeline, data, 1000)
    measure_bits(measurement, pipeline, data)
    measure_samples(measurement, data)
    measurement.figures["recall"]              # {"value": ..., "low": ..., "high": ..., "real": {"value": ..., ...}}
"""

from __future__ import annotations

import math
from collections import Counter
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
from evaluation.membership import denoising_errors, gap_by_noise, membership, noise_levels
from evaluation.memorization import find_copies, warp_uint8
from models.pipeline import BY_EARLIER, BY_TYPES, DEFAULT_GUIDANCE, Pipeline
from utils.images import to_uint8
from utils.seeding import seed_from

NUM_PAIRS = 24  # closest pairs that are shown
FEW = 10  # images of a kind, below which an error bar of bits is not to be trusted
RARE = 5  # training images that have the same types, at most, for these to count as rare
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
    sampling: sampler, steps, seed, guidance, guide and built-in guidance of samples that were drawn here.
    figures: by name (see meanings.py): a figure (see error_bars.py) with, under "real", that of real images in the
        place of the samples, the best that can be expected.
    bits: details of the variational bounds, "train" and "held_out".
    gap_by_noise: a figure for each noise level, with its "timestep" and "noise", the standard deviation of the noise in
        x_t as a multiple of the image's coefficient (see membership.py).
    compared: number of samples in the distances, or None.
    copies: details of the search for copies, or None.
    copies_by_type: a row for each type: "type", and a figure with its "total" number of samples for "plain" and
        "guided" samples, where there are any.
    guided_by: what the "guided" samples were guided away from, or None.
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
    gap_by_noise: list[dict] = field(default_factory=list)
    compared: int | None = None
    copies: dict[str, Any] | None = None
    copies_by_type: list[dict] = field(default_factory=list)
    guided_by: str | None = None
    pairs: torch.Tensor | None = None
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# the model


def draw_samples(pipeline: Pipeline, data: EvaluationData, num_samples: int, *, sampler: str | None = None,
                 steps: int | None = None, guidance: float = 1.0, guide: str | None = None, seed: int = 0,
                 batch_size: int = 64) -> tuple[torch.Tensor, dict[str, Any]]:
    """Draw samples, uint8 [num_samples, 3, S, S]; also return how: the sampler, steps, seed and guidance.

    A model with types gets the labels of random training images, so that the samples have the types of the data.

    Args:
        sampler: default: that of the training's sample grids.
        steps: default: as for those grids; 50 for another sampler.
        guide: what guidance goes away from, see `Pipeline.choose_guide`.
        seed: sample i is drawn from seed + i.

    Raises:
        ValueError: for guidance that the model cannot follow, or that has no labels.
    """
    # Settings
    grid_sampler, grid_steps = pipeline.grid_sampler
    sampler = sampler or grid_sampler
    steps = steps or (grid_steps if sampler == grid_sampler else OTHER_SAMPLER_STEPS)
    steps = min(steps, pipeline.scheduler.num_timesteps)
    labels = sample_labels(data, num_samples, seed)
    guide = guide or pipeline.default_guide
    if guidance != 1 and guide == BY_TYPES and pipeline.class_names and labels is None:
        raise ValueError("--guidance strengthens types, and the images of the data have none: leave --guidance out")
    guide = pipeline.choose_guide(guidance, labels, guide)

    # Batches, each converted to uint8 at once: floats would take four times the memory
    batches = []
    with tqdm(total=steps * math.ceil(num_samples / batch_size), desc="sampling", unit="step",
              dynamic_ncols=True) as bar:
        for low in range(0, num_samples, batch_size):
            high = min(low + batch_size, num_samples)
            images = pipeline.sample(
                range(seed + low, seed + high), labels=None if labels is None else labels[low:high],
                guidance=guidance, guide=guide, sampler=sampler, steps=steps, batch_size=batch_size,
                callback=lambda *_: bar.update(),
            )
            batches.append(to_uint8(images))
    return torch.cat(batches), dict(sampler=sampler, steps=steps, seed=seed, guidance=guidance,
                                    guide=pipeline.earlier_name if guide == BY_EARLIER else guide,
                                    built_in_guidance=pipeline.built_in_guidance)


def sample_labels(data: EvaluationData, count: int, seed: int) -> torch.Tensor | None:
    """Return the labels of `count` random training images [count, K], which samples are drawn with; None without."""
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
    bounds, details = {}, {}
    for name, (images, labels) in _chosen_images(data, num_images, seed).items():
        # What the model sees, in 256 levels: latents are rounded to them, pixels are these levels.
        levels = to_uint8(pipeline.encode(images.float() / 127.5 - 1) / latent_range)
        with _progress(f"bits, {name}", len(images) * (1 + num_timesteps)) as bar:
            bound = variational_bound(
                pipeline.denoise, pipeline.scheduler, levels, latent_range=latent_range,
                prediction=pipeline.prediction, labels=labels, num_timesteps=num_timesteps, seed=seed,
                batch_size=batch_size, device=pipeline.device, callback=bar.update,
            )
        bounds[name], details[name] = bound, png_bits(images)
        measurement.figures[f"bits_{name}"] = score_figure(Score(bound.mean, bound.stderr))
        measurement.bits[name] = dict(num_images=len(images), prior=bound.prior.mean().item(), ranges=bound.ranges,
                                      steps=bound.steps.mean(dim=0).tolist(), decoder=bound.decoder.mean().item())
    if len(bounds) == 2:
        fewest = min(len(detail) for detail in details.values())
        if fewest < FEW:
            measurement.notes.append(f"Bits and membership rest on only {fewest} images of one kind; with fewer than "
                                     f"{FEW}, their intervals are too narrow.")
        gap, error = generalisation_gap(bounds["train"], bounds["held_out"], (details["train"], details["held_out"]))
        measurement.figures["bits_gap"] = score_figure(Score(gap, error))


def measure_membership(measurement: Measurement, pipeline: Pipeline, data: EvaluationData, num_images: int = 200,
                       num_levels: int = 16, *, seed: int = 0, batch_size: int = 64) -> None:
    """Measure how much better training images are predicted than unseen ones, by noise level and by image.

    Nothing is measured without unseen images.

    Args:
        num_images, num_levels: images of each kind, and noise levels that each image is predicted at.
    """
    chosen = _chosen_images(data, num_images, seed)
    if len(chosen) < 2:
        return
    scheduler, errors, details = pipeline.scheduler, {}, {}
    timesteps = noise_levels(scheduler, num_levels)
    for name, (images, labels) in chosen.items():
        with _progress(f"noise levels, {name}", len(images) * len(timesteps)) as bar:
            errors[name] = denoising_errors(
                pipeline.denoise, scheduler, pipeline.encode(images.float() / 127.5 - 1), timesteps,
                prediction=pipeline.prediction, latent_range=pipeline.space.latent_range, labels=labels, seed=seed,
                batch_size=batch_size, device=pipeline.device, callback=bar.update,
            )
        details[name] = png_bits(images)
    train, unseen, detail = errors["train"], errors["held_out"], (details["train"], details["held_out"])
    noise = scheduler.snr()[timesteps].rsqrt().tolist()
    measurement.gap_by_noise = [dict(timestep=t, noise=sigma, **figure)
                                for t, sigma, figure in zip(timesteps, noise, gap_by_noise(train, unseen, detail))]
    figures, false_positive_rate = membership(train, unseen, detail)
    measurement.figures["membership_auc"] = figures["auc"]
    measurement.figures["membership_found"] = figures["found"] | dict(chance=false_positive_rate)


def _chosen_images(data: EvaluationData, count: int, seed: int
                   ) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Choose up to `count` images "train" and "held_out", with their labels; a kind with fewer than two is left out."""
    chosen = {}
    for name, images, labels in (("train", data.train, data.train_labels),
                                 ("held_out", data.unseen, data.unseen_labels)):
        if len(images) >= 2:
            generator = torch.Generator().manual_seed(seed_from(seed, stream=f"likelihood {name}"))
            index = torch.randperm(len(images), generator=generator)[:count]
            chosen[name] = images[index], None if labels is None else labels[index]
    return chosen


def _progress(text: str, total: int) -> tqdm:
    return tqdm(total=total, desc=text.replace("_", " "), unit="pass", dynamic_ncols=True)


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
    scores, real_scores = (_scores(images, real, data, outside) for images in (samples, other_real))
    if fid:
        try:
            scores |= inception_distances(samples, real, cuda)
            real_scores |= inception_distances(other_real, real, cuda)
        except ValueError as error:
            measurement.notes.append(f"FID and KID were not measured: {error}.")
    for name, real_score in real_scores.items():
        figure, real_figure = score_figure(scores[name]), score_figure(real_score)
        if name.removeprefix(OUTSIDE) in FRACTIONS:
            figure, real_figure = widened(figure, len(samples)), widened(real_figure, len(real))
        measurement.figures[name] = {**figure, "real": real_figure}
    measurement.compared = len(samples)
    if outside is not None:
        measurement.notes.append(OUTSIDE_NOTE)


def _scores(samples: torch.Tensor, real: torch.Tensor, data: EvaluationData, outside: EfficientNetFeatures | None
            ) -> dict[str, Score]:
    """Compare two sets of images; the finest and the coarsest scale of the patch distance get names of their own."""
    scores = compare(samples, real, data.feature_space)
    if outside is not None:
        scores |= {OUTSIDE + name: score for name, score in feature_scores(outside(samples), outside(real)).items()}
    scales = [name for name in scores if name.startswith("wasserstein_")]  # from the finest
    scores["wasserstein_fine"], scores["wasserstein_coarse"] = scores[scales[0]], scores[scales[-1]]
    return scores


def _measure_copies(measurement: Measurement, data: EvaluationData) -> None:
    """Measure the fraction of copies among the samples and among unseen images; find the closest pairs."""
    samples, thresholds = measurement.samples, data.copy_thresholds
    matches, is_copy = find_copies(samples, data.train, thresholds, data.feature_space)
    for name, kind in (("copies", "pixels"), ("copies_ratio", "ratio"), ("copies_features", "features")):
        measurement.figures[name] = _copies_figure(is_copy[kind], data, kind)
    if measurement.sampling is not None:
        labels = sample_labels(data, len(samples), measurement.sampling["seed"])
        _add_copies_by_type(measurement, data, "plain", is_copy["pixels"], labels)

    # Closest pairs
    order = matches.distance.argsort()[:NUM_PAIRS]
    closest = [dict(sample=i, image=data.names[matches.index[i]], distance=matches.distance[i].item(),
                    mirrored=matches.pose[i, 0].item() < 0, degrees=matches.pose[i, 1].item()) for i in order.tolist()]
    measurement.pairs = _side_by_side(samples[order], warp_uint8(data.train[matches.index[order]], matches.pose[order]))
    pixels, ratio, features = thresholds["pixels"], thresholds["ratio"], thresholds["features"]
    measurement.copies = dict(
        explanation=_explain_threshold(data), threshold=pixels.distance, alarm=pixels.false_alarm,
        planted_found=pixels.planted_found, compared=pixels.compared, duplicates=pixels.duplicates,
        ratio_alarm=ratio.false_alarm, ratio_planted_found=ratio.planted_found,
        features_threshold=features.distance, features_planted_found=features.planted_found, closest=closest,
    )


def measure_guided_copies(measurement: Measurement, pipeline: Pipeline, data: EvaluationData, num_samples: int = 200,
                          *, guide: str | None = None, sampler: str | None = None, steps: int | None = None,
                          seed: int = 0, batch_size: int = 64) -> None:
    """Search for copies among samples at the guidance that generate.py uses by default, after `measure_samples`.

    Guidance makes samples typical of the data, or of their types; where few training images have these types, that can
    mean a copy. The samples have the seeds and types of the first plain ones.
    """
    labels, guide = sample_labels(data, num_samples, seed), guide or pipeline.default_guide
    if measurement.copies is None or guide not in pipeline.guides or guide == BY_TYPES and labels is None:
        return
    samples, sampling = draw_samples(pipeline, data, num_samples, sampler=sampler, steps=steps,
                                     guidance=DEFAULT_GUIDANCE, guide=guide, seed=seed, batch_size=batch_size)
    measurement.guided_by = sampling["guide"]
    is_copy = find_copies(samples, data.train, data.copy_thresholds, data.feature_space)[1]["pixels"]
    measurement.figures["copies_guided"] = _copies_figure(is_copy, data, "pixels")
    _add_copies_by_type(measurement, data, "guided", is_copy, labels)


def _copies_figure(is_copy: torch.Tensor, data: EvaluationData, kind: str) -> dict[str, Any]:
    """Return the fraction of copies, with that of unseen images where there are any."""
    figure = fraction_figure(is_copy)
    return figure if data.false_alarms is None else figure | dict(real=fraction_figure(data.false_alarms[kind]))


def _add_copies_by_type(measurement: Measurement, data: EvaluationData, name: str, is_copy: torch.Tensor,
                        labels: torch.Tensor | None) -> None:
    """Add the fraction of copies among the samples of each type, and of rare combinations of types, under `name`."""
    if labels is None:
        return
    counts = Counter(map(tuple, data.train_labels.tolist()))
    is_rare = torch.tensor([counts[tuple(row)] <= RARE for row in labels.tolist()])
    groups = dict(zip(data.class_names, labels.bool().T)) | {f"types of at most {RARE} training images": is_rare}
    rows = {row["type"]: row for row in measurement.copies_by_type}
    for group, mask in groups.items():
        if mask.any():
            row = rows.setdefault(group, dict(type=group))
            row[name] = fraction_figure(is_copy[mask]) | dict(total=mask.sum().item())
    measurement.copies_by_type = list(rows.values())


def _explain_threshold(data: EvaluationData) -> str:
    """Say in sentences how the threshold for copies was found, and how well it works."""
    threshold = data.copy_thresholds["pixels"]
    text = (f"A sample counts as a copy if its distance is at most {threshold.distance:.3f}. An image that is no copy "
            f"is that close with a probability of {100 * threshold.false_alarm:.1f} %, estimated from "
            f"{threshold.compared - threshold.duplicates:,} training images. Of copies planted on purpose (rotated, "
            f"shifted, recoloured), {100 * threshold.planted_found[0]:.0f} % are found; the ratio of the nearest to "
            f"the second nearest distance finds {100 * data.copy_thresholds['ratio'].planted_found[0]:.0f} % of them.")
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
