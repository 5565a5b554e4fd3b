import torch

from evaluate import marks


def picture(background: int = 255) -> torch.Tensor:
    """A grey creature of 16x16 pixels in the middle of a plain 32x32 background, uint8 [3, 32, 32]."""
    image = torch.full((3, 32, 32), background, dtype=torch.uint8)
    image[:, 8:24, 8:24] = 128
    return image


def test_each_mark_is_found_where_it_is_planted_and_nowhere_else():
    corner = picture()
    corner[:, -2:, :2] = 0
    speck = picture()
    speck[:, 0, 16] = 0  # a creature's ear may touch the edge
    images = torch.stack([picture(), corner, picture(0) // 4, picture(220), speck])
    found = marks(images)
    assert found["black_corner"].tolist() == [False, True, True, False, False]
    assert found["collapsed"].tolist() == [False, False, True, False, False]
    assert found["clean"].tolist() == [True, False, False, False, True]


def test_the_corner_that_is_dark_may_be_any_of_the_four():
    for rows in (slice(2), slice(-2, None)):
        for columns in (slice(2), slice(-2, None)):
            image = picture()
            image[:, rows, columns] = 20
            assert marks(image[None])["black_corner"].item() and not marks(image[None])["clean"].item()
