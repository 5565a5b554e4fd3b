"""A race: PokeDiff and other packages train on the same images for the same minutes. Whose pictures are better?

    python -m tools.race                              # 2,000 critters at 32 x 32; scores after 1, 2, 4 and 8 minutes
    python -m tools.race --minutes 4                  # after 4 minutes alone; the same command continues after a stop
    python -m tools.race --data data/pokemon_jpg --image_size 64 --minutes 30 --name race_pokemon
    python -m tools.race --minutes 0.1 --num_samples 50 --num_trial 0 --name rehearsal

One after the other, on the same cores: the quick preset, denoising-diffusion-pytorch and diffusers, each of these in
its own recommended settings, in our precision, batch and rate, and also in our widths (contenders.py, peers.py). Only
training steps count as time, with the waiting for images. Each draws the same number of samples, by the sampler that
suits it best in a trial. They are scored as evaluate.py does: KID in the features of an outside network, patch
distance, artifacts, copies. Writes outputs/race/: results.md, results.json, curve.png, samples.png. Run nothing else
meanwhile.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from critters import TYPES
from evaluation.data import DataSource, EvaluationData, load_data
from evaluation.distances import MIN_IMAGES, kernel_distance
from evaluation.efficientnet import EfficientNetFeatures
from evaluation.measure import Measurement, measure_samples
from tools.race.contender import Contender
from tools.race.contenders import CONTENDERS, installed, make_contender
from tools.race.results import write_results
from training.dataset import NUM_CRITTERS, load_images
from training.run_dir import StopOnSignal, run_folder
from unet import count_parameters
from utils.cli import check_sub_folder, device_setting, parse, setting
from utils.device import describe_device, pick_device, use_fast_kernels
from utils.errors import UserError, one_line_errors
from utils.files import keep_settings, read_json, replacing

FIRST_SEED = 0  # of the samples that are scored
TRIAL_SEED = 10_000_000  # of those that a sampler is chosen by


@dataclass
class Settings:
    """The flags of the race."""

    minutes: tuple[float, ...] = setting((1.0, 2.0, 4.0, 8.0), "minutes of training after which samples are drawn",
                                         kind=float, above=0)
    only: tuple[str, ...] = setting((), f"contenders, of {', '.join(CONTENDERS)} (default: all whose packages are "
                                    f"installed)", tuple(CONTENDERS), kind=str, metavar="NAME")
    data: str = setting("critters", "folder of images, or critters")
    labels: str = setting("auto", "source of the images' types, as in train.py; only PokeDiff learns them")
    num_critters: int = setting(NUM_CRITTERS, "number of critters, where those are the data", above=0)
    image_size: int = setting(32, "side of the images in pixels", least=8)
    num_samples: int = setting(500, "samples that are scored after the last of the minutes", least=MIN_IMAGES)
    num_curve: int = setting(128, "samples that are scored after each of the others, at most as many",
                             least=MIN_IMAGES)
    num_trial: int = setting(32, "samples by which the sampler is chosen; 0: the first of each contender's samplers",
                             least=0)
    batch_size: int = setting(64, "samples drawn at a time", above=0)
    name: str = setting("race", "sub-folder of outputs/")
    device: str = device_setting()


@dataclass
class Race:
    """What all contenders share."""

    settings: Settings
    data: EvaluationData
    outside: EfficientNetFeatures
    device: torch.device
    folder: Path
    stop: StopOnSignal
    results: dict[str, Any] = field(default_factory=dict)  # by contender and minutes


def main() -> None:
    with one_line_errors():
        settings = parse(Settings, "Train PokeDiff and other packages on the same images for the same time, and "
                         "compare what they draw.", prog="python -m tools.race")
        check_sub_folder("--name", settings.name)
        settings.minutes = tuple(sorted(set(settings.minutes)))
        if settings.num_trial == 1:
            raise ValueError("--num_trial must be 0 or at least 2, since one sample has no KID")
        device = pick_device(settings.device)
        use_fast_kernels()
        outside = EfficientNetFeatures(device)  # fails before minutes of work
        names = installed(settings.only or tuple(CONTENDERS))
        if not names:
            raise UserError("none of these contenders is installed, see above")
        folder = run_folder("outputs", settings.name)
        lasting = {name: value for name, value in asdict(settings).items()
                   if name not in ("only", "batch_size", "device", "name")}
        keep_settings(folder / "settings.json", lasting)
        race = Race(settings, load_race_data(settings), outside, device, folder, StopOnSignal(), read_results(folder))
        print(f"{race.data.description}; on {describe_device(device)} of {os.cpu_count()} cores")
        for name in names:
            run(race, name)
            if race.stop:
                print("stopped; the same command continues")
                sys.exit(128 + race.stop.signal)
        print(f"\n{(folder / 'results.md').read_text(encoding='utf-8')}\nwrote {folder}/results.md, results.json, "
              f"curve.png and samples.png")


def load_race_data(settings: Settings) -> EvaluationData:
    """Load the images to train on and to compare with; for critters, others that nobody trains on."""
    source = DataSource(settings.data, settings.image_size, settings.labels, settings.num_critters)
    if settings.data == "critters":
        return load_data(source, class_names=TYPES if settings.labels != "none" else ())
    class_names = load_images(settings.data, settings.image_size, label_source=settings.labels).class_names
    return load_data(source, class_names=class_names)


def read_results(folder: Path) -> dict[str, Any]:
    return read_json(folder / "results.json").get("contenders", {})


# ---------------------------------------------------------------------------------------------------------------------
# one contender


def run(race: Race, name: str) -> None:
    """Train a contender and score it after each of the minutes, less what was done before."""
    done = race.results.setdefault(name, {})
    all_minutes, folder = race.settings.minutes, race.folder / name
    contender: Contender | None = None
    for minutes in all_minutes:
        key = f"{minutes:g}"
        if key in done:
            continue
        if contender is None or contender.fits_time:
            contender = make_contender(name, race.data, folder, race.device)
            clock = Clock.resume(folder / "state.pt", contender, minutes)
        train(contender, clock, minutes, race, CONTENDERS[name].title)
        clock.save(folder / "state.pt", contender, minutes)
        if race.stop:
            return
        is_last = minutes == all_minutes[-1]
        count = race.settings.num_samples if is_last else min(race.settings.num_curve, race.settings.num_samples)
        scored = score(race, contender, name, count)
        if race.stop:
            return
        samples, result = scored
        with replacing(folder / f"samples_{key}.pt") as path:
            torch.save(samples, path)
        done[key] = dict(steps=clock.steps, images=clock.steps * contender.batch_size, seconds=clock.seconds,
                         parameters=count_parameters(contender.net), **result)
        write(race)
    (folder / "state.pt").unlink(missing_ok=True)


@dataclass
class Clock:
    """How many training steps a contender has made, and the seconds that they took."""

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def resume(cls, path: Path, contender: Contender, minutes: float) -> Clock:
        """Load the state at `path` into a contender, if there is one and it belongs to a training of these minutes."""
        if path.exists():
            saved = torch.load(path, weights_only=True)
            if saved["minutes"] == minutes or not contender.fits_time:
                contender.load_state(saved["contender"])
                return cls(saved["steps"], saved["seconds"])
        return cls()

    def save(self, path: Path, contender: Contender, minutes: float) -> None:
        with replacing(path) as temporary:
            torch.save(dict(minutes=minutes, contender=contender.state(), **asdict(self)), temporary)


def train(contender: Contender, clock: Clock, minutes: float, race: Race, title: str) -> None:
    """Make steps until the time is up, or a signal came. The first step that ends after the time is the last one."""
    total = 60 * minutes
    with tqdm(total=round(total), initial=round(clock.seconds), unit="s", desc=f"{title}, {minutes:g} min",
              bar_format="{desc}: {percentage:3.0f}% {bar} {postfix}", dynamic_ncols=True) as bar:
        while clock.seconds < total and not race.stop:
            began = time.perf_counter()
            try:
                contender.step(clock.steps, clock.seconds / total)
            except RuntimeError:  # Ctrl-C also reaches processes that read images, which end at once
                if race.stop:
                    return
                raise
            if race.device.type == "cuda":
                torch.cuda.synchronize()
            clock.seconds += time.perf_counter() - began
            clock.steps += 1
            bar.update(min(round(clock.seconds), bar.total) - bar.n)
            bar.set_postfix_str(f"{clock.steps * contender.batch_size:,} images")


# ---------------------------------------------------------------------------------------------------------------------
# score


def score(race: Race, contender: Contender, name: str, count: int) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """Draw samples and score them; None if a signal came meanwhile."""
    sampler, trials = contender.samplers[0], {}
    for tried in contender.samplers if race.settings.num_trial else ():
        samples = draw(race, contender, tried, race.settings.num_trial, TRIAL_SEED)
        if samples is None:
            return None
        real = race.data.real[: len(samples)]
        trials[tried] = kernel_distance(race.outside(samples), race.outside(real))["kid"].value
    if trials:
        sampler = min(trials, key=trials.__getitem__)
    samples = draw(race, contender, sampler, count, FIRST_SEED)
    if samples is None:
        return None
    measurement = Measurement(name, samples=samples)
    measure_samples(measurement, race.data, race.outside)
    return samples, dict(sampler=sampler, trials=trials, compared=measurement.compared, figures=measurement.figures,
                         notes=measurement.notes)


def draw(race: Race, contender: Contender, sampler: str, count: int, seed: int) -> torch.Tensor | None:
    """Return samples, uint8 [count, 3, S, S]; None if a signal came meanwhile."""
    batches = []
    for low in tqdm(range(0, count, race.settings.batch_size), desc=f"sampling, {sampler}", unit="batch", leave=False,
                    dynamic_ncols=True):
        if race.stop:
            return None
        batches.append(contender.draw(sampler, min(race.settings.batch_size, count - low), seed + low))
    return torch.cat(batches)


def write(race: Race) -> None:
    """Write what is known so far."""
    packages = {entry.package for entry in CONTENDERS.values() if entry.package} - {
        entry.package for name, entry in CONTENDERS.items() if name not in race.results}
    versions = dict(torch=torch.__version__) | {package: importlib.metadata.version(package) for package in packages}
    machine = dict(device=describe_device(race.device), cores=os.cpu_count(), versions=versions)
    titles = {name: entry.title for name, entry in CONTENDERS.items()}
    write_results(race.folder, asdict(race.settings), machine, race.data.description, race.results, titles)


if __name__ == "__main__":
    main()
