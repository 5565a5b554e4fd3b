"""From a folder of images to training batches: finding, decoding, labels, order.

    python dataset.py data/pokemon_jpg --image_size 64      # count the images, draw outputs/augmentation.png

Three habits hold this file together:

- A folder comes as people have it. Any format, mode, size and shape is decoded to the same small square, transparent
  parts become white, and a file that cannot be read is named and left out instead of ending the training.
- The order of the images depends on (seed, epoch) alone and the batch of any step can be computed directly, so a
  resumed run sees the batches of an uninterrupted one, with any number of workers.
- Labels are optional: pictures of known types come with them, others with nothing said (see labels.py).
"""

import argparse
import errno
import hashlib
import itertools
import math
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from augmentation import augment
from critters import TYPES, draw_critters
from forward_diffusion import seed_from
from labels import LABEL_SOURCES, LabelError, find_labels, multi_hot

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
# Pillow looks at a file's content, not at its name. Only these decoders may run: some others start outside programs.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode_image refuses what Pillow only warns of


class DataError(Exception):
    """A problem with the user's data. Its message is one line: what is wrong, where, and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# files


def find_images(folder: str | Path) -> list[Path]:
    """Every image file in `folder` at any depth, hidden files and folders left out, sorted by relative posix path.

    The order is the same on every machine, whatever the file system returns. Raises DataError when the folder does
    not exist, is a file, cannot be listed, or has no image.
    """
    root = Path(folder).expanduser()
    if not root.exists():
        raise DataError(f"no folder {root}: give a folder of images with --data")
    if not root.is_dir():
        raise DataError(f"{root} is a file: give the folder that holds the images")

    def fail(e: OSError) -> None:
        raise DataError(f"cannot list {e.filename} ({e.strerror}): change its permissions or give another folder")

    found, seen = [], set()
    for where, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(where) in seen:  # a link that leads back up would otherwise be followed for ever
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        found += [Path(where, name) for name in names
                  if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    if not found:
        raise DataError(f"no image in {root}: put {' '.join(s[1:] for s in SUFFIXES)} files there, at any depth")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def relative_names(folder: str | Path, files: Sequence[Path]) -> list[str]:
    """The files' paths relative to the folder, with forward slashes on every system."""
    root = Path(folder).expanduser()
    return [path.relative_to(root).as_posix() for path in files]


def decode_image(path: str | Path, image_size: int) -> np.ndarray:
    """Read one image file as uint8 RGB `[3, image_size, image_size]`.

    The shorter side is scaled to `image_size` with antialiasing and the middle is cut out. Transparent parts are laid
    over white, the camera's EXIF rotation is applied, 16-bit grey is scaled to 8 bits, and of an animation the first
    frame is taken. Raises whatever Pillow raises for a file that it cannot read, and DecompressionBombError for one
    of more than Image.MAX_IMAGE_PIXELS pixels.
    """
    if not os.path.isfile(path):  # to open a pipe would be to wait for ever
        raise OSError(errno.EINVAL, "not a file, or a link to nowhere", str(path))
    with Image.open(path, formats=FORMATS) as image:
        # Pillow only warns up to twice its limit, and a warning filter is not safe in threads: so ask again here.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many")
        # JPEG can decode at 1/2, 1/4 or 1/8 of its size for less work; twice image_size stays for the antialiasing.
        image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it at 255, that is to white
            grey = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def reason(e: Exception) -> str:
    """Why an image could not be read, in a few words on one line."""
    if isinstance(e, UnidentifiedImageError):
        return "not an image, or an empty file"  # Pillow's own message repeats the path
    return printable((getattr(e, "strerror", None) or str(e) or type(e).__name__).splitlines()[0])


def printable(text: object) -> str:
    """The text on one line that any terminal can show: a file's name can hold line breaks, and worse."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _default_memory_limit() -> int:
    """A quarter of the machine's memory in bytes; 2 GiB where the system does not say (Windows).

    Of several processes that torchrun starts on a machine, each has its part of it.
    """
    try:
        quarter = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, ValueError, OSError):
        quarter = 2 * 1024**3
    return quarter // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class ImageFolder(Dataset):
    """The images of a folder as uint8 tensors `[3, S, S]`, and the types of each where the folder tells them.

    Each image is decoded once and kept in `.images`, uint8 `[N, 3, S, S]`, when that takes at most `memory_limit`
    bytes (default: a quarter of the machine's memory). Otherwise `.images` is None and files are read as needed.

    `.files` holds the path of every image and `.names` the same relative to the folder, in the order of their indices;
    `.left_out` is the number of files that could not be read. `.types` are the names of the types and `.labels`, uint8
    `[N, len(types)]`, has a 1 for each that an image has; both are empty without labels (see labels.py for `labels`).
    With `keep`, only the images for whose names it is true are in it; the types are the whole folder's all the same.

    Raises DataError as `find_images` and `find_labels` do, and when no file can be read.
    """

    def __init__(self, folder: str | Path, image_size: int, memory_limit: int | None = None, *, labels: str = "auto",
                 keep: Callable[[str], bool] | None = None):
        if image_size < 8:
            raise DataError(f"an image size of {image_size} pixels is too small: give 8 or more")
        self.files, self.image_size, self.left_out = find_images(folder), image_size, 0
        self.names = relative_names(folder, self.files)
        try:
            found = find_labels(folder, self.names, labels)
        except LabelError as e:
            raise DataError(str(e)) from e
        self.types = tuple(sorted(set().union(*found or ())))
        self.labels = torch.from_numpy(multi_hot(found or [()] * len(self.files), self.types))
        self.images: torch.Tensor | None = None
        self._warned: set[int] = set()
        if keep is not None:
            self._keep([i for i, name in enumerate(self.names) if keep(name)])
            if not self.files:
                raise DataError(f"none of the images wanted is in {folder}: give the folder of the training")
        limit = _default_memory_limit() if memory_limit is None else memory_limit
        if len(self.files) * 3 * image_size**2 <= limit:
            self._decode_all(folder)
        else:
            self[0]  # fail now, in one line, when no file can be read

    @classmethod
    def from_array(cls, images: np.ndarray | torch.Tensor, labels: Sequence[Sequence[str]] | None = None,
                   types: Sequence[str] = ()) -> "ImageFolder":
        """A data set of square images in memory, uint8 `[N, S, S, 3]` or `[N, 3, S, S]`; `.names` only number them."""
        images = torch.as_tensor(images)
        if images.ndim == 4 and images.shape[-1] == 3 and images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        n, size = len(images), images.shape[-1]
        if images.shape != (n, 3, size, size) or images.dtype != torch.uint8 or n == 0:
            raise ValueError(f"want uint8 [N, S, S, 3] or [N, 3, S, S], got {images.dtype} {list(images.shape)}")
        self = cls.__new__(cls)
        self.images, self.image_size, self.left_out = images.contiguous(), size, 0
        self.names = [f"{i:05d}" for i in range(n)]
        self.files = [Path(name) for name in self.names]
        self.types = tuple(types)
        self.labels = torch.from_numpy(multi_hot(labels or [()] * n, self.types))
        return self

    def _keep(self, indices: list[int]) -> None:
        """Leave out all images but these, which stay in their order."""
        self.files, self.names = [self.files[i] for i in indices], [self.names[i] for i in indices]
        self.labels = self.labels[indices]
        if self.images is not None:
            for new, old in enumerate(indices if len(indices) < len(self.images) else []):
                self.images[new] = self.images[old]  # in place: a copy would take the memory twice
            self.images = self.images[: len(indices)]

    def _decode_all(self, folder: str | Path) -> None:
        images = torch.empty(len(self.files), 3, self.image_size, self.image_size, dtype=torch.uint8)

        def decode(i: int) -> str | None:
            try:
                images[i] = torch.from_numpy(decode_image(self.files[i], self.image_size))
            except Exception as e:  # a damaged file can make a decoder raise nearly anything
                return reason(e)

        # Threads are enough: Pillow lets go of Python's lock while it decodes and scales.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            problems = list(tqdm(pool.map(decode, range(len(self.files))), total=len(self.files),
                                 desc="decoding", unit="image", delay=2, leave=False))
        bad = [(path, problem) for path, problem in zip(self.files, problems) if problem]
        for path, problem in bad[:10]:
            print(f"warning: left out {printable(path)}: {problem}", file=sys.stderr)
        if len(bad) > 10:
            print(f"warning: left out {len(bad) - 10} more files that cannot be read", file=sys.stderr)
        good = [i for i, problem in enumerate(problems) if not problem]
        if not good:
            raise DataError(f"none of the {len(bad)} image files in {folder} can be read: give a folder of images")
        self.images, self.left_out = images, len(bad)
        self._keep(good)

    def fingerprint(self) -> str:
        """A hash of the names and labels: the same for the same images, as far as that shows without reading them."""
        names = b"\0".join(map(os.fsencode, [*self.names, *self.types]))
        return hashlib.sha256(names + self.labels.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Image `i`, uint8 `[3, S, S]`, and its row of `.labels`.

        A file that cannot be read is named, and the next that can takes its place.
        """
        if self.images is not None:
            return self.images[i], self.labels[i]
        first = range(len(self))[i]
        for j in itertools.chain(range(first, len(self)), range(first)):
            try:
                return torch.from_numpy(decode_image(self.files[j], self.image_size)), self.labels[j]
            except Exception as e:  # as in _decode_all
                if j not in self._warned:
                    print(f"warning: cannot read {printable(self.files[j])}: {reason(e)}; using the next image",
                          file=sys.stderr)
                    self._warned.add(j)
        raise DataError(f"none of the {len(self)} image files, from {self.files[0]} on, can be read")

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of `indices` as one batch; DataLoader calls this instead of B single look-ups."""
        if self.images is not None:
            indices = torch.as_tensor(indices)
            return self.images[indices], self.labels[indices]
        images, labels = zip(*(self[i] for i in indices))
        return torch.stack(images), torch.stack(labels)


def load_images(data: str, image_size: int, *, labels: str = "auto", keep: Callable[[str], bool] | None = None,
                num_critters: int = 2000, seed: int = 0) -> ImageFolder:
    """The images of a folder, or of the built-in critters where `data` is "critters"; see `ImageFolder`."""
    if data != "critters":
        return ImageFolder(data, image_size, labels=labels, keep=keep)
    if labels not in LABEL_SOURCES:
        raise DataError(f"critters come with their own types: leave out --labels {labels}, or say --labels none")
    images, types = draw_critters(num_critters, image_size, seed)
    dataset = ImageFolder.from_array(images) if labels == "none" else ImageFolder.from_array(images, types, TYPES)
    if keep is not None:
        dataset._keep([i for i, name in enumerate(dataset.names) if keep(name)])
    return dataset


def image_names(data: str, num_critters: int = 2000) -> list[str]:
    """`ImageFolder.names` of `load_images`, without reading an image."""
    if data == "critters":
        return [f"{i:05d}" for i in range(num_critters)]
    return relative_names(data, find_images(data))


def held_out_names(names: Sequence[str], fraction: float) -> list[str]:
    """The part of the images to keep aside from training, `fraction` of them in [0, 1), chosen by their names; sorted.

    Those whose names have the lowest hashes: the same ones on every machine, and nearly the same ones after a few
    images were added or taken away.
    """
    by_hash = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return sorted(by_hash[: round(fraction * len(names))])


# ---------------------------------------------------------------------------------------------------------------------
# order


class ShuffledBatches(Sampler):
    """The indices of each training step's images, as a pure function of (seed, step).

    An epoch is ceil(num_images / batch_size) steps and visits every image in an order drawn from (seed, epoch). Every
    batch is full: the last one of an epoch is filled up from the front of the epoch's order. Iterating yields the
    batches of the steps first_step ... last_step - 1, without end when last_step is None, or of each the `share`, which
    is one process's part of it.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, first_step: int = 0, last_step: int | None = None,
                 share: slice = slice(None)):
        self.num_images, self.batch_size, self.seed, self.share = num_images, batch_size, seed, share
        self.first_step, self.last_step = first_step, last_step
        self.steps_per_epoch = math.ceil(num_images / batch_size)
        self._order = (-1, torch.empty(0))  # the last epoch asked for, and its order

    def batch(self, step: int) -> list[int]:
        """The `batch_size` image indices of `step`, counted from 0 at the start of the run."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(seed_from(self.seed, epoch, stream="order"))
            self._order = (epoch, torch.randperm(self.num_images, generator=generator))
        positions = torch.arange(k * self.batch_size, (k + 1) * self.batch_size) % self.num_images
        return self._order[1][positions].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        steps = itertools.count(self.first_step) if self.last_step is None else range(self.first_step, self.last_step)
        return (self.batch(step)[self.share] for step in steps)

    def __len__(self) -> int:
        if self.last_step is None:
            raise TypeError("batches without end have no length")
        return max(0, self.last_step - self.first_step)


def _as_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch


def _work_on_through_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM often go to all processes at once; the one that trains finishes its step first, with our help.

    It ends its workers itself. A second SIGTERM counts, since that is also how Python ends those that are left at exit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def make_loader(dataset: ImageFolder, batch_size: int, seed: int, first_step: int = 0, last_step: int | None = None,
                workers: int = 0, share: slice = slice(None)) -> DataLoader:
    """Batches (images uint8 `[B, 3, S, S]`, labels uint8 `[B, K]`) for the steps first_step ... last_step - 1.

    The result is the same for any number of `workers` (processes; -1: one a core, at most 8): they decode files and
    draw no random number. Images that are in memory need none. Of each batch only the `share` is read.
    """
    if workers < 0:
        workers = min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    batches = ShuffledBatches(len(dataset), batch_size, seed, first_step, last_step, share)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=_as_is, pin_memory=torch.cuda.is_available(),
                      num_workers=0 if dataset.images is not None else workers,
                      worker_init_fn=_work_on_through_signals,
                      generator=torch.Generator())  # its own, so that starting a loader leaves torch's global one alone


# ---------------------------------------------------------------------------------------------------------------------
# the command: look at what the network will see


def main() -> None:
    parser = argparse.ArgumentParser(description="Count a folder's images and draw what augmentation does to them.")
    parser.add_argument("folder", help="a folder of images, at any depth")
    parser.add_argument("--image_size", type=int, default=64, help="side of the decoded images in pixels (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other augmentations (default 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/augmentation.png"),
                        help="the picture to write (default outputs/augmentation.png)")
    args = parser.parse_args()
    try:
        dataset = ImageFolder(args.folder, args.image_size)
    except DataError as e:
        sys.exit(f"error: {printable(e)}")
    print(f"{len(dataset)} images in {printable(args.folder)}, {dataset.left_out} files left out")
    for name, count in zip(dataset.types, dataset.labels.sum(0, dtype=torch.long).tolist()):
        print(f"{count:6d} {name}")

    # Eight images spread over the folder: each plain on the left, then augmented seven times. The grey lines between
    # the tiles belong to this drawing; anything else at a tile's border would be a mark of the augmentation.
    chosen = np.linspace(0, len(dataset) - 1, 8).round().astype(int).tolist()
    images, _ = dataset.__getitems__(chosen)
    generator = torch.Generator().manual_seed(args.seed)
    columns = [augment(images, generator, "none")[0]] + [augment(images, generator, "full")[0] for _ in range(7)]
    tiles = F.pad(torch.stack(columns, dim=1), (1, 1, 1, 1), value=0.5)  # [8, 8, 3, S + 2, S + 2]
    grid = tiles.permute(0, 3, 1, 4, 2).reshape(8 * tiles.shape[3], 8 * tiles.shape[4], 3)
    pixels = ((grid + 1) * 127.5).round().to(torch.uint8).numpy()
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(args.output)
    except (OSError, ValueError) as e:
        sys.exit(f"error: cannot write {args.output}: {e}")
    print(f"{args.output}: left column plain, the other seven augmented")


if __name__ == "__main__":
    main()
