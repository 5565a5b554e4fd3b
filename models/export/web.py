"""The folder of a static web page that draws with a model in the visitor's browser.

    write_web(pipeline, "critters", Path("outputs/web"), runtime=None)

It holds the files of web/, the runtime (ort/) and the model (model/); any static host can serve it.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from models.export.onnx import require_packages, write_model
from models.pipeline import Pipeline
from utils.errors import UserError, first_line
from utils.files import replacing_folder

PAGE = Path(__file__).resolve().parents[2] / "web"
RUNTIME_PACKAGE = "onnxruntime-web@1.30.0"  # the version that the page was tried with
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
LARGEST_RUNTIME_FILE = 200 * 2**20  # bytes


def write_web(pipeline: Pipeline, name: str, folder: Path, runtime: Path | None = None, max_types: int = 2) -> None:
    """Write the page, its runtime and the model, its weights as float16, to `folder`, whole or not at all.

    Args:
        runtime: npm's onnxruntime-web, as its tarball or unpacked. None: npm fetches it.
        max_types: the largest set of types that the page offers.

    Raises:
        UserError: for a runtime that cannot be had, a missing package, a model that ONNX cannot hold.
        OSError: if the folder cannot be written.
    """
    require_packages()
    if not (PAGE / "index.html").is_file():
        raise UserError(f"there is no page at {PAGE}; get it from the repository")
    if PAGE in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"--output {folder} is the page's own source; name another folder")
    with replacing_folder(folder) as temporary:
        for path in PAGE.iterdir():
            if path.is_file() and not path.name.startswith("."):  # an editor's or the system's own
                shutil.copyfile(path, temporary / path.name)
        (temporary / "ort").mkdir()
        for file_name, content in read_runtime(runtime).items():
            (temporary / "ort" / file_name).write_bytes(content)
        (temporary / "model").mkdir()
        write_model(pipeline, name, temporary / "model", "x_0", half=True, max_types=max_types)


def read_runtime(source: Path | None) -> dict[str, bytes]:
    """Return the runtime's files by name.

    Raises:
        UserError: if `source` is not the package onnxruntime-web, or npm cannot fetch it.
    """
    if source is None:
        with tempfile.TemporaryDirectory() as downloads:
            return read_runtime(_npm_pack(Path(downloads)))
    if not source.exists():
        raise UserError(f"there is no --runtime {source}; `npm pack {RUNTIME_PACKAGE}` fetches one")
    try:
        if source.is_dir():
            folder = source / "package" if (source / "package").is_dir() else source
            return {name: (folder / "dist" / name).read_bytes() for name in RUNTIME_FILES}
        with tarfile.open(source) as archive:
            return {name: _read_member(archive, f"package/dist/{name}") for name in RUNTIME_FILES}
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"--runtime {source} is not npm's package onnxruntime-web, as its tarball or unpacked "
                        f"({first_line(error)})") from error


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.getmember(name)
    if not member.isfile() or member.size > LARGEST_RUNTIME_FILE:
        raise ValueError(f"{name} is of another kind")
    return archive.extractfile(member).read()


def _npm_pack(folder: Path) -> Path:
    """Fetch the runtime's tarball with npm."""
    advice = f"fetch it elsewhere with `npm pack {RUNTIME_PACKAGE}` and name the file with --runtime"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the page's runtime comes from npm, which is not installed; {advice}")
    try:
        done = subprocess.run([npm, "pack", "--loglevel=error", RUNTIME_PACKAGE], cwd=folder, capture_output=True,
                              text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"npm did not fetch the page's runtime within 10 minutes; {advice}") from error
    found = list(folder.glob("*.tgz"))
    if done.returncode or not found:
        reason = next((line for line in done.stderr.splitlines() if line.strip()), "no reason given")
        raise UserError(f"npm could not fetch the page's runtime ({reason.strip()[:200]}); {advice}")
    return found[0]
