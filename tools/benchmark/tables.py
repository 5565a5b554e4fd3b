"""The benchmark's tables, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.benchmark.roofline import Row
from utils.tables import markdown_table


def training_table(results: dict[str, dict[str, Any]]) -> str:
    """Return a row per trainer."""
    rows = []
    for name, figures in results.items():
        compiled = f" in {figures['compile_seconds']:.0f} s" if "compile_seconds" in figures else ""
        speedup = f"{figures['speedup']:.2f}" if "speedup" in figures else "–"
        rows.append([name + compiled, _spread(figures), speedup, f"{figures['gflop_forward']:.1f}",
                     f"{figures['matmul_fraction']:.0%}", f"{figures['data_wait']:.1%}",
                     f"{figures['peak_memory'] / 1e9:.2f} GB"])
    head = ["training", "images/s", "speedup", "GFLOP per image, forward", "of matmul rate", "data wait", "peak memory"]
    return markdown_table(head, rows, numbers=True)


def sampling_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a row per sampler; `results` has those of the precision of choice first, then those of float32, if any."""
    precisions = list(results)
    compares = len(precisions) > 1
    rows = []
    for sampler, figures in results[precisions[0]].items():
        speeds = [_spread(results[precision][sampler]) for precision in precisions]
        speedup = [f"{figures['speedup']:.2f}"] if compares else []
        rows.append([sampler, *speeds, *speedup, f"{figures['gflop_image']:,.0f}", str(figures["passes"])])
    head = ["sampling", *(f"images/s, {precision}" for precision in precisions), *["speedup"] * compares,
            "GFLOP per image", "passes timed"]
    return markdown_table(head, rows, numbers=True)


def profile_table(rows: Sequence[Row]) -> str:
    """Return a row per kind of operation, and their sum."""
    total = Row("all", *(sum(getattr(row, name) for row in rows) for name in ("seconds", "flops", "bytes", "floor")))
    return markdown_table(["", "ms", "fraction", "GFLOP", "GB", "floor, ms"], [
        [row.kind, f"{1e3 * row.seconds:,.1f}", f"{row.seconds / total.seconds:.0%}", f"{row.flops / 1e9:,.0f}",
         f"{row.bytes / 1e9:,.2f}", f"{1e3 * row.floor:,.1f}"] for row in [*rows, total]], numbers=True)


def _spread(figures: dict[str, Any]) -> str:
    """Return the median speed with the smallest and the largest."""
    speeds = figures["images_per_second"]  # in ascending order
    return f"{figures['median']:.3g} ({speeds[0]:.3g} ... {speeds[-1]:.3g})"
