"""The folder of a static web page that draws with a model in the visitor's browser.

    write_web(pipeline, "critters", Path("outputs/web"), runtime=None)

It holds the files of web/, the runtime (ort/) and the model (model/); any static host can serve it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from models.export.description import describe
from models.export.onnx import autoencoder_graphs, denoiser_graph, require_packages
from models.pipeline import Pipeline
from utils.errors import UserError, first_line
from utils.files import replacing_folder

PAGE = Path(__file__).resolve().parents[2] / "web"
RUNTIME_PACKAGE = "onnxruntime-web@1"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def write_web(pipeline: Pipeline, name: str, folder: Path, runtime: Path | None = None, half: bool = True) -> None:
    """Write the page, its runtime and the model to `folder`, whole or not at all.

    Args:
        runtime: npm's onnxruntime-web, as its tarball or unpacked. None: npm fetches it.
        half: store the weights as float16.

    Raises:
        UserError: for a runtime that cannot be had, a missing package, a model that ONNX cannot hold.
        OSError: if the folder cannot be written.
    """
    require_packages()
    page = [path for path in sorted(PAGE.iterdir()) if not path.name.startswith(".")] if PAGE.is_dir() else []
    with replacing_folder(folder, names=[*(path.name for path in page), "ort", "model"]) as temporary:
        for path in page:
            if path.is_dir():
                shutil.copytree(path, temporary / path.name)
            else:
                shutil.copyfile(path, temporary / path.name)
        copy_runtime(runtime, temporary / "ort")
        write_model(pipeline, name, temporary / "model", half)


def write_model(pipeline: Pipeline, name: str, folder: Path, half: bool) -> None:
    """Write model.onnx, model.json and, for a latent model, encoder.onnx and decoder.onnx into a new folder."""
    graphs = {"model.onnx": denoiser_graph(pipeline, "x_0", half)}
    if pipeline.space.is_latent:
        graphs |= autoencoder_graphs(pipeline, half)
    folder.mkdir()
    description = describe(pipeline, name) | dict(bytes={}, sha256={})
    for file_name, graph in graphs.items():
        content = graph.SerializeToString()
        (folder / file_name).write_bytes(content)
        description["bytes"][file_name] = len(content)
        description["sha256"][file_name] = hashlib.sha256(content).hexdigest()
    (folder / "model.json").write_text(json.dumps(description, allow_nan=False) + "\n", encoding="utf-8")


def copy_runtime(source: Path | None, folder: Path) -> None:
    """Copy the runtime's files into a new folder.

    Raises:
        UserError: if `source` is not the package onnxruntime-web, or npm cannot fetch it.
    """
    folder.mkdir()
    if source is None:
        with tempfile.TemporaryDirectory() as downloads:
            _copy_from(_npm_pack(Path(downloads)), folder)
    else:
        _copy_from(source, folder)


def _copy_from(source: Path, folder: Path) -> None:
    problem = f"--runtime {source} is not npm's package onnxruntime-web, as a tarball or unpacked"
    if source.is_dir():
        for name in RUNTIME_FILES:
            found = [path for path in (source / name, source / "dist" / name, source / "package/dist" / name)
                     if path.is_file()]
            if not found:
                raise UserError(f"{problem}: it has no dist/{name}")
            shutil.copyfile(found[0], folder / name)
        return
    if not source.is_file():
        raise UserError(f"there is no --runtime {source}; `npm pack {RUNTIME_PACKAGE}` fetches one")
    try:
        with tarfile.open(source) as archive:
            for name in RUNTIME_FILES:
                with archive.extractfile(f"package/dist/{name}") as file, open(folder / name, "wb") as copy:
                    shutil.copyfileobj(file, copy)
    except (tarfile.TarError, KeyError, EOFError, AttributeError) as error:
        raise UserError(f"{problem} ({first_line(error)})") from error


def _npm_pack(folder: Path) -> Path:
    """Fetch the runtime's tarball with npm."""
    advice = f"fetch it elsewhere with `npm pack {RUNTIME_PACKAGE}` and name the file with --runtime"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the page's runtime comes from npm, which is not installed; {advice}")
    try:
        done = subprocess.run([npm, "pack", "--silent", RUNTIME_PACKAGE], cwd=folder, capture_output=True, text=True,
                              timeout=600)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"npm did not fetch the page's runtime within 10 minutes; {advice}") from error
    found = list(folder.glob("*.tgz"))
    if done.returncode or not found:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), "no reason given")
        raise UserError(f"npm could not fetch the page's runtime ({reason.strip()[:200]}); {advice}")
    return found[0]
