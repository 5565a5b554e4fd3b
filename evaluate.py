"""Measure what a model has learned: likelihood, distance to the data, copies, artifacts.

    python evaluate.py                                                            # the newest checkpoint
    python evaluate.py --checkpoint checkpoints/final_model.pt --num_samples 1000
    python evaluate.py --checkpoint checkpoints/epoch_*.pt --num_samples 500      # also: which epoch to keep
    python evaluate.py --samples outputs/generated --data data/pokemon_jpg        # images that were drawn before

Prints a table and writes report.json and report.html, which explains every figure, to outputs/evaluation/. Samples are
compared with the data that the checkpoint was trained on, and with the images that were held out of the training
(`train.py --holdout 0.1`). Only --features efficientnet and --fid need a trained network. See docs/evaluation.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evaluation.data import (
    CheckpointInfo,
    DataSource,
    EvaluationData,
    common_source,
    load_data,
    load_samples,
    native_side,
    read_info,
)
from evaluation.distances import import_torch_fidelity
from evaluation.efficientnet import EfficientNetFeatures
from evaluation.measure import (
    Measurement,
    draw_samples,
    measure_bits,
    measure_guided_copies,
    measure_membership,
    measure_samples,
)
from evaluation.report import table, write_report
from models.pipeline import BY_EARLIER, BY_TYPES, DEFAULT_GUIDANCE, Pipeline, newest_checkpoint
from reverse_diffusion import SAMPLERS
from training.labels import BEFORE_METADATA
from utils.cli import device_setting, parse, precision_setting, seed_setting, setting
from utils.device import describe_device, pick_device, pick_precision, use_fast_kernels
from utils.errors import one_line_errors

# Flags that say how samples are drawn, and those that only mean something with a checkpoint.
DRAWING_FLAGS = ("num_samples", "sampler", "steps", "guidance", "guide", "num_guided")
CHECKPOINT_FLAGS = ("labels", "label_column", "num_likelihood", "likelihood_steps")


@dataclass
class Settings:
    checkpoint: tuple[Path, ...] = setting((), "checkpoint, or several of one training for figures over time (default: "
                                           "the newest in checkpoints/)", kind=Path, metavar="FILE")
    samples: Path | None = setting(None, "measure the images in this folder, as written by generate.py --individual, "
                                   "instead of drawing samples", kind=Path, metavar="FOLDER")
    data: str | None = setting(None, "folder of images, a .zip of one, or critters (default: what the checkpoint was "
                               "trained on)", kind=str)
    labels: str | None = setting(None, "source of the images' types, as in train.py (default: as in the training)",
                                 kind=str)
    label_column: tuple[str, ...] = setting((), "columns of the metadata that hold the types, as in train.py (default: "
                                            "as in the training)", kind=str, metavar="NAME")
    image_size: int | None = setting(None, "side of the images in pixels, for --samples without --checkpoint (default: "
                                     "that of the first sample)", kind=int, least=8)
    num_samples: int = setting(1000, "samples to draw for each checkpoint", least=1)
    sampler: str | None = setting(None, "sampler (default: that of the training's sample grids)", tuple(SAMPLERS),
                                  kind=str)
    steps: int | None = setting(None, "network passes for a sample (default: as for those grids; 50 for another "
                                "sampler)", kind=int, least=1)
    guidance: float | None = setting(None, "scale of the guidance (1 = off); higher values make samples less varied "
                                           f"than the data (default: 1; {DEFAULT_GUIDANCE:g} with --guide)", kind=float)
    guide: str | None = setting(None, "what guidance goes away from, earlier, types, or the file of a checkpoint, as "
                                      "in generate.py (default: earlier where all checkpoints hold an earlier network, "
                                      "else types)", kind=str)
    num_guided: int = setting(200, "samples at guidance 3, generate.py's default, that are searched for copies as "
                              "well, of a model that can be guided; 0: none", least=0)
    num_likelihood: int = setting(200, "training images, and unseen images, whose bits and membership are estimated; "
                                  "0: none", least=0)
    likelihood_steps: int = setting(16, "timesteps visited for each of them", least=1)
    features: str | None = setting(None, "also KID, precision, recall, density and coverage in the features of this "
                                   "outside network; needs the packages of requirements-evaluate.txt",
                                   ("efficientnet",), kind=str)
    fid: bool = setting(False, "also FID and KID; needs torch-fidelity")
    seed: int = seed_setting("sample i is drawn from seed + i")
    batch_size: int = setting(64, "images at a time", least=1)
    output: Path = setting(Path("outputs/evaluation"), "folder for the report")
    device: str = device_setting()
    precision: str = precision_setting()


def check(settings: Settings) -> None:
    """Raise ValueError for flags that do not go together."""
    if settings.samples and len(settings.checkpoint) > 1:
        raise ValueError("--samples goes with one --checkpoint or none")
    if settings.samples and not settings.checkpoint and not settings.data:
        raise ValueError("--samples needs --data, the images to compare with, or --checkpoint, which knows them")
    has_checkpoint = bool(settings.checkpoint or not settings.samples)
    for names, is_ignored, reason in (
        (DRAWING_FLAGS, settings.samples, "--samples are drawn already"),
        (CHECKPOINT_FLAGS, not has_checkpoint, "--samples without --checkpoint come from no model"),
        (("image_size",), has_checkpoint, "a checkpoint knows its own"),
    ):
        for name in names:
            if is_ignored and getattr(settings, name) not in (getattr(Settings, name), 0):
                raise ValueError(f"--{name} has no effect here, since {reason}: leave it out")


def main() -> None:
    with one_line_errors("give a smaller --batch_size"):
        settings = parse(Settings, "Measure what a model has learned: likelihood, distance to the data, copies, "
                         "artifacts.", prog="python evaluate.py")
        check(settings)
        device = pick_device(settings.device)
        settings.precision = pick_precision(settings.precision, device)
        if settings.guidance is None:
            settings.guidance = DEFAULT_GUIDANCE if settings.guide else 1.0
        use_fast_kernels()

        # Fail before minutes of work.
        if settings.fid:
            import_torch_fidelity()
        outside = EfficientNetFeatures(device) if settings.features else None
        infos = find_checkpoints(settings)
        if not settings.samples:
            choose_guide(infos, settings)
        settings.output.mkdir(parents=True, exist_ok=True)

        # Measure one checkpoint after another; only one at a time is in memory.
        data = find_data(settings, infos)
        measurements: list[Measurement] = []
        for info in infos or [None]:
            name = info.path if info else settings.samples
            print(f"{name}: {data.description}; on {describe_device(device)}, {settings.precision}")
            measurements.append(evaluate(info, data, settings, device, outside))
            print(table(measurements[-1]) + "\n")
            measurements.sort(key=lambda measurement: measurement.epoch)
            report = write_report(measurements, data, settings.output)  # each time, in case of a stop

        # Summary
        if report["epoch_to_keep"]:
            print(f"- {report['epoch_to_keep']}")
        for line in report["runs"][-1]["verdict"] + report["notes"]:
            print(f"- {line}")
        print(f"wrote {settings.output}/report.html and report.json")


def find_checkpoints(settings: Settings) -> list[CheckpointInfo]:
    """Read what is needed of the checkpoints before their weights; none for samples alone."""
    if settings.samples and not settings.checkpoint:
        return []
    return [read_info(path) for path in settings.checkpoint or (newest_checkpoint(),)]


def choose_guide(infos: list[CheckpointInfo], settings: Settings) -> None:
    """Choose one guide for all checkpoints. Raises ValueError for guidance that one of them cannot follow."""
    given = settings.guide
    settings.guide = given or (BY_EARLIER if all(info.has_earlier for info in infos) else BY_TYPES)
    if settings.guidance == 1 and given is None:
        return
    for info in sorted(infos, key=lambda info: info.has_earlier):  # those first whose own default is the common one
        pipeline = Pipeline.load(info.path)
        try:
            guide = pipeline.use_guide(given)
            pipeline.choose_guide(settings.guidance, torch.zeros(1, len(pipeline.class_names)), guide)
        except ValueError as error:
            raise ValueError(f"{info.path}: {error}") from error


def find_data(settings: Settings, infos: list[CheckpointInfo]) -> EvaluationData:
    """Load the data of the checkpoints, or --data with the labels of --labels.

    Raises:
        DataError, ArchiveError: as `load_data` does.
        ValueError: the same, and for labels that the checkpoints know nothing of.
    """
    if not infos:
        image_size = settings.image_size or native_side(settings.samples)
        return load_data(DataSource(settings.data, image_size, label_source="none"), held_out=None)
    source, held_out = common_source(infos), infos[0].held_out
    if settings.data and not _same_data(settings.data, source.data):
        print(f"note: the model was trained on {source.data}; if {settings.data} is no copy of that, what is said of "
              f"training images, copies and memorisation means nothing", file=sys.stderr)
        source = replace(source, data=settings.data, label_source="auto", label_columns=(), splits="auto")
        held_out = held_out or None  # the splits of the other folder, if it has any
    if settings.labels or settings.label_column:
        if not infos[0].class_names and (settings.labels != "none" or settings.label_column):
            raise ValueError("the checkpoint knows no types: leave out --labels and --label_column")
        before = "auto" if source.label_source == BEFORE_METADATA else source.label_source
        source = replace(source, label_source=settings.labels or before, label_columns=settings.label_column)
    return load_data(source, held_out, infos[0].class_names)


def _same_data(one: str, other: str) -> bool:
    """Whether both name the critters, or the same folder."""
    if "critters" in (one, other):
        return one == other
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def evaluate(info: CheckpointInfo | None, data: EvaluationData, settings: Settings, device: torch.device,
             outside: EfficientNetFeatures | None) -> Measurement:
    """Measure one checkpoint, or the samples in a folder."""
    pipeline = Pipeline.load(info.path, device, settings.precision) if info else None
    guide = pipeline.use_guide(settings.guide) if pipeline else None
    drawing = dict(guide=guide, sampler=settings.sampler, steps=settings.steps, seed=settings.seed,
                   batch_size=settings.batch_size)
    if info:
        measurement = Measurement(str(info.path), info.epoch, trained_on=info.settings["data"])
    else:
        measurement = Measurement(str(settings.samples))
    if settings.samples:
        measurement.samples = load_samples(settings.samples, data.train.shape[-1])
    else:
        measurement.samples, measurement.sampling = draw_samples(pipeline, data, settings.num_samples,
                                                                 guidance=settings.guidance, **drawing)
    if pipeline and settings.num_likelihood:
        effort = (settings.num_likelihood, settings.likelihood_steps)
        measure_bits(measurement, pipeline, data, *effort, seed=settings.seed, batch_size=settings.batch_size)
        measure_membership(measurement, pipeline, data, *effort, seed=settings.seed, batch_size=settings.batch_size)
    print(f"measuring {len(measurement.samples):,} samples")
    measure_samples(measurement, data, outside, fid=settings.fid, cuda=device.type == "cuda")
    if pipeline and not settings.samples and settings.num_guided and settings.guidance != DEFAULT_GUIDANCE:
        measure_guided_copies(measurement, pipeline, data, settings.num_guided, **drawing)
    return measurement


if __name__ == "__main__":
    main()
