"""Is a sample a copy of a training picture? The nearest one, however it is turned, and how near is too near.

    limits = calibrate(train, space)                       # uint8 [N, 3, S, S], and a FeatureSpace
    found = nearest(samples, train)                        # which picture, how far, and turned how
    copied = found.distance <= limits["pixels"].threshold

Two pictures are compared by what is left of one when the other is laid over it: mirrored or not, turned by up to 15
degrees and more, shifted a little, and with the brightness and contrast that fit best. What is left, as a share of the
picture's own contrast, is the distance: 0 for the same picture, 1 for nothing in common.

How near is too near? As near as hardly any real picture is to another one. Each training picture is compared with all
the others; the distance that one in a hundred falls below is the threshold, so that of new pictures that are no copies
one in a hundred is called one: the false alarm, 1 %. Data sets have the same creature twice, though, and such pairs
would pull the threshold down until no copy is found. They are known by two things, and left out of the threshold (and
counted): they are as near as copies that are planted (training pictures, mirrored, turned, shifted and recoloured), and
much nearer than anything else, while among many pictures that are all alike, whatever is near one has others nearly as
near. The share of planted copies that are found is reported, as is the false alarm on pictures that were kept aside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from augmentation import augment
from features import FeatureSpace
from forward_diffusion import seed_from

FALSE_ALARM = 0.01
FEWEST = 50  # pictures, below which no threshold can be found
PLANTED = 200
THUMBNAIL = 16  # side of the pictures in the coarse search
DETAIL = 32  # side of the pictures in the fine one
CANDIDATES = 8  # of the coarse search, for the fine one
FINALISTS = 3  # of those, after two steps of it
MUCH_NEARER = 0.6  # a duplicate is nearer than this share of the distance of the last finalist
MOST_CALIBRATED = 1000  # training pictures to compare with the others
POSES = [(mirror, angle, x / THUMBNAIL, y / THUMBNAIL) for mirror in (1.0, -1.0)
         for angle in (-14.0, -7.0, 0.0, 7.0, 14.0) for x in (-1, 0, 1) for y in (-1, 0, 1)]
# Fine search: steps of the angle in degrees, and of the shift as a share of the side.
STEPS = [(3.5, 1 / 32), (3.5, 1 / 32), (3.5, 1 / 32), (1.75, 1 / 64), (1.75, 1 / 64), (0.9, 1 / 128)]


@dataclass
class Nearest:
    """For each of N queries: the training picture that is nearest, the distance, and the pose it was found in.

    distance: [N], 0 ... 1; index: [N]; pose: [N, 4], what turns that picture into the query: 1, or -1 for mirrored;
    then degrees counter-clockwise; then shifts to the right and down as shares of the side. third: [N], the distance of
    the third nearest picture.
    """

    distance: torch.Tensor
    index: torch.Tensor
    pose: torch.Tensor
    third: torch.Tensor


@dataclass
class Limit:
    """A picture is called a copy if its distance is at most `threshold`.

    alarm: the share of new pictures, no copies, for which that will happen.
    found: (share, low, high) of planted copies for which it does, with its 95 % interval.
    duplicates: how many of the `compared` training pictures have a duplicate, and had no say.
    """

    threshold: float
    alarm: float
    found: tuple[float, float, float]
    duplicates: int
    compared: int


def warp(images: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """Pictures float [N, 3, S, S] in the poses [N, 4] of `Nearest`. What comes in at the edge repeats the edge."""
    mirror, angle, right, down = pose.T
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    # Where each pixel of the result is from, in -1 ... 1 with y down: shifted back, turned back, mirrored back.
    x, y = -2 * right, -2 * down
    matrix = torch.stack([torch.stack([mirror * cos, -mirror * sin, mirror * (cos * x - sin * y)], dim=1),
                          torch.stack([sin, cos, sin * x + cos * y], dim=1)], dim=1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def nearest(queries: torch.Tensor, pictures: torch.Tensor, own: torch.Tensor | None = None) -> Nearest:
    """The nearest of `pictures`, uint8 [M, 3, S, S], to each query, uint8 [N, 3, S, S].

    A query is never matched with picture own[i]: that is for pictures that are among the others themselves.
    """
    thumbnails, details = _shrink(pictures, THUMBNAIL), _shrink(pictures, DETAIL)
    parts = []
    for low in range(0, len(queries), 1000):
        batch = queries[low : low + 1000]
        index, pose = _candidates(_shrink(batch, THUMBNAIL), thumbnails, None if own is None else own[low : low + 1000])
        parts.append(_refine(_normalise(_shrink(batch, DETAIL)), details, index, pose))
    return Nearest(*(torch.cat(part) for part in zip(*parts)))


def _shrink(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 pictures as float32 in 0 ... 1, of at most `side` pixels a side, in batches."""
    side = min(side, images.shape[-1])
    return torch.cat([F.interpolate(x.float() / 255, size=(side, side), mode="area") for x in images.split(256)])


def _normalise(x: torch.Tensor) -> torch.Tensor:
    """Pictures as vectors [N, D] of mean 0 and length 1: a product of two is their correlation, which brightness and
    contrast do not change. A picture of one colour becomes zeros, and is like nothing."""
    x = x.flatten(1)
    x = x - x.mean(dim=1, keepdim=True)
    length = x.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-3 * x.shape[1] ** 0.5, x / length.clamp(min=1e-12), 0)


def _candidates(queries: torch.Tensor, pictures: torch.Tensor,
                own: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """By thumbnails in every pose of POSES: the pictures [N, CANDIDATES] most like each query, and poses [..., 4]."""
    flat = _normalise(queries)
    best = torch.full((len(queries), len(pictures)), -2.0)
    which = torch.zeros(best.shape, dtype=torch.uint8)
    for k, pose in enumerate(POSES):
        turned = _normalise(warp(pictures, torch.tensor(pose).expand(len(pictures), 4)))
        like = flat @ turned.T
        which.masked_fill_(like > best, k)
        torch.maximum(best, like, out=best)
    if own is not None:
        best[torch.arange(len(queries)), own] = -2.0
    index = best.topk(min(CANDIDATES, len(pictures)), dim=1).indices
    return index, torch.tensor(POSES)[which.gather(1, index).long()]


def _refine(queries: torch.Tensor, pictures: torch.Tensor, index: torch.Tensor,
            pose: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Better poses for each candidate, a step along each axis at a time; then what `Nearest` has of the best."""

    def likeness(pose: torch.Tensor) -> torch.Tensor:
        n, m = index.shape
        owner, flat, of = torch.arange(n).repeat_interleave(m), pose.reshape(-1, 4), index.flatten()
        parts = torch.arange(n * m).split(512)
        like = [(_normalise(warp(pictures[of[p]], flat[p])) * queries[owner[p]]).sum(1) for p in parts]
        return torch.cat(like).view(n, m)

    best = likeness(pose)
    for step, (angle, shift) in enumerate(STEPS):
        for axis, size in ((1, angle), (2, shift), (3, shift)):
            start = pose.clone()
            for sign in (-1, 1):
                tried = start.clone()
                tried[:, :, axis] += sign * size
                like = likeness(tried)
                better = like > best
                pose = torch.where(better[:, :, None], tried, pose)
                best = torch.where(better, like, best)
        if step == 1 or step == len(STEPS) - 1:
            best, kept = best.topk(min(FINALISTS, best.shape[1]), dim=1)
            index, pose = index.gather(1, kept), pose.gather(1, kept[:, :, None].expand(-1, -1, 4))
    distance = (1 - best.clamp(0, 1) ** 2).sqrt()
    return distance[:, 0], index[:, 0], pose[:, 0], distance[:, -1]


# ---------------------------------------------------------------------------------------------------------------------
# how near is too near


def calibrate(train: torch.Tensor, space: FeatureSpace, seed: int = 0) -> dict[str, Limit]:
    """Limits for the distances of `nearest` ("pixels") and `feature_distance` ("features"), from the training pictures.

    Up to 1,000 of them are compared with all others. With n of them in use the threshold is the k-th smallest distance,
    k = floor(0.01 (n + 1)): a further picture of their kind falls below it with probability k / (n + 1), whatever the
    distances look like. With fewer than 99 the smallest is taken, and the alarm is what that gives: 1 / (n + 1).

    Raises:
        ValueError: for fewer than 50 pictures.
    """
    if len(train) < FEWEST:
        raise ValueError(f"finding copies needs {FEWEST} training pictures, and there are {len(train)}")
    generator = torch.Generator().manual_seed(seed_from(seed, stream="copies"))
    chosen = torch.randperm(len(train), generator=generator)[:MOST_CALIBRATED]
    planted = plant(train[chosen[:PLANTED]], generator)
    own, again = nearest(train[chosen], train, chosen), nearest(planted, train)
    is_duplicate = torch.zeros(len(train), dtype=torch.bool)
    pair = (own.distance <= again.distance.quantile(0.95)) & (own.distance < MUCH_NEARER * own.third)
    is_duplicate[chosen[pair]] = is_duplicate[own.index[pair]] = True  # both, even if only one way round is it plain
    duplicate = is_duplicate[chosen]
    limits = {}
    for name, distance, of_planted in (
        ("pixels", own.distance, again.distance),
        ("features", feature_distance(train[chosen], train, own, space),
         feature_distance(planted, train, again, space)),
    ):
        rest = distance[~duplicate].sort().values
        if len(rest) < FEWEST:  # a set of duplicates alone: no pair of different pictures to learn from
            raise ValueError(f"finding copies needs {FEWEST} training pictures without a duplicate among the others, "
                             f"and there are {len(rest)} of {len(chosen)}")
        k = max(1, math.floor(FALSE_ALARM * (len(rest) + 1)))
        threshold = rest[k - 1].item()
        found = wilson((of_planted <= threshold).sum().item(), len(planted))
        limits[name] = Limit(threshold, k / (len(rest) + 1), found, duplicate.sum().item(), len(chosen))
    return limits


def plant(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Copies that a model might make of pictures uint8 [N, 3, S, S]: each with the augmentation of training (a mirror
    image, a rotation, other colours: half of the time each), and shifted by up to a sixteenth of the side."""
    shift = (2 * torch.rand(len(images), 2, generator=generator) - 1) / 16
    pose = torch.cat([torch.ones(len(images), 1), torch.zeros(len(images), 1), shift], dim=1)
    changed = warp((augment(images, generator)[0] + 1) / 2, pose)
    return (255 * changed).round().clamp(0, 255).to(torch.uint8)


def feature_distance(queries: torch.Tensor, pictures: torch.Tensor, found: Nearest,
                     space: FeatureSpace) -> torch.Tensor:
    """How far each query is in features from the picture found for it, [N], after that was laid over it.

    A second opinion on the same pairs, from colours and edges at full size. The pose is needed: the features see where
    things are, and a copy that is shifted is further away in them than another creature that is not.
    """
    parts = []
    for p in torch.arange(len(queries)).split(256):
        laid = warp(pictures[found.index[p]].float() / 255, found.pose[p])
        laid = (255 * laid).round().clamp(0, 255).to(torch.uint8)
        parts.append((space(queries[p]) - space(laid)).norm(dim=1))
    return torch.cat(parts)


def wilson(count: int, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """A share and its 95 % interval, which stays within 0 ... 1 and is right for shares near them too (Wilson 1927)."""
    if n == 0:
        return math.nan, 0.0, 1.0
    share = count / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return share, max(0.0, middle - half), min(1.0, middle + half)
