"""Kill a small training over and over with SIGKILL, resume it each time, and compare its end with an undisturbed run.

    python tests/kill_many.py --kills 200
    python tests/kill_many.py --kills 200 --log tensorboard          # and the event file is metrics.csv, with the grids

A kill comes after a random time, or at a random moment of a save: half-way through the bytes of a checkpoint, of an
image, of the run's page or of a line of metrics.csv, or just before or after a file is synced or renamed. Every run
must end with the files of the undisturbed one: the same weights, EMA, optimizer and everything else in its checkpoints,
to the last bit, and the same bytes in metrics.csv and in the images. After every kill the run's page must be whole.

POSIX only: each life is a fork of this process, which has imported everything already, so it costs part of a second.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's other threads
os.environ["MPLBACKEND"] = "Agg"

import matplotlib.pyplot as plt  # noqa: E402  imported here once, instead of in every life
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from scripts import same  # noqa: E402

import train  # noqa: E402
from training import event_log  # noqa: E402
from training.run_dir import RunDir  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402

FLAGS = ("--data critters --num_critters 10 --image_size 8 --width 8 --groups 4 --multipliers 1 2 --blocks 1 "
         "--epochs 8 --batch_size 4 --num_samples 4 --sample_steps 2 --timesteps 50 --device cpu --precision fp32 "
         "--dropout 0.1 --sample_every 4 --milestone_every 2 --keep 2 --save_every 0").split()
MOMENTS = ("any time", "half a checkpoint", "half an image", "half a page", "half a line", "before a sync",
           "after a sync", "before a rename", "after a rename")
HALF_A_RECORD = "half a record"  # of the event file


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # until it arrives


def arm(moment: str, chance: random.Random, seconds: float) -> None:
    """Have this process killed at such a moment, within `seconds` or after some moments that it survives."""
    if moment == "any time":
        threading.Timer(seconds * chance.random(), die).start()
        return
    writers = {"half a checkpoint": (torch, "save"), "half an image": (Image.Image, "save"),  # loss curves and grids
               "half a page": (Path, "write_text"), "half a line": (RunDir, "_append_metrics"),
               HALF_A_RECORD: (event_log, "_append")}
    module, name = writers.get(moment, (os, "fsync" if "sync" in moment else "replace"))
    original = getattr(module, name)
    survived = chance.randrange({"half an image": 2, "half a line": 1}.get(moment, 6))

    def deadly(*args, **kwargs):
        nonlocal survived
        survived -= 1
        if survived >= 0:
            return original(*args, **kwargs)
        if moment.startswith("before"):
            die()
        original(*args, **kwargs)
        if moment.startswith("half"):
            for written in args[:1] if moment == "half a page" else args:
                if isinstance(written, (str, Path)) or hasattr(written, "fileno"):
                    cut(written)
        die()

    def cut(written) -> None:
        """Leave a random part of what the last write added to a file, open or closed."""
        if isinstance(written, io.BytesIO):
            return
        if isinstance(written, (str, Path)):
            path = Path(written)
        else:
            written.flush()
            path = Path(written.name)
        size, last = path.stat().st_size, {"half a line": 20, HALF_A_RECORD: 200}.get(moment)
        os.truncate(path, max(0, size - chance.randrange(1, last)) if last else chance.randrange(size))

    setattr(module, name, deadly)


def live(folder: Path, flags: list[str], moment: str | None, chance: random.Random, seconds: float = 0) -> int:
    """Run `train.py FLAGS` in a process that is killed at a `moment`; return its status, as waitpid does."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.chdir(folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            sys.argv = ["train.py", *flags]
            if moment is not None:
                arm(moment, chance, seconds)
            train.main()
            status = 0
        except SystemExit as stopped:
            print(stopped.code, flush=True)
        finally:
            os._exit(status)
    return os.waitpid(process, 0)[1]


def compare(folder: Path, whole: Path) -> None:
    """Fail unless two runs have left the same files."""
    names = [{path.relative_to(top).as_posix() for path in [*top.glob("outputs/*"), *top.glob("checkpoints/*")]
              if "tfevents" not in path.name} for top in (folder, whole)]
    assert names[0] == names[1], f"{folder} has other files than {whole}: {names[0] ^ names[1]}"
    for name in names[0] - {"checkpoints/.lock", "outputs/cost.json", "outputs/index.html"}:  # process and seconds
        if name.endswith(".pt"):
            assert same(load_checkpoint(folder / name), load_checkpoint(whole / name)), f"{folder / name} differs"
        else:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), f"{folder / name} differs"


def compare_events(folder: Path) -> None:
    """Fail unless TensorBoard reads metrics.csv and the grids from the event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outputs = folder / "outputs"
    assert len([path for path in outputs.glob("*tfevents*") if path.stat().st_size]) == 1, f"{folder} has several"
    read = EventAccumulator(str(outputs), size_guidance=dict(scalars=0, images=0)).Reload()
    with (outputs / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for column in rows[0].keys() - {"step"}:
        points = [(event.step, event.value) for event in read.Scalars(column)]
        assert points == [(int(row["step"]), float(np.float32(row[column]))) for row in rows], f"{folder}: {column}"
    grids = [np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in read.Images(event_log.GRIDS)]
    drawn = [np.asarray(Image.open(path)) for path in sorted(outputs.glob("generated_epoch_*.png"))]
    assert len(grids) == len(drawn) and all(map(np.array_equal, grids, drawn)), f"{folder} shows other grids"


def check_page(folder: Path) -> None:
    """Fail if the run's page is not whole."""
    page = folder / "outputs/index.html"
    text = page.read_text(encoding="utf-8") if page.exists() else "<!doctype html></html>\n"
    assert text.startswith("<!doctype html>") and text.endswith("</html>\n"), f"{page} is not whole"


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a training many times and compare its end with a whole one's.")
    parser.add_argument("--kills", type=int, default=200, help="how many times, at least (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="another one kills at other moments (default: 0)")
    parser.add_argument("--log", choices=event_log.LOGS, default="none", help="as in train.py (default: none)")
    args = parser.parse_args()
    flags, moments = [*FLAGS, "--log", args.log], MOMENTS
    if args.log == "tensorboard":
        event_log.check_tensorboard()  # imported here once
        moments = (*MOMENTS, HALF_A_RECORD)
    torch.set_num_threads(1)
    plt.subplots(layout="constrained")[0].savefig(io.BytesIO())  # finds the fonts
    chance, kills, finished, lives, unfinished = random.Random(args.seed), Counter(), 0, 0, False
    with tempfile.TemporaryDirectory() as top:
        whole = Path(top, "whole")
        whole.mkdir()
        started = time.monotonic()
        assert live(whole, flags, None, chance) == 0, (whole / "log").read_text()
        seconds = time.monotonic() - started
        while kills.total() < args.kills or unfinished:
            folder = Path(top, f"run_{finished}")
            folder.mkdir(exist_ok=True)
            begun = (folder / "checkpoints/latest.pt").exists()
            moment = moments[lives % len(moments)] if kills.total() < args.kills else None
            status = live(folder, ["--resume"] if begun else flags, moment, chance, seconds / 6)
            check_page(folder)
            lives += 1
            unfinished = status == signal.SIGKILL
            if unfinished:
                kills[moment] += 1
                continue
            assert status == 0, f"a life ended with status {status}: {(folder / 'log').read_text()[-2000:]}"
            compare(folder, whole)
            if args.log == "tensorboard":
                compare_events(folder)
            finished += 1
    print(f"{kills.total()} kills of {finished} runs, each of which ended as the undisturbed one, bit for bit")
    print(", ".join(f"{moment}: {kills[moment]}" for moment in moments))


if __name__ == "__main__":
    main()
