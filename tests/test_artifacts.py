"""Artifacts: each is found where it is planted, and nowhere else."""

import torch

from evaluation.artifacts import find_artifacts


def creature(background: int = 255) -> torch.Tensor:
    """A grey creature of 16 x 16 pixels in the middle of a plain 32 x 32 background, uint8 [3, 32, 32]."""
    image = torch.full((3, 32, 32), background, dtype=torch.uint8)
    image[:, 8:24, 8:24] = 128
    return image


def test_each_artifact_is_found_where_it_is_planted():
    corner = creature()
    corner[:, -2:, :2] = 0
    speck = creature()
    speck[:, 0, 16] = 0  # a creature's ear may touch the edge
    artifacts = find_artifacts(torch.stack([creature(), corner, creature(0) // 4, creature(220), speck]))
    assert artifacts["black_corner"].tolist() == [False, True, True, False, False]
    assert artifacts["collapsed"].tolist() == [False, False, True, False, False]
    assert artifacts["clean"].tolist() == [True, False, False, False, True]


def test_the_dark_corner_may_be_any_of_the_four():
    for rows in (slice(2), slice(-2, None)):
        for columns in (slice(2), slice(-2, None)):
            image = creature()
            image[:, rows, columns] = 20
            artifacts = find_artifacts(image[None])
            assert artifacts["black_corner"].item() and not artifacts["clean"].item()
