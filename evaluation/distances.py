"""Distances between sets of images: in a space of features, and of patches; FID.

    scores = compare(samples, images, space)           # uint8 [N, 3, S, S] each, and a FeatureSpace
    print(scores["recall"].value, scores["recall"].error)
    scores = feature_scores(space(samples), space(images))    # KID and neighbours, in any other space

The values depend on the number of images, and even two sets of real images do not reach the ideal values. The same
measure between two sets of real images of that size is therefore the reference; `comparison_sets` draws both pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evaluation.error_bars import Score, jackknife_error
from evaluation.features import FeatureSpace
from utils.errors import first_line
from utils.seeding import seed_from

MIN_IMAGES = 50  # a set; the distances of smaller ones are mostly noise
MAX_IMAGES = 1000  # a set
NEIGHBOURS = 5
PATCH_SIZE = 7
PATCHES = 32  # for each image and scale
PROJECTIONS = 64
JACKKNIFE_GROUPS = 10


def comparison_sets(samples: torch.Tensor, train: torch.Tensor, unseen: torch.Tensor, seed: int = 0
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw three random subsets of one size: (samples, real images, other real images).

    The first two are compared, and the last two give the value that real images reach. They are training and unseen
    images if there are enough of both. Otherwise all real images are shuffled and halved: a distance between
    real images does not depend on which of them a model has seen.

    Raises:
        ValueError: if there would be fewer than MIN_IMAGES in a set.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, stream="distances"))
    samples, train, unseen = [x[torch.randperm(len(x), generator=generator)] for x in (samples, train, unseen)]
    if min(len(train), len(unseen)) < min(len(samples), (len(train) + len(unseen)) // 2, MAX_IMAGES) / 2:
        real = torch.cat([train, unseen])
        real = real[torch.randperm(len(real), generator=generator)]
        train, unseen = real[: len(real) // 2], real[len(real) // 2 :]
    n = min(len(samples), len(train), len(unseen), MAX_IMAGES)
    if n < MIN_IMAGES:
        raise ValueError(f"at least {MIN_IMAGES} samples and {2 * MIN_IMAGES} images of the data are needed, "
                         f"not {len(samples)} and {len(train) + len(unseen)}")
    return samples[:n], train[:n], unseen[:n]


def compare(samples: torch.Tensor, images: torch.Tensor, space: FeatureSpace, seed: int = 0) -> dict[str, Score]:
    """Return all distances between two sets of the same size, uint8 [N, 3, S, S], except FID and KID."""
    return {**neighbour_scores(space(samples), space(images)), **sliced_wasserstein(samples, images, seed)}


def feature_scores(samples: torch.Tensor, images: torch.Tensor) -> dict[str, Score]:
    """Return KID, precision, recall, density and coverage of features [N, D] each, of the same number of images."""
    return {**kernel_distance(samples, images), **neighbour_scores(samples, images)}


def _check_shapes(samples: torch.Tensor, images: torch.Tensor) -> None:
    if samples.shape != images.shape:
        raise ValueError(f"the sets must have one shape, not {list(samples.shape)} and {list(images.shape)}")


def _with_jackknife(names: tuple[str, ...], scores: Callable[[torch.Tensor], torch.Tensor], n: int
                    ) -> dict[str, Score]:
    """Return scores(keep), keep bool [n], of all images, with jackknife errors over tenths of both sets.

    A bootstrap would draw some images twice, and they would become their own nearest neighbours.
    """
    generator = torch.Generator().manual_seed(seed_from(n, stream="jackknife"))
    group = torch.randperm(n, generator=generator) % JACKKNIFE_GROUPS
    values = scores(torch.ones(n, dtype=torch.bool)).double()
    errors = jackknife_error(torch.stack([scores(group != g).double() for g in range(JACKKNIFE_GROUPS)]))
    return {name: Score(value, error) for name, value, error in zip(names, values.tolist(), errors.tolist())}


# ---------------------------------------------------------------------------------------------------------------------
# neighbours in feature space


def neighbour_scores(samples: torch.Tensor, images: torch.Tensor, k: int = NEIGHBOURS) -> dict[str, Score]:
    """Compute precision, recall, density and coverage of features [N, D] each.

    Precision and recall are those of Kynkäänniemi et al. (2019), density and coverage those of Naeem et al. (2020).
    A ball around each point reaches to its k-th nearest neighbour in the same set; together, the balls of a set
    estimate its support.

        precision: fraction of samples within the balls of real images.
        recall: fraction of real images within the balls of samples.
        density: number of real images' balls that a sample is in, divided by k; about 1 for real images. Unlike
            precision it is hardly raised by a few outliers with large balls.
        coverage: fraction of real images with a sample in their ball. Unlike recall it is not raised by outliers
            among the samples.
    """
    _check_shapes(samples, images)
    between_images, between_samples = torch.cdist(images, images), torch.cdist(samples, samples)
    across = torch.cdist(images, samples)

    def scores(keep: torch.Tensor) -> torch.Tensor:
        # The smallest distance in each row is that of a point to itself.
        image_radius = between_images[keep][:, keep].kthvalue(k + 1, dim=1).values
        sample_radius = between_samples[keep][:, keep].kthvalue(k + 1, dim=1).values
        distance = across[keep][:, keep]
        in_image_ball = distance <= image_radius[:, None]
        in_sample_ball = distance <= sample_radius
        precision = in_image_ball.any(0).float().mean()
        recall = in_sample_ball.any(1).float().mean()
        density = in_image_ball.float().sum(0).mean() / k
        coverage = in_image_ball.any(1).float().mean()
        return torch.stack([precision, recall, density, coverage])

    return _with_jackknife(("precision", "recall", "density", "coverage"), scores, len(images))


# ---------------------------------------------------------------------------------------------------------------------
# kernel distance of features


def kernel_distance(samples: torch.Tensor, images: torch.Tensor) -> dict[str, Score]:
    """Compute the kernel distance of features [N, D] each, "kid"; 0 is the best (Bińkowski et al. 2018, section 4).

    It is the squared maximum mean discrepancy for the kernel (x . y / D + 1)^3, estimated without bias, whatever the
    number of images. Between sets from one distribution it is 0 on average, so it can be below 0.
    """
    _check_shapes(samples, images)
    x, y = samples.double(), images.double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within_samples, within_images, across = kernel(x, x), kernel(y, y), kernel(x, y)

    def scores(keep: torch.Tensor) -> torch.Tensor:
        n = keep.sum()

        def mean_of_pairs(products: torch.Tensor) -> torch.Tensor:
            products = products[keep][:, keep]
            return (products.sum() - products.trace()) / (n * (n - 1))  # without each image's product with itself

        distance = mean_of_pairs(within_samples) + mean_of_pairs(within_images) - 2 * across[keep][:, keep].mean()
        return distance[None]

    return _with_jackknife(("kid",), scores, len(samples))


# ---------------------------------------------------------------------------------------------------------------------
# patches


@dataclass
class ProjectedPatches:
    """Patches of one set and pyramid level along random directions.

    values: float32 [PROJECTIONS, N * PATCHES], ascending in each row.
    patch: the number of the patch that each value comes from, of the same shape; image i has the patches
        i * PATCHES ... (i + 1) * PATCHES - 1.
    """

    values: torch.Tensor
    patch: torch.Tensor

    def of_images(self, keep: torch.Tensor) -> torch.Tensor:
        """Return the values from the images in the mask `keep`, still sorted."""
        kept_patches = keep.repeat_interleave(PATCHES)
        return self.values[kept_patches[self.patch]].view(PROJECTIONS, -1)


def sliced_wasserstein(samples: torch.Tensor, images: torch.Tensor, seed: int = 0) -> dict[str, Score]:
    """Compute the sliced Wasserstein distance of patches at each scale; 0 is the best (Karras et al. 2018, section 5).

    The scales are the levels of a Laplacian pyramid from S down to 16 pixels (or S, if that is less): the finest holds
    the sharp details, the last the coarse image. Each image and level gives 32 random patches of 7 x 7 pixels, which
    are projected to 64 random directions. Along each direction the distance of two sets of equal size is the mean
    difference of their sorted values.

    Each colour channel is normalised by the mean and deviation of the real patches, for both sets. The paper
    normalises each set by its own, which would hide differences of contrast and grain.

    Returns:
        "wasserstein_64", "wasserstein_32", ... by the level's side in pixels, and their mean, "wasserstein".
    """
    _check_shapes(samples, images)
    side, sides = samples.shape[-1], []
    while not sides or side >= 16:
        sides.append(side)
        side //= 2
    levels = [_project_patches(samples, images, level, len(sides), seed) for level in range(len(sides))]

    def scores(keep: torch.Tensor) -> torch.Tensor:
        distances = torch.stack([(real.of_images(keep) - drawn.of_images(keep)).abs().mean() for real, drawn in levels])
        return torch.cat([distances.mean()[None], distances])

    return _with_jackknife(("wasserstein", *(f"wasserstein_{side}" for side in sides)), scores, len(samples))


def _project_patches(samples: torch.Tensor, images: torch.Tensor, level: int, num_levels: int, seed: int
                     ) -> tuple[ProjectedPatches, ProjectedPatches]:
    """Return the projected patches of real images and of samples at one level of the pyramid."""
    generator = torch.Generator().manual_seed(seed_from(seed, level, stream="patches"))
    real = _random_patches(images, level, num_levels, generator)  # [N * PATCHES, 3, pixels]
    drawn = _random_patches(samples, level, num_levels, generator)
    mean, std = real.mean(dim=(0, 2), keepdim=True), real.std(dim=(0, 2), keepdim=True).clamp(min=1e-6)
    directions = F.normalize(torch.randn(real[0].numel(), PROJECTIONS, generator=generator), dim=0)

    def project(patches: torch.Tensor) -> ProjectedPatches:
        projected = ((patches - mean) / std).flatten(1) @ directions
        return ProjectedPatches(*projected.T.sort(dim=1))

    return project(real), project(drawn)


def _random_patches(images: torch.Tensor, level: int, num_levels: int, generator: torch.Generator) -> torch.Tensor:
    """Cut PATCHES random patches from each image's pyramid level, float32 [N * PATCHES, 3, pixels]."""
    parts = []
    for batch in images.split(128):
        # Pyramid level
        x = batch.float() / 127.5 - 1
        for _ in range(level):
            x = F.avg_pool2d(x, 2)
        if level + 1 < num_levels:  # keep only what the next, coarser level does not hold
            x = x - F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear", align_corners=False)
        # Patches
        n, _, side, _ = x.shape
        size = min(PATCH_SIZE, side)
        top, left = torch.randint(side - size + 1, (2, n, PATCHES, 1, 1), generator=generator)
        offset = torch.arange(size)
        image = torch.arange(n)[:, None, None, None]
        patches = x[image, :, top + offset[:, None], left + offset]  # [n, PATCHES, size, size, 3]
        parts.append(patches.permute(0, 1, 4, 2, 3).reshape(n * PATCHES, 3, -1))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# distances in the features of the Inception network


def import_torch_fidelity():
    """Import the optional package torch_fidelity.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import torch_fidelity
    except ImportError:
        raise ValueError("--fid needs torch-fidelity, which is not installed: pip install torch-fidelity (on its first "
                         "use it downloads the Inception network), or leave --fid out") from None
    return torch_fidelity


def inception_distances(samples: torch.Tensor, images: torch.Tensor, cuda: bool = False) -> dict[str, Score]:
    """Compute FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018) with torch-fidelity's Inception network.

    Raises:
        ValueError: if torch-fidelity is not installed or fails, for example to download its network.
    """
    torch_fidelity = import_torch_fidelity()

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: torch.Tensor):
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> torch.Tensor:
            return self.images[i]

    try:
        metrics = torch_fidelity.calculate_metrics(
            input1=Images(samples), input2=Images(images), fid=True, kid=True, cuda=cuda, verbose=False,
            kid_subset_size=min(1000, len(samples), len(images)),
        )
    except Exception as error:  # no network to download from, no memory, ...
        raise ValueError(f"torch-fidelity failed ({first_line(error)})") from error
    return {"fid": Score(metrics["frechet_inception_distance"], math.nan),
            "kid": Score(metrics["kernel_inception_distance_mean"], math.nan)}
