"""Memory of a folder that is read as needed: it grows with the names of the files, not with their pixels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# Prints, after each folder, its number of images and the peak memory in bytes of this process and of a worker.
READ = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from training.batches import make_loader
from training.dataset import ImageFolder
unit = 1 if sys.platform == "darwin" else 1024
for folder in sys.argv[1:]:
    dataset = ImageFolder(folder, 64, memory_limit=0)
    for images, labels in make_loader(dataset, 32, seed=0, last_step=100, workers=2):
        assert images.shape == (32, 3, 64, 64)
    peaks = [resource.getrusage(kind).ru_maxrss * unit for kind in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(len(dataset), *peaks)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows does not report the peak")
def test_eight_thousand_files_take_the_memory_of_their_names(tmp_path):
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "one.png")
    for folder, count in ("few", 500), ("many", 8_000):
        (tmp_path / folder).mkdir()
        for i in range(count):
            name = tmp_path / folder / f"an image with a name as long as people give them {i:05d}.png"
            try:
                os.link(tmp_path / "one.png", name)
            except OSError:  # a file system without links, or with few
                shutil.copy(tmp_path / "one.png", name)
    done = subprocess.run([sys.executable, "-c", READ, "few", "many"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    few, many = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert (few[0], many[0]) == (500, 8_000)
    for name, before, after in zip(("process", "worker"), few[1:], many[1:]):
        grown = (after - before) / (8_000 - 500)
        # A path and its relative name as Python objects; decoded, an image would take 12,288 bytes.
        assert grown < 1_000, f"{grown:.0f} bytes an image more in the {name}"
