"""Detection of copied training images: nearest training image in any pose, and a calibrated distance threshold.

    thresholds = calibrate_thresholds(train, space)                # uint8 [N, 3, S, S], and a FeatureSpace
    matches, is_copy = find_copies(samples, train, thresholds, space)
    is_copy["pixels"].float().mean()                               # matches: nearest image, its distance and pose

The distance of two images is the fraction of the contrast of one that the other does not explain, after the other was
mirrored or not, rotated (searched up to 14 degrees, and refined from there), shifted slightly, and fitted in brightness
and contrast. It is 0 for the same image and 1 for images with nothing in common.

The threshold comes from the training images themselves: each is compared with all others, and the distance below
which one in a hundred falls is the threshold. Of new images that are no copies, one in a hundred is then called a copy
(the false alarm rate, 1 %). Data sets contain duplicates, though, which would lower the threshold until no copy is
found. They are left out of the calibration, and counted. An image is taken for a duplicate of another if it is both as
near to it as planted copies are (training images that were mirrored, rotated, shifted and recoloured on purpose), and
much nearer than to any other image; the second condition spares data sets in which all images are alike.

The fraction of planted copies that is found is reported, and so is the false alarm rate on unseen images.

The literature's yardstick stands beside it: a sample is a copy if its distance to the nearest training image is less
than a third of that to the second nearest (Yoon et al. 2023, Gu et al. 2023). There it is the Euclidean distance of the
pixels; here it is what is left of that after the fit, since plain pixels miss nearly every copy that is turned or
recoloured. It needs no calibration, and misses copies of images that have a duplicate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evaluation.error_bars import wilson_interval
from evaluation.features import FeatureSpace
from training.augment import augment
from utils.seeding import seed_from

FALSE_ALARM_RATE = 0.01
COPY_RATIO = 1 / 3  # nearest to second nearest distance of a copy
MIN_IMAGES = 50  # fewer training images give no threshold
NUM_PLANTED = 200
MAX_CALIBRATED = 1000  # training images that are compared with all others
COARSE_SIZE = 16  # side of the images in the coarse search, pixels
FINE_SIZE = 32  # and in the fine search
CANDIDATES = 8  # images that go from the coarse search to the fine search
FINALISTS = 3  # images that are left after two steps of the fine search
DUPLICATE_RATIO = 0.6  # a duplicate is nearer than this fraction of the last finalist's distance
COARSE_POSES = [(mirror, angle, x / COARSE_SIZE, y / COARSE_SIZE) for mirror in (1.0, -1.0)
                for angle in (-14.0, -7.0, 0.0, 7.0, 14.0) for x in (-1, 0, 1) for y in (-1, 0, 1)]
# Steps of the fine search: angle in degrees, and shift as a fraction of the side.
FINE_STEPS = [(3.5, 1 / 32), (3.5, 1 / 32), (3.5, 1 / 32), (1.75, 1 / 64), (1.75, 1 / 64), (0.9, 1 / 128)]


@dataclass
class Matches:
    """The nearest training image of each of N queries.

    distance: [N], 0 ... 1.
    index: [N], number of the training image.
    pose: [N, 4], the transformation of the training image that fits the query best (see `warp`).
    second, third: [N], distances of the second and third nearest training image.
    """

    distance: torch.Tensor
    index: torch.Tensor
    pose: torch.Tensor
    second: torch.Tensor
    third: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        """The distance of the nearest image as a fraction of that of the second nearest, [N], 0 ... 1."""
        return self.distance / self.second.clamp(min=1e-6)


@dataclass
class CopyThreshold:
    """An image is called a copy if its distance is at most `distance`.

    false_alarm: probability that this happens to a new image that is no copy.
    planted_found: fraction of planted copies for which it happens, with its 95 % interval: (fraction, low, high).
    duplicates: number of the `compared` training images that have a duplicate, and were not used.
    """

    distance: float
    false_alarm: float
    planted_found: tuple[float, float, float]
    duplicates: int
    compared: int


# ---------------------------------------------------------------------------------------------------------------------
# search


def warp(images: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """Transform images, float [N, 3, S, S], by poses [N, 4]; border pixels are repeated where an edge comes in.

    A pose is: 1, or -1 to mirror; rotation in degrees counter-clockwise; shifts to the right and down as fractions of
    the side.
    """
    mirror, angle, right, down = pose.T
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    # The source of each pixel of the result, in -1 ... 1 with y pointing down: undo the shift, rotation and mirroring.
    x, y = -2 * right, -2 * down
    matrix = torch.stack([torch.stack([mirror * cos, -mirror * sin, mirror * (cos * x - sin * y)], dim=1),
                          torch.stack([sin, cos, sin * x + cos * y], dim=1)], dim=1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def warp_uint8(images: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """Transform images, uint8 [N, 3, S, S], as `warp` does, rounded to uint8."""
    return (255 * warp(images.float() / 255, pose)).round().clamp(0, 255).to(torch.uint8)


def find_nearest(queries: torch.Tensor, images: torch.Tensor, own_index: torch.Tensor | None = None) -> Matches:
    """Find the nearest of `images`, uint8 [M, 3, S, S], to each query, uint8 [N, 3, S, S].

    With `own_index` [N], query i is never matched with image own_index[i]; for queries that are among the images.
    """
    coarse, fine = _downscale(images, COARSE_SIZE), _downscale(images, FINE_SIZE)
    parts = []
    for low in range(0, len(queries), 1000):
        batch = queries[low : low + 1000]
        batch_own = None if own_index is None else own_index[low : low + 1000]
        index, pose = _coarse_search(_downscale(batch, COARSE_SIZE), coarse, batch_own)
        parts.append(_fine_search(_standardise(_downscale(batch, FINE_SIZE)), fine, index, pose))
    return Matches(*(torch.cat(part) for part in zip(*parts)))


def _downscale(images: torch.Tensor, side: int) -> torch.Tensor:
    """Convert uint8 images to float32 in [0, 1] with at most `side` pixels a side."""
    side = min(side, images.shape[-1])
    return torch.cat([F.interpolate(x.float() / 255, size=(side, side), mode="area") for x in images.split(256)])


def _standardise(x: torch.Tensor) -> torch.Tensor:
    """Flatten images to vectors [N, D] of mean 0 and length 1, whose products are correlations.

    Brightness and contrast do not change a correlation. An image of one colour becomes zeros, and matches nothing.
    """
    x = x.flatten(1)
    x = x - x.mean(dim=1, keepdim=True)
    length = x.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-3 * x.shape[1] ** 0.5, x / length.clamp(min=1e-12), 0)


def _coarse_search(queries: torch.Tensor, images: torch.Tensor, own_index: torch.Tensor | None
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare small images in every coarse pose.

    Returns:
        The most similar images of each query [N, CANDIDATES] and their poses [N, CANDIDATES, 4].
    """
    flat = _standardise(queries)
    best = torch.full((len(queries), len(images)), -2.0)  # correlation, at least -1
    best_pose = torch.zeros(best.shape, dtype=torch.uint8)
    for number, pose in enumerate(COARSE_POSES):
        warped = _standardise(warp(images, torch.tensor(pose).expand(len(images), 4)))
        similarity = flat @ warped.T
        best_pose.masked_fill_(similarity > best, number)
        torch.maximum(best, similarity, out=best)
    if own_index is not None:
        best[torch.arange(len(queries)), own_index] = -2.0
    index = best.topk(min(CANDIDATES, len(images)), dim=1).indices
    return index, torch.tensor(COARSE_POSES)[best_pose.gather(1, index).long()]


def _fine_search(queries: torch.Tensor, images: torch.Tensor, index: torch.Tensor, pose: torch.Tensor
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Improve the pose of each candidate, one step along each axis at a time; return the fields of `Matches`."""
    best = _similarity(queries, images, index, pose)
    for step, (angle, shift) in enumerate(FINE_STEPS):
        for axis, size in ((1, angle), (2, shift), (3, shift)):
            start = pose.clone()
            for sign in (-1, 1):
                tried = start.clone()
                tried[:, :, axis] += sign * size
                similarity = _similarity(queries, images, index, tried)
                better = similarity > best
                pose = torch.where(better[:, :, None], tried, pose)
                best = torch.where(better, similarity, best)
        if step == 1 or step == len(FINE_STEPS) - 1:  # the last time to sort them
            best, kept = best.topk(min(FINALISTS, best.shape[1]), dim=1)
            index, pose = index.gather(1, kept), pose.gather(1, kept[:, :, None].expand(-1, -1, 4))
    distance = (1 - best.clamp(0, 1) ** 2).sqrt()
    return distance[:, 0], index[:, 0], pose[:, 0], distance[:, min(1, distance.shape[1] - 1)], distance[:, -1]


def _similarity(queries: torch.Tensor, images: torch.Tensor, index: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """Correlate standardised queries [N, D] with images[index], index [N, M], in poses [N, M, 4]; returns [N, M]."""
    n, m = index.shape
    query, image, flat_pose = torch.arange(n).repeat_interleave(m), index.flatten(), pose.reshape(-1, 4)
    parts = [(_standardise(warp(images[image[part]], flat_pose[part])) * queries[query[part]]).sum(1)
             for part in torch.arange(n * m).split(512)]
    return torch.cat(parts).view(n, m)


def feature_distance(queries: torch.Tensor, images: torch.Tensor, matches: Matches, space: FeatureSpace
                     ) -> torch.Tensor:
    """Return the distance [N] in feature space of each query from its match, in the pose that was found.

    It is a second opinion on the same pairs, by colours and edges at full size. Without the pose a shifted copy would
    be further away than a different creature in the same place.
    """
    parts = []
    for part in torch.arange(len(queries)).split(256):
        warped = warp_uint8(images[matches.index[part]], matches.pose[part])
        parts.append((space(queries[part]) - space(warped)).norm(dim=1))
    return torch.cat(parts)


def find_copies(queries: torch.Tensor, images: torch.Tensor, thresholds: dict[str, CopyThreshold], space: FeatureSpace
                ) -> tuple[Matches, dict[str, torch.Tensor]]:
    """Return the nearest image of each query, and which are copies by "pixels", "ratio" and "features", bool [N]."""
    matches = find_nearest(queries, images)
    by_features = feature_distance(queries, images, matches, space)
    return matches, {"pixels": matches.distance <= thresholds["pixels"].distance, "ratio": matches.ratio < COPY_RATIO,
                     "features": by_features <= thresholds["features"].distance}


# ---------------------------------------------------------------------------------------------------------------------
# calibration


def calibrate_thresholds(train: torch.Tensor, space: FeatureSpace, seed: int = 0) -> dict[str, CopyThreshold]:
    """Find the thresholds for the distances of `find_nearest` ("pixels") and `feature_distance` ("features").

    The threshold of the "ratio" is COPY_RATIO; how well it works is found in the same way.

    Up to 1,000 training images are compared with all others. With n of them in use the threshold is the k-th smallest
    distance, k = floor(0.01 (n + 1)): a further image of the same kind falls below it with probability k / (n + 1),
    whatever the distribution of distances. For n below 99 it is the smallest distance, with a false alarm rate of
    1 / (n + 1).

    Raises:
        ValueError: for fewer than 50 training images without a duplicate.
    """
    if len(train) < MIN_IMAGES:
        raise ValueError(f"at least {MIN_IMAGES} training images are needed, not {len(train)}")
    generator = torch.Generator().manual_seed(seed_from(seed, stream="copies"))
    chosen = torch.randperm(len(train), generator=generator)[:MAX_CALIBRATED]
    planted = plant_copies(train[chosen[:NUM_PLANTED]], generator)
    others, planted_matches = find_nearest(train[chosen], train, chosen), find_nearest(planted, train)

    # Duplicates: both images of a pair, even if only one of them is plainly much nearer to the other.
    is_pair = ((others.distance <= planted_matches.distance.quantile(0.95))
               & (others.distance < DUPLICATE_RATIO * others.third))
    is_duplicate = torch.zeros(len(train), dtype=torch.bool)
    is_duplicate[chosen[is_pair]] = True
    is_duplicate[others.index[is_pair]] = True
    is_duplicate = is_duplicate[chosen]
    if (~is_duplicate).sum() < MIN_IMAGES:
        raise ValueError(f"at least {MIN_IMAGES} training images without a duplicate among the others are needed, not "
                         f"{(~is_duplicate).sum()} of {len(chosen)}")

    # Thresholds
    distances = {
        "pixels": (others.distance, planted_matches.distance),
        "features": (feature_distance(train[chosen], train, others, space),
                     feature_distance(planted, train, planted_matches, space)),
    }
    thresholds = {}
    for name, (distance, planted_distance) in distances.items():
        used = distance[~is_duplicate].sort().values
        k = max(1, math.floor(FALSE_ALARM_RATE * (len(used) + 1)))
        threshold = used[k - 1].item()
        found = wilson_interval((planted_distance <= threshold).sum().item(), len(planted))
        thresholds[name] = CopyThreshold(threshold, k / (len(used) + 1), found, is_duplicate.sum().item(), len(chosen))

    found = wilson_interval((planted_matches.ratio < COPY_RATIO).sum().item(), len(planted))
    false_alarm = (others.ratio < COPY_RATIO)[~is_duplicate].float().mean().item()
    thresholds["ratio"] = CopyThreshold(COPY_RATIO, false_alarm, found, is_duplicate.sum().item(), len(chosen))
    return thresholds


def plant_copies(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Make copies of images, uint8 [N, 3, S, S], as a model might.

    They get the augmentation of training (mirroring, a rotation and other colours, each with probability 1/2) and a
    shift of up to a sixteenth of the side.
    """
    shift = (2 * torch.rand(len(images), 2, generator=generator) - 1) / 16
    pose = torch.cat([torch.ones(len(images), 1), torch.zeros(len(images), 1), shift], dim=1)
    changed = warp((augment(images, generator)[0] + 1) / 2, pose)
    return (255 * changed).round().clamp(0, 255).to(torch.uint8)
