"""Two networks, trained on disjoint halves of the images: do they draw the same from the same noise?

    python -m tools.two_halves                                             # critters: 250, 1,000 and 10,000 of them
    python -m tools.two_halves --data critters data/pokemon_jpg            # and a folder of images, all of them
    python -m tools.two_halves                                             # after a stop: continue

The test of Kadkhodaie et al. (2024). Networks that have stored their few images draw those, each its own. Networks that
have learned what the images have in common agree, though they have no image in common. Both are trained with the quick
preset for the same number of steps and with the same seeds, without augmentation and labels; so they begin with the
same weights and see the same noise. Samples start from the same noise and are deterministic from there.

Writes outputs/two_halves/: samples.png (both halves' samples of the same noise, each above the nearest image of its
half), similarity.png, results.md and results.json. Trainings that were stopped are resumed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.memorization import COPY_RATIO, find_nearest
from models.pipeline import Pipeline
from training.dataset import NUM_CRITTERS, load_images
from training.run_dir import run_folder
from utils.cli import check_sub_folder, device_setting, parse, seed_setting, setting
from utils.device import pick_device
from utils.errors import UserError, one_line_errors
from utils.files import keep_settings, write_json, write_text
from utils.images import image_grid, save_image, save_images, to_uint8
from utils.plots import result_plot
from utils.processes import interrupt_on_sigterm, run_python
from utils.seeding import seed_from
from utils.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
HALVES = ("a", "b")
BATCH_SIZE = 16  # of the quick preset
SAMPLER, SAMPLER_STEPS = "dpm++", 20  # deterministic: what differs is the network
MEASURES = {  # of a sample; key in the results, and heading
    "agreement": "the other half's network, same noise",
    "other_noise": "the other half's network, other noise",
    "nearest_own": "nearest image of its own half",
    "nearest_other": "nearest image of the other half",
}


@dataclass
class Settings:
    """The flags of this command."""

    data: tuple[str, ...] = setting(("critters",), "critters, or a folder of images; several are compared", kind=str)
    numbers: tuple[int, ...] = setting((250, 1000, 10_000), "numbers of critters to divide, where those are the data",
                                       least=4)
    image_size: int = setting(32, "side of the images in pixels", least=8)
    steps: int = setting(6000, "training steps of 16 images for each network", above=0)
    num_samples: int = setting(64, "samples of each network that are compared", least=2)
    columns: int = setting(10, "samples that are shown", above=0)
    seed: int = seed_setting("seed of the trainings; the samples are those of the seeds from here on")
    train: str = setting("", "more flags for every training, as --train=\"--width 16\"", metavar="FLAGS")
    name: str = setting("two_halves", "sub-folder of outputs/ and checkpoints/")
    device: str = device_setting()


@dataclass
class Halves:
    """A data set in two halves.

    name: of its folder.
    title: for people.
    images: uint8 [N, 3, S, S] of each half.
    """

    name: str
    title: str
    images: tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    with one_line_errors():
        interrupt_on_sigterm()
        settings = parse(Settings, "Train two networks on disjoint halves of the images and compare what they draw "
                         "from the same noise.", prog="python -m tools.two_halves")
        check_sub_folder("--name", settings.name)
        outputs = run_folder("outputs", settings.name)
        keep_settings(outputs / "settings.json", _lasting(settings))
        device = pick_device(settings.device)
        rows: list[dict[str, Any]] = []
        sheets: list[torch.Tensor] = []
        for halves in all_halves(settings):
            models = [train_half(settings, halves, number) for number in range(2)]
            samples = [draw(model, settings, device) for model in models]
            results, nearest = compare(samples, halves.images)
            rows.append(dict(name=halves.name, title=halves.title, **results))
            sheets += [picture[: settings.columns] for pair in zip(samples, nearest) for picture in pair]
            write_results(outputs, rows, sheets, settings.columns)  # each time, in case of a stop
        print(f"{table(rows)}\n\nwrote {outputs}/samples.png, similarity.png, results.md and results.json")


def _lasting(settings: Settings) -> dict[str, Any]:
    """Return the settings that the trainings depend on; data sets can be added later."""
    return {name: value for name, value in asdict(settings).items() if name in ("image_size", "steps", "seed", "train")}


# ---------------------------------------------------------------------------------------------------------------------
# data and trainings


def all_halves(settings: Settings) -> list[Halves]:
    """Load every data set and divide it at random; of an odd number of images one is left out."""
    sources = []
    for data in settings.data:
        if data == "critters":
            sources += [(data, number, f"critters_{number}") for number in settings.numbers]
        else:
            sources.append((data, NUM_CRITTERS, Path(data).resolve().name))
    divided = []
    for data, number, name in sources:
        images = load_images(data, settings.image_size, label_source="none", num_critters=number).images
        if images is None or len(images) < 4:
            raise UserError(f"{data} has too few images to be divided, or more than fit in memory: give another folder")
        folder = run_folder("outputs", settings.name) / "images" / name
        keep_settings(folder / "source.json", dict(data=data, numbers=len(images)))
        generator = torch.Generator().manual_seed(seed_from(settings.seed, stream="two halves"))
        images = images[torch.randperm(len(images), generator=generator)]
        half = len(images) // 2
        title = f"{data if data == 'critters' else name}, 2 x {half:,} images"
        divided.append(Halves(name, title, (images[:half], images[half : 2 * half])))
    return divided


def train_half(settings: Settings, halves: Halves, number: int) -> Path:
    """Train on one half with train.py, or continue or skip a training that was begun; return the final checkpoint.

    Raises:
        UserError: if the training fails.
        KeyboardInterrupt: if it was stopped; it has saved.
    """
    run_name = f"{settings.name}/{halves.name}/{HALVES[number]}"
    folder = run_folder("checkpoints", run_name)
    final = folder / "final_model.pt"
    if final.exists():
        return final
    if (folder / "latest.pt").exists():
        command = ["--resume", "--run_name", run_name]
    else:
        images = halves.images[number]
        data = save_images(images, run_folder("outputs", settings.name) / "images" / halves.name / HALVES[number])
        epochs = max(1, round(settings.steps / math.ceil(len(images) / BATCH_SIZE)))
        command = ["--preset", "quick", "--data", data, "--labels", "none", "--augment", "none",
                   "--image_size", settings.image_size, "--epochs", epochs, "--sample_every", epochs,
                   "--milestone_every", epochs, "--num_samples", BATCH_SIZE, "--save_every", 2,
                   "--seed", settings.seed, "--device", settings.device, "--run_name", run_name,
                   *shlex.split(settings.train)]
    print(f"{halves.title}: half {HALVES[number]}", flush=True)
    status = run_python([ROOT / "train.py", *command])
    if status in (130, 143):
        raise KeyboardInterrupt
    if status:
        raise UserError(f"the training of {run_name} failed, see above; the same command continues")
    return final


def draw(checkpoint: Path, settings: Settings, device: torch.device) -> torch.Tensor:
    """Return samples, uint8 [num_samples, 3, S, S]; sample i starts from the noise of seed + i."""
    seeds = range(settings.seed, settings.seed + settings.num_samples)
    return to_uint8(Pipeline.load(checkpoint, device).sample(seeds, sampler=SAMPLER, steps=SAMPLER_STEPS))


# ---------------------------------------------------------------------------------------------------------------------
# comparison


def compare(samples: Sequence[torch.Tensor], images: Sequence[torch.Tensor]
            ) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Compare the samples of both networks with each other and with the images of both halves.

    Similarity is the cosine of the angle between two images from which the mean image of both halves was subtracted:
    1 for the same image, about 0 for images that have nothing else in common.

    Args:
        samples, images: uint8 [N, 3, S, S] and [M, 3, S, S] of either half.

    Returns:
        results: for each of MEASURES the similarity of every sample, those of half a first; "copies", the fraction of
            samples that copy an image of their own half by the ratio 1/3 (see evaluation/memorization.py).
        nearest: the nearest image of its own half for each sample, of either half.
    """
    mean = torch.cat(list(images)).float().mean(dim=0)
    drawn, known = ([_unit(x, mean) for x in pair] for pair in (samples, images))
    same, other = (drawn[0] * drawn[1]).sum(dim=1), (drawn[0] * drawn[1].roll(1, dims=0)).sum(dim=1)
    own, others = ([drawn[i] @ known[j].T for i, j in pairs] for pairs in (((0, 0), (1, 1)), ((0, 1), (1, 0))))
    copies = torch.cat([find_nearest(x, y).ratio < COPY_RATIO for x, y in zip(samples, images)])
    results = dict(agreement=same.tolist(), other_noise=other.tolist(),
                   nearest_own=torch.cat([x.amax(dim=1) for x in own]).tolist(),
                   nearest_other=torch.cat([x.amax(dim=1) for x in others]).tolist(),
                   copies=copies.float().mean().item())
    return results, [half[similarity.argmax(dim=1)] for half, similarity in zip(images, own)]


def _unit(images: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Return images, less the mean image, as vectors of length 1, [N, D]."""
    return torch.nn.functional.normalize((images.float() - mean).flatten(1), dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# results


def write_results(folder: Path, rows: Sequence[dict[str, Any]], sheets: Sequence[torch.Tensor], columns: int) -> None:
    """Write results.json, results.md, similarity.png and samples.png."""
    write_json(folder / "results.json", rows)
    write_text(folder / "results.md", table(rows) + "\n")
    names = [f"{row['title']}: {text}" for row in rows
             for text in ("half a", "nearest image of a", "half b", "nearest image of b")]
    pictures = torch.cat(list(sheets))
    save_image(image_grid(pictures, min(columns, len(sheets[0])), max(1, 64 // pictures.shape[-1]), names),
               folder / "samples.png")
    plot(rows, folder / "similarity.png")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table in Markdown: the median similarity of a sample to each other image, with the quartiles."""
    lines = []
    for row in rows:
        cells = [row["title"]]
        for name in MEASURES:
            low, middle, high = torch.tensor(row[name]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append([*cells, f"{100 * row['copies']:.0f} %"])
    return markdown_table(["images", *MEASURES.values(), "copies of its own half"], lines, numbers=True)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the distributions of the similarities, a panel for each data set."""
    with result_plot(path, 2 + 3 * len(rows), 2.8) as figure:
        axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
        bins = torch.linspace(-0.2, 1, 25).tolist()
        for axis, row in zip(axes, rows):
            for name, colour in (("other_noise", "0.75"), ("nearest_own", "C1"), ("agreement", "C0")):
                weights = [1 / len(row[name])] * len(row[name])
                axis.hist(row[name], bins, weights=weights, alpha=0.65, color=colour, label=MEASURES[name])
            axis.set_title(row["title"], fontsize=9)
            axis.set_xlabel("similarity of a sample to ...")
        axes[0].set_ylabel("fraction of samples")
        axes[0].legend(fontsize=7)


if __name__ == "__main__":
    main()
