"""Export a model for other programs: diffusers, ONNX, safetensors, a page for the browser.

    python export.py --checkpoint checkpoints/critters.pt --to web --output outputs/web

Needs the packages of requirements-export.txt. See docs/exporting.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.export import web
from models.pipeline import Pipeline, newest_checkpoint
from utils.cli import parse, setting
from utils.errors import UserError, one_line_errors

FORMATS = ("web",)


@dataclass
class Settings:
    checkpoint: Path | None = setting(None, "file of weights (default: the newest in checkpoints/)", kind=Path)
    to: str | None = setting(None, "format to write", FORMATS, kind=str)
    output: Path | None = setting(None, "file or folder to write", kind=Path)
    runtime: Path | None = setting(None, "for web: npm's package onnxruntime-web, as a tarball or unpacked (default: "
                                         "fetch it with npm)", kind=Path, metavar="FILE")


def main() -> None:
    with one_line_errors("export on a machine with more"):
        settings = parse(Settings, "Export a model for other programs.", prog="python export.py")
        if settings.to is None:
            raise UserError(f"say which format with --to: {', '.join(FORMATS)}")
        checkpoint = settings.checkpoint or newest_checkpoint()
        pipeline = Pipeline.load(checkpoint, precision="fp32")
        name = pipeline.settings.get("run_name") or Path(checkpoint).stem
        output = settings.output or Path("outputs") / f"{name}_{settings.to}"
        web.write_web(pipeline, name, output, settings.runtime)
        print(f"wrote {output}/")


if __name__ == "__main__":
    main()
