"""How far are the samples from the data? By patches (sliced Wasserstein), and by neighbours (precision, recall, ...).

    scores = compare(samples, pictures, space)         # uint8 [N, 3, S, S] each, and a FeatureSpace
    print(scores["recall"].value, scores["recall"].error)

Every figure depends on how many pictures went into it, and is imperfect even for real ones. So the same figure of real
pictures against other real pictures, in the same numbers, is the yardstick: `sets_to_compare` cuts both out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from features import FeatureSpace
from forward_diffusion import seed_from

FEWEST = 50  # pictures in a set, below which none of this says anything
NEIGHBOURS = 5
PATCH = 7
PATCHES = 32  # a picture and scale
PROJECTIONS = 64
GROUPS = 10  # of the jackknife


@dataclass
class Score:
    """A figure and its standard error; and the same figure without each tenth of both sets, from which that comes. The
    tenths are the same ones for sets of the same size, so the difference of two scores can have an error of its own."""

    value: float
    error: float
    others: tuple[float, ...] = ()


def sets_to_compare(samples: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, seed: int = 0,
                    largest: int = 1000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(samples, reference, yardstick), random subsets of one size n, at most `largest`.

    Reference and yardstick are real pictures that have none in common: training and held-out ones where there are
    enough of the latter; else all real pictures are shuffled and halved, which for a distance among real pictures,
    where no model has a part, comes to the same.

    Raises:
        ValueError: if there would be fewer than 50 in a set.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, stream="distances"))
    samples, train, held_out = [x[torch.randperm(len(x), generator=generator)] for x in (samples, train, held_out)]
    if len(held_out) < min(len(samples), len(train), largest) / 2:
        real = torch.cat([train, held_out])
        real = real[torch.randperm(len(real), generator=generator)]
        train, held_out = real[: len(real) // 2], real[len(real) // 2 :]
    n = min(len(samples), len(train), len(held_out), largest)
    if n < FEWEST:
        raise ValueError(f"a distance needs {FEWEST} samples and {2 * FEWEST} pictures of the data; there are "
                         f"{len(samples)} and {len(train) + len(held_out)}")
    return samples[:n], train[:n], held_out[:n]


def compare(samples: torch.Tensor, pictures: torch.Tensor, space: FeatureSpace, seed: int = 0) -> dict[str, Score]:
    """Every distance of this file between two sets of pictures uint8 [N, 3, S, S], of the same N."""
    return {**neighbour_scores(space(samples), space(pictures)), **sliced_wasserstein(samples, pictures, seed)}


# ---------------------------------------------------------------------------------------------------------------------
# neighbours


def neighbour_scores(samples: torch.Tensor, pictures: torch.Tensor, k: int = NEIGHBOURS) -> dict[str, Score]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of features [N, D].

    Around each point a ball reaches to its k-th nearest neighbour in its own set; the balls of a set are where it is.
        precision: the share of samples within a ball of the pictures: are they like real ones?
        recall: the share of pictures within a ball of the samples: is everything that is real also made?
        density: how many of the pictures' balls a sample is in, on average, over k. Unlike precision, one picture that
            lies far out, with its large ball, counts little. Around 1 for real ones; it can be more.
        coverage: the share of pictures with a sample in their ball: recall, not raised by samples that lie far out.
    """
    if samples.shape != pictures.shape:
        raise ValueError(f"the sets must have one shape, not {list(samples.shape)} and {list(pictures.shape)}")
    among_pictures, among_samples = torch.cdist(pictures, pictures), torch.cdist(samples, samples)
    between = torch.cdist(pictures, samples)

    def scores(keep: torch.Tensor) -> torch.Tensor:
        radius_p = among_pictures[keep][:, keep].kthvalue(k + 1, dim=1).values  # the first is the point itself
        radius_s = among_samples[keep][:, keep].kthvalue(k + 1, dim=1).values
        distance = between[keep][:, keep]
        inside = distance <= radius_p[:, None]
        recalled = distance <= radius_s
        return torch.stack([inside.any(0).float().mean(), recalled.any(1).float().mean(),
                            inside.float().sum(0).mean() / k, inside.any(1).float().mean()])

    return _jackknife(("precision", "recall", "density", "coverage"), scores, len(pictures))


# ---------------------------------------------------------------------------------------------------------------------
# patches


def sliced_wasserstein(samples: torch.Tensor, pictures: torch.Tensor, seed: int = 0) -> dict[str, Score]:
    """The sliced Wasserstein distance between patches, at each scale (Karras et al. 2018, section 5); 0 is the best.

    The scales are levels of a Laplacian pyramid, from S down to 16 pixels (or S, if that is less): the finest holds
    what is sharp, the last one the whole coarse picture. From each picture and level come 32 patches of 7 x 7 pixels at
    random places. They are normalised to mean 0 and deviation 1 in each channel, both sets by the pictures' statistics:
    each by its own, as in the paper, would make pale or grainy samples equal to them. Patches are projected to 64
    random directions; along each, the distance of two sets of equal size is the mean difference of their sorted values.

    Returns:
        "wasserstein_64", "wasserstein_32", ... by the level's side in pixels, and their mean, "wasserstein".
    """
    if samples.shape != pictures.shape:
        raise ValueError(f"the sets must have one shape, not {list(samples.shape)} and {list(pictures.shape)}")
    n, side, sides = len(samples), samples.shape[-1], []
    while not sides or side >= 16:
        sides.append(side)
        side //= 2
    levels = [_projected_patches(samples, pictures, level, len(sides), seed) for level in range(len(sides))]

    def scores(keep: torch.Tensor) -> torch.Tensor:
        kept = keep.repeat_interleave(PATCHES)  # the sorted values stay sorted when those of some pictures are left out
        of_level = [[value[kept[patch]].view(PROJECTIONS, -1) for value, patch in level] for level in levels]
        distance = torch.stack([(real - made).abs().mean() for real, made in of_level])
        return torch.cat([distance.mean()[None], distance])

    return _jackknife(("wasserstein", *(f"wasserstein_{side}" for side in sides)), scores, n)


def _projected_patches(samples: torch.Tensor, pictures: torch.Tensor, level: int, num_levels: int,
                       seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of pictures and of samples: a level's patches along each direction, sorted, [PROJECTIONS, N * PATCHES], and the
    number of the patch that each value is from; patches PATCHES i ... PATCHES (i + 1) - 1 are from picture i."""
    generator = torch.Generator().manual_seed(seed_from(seed, level, stream="patches"))
    real = _patches(pictures, level, num_levels, generator)  # [N * PATCHES, 3, numbers]
    made = _patches(samples, level, num_levels, generator)
    mean, std = real.mean(dim=(0, 2), keepdim=True), real.std(dim=(0, 2), keepdim=True).clamp(min=1e-6)
    directions = F.normalize(torch.randn(real[0].numel(), PROJECTIONS, generator=generator), dim=0)
    return [tuple((((x - mean) / std).flatten(1) @ directions).T.sort(dim=1)) for x in (real, made)]


def _patches(images: torch.Tensor, level: int, num_levels: int, generator: torch.Generator) -> torch.Tensor:
    """PATCHES random patches of each image's pyramid at `level`, float32 [N * PATCHES, 3, numbers in a channel]."""
    parts = []
    for batch in images.split(128):
        x = batch.float() / 127.5 - 1
        for _ in range(level):
            x = F.avg_pool2d(x, 2)
        if level + 1 < num_levels:  # what the next, coarser one does not hold
            x = x - F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear", align_corners=False)
        b, _, side, _ = x.shape
        patch = min(PATCH, side)
        y, x_ = torch.randint(side - patch + 1, (2, b, PATCHES, 1, 1), generator=generator)
        inside = torch.arange(patch)
        which = torch.arange(b)[:, None, None, None]
        found = x[which, :, y + inside[:, None], x_ + inside]  # [b, PATCHES, patch, patch, 3]
        parts.append(found.permute(0, 1, 4, 2, 3).reshape(b * PATCHES, 3, -1))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# error bars


def _jackknife(names: tuple[str, ...], scores: Callable[[torch.Tensor], torch.Tensor], n: int) -> dict[str, Score]:
    """scores(keep), keep bool [n], with all pictures; and standard errors from leaving out each tenth of both sets.

    Not the bootstrap: it would draw some pictures twice, and their nearest neighbour would be themselves.
    """
    group = torch.randperm(n, generator=torch.Generator().manual_seed(seed_from(n, stream="jackknife"))) % GROUPS
    values = scores(torch.ones(n, dtype=torch.bool)).double()
    others = torch.stack([scores(group != g).double() for g in range(GROUPS)])
    errors = ((GROUPS - 1) * others.var(dim=0, unbiased=False)).sqrt()
    return {name: Score(value, error, tuple(without)) for name, value, error, without in
            zip(names, values.tolist(), errors.tolist(), others.T.tolist())}


# ---------------------------------------------------------------------------------------------------------------------
# with a trained network, for those who have one


def find_torch_fidelity():
    """The package that has the network; a ValueError in words where it is not installed."""
    try:
        import torch_fidelity
    except ImportError:
        raise ValueError("--fid needs torch-fidelity, which is not installed: pip install torch-fidelity (on its first "
                         "use it downloads the Inception network), or leave --fid out") from None
    return torch_fidelity


def inception_distances(samples: torch.Tensor, pictures: torch.Tensor, cuda: bool = False) -> dict[str, Score]:
    """FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018) with the usual Inception network, by torch-fidelity.

    Raises:
        ValueError: if that is not installed, or cannot get its network.
    """
    torch_fidelity = find_torch_fidelity()

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, images: torch.Tensor):
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> torch.Tensor:
            return self.images[i]

    try:
        found = torch_fidelity.calculate_metrics(
            input1=Pictures(samples), input2=Pictures(pictures), fid=True, kid=True, cuda=cuda, verbose=False,
            kid_subset_size=min(1000, len(samples), len(pictures)),
        )
    except Exception as error:  # no network to download from, no memory, ...
        raise ValueError(f"torch-fidelity failed ({str(error).splitlines()[0]}); leave --fid out") from error
    return {"fid": Score(found["frechet_inception_distance"], math.nan),
            "kid": Score(found["kernel_inception_distance_mean"], math.nan)}
