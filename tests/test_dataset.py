"""Data sets: folders of images, unreadable files, critters, what is held out, and the way to x_0."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from critters import TYPES, draw_critters, write_critters
from models.space import LatentSpace, PixelSpace
from training.augment import AUGMENT_MODES, augment, fixed_augmentations
from training.batches import make_loader
from training.dataset import (
    DataError,
    ImageFolder,
    encode_dataset,
    find_images,
    has_images,
    held_out_names,
    image_names,
    load_images,
)
from training.loss import to_x_0
from training.run_images import load_run_images
from utils.images import decode_image


def write_folder(folder: Path, count: int, size: int = 16) -> None:
    """Write `count` PNGs 000.png ..., each of one grey level that is its number times 7."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (size, size), (i * 7,) * 3).save(folder / f"{i:03d}.png")


def write_images(folder: Path, *names: str) -> None:
    """Write images of the grey levels 10, 20, ... in the order of the names."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * (i + 1),) * 3).save(folder / name)


def write_noise(path: Path, size: int) -> None:
    Image.effect_noise((size, size), 80).convert("RGB").save(path)


def grey_levels(dataset: ImageFolder) -> list[int]:
    return [int(dataset[i][0][0, 0, 0]) for i in range(len(dataset))]


def break_files(folder: Path) -> list[str]:
    """Add four files that look like images and are not; return their names."""
    write_noise(folder / "whole.jpg", 200)
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "000_cut.jpg").write_bytes(whole[:len(whole) // 2])
    (folder / "001_empty.png").touch()
    (folder / "003_text.jpg").write_text("this is not an image\n" * 20)
    (folder / "004_noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return ["000_cut.jpg", "001_empty.png", "003_text.jpg", "004_noise.png"]


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_find_images_order_and_what_is_left_out(tmp_path):
    wanted = ["B/2.PNG", "a.jpg", "a/z.png", "b/c/d.WebP", "b/c/e.gif", "c.bmp", "d.jpeg"]
    for name in reversed(wanted + [".hidden.png", ".cache/a.png", "b/._a.png", "notes.txt", "labels.csv", "x.png.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == wanted
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_find_images_within_a_hidden_folder(tmp_path):
    write_folder(tmp_path / ".data", 1)
    assert len(find_images(tmp_path / ".data")) == 1


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_find_images_follows_links_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    assert [path.name for path in find_images(tmp_path / "data")] == ["000.png", "001.png"]


def test_has_images(tmp_path):
    assert not has_images(tmp_path / "missing") and not has_images(tmp_path)
    write_folder(tmp_path / "deep", 1)
    assert has_images(tmp_path) and has_images(str(tmp_path)) and not has_images(tmp_path / "deep/000.png")


def test_folder_errors_are_one_clear_line(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    for folder, words in [("missing", "no folder"), ("a.txt", "is a file"), ("", "no image")]:
        with pytest.raises(DataError, match=words) as error:
            ImageFolder(tmp_path / folder, 16)
        assert str(tmp_path / folder) in str(error.value) and "\n" not in str(error.value)


def test_held_out_names_do_not_depend_on_the_order_and_hardly_on_the_others():
    names = [f"creature {i}.jpg" for i in range(1000)]
    held = held_out_names(names, 0.1)
    assert len(held) == 100 and held == sorted(held) == held_out_names(names[::-1], 0.1)
    assert held[:3] == ["creature 100.jpg", "creature 105.jpg", "creature 126.jpg"]  # the same on every machine
    assert held_out_names(names, 0.0) == []
    fewer = held_out_names(names[:950], 0.1)
    assert len(fewer) == 95 and len(set(fewer) - set(held)) < 5
    assert len(set(held_out_names(names, 0.2)) & set(held)) == 100
    counts = np.bincount([int(name.split()[1][:-4]) // 250 for name in held_out_names(names, 0.4)])
    assert counts.min() > 70  # spread over all of them


# ---------------------------------------------------------------------------------------------------------------------
# images


def test_broken_files_are_named_and_left_out(tmp_path, capsys):
    write_folder(tmp_path, 6)
    broken = break_files(tmp_path)
    dataset = ImageFolder(tmp_path, 16)
    assert [path.name for path in dataset.files] == [f"{i:03d}.png" for i in range(6)]
    assert dataset.left_out == 4 and len(dataset) == 6 and dataset.images.shape == (6, 3, 16, 16)
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 7, 14, 21, 28, 35]  # each image still belongs to its file
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(name in line for name, line in zip(broken, lines))


def test_at_most_ten_broken_files_are_named(tmp_path, capsys):
    write_folder(tmp_path, 2)
    for i in range(13):
        (tmp_path / f"bad{i:02d}.jpg").touch()
    assert len(ImageFolder(tmp_path, 16)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 11 and "bad09.jpg" in lines[9] and "3 more" in lines[10]


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_no_readable_image(tmp_path, memory_limit):
    break_files(tmp_path)
    with pytest.raises(DataError, match="none of the 4"):
        ImageFolder(tmp_path, 16, memory_limit)


def test_in_memory_and_as_needed_are_equal(tmp_path):
    write_folder(tmp_path, 5, size=20)
    write_noise(tmp_path / "noise.jpg", 100)
    need = 6 * 3 * 16 * 16
    kept, read = ImageFolder(tmp_path, 16, memory_limit=need), ImageFolder(tmp_path, 16, memory_limit=need - 1)
    assert kept.images is not None and read.images is None
    assert kept.files == read.files and len(kept) == len(read) == 6
    for i in range(6):
        assert kept[i][0].dtype == read[i][0].dtype == torch.uint8 and torch.equal(kept[i][0], read[i][0])
    assert torch.equal(kept.__getitems__([4, 5, 0, 4])[0], read.__getitems__([4, 5, 0, 4])[0])
    assert torch.equal(read.__getitems__([4, 5])[0][1], torch.from_numpy(decode_image(tmp_path / "noise.jpg", 16)))
    for dataset in (kept, read):
        with pytest.raises(IndexError):
            dataset[6]


def test_as_needed_a_broken_file_is_replaced_by_the_next(tmp_path, capsys):
    write_folder(tmp_path, 5)
    (tmp_path / "002.png").write_bytes(b"")
    (tmp_path / "004.png").write_bytes(b"")
    dataset = ImageFolder(tmp_path, 16, memory_limit=0)
    assert [int(dataset[i][0][0, 0, 0]) for i in [0, 1, 2, 3, 4, 2]] == [0, 7, 21, 21, 0, 21]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "002.png" in lines[0] and "004.png" in lines[1]  # once each


def test_from_array():
    array = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for images in (array, array.transpose(0, 3, 1, 2), torch.from_numpy(array)):
        dataset = ImageFolder.from_array(images)
        assert len(dataset) == len(dataset.files) == 4 and dataset.image_size == 16
        assert np.array_equal(dataset[2][0].numpy(), array[2].transpose(2, 0, 1))
    for wrong in (array.astype(np.float32), array[..., 0], array[:, :8], array[:0]):
        with pytest.raises(ValueError):
            ImageFolder.from_array(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# labels, and what is kept


@pytest.mark.parametrize("memory_limit", [None, 0])
def test_an_image_keeps_its_label(tmp_path, memory_limit):
    """Through broken files, what is held out, and any order."""
    names = [f"{i:02d}.png" for i in range(9)]
    write_images(tmp_path, *names)
    (tmp_path / "labels.csv").write_text("file,types\n" + "".join(f"{name},t{name[:2]}\n" for name in names))
    (tmp_path / "03.png").write_bytes(b"")
    dataset = ImageFolder(tmp_path, 16, memory_limit, keep=lambda name: name != "05.png")
    assert dataset.class_names == tuple(f"t{i:02d}" for i in range(9))
    seen = set()
    for images, labels in make_loader(dataset, 4, seed=0, last_step=6):
        assert labels.sum(1).tolist() == [1] * 4
        assert torch.equal(images[:, 0, 0, 0] // 10 - 1, labels.argmax(1))
        seen |= set(labels.argmax(1).tolist())
    assert seen == {0, 1, 2, 4, 6, 7, 8}


def test_what_is_kept_and_what_is_held_out_make_the_whole(tmp_path):
    write_images(tmp_path, *(f"{i}.png" for i in range(8)))
    held = set(held_out_names(image_names(str(tmp_path)), 0.25))
    kept, held_out = (ImageFolder(tmp_path, 16, keep=keep) for keep in (lambda n: n not in held, lambda n: n in held))
    assert len(kept) == 6 and set(held_out.names) == held
    assert sorted(grey_levels(kept) + grey_levels(held_out)) == [10 * (i + 1) for i in range(8)]
    with pytest.raises(DataError, match="none of the wanted images"):
        ImageFolder(tmp_path, 16, keep=lambda name: False)


def test_the_fingerprint_depends_on_names_and_labels(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_text("file,types\na.png,fire\nb.png,ice\n")
    before = ImageFolder(tmp_path, 16).fingerprint()
    assert before == ImageFolder(tmp_path, 32, memory_limit=0).fingerprint()
    # Runs of older versions have this one, and must resume.
    assert before == "8bae61a17ab18b3c04a0826cc7b8909492c8c85e23f2bd32c1321d9b1e34a1d0"
    (tmp_path / "labels.csv").write_text("file,types\na.png,ice\nb.png,fire\n")
    assert before != ImageFolder(tmp_path, 16).fingerprint()
    assert before != ImageFolder(tmp_path, 16, label_source="none").fingerprint()


def test_critters_have_the_labels_that_their_folder_has(tmp_path):
    write_critters(tmp_path, 30, 16, seed=5)
    drawn, folder = load_images("critters", 16, num_critters=30, seed=5), ImageFolder(tmp_path, 16)
    assert drawn.class_names == TYPES and set(folder.class_names) <= set(TYPES)
    columns = [TYPES.index(name) for name in folder.class_names]
    assert torch.equal(drawn.labels[:, columns], folder.labels) and drawn.labels.sum() == folder.labels.sum()
    assert torch.equal(drawn.images, folder.images)
    assert load_images("critters", 16, label_source="none", num_critters=3).class_names == ()
    with pytest.raises(DataError, match="leave out --labels my.csv"):
        load_images("critters", 16, label_source="my.csv")


def test_critters_depend_on_the_seed_of_the_data_alone():
    def critters(**options):
        return load_images("critters", 16, num_critters=4, **options).images

    for seed in (0, 7):
        expected = torch.from_numpy(draw_critters(4, 16, seed)[0]).permute(0, 3, 1, 2)
        torch.manual_seed(seed + 1)
        assert critters(seed=seed).equal(expected)
    assert critters().equal(critters(seed=0)) and not critters().equal(critters(seed=7))
    dataset = load_images("critters", 16, num_critters=6, seed=7, keep=lambda name: name != "00001")
    assert dataset.images[[0, 1]].equal(critters(seed=7)[[0, 2]])
    assert dataset.names == [name for name in image_names("critters", 6) if name != "00001"]


def test_runs_of_different_seeds_train_on_the_same_critters():
    def images(**seeds):
        config = SimpleNamespace(data="critters", image_size=16, num_critters=4, holdout=0.0, labels="auto",
                                 splits="auto", **seeds)
        return load_run_images(config, checkpoint=None).dataset.images

    first = images(seed=0, data_seed=0)
    assert first.equal(images(seed=1, data_seed=0)) and not first.equal(images(seed=0, data_seed=1))


# ---------------------------------------------------------------------------------------------------------------------
# from images to x_0


PIXELS = PixelSpace()


class Latents(LatentSpace):
    """A latent space of random weights that is not symmetric, so that a mirror image has other latents."""

    def __init__(self):
        self.weights = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        self.layouts = []
        self.channels, self.factor = 4, 4
        self.autoencoder = SimpleNamespace(mean=torch.zeros(1), encode=self.convolve,
                                           latent_shape=lambda size: (4, size // 4, size // 4))

    def convolve(self, images: torch.Tensor) -> torch.Tensor:
        self.layouts.append(images.is_contiguous(memory_format=torch.channels_last))
        return torch.nn.functional.conv2d(images, self.weights, stride=4).float()


@pytest.fixture
def dataset() -> ImageFolder:
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageFolder.from_array(images, [("a",)] * 40, ("a",))


def draw_augmentation(count: int) -> torch.Tensor:
    return torch.rand(count, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", AUGMENT_MODES)
def test_in_pixel_space_x_0_is_the_augmented_image(dataset, mode):
    assert encode_dataset(dataset, PIXELS, mode, "bf16") is dataset
    augment_rand = draw_augmentation(40)
    x_0, augment_labels = to_x_0(dataset.images, augment_rand, mode, PIXELS, "bf16")
    expected = augment(dataset.images, mode=mode, augment_rand=augment_rand)
    assert x_0.equal(expected[0]) and augment_labels.equal(expected[1])


@pytest.mark.parametrize("mode", AUGMENT_MODES)
def test_latents_encoded_in_advance_are_those_of_the_augmented_images(dataset, mode):
    space = Latents()
    encoded = encode_dataset(dataset, space, mode, "fp32")
    assert (encoded is dataset) == (mode == "full") and dataset.images.dtype == torch.uint8
    if mode != "full":
        assert encoded.images.shape == (40, 2 if mode == "flip" else 1, 4, 4, 4)
        assert encoded.images.dtype == torch.float32 and encoded.labels is dataset.labels
    chosen, augment_rand = [7, 2, 2, 39], draw_augmentation(4)
    augment_rand[:, 0] = torch.tensor([0.2, 0.7, 0.2, 0.7])  # image 2 as it is, and mirrored
    x_0, augment_labels = to_x_0(encoded.__getitems__(chosen)[0], augment_rand, mode, space, "fp32")
    x, expected_labels = augment(dataset.images[chosen], mode=mode, augment_rand=augment_rand)
    assert augment_labels.equal(expected_labels) and all(space.layouts)
    assert torch.allclose(x_0, space.convolve(x), atol=1e-5)
    if mode == "flip":
        assert not x_0[1].equal(x_0[2])


def test_fixed_augmentations_are_encoded_once_each_and_told(dataset):
    space, augment_rand = Latents(), draw_augmentation(400)
    encoded = encode_dataset(dataset, space, "full", "fp32", num_augmentations=6)
    assert encoded.images.shape == (40, 8, 4, 4, 4) and encoded.images.dtype == torch.float16
    chosen = [7] * 400
    x_0, labels = to_x_0(encoded.__getitems__(chosen)[0], augment_rand, "full", space, "fp32")
    assert x_0.dtype == torch.float32 and x_0.unique(dim=0).shape[0] == 8  # each of them is drawn

    # What is told of a version is what was done to it; its kinds come as often as those that are drawn anew.
    table = fixed_augmentations("full", 6)
    x, expected = augment(dataset.images[7:8].expand(8, -1, -1, -1), mode="full", augment_rand=table)
    latents = space.convolve(x)
    version = (x_0[:, None] - latents).flatten(2).abs().amax(-1).argmin(1)
    assert torch.allclose(x_0, latents[version], atol=0.02) and labels.equal(expected[version])
    anew = augment(dataset.images[chosen], mode="full", augment_rand=augment_rand)[1]
    assert (labels.any(1) == anew.any(1)).all()
    assert 0.4 < (labels[:, 0] != 0).float().mean() < 0.6 and 0.4 < (labels[:, 1] != 0).float().mean() < 0.6
    assert 0.4 < (version[version < 2] == 1).float().mean() < 0.6


class HostData(TorchDispatchMode):
    """Collects the operations that bring numbers from the host, which a CUDA graph cannot hold."""

    names: tuple[str, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("lift_fresh", "rand", "full", "copy_"):
            self.names += (name,)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", AUGMENT_MODES)
def test_a_step_brings_no_numbers_from_the_host_for_encoded_images(dataset, mode):
    images = encode_dataset(dataset, Latents(), mode, "fp32", num_augmentations=6).images[:4]
    for _ in range(2):  # the first one keeps what it makes
        with HostData() as host:
            to_x_0(images, draw_augmentation(4), mode, Latents(), "fp32")
    assert host.names == ("rand",)  # of draw_augmentation


def test_blank_latents_have_the_shape_of_encoded_ones_and_take_no_memory(dataset):
    blank, encoded = (encode_dataset(dataset, Latents(), "full", "fp32", 6, blank=blank).images
                      for blank in (True, False))
    assert blank.shape == encoded.shape and blank.dtype == encoded.dtype and not blank.any()
    assert blank.untyped_storage().nbytes() * 40 == encoded.untyped_storage().nbytes()


def test_more_fixed_augmentations_than_fit_are_refused(dataset, monkeypatch):
    monkeypatch.setattr("training.dataset._default_memory_limit", lambda: 40 * 64 * 2 * 5)
    with pytest.raises(DataError, match="give --fixed_augmentations 3 or fewer"):
        encode_dataset(dataset, Latents(), "full", "fp32", num_augmentations=4)
    assert encode_dataset(dataset, Latents(), "full", "fp32", num_augmentations=3).images.shape[1] == 5


def test_the_encoder_runs_in_the_given_precision(dataset):
    space = Latents()
    augment_rand = draw_augmentation(40)
    fine, coarse = (to_x_0(dataset.images, augment_rand, "none", space, precision)[0] for precision in ("fp32", "bf16"))
    assert coarse.dtype == torch.float32 and coarse.equal(coarse.bfloat16().float()) and not coarse.equal(fine)
    assert torch.allclose(coarse, fine, atol=0.3)


def test_images_that_are_not_in_memory_are_encoded_as_they_come(tmp_path):
    write_folder(tmp_path, 3)
    dataset, space = ImageFolder(tmp_path, 16, memory_limit=0), Latents()
    assert encode_dataset(dataset, space, "flip", "fp32") is dataset
    images = dataset.__getitems__([1, 2])[0]
    x_0, _ = to_x_0(images, torch.ones(2, 8), "flip", space, "fp32")
    assert torch.allclose(x_0, space.convolve(images / 127.5 - 1), atol=1e-6)
