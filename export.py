"""Export a model for other programs: diffusers, ONNX, safetensors, or a page that draws in the browser.

    python export.py --to web                                         # the newest checkpoint, as a static page
    python export.py --checkpoint checkpoints/final_model.pt --to diffusers --output outputs/mine
    python export.py --to onnx --half --output outputs/mine.onnx      # weights stored as float16
    python export.py --to safetensors                                 # weights and configuration; generate.py reads it
    python export.py --to pt                                          # a checkpoint of half the size

All but pt need the packages of requirements-export.txt, and what they write is checked against the checkpoint. What is
written is whole or not there at all. See docs/exporting.md.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.report_markdown import find_report, report_markdown
from models.export import diffusers, onnx, web
from models.export.card import Card
from models.export.weights import write_half, write_safetensors
from models.pipeline import Pipeline, newest_checkpoint
from unet import UNet
from utils.cli import parse, setting
from utils.errors import UserError, one_line_errors
from utils.files import naming

FORMATS = {
    "diffusers": "a folder that DDPMPipeline loads",
    "onnx": "a file for any runtime (a folder for a model of latents)",
    "pt": "a checkpoint with float16 weights, half as large, which generate.py reads",
    "safetensors": "weights and configuration in one file, which generate.py reads",
    "web": "the folder of a static page that draws in the browser",
}
SUFFIXES = {"onnx": ".onnx", "pt": ".pt", "safetensors": ".safetensors"}
FILE_SUFFIXES = {".onnx", ".safetensors", ".pt", ".pth", ".bin", ".zip", ".tgz", ".html", ".json", ".md", ".png"}
# Settings that only some formats have.
BELONGS_TO = {"guide": ("onnx", "pt", "safetensors", "web"), "half": ("onnx",), "max_types": ("diffusers", "web"),
              "runtime": ("web",), "report": ("diffusers",), "license": ("diffusers",), "credit": ("diffusers",),
              "num_images": ("diffusers",)}
CRITTERS_CREDIT = "PokeDiff's built-in creatures, drawn by program."
UNKNOWN_CREDIT = "The images it was trained on belong to their owners, whom this card does not name yet."


@dataclass
class Settings:
    checkpoint: Path | None = setting(None, "file of weights (default: the newest in checkpoints/)", kind=Path,
                                      metavar="FILE")
    to: str | None = setting(None, "; ".join(f"{name}: {about}" for name, about in FORMATS.items()), tuple(FORMATS),
                             kind=str)
    output: Path | None = setting(None, "file or folder to write (default: in outputs/, named after the run)",
                                  kind=Path)
    guide: Path | None = setting(None, "not diffusers, nor one .onnx file: a checkpoint of less training, away from "
                                       "whose network guidance goes (default: the earlier network that the "
                                       "checkpoint holds)", kind=Path,
                                 metavar="FILE")
    half: bool = setting(False, "onnx: store the weights as float16, in half of the bytes (web always does)")
    max_types: int | None = setting(None, "diffusers, web: largest set of types to offer (default: 2)", kind=int,
                                    least=1)
    runtime: Path | None = setting(None, "web: npm's package onnxruntime-web, as its tarball or unpacked (default: "
                                         "fetch it with npm)", kind=Path, metavar="PATH")
    report: Path | None = setting(None, "diffusers: report.json of evaluate.py, whose figures the card shows (default: "
                                        "one beside the checkpoint, or the last one if it is of this checkpoint)",
                                  kind=Path, metavar="FILE")
    license: str | None = setting(None, "diffusers: the card's license identifier (default: mit for critters, else "
                                        "other)", kind=str)
    credit: str | None = setting(None, "diffusers: who made and who owns the training images, for the card", kind=str)
    num_images: int | None = setting(None, "diffusers: pictures to draw for the card (default: 16)", kind=int, least=0)


def main() -> None:
    with one_line_errors("export on a machine with more"):
        settings = parse(Settings, "Export a model for other programs.", prog="python export.py")
        check(settings)

        # Load the model.
        checkpoint = settings.checkpoint or newest_checkpoint()
        pipeline = Pipeline.load(checkpoint, precision="fp32")
        if settings.guide:
            pipeline.load_guide(settings.guide)
        name = str(pipeline.settings.get("run_name") or checkpoint.stem)
        output = settings.output or Path("outputs") / f"{Path(name).name}{default_ending(settings.to, pipeline)}"
        print(f"{checkpoint}: {pipeline.image_size} x {pipeline.image_size}, to {settings.to}")

        if settings.guide and output.suffix.lower() == ".onnx":
            raise ValueError("--guide needs a folder, since one .onnx file holds one network: give --output one "
                             "without .onnx")
        if pipeline.earlier is not None and (settings.to == "diffusers" or output.suffix.lower() == ".onnx"):
            print(f"note: {'one .onnx file' if settings.to == 'onnx' else settings.to} leaves out the earlier network "
                  f"that generate.py guides away from, so pictures will be less good; a folder of --to onnx, and the "
                  f"other formats, have it")

        # Write it.
        with naming(output):
            write(settings, pipeline, checkpoint, name, output)
        print(summary(settings.to, output))


def check(settings: Settings) -> None:
    """Raise ValueError or UserError for flags that are missing or do not go together."""
    if settings.to is None:
        raise UserError("give a format: --to diffusers, onnx, pt, safetensors or web")
    for name, formats in BELONGS_TO.items():
        if getattr(settings, name) not in (None, False) and settings.to not in formats:
            raise ValueError(f"--{name} goes with --to {' and '.join(formats)}, not with {settings.to}")
    if settings.output is None:
        return
    suffix = settings.output.suffix.lower()
    if settings.to in ("pt", "safetensors") and suffix != SUFFIXES[settings.to]:
        raise ValueError(f"--output must end in {SUFFIXES[settings.to]}, not {settings.output}")
    if settings.to == "onnx" and suffix != ".onnx" and suffix in FILE_SUFFIXES:
        raise ValueError(f"--output must end in .onnx, or be a folder, not {settings.output}")
    if settings.to in ("diffusers", "web") and suffix in FILE_SUFFIXES:
        raise ValueError(f"--to {settings.to} writes a folder: give --output the name of one, not {settings.output}")


def default_ending(to: str, pipeline: Pipeline) -> str:
    """Return what distinguishes the default output of a format."""
    is_file = to in SUFFIXES and not (to == "onnx" and pipeline.space.is_latent)
    return SUFFIXES[to] if is_file else f"_{to}"


def write(settings: Settings, pipeline: Pipeline, checkpoint: Path, name: str, output: Path) -> None:
    max_types = settings.max_types or 2
    if settings.to == "diffusers":
        diffusers.write_folder(pipeline, output, make_card(settings, pipeline, checkpoint, name), max_types)
    elif settings.to == "web":
        web.write_web(pipeline, name, output, settings.runtime, max_types)
    elif settings.to == "pt":
        write_half(checkpoint, output, guide_to_keep(settings, pipeline))
    elif settings.to == "safetensors":
        write_safetensors(checkpoint, output, guide_to_keep(settings, pipeline))
    elif output.suffix.lower() == ".onnx":
        onnx.write_file(pipeline, name, output, settings.half)
    else:
        onnx.write_folder(pipeline, name, output, settings.half)


def guide_to_keep(settings: Settings, pipeline: Pipeline) -> UNet | None:
    """Return the network of --guide in the size of the checkpoint's own. Raises ValueError if it cannot have that."""
    if settings.guide is None:
        return None
    net, size = copy.deepcopy(pipeline.net), pipeline.earlier.config
    if net.config != replace(size, dropout=net.config.dropout, blocks=max(size.blocks, net.config.blocks)):
        raise ValueError(f"--guide {settings.guide} is of a network of another size, which a checkpoint cannot hold; "
                         f"generate.py --guide takes it as it is")
    net.load_shallower(pipeline.earlier)
    return net


def make_card(settings: Settings, pipeline: Pipeline, checkpoint: Path, name: str) -> Card:
    """Collect what the card says beside what the model knows of itself."""
    report = settings.report or find_report(checkpoint)
    critters = pipeline.settings.get("data") == "critters"
    if settings.credit is None and not critters:
        print("note: name who made and who owns the training images with --credit before the card is published")
    return Card(
        name, settings.license or ("mit" if critters else "other"),
        settings.credit or (CRITTERS_CREDIT if critters else UNKNOWN_CREDIT),
        report_markdown(report, checkpoint) if report else "",
        16 if settings.num_images is None else settings.num_images)


def summary(to: str, output: Path) -> str:
    """Say what was written, and what can be done with it."""
    files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    next_command = {
        "pt": f"python generate.py --checkpoint {output}",
        "safetensors": f"python generate.py --checkpoint {output}",
        "web": f"python -m http.server --directory {output}, then http://localhost:8000",
    }.get(to)
    return f"wrote {output}, {megabytes:.1f} MB" + (f"; {next_command}" if next_command else "")


if __name__ == "__main__":
    main()
