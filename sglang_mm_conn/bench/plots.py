"""Plots of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_mm_conn.bench.measurement import Row
from sglang_mm_conn.bench.sizes import show_size


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write ``latency.png``, ``speed.png``, ``cpu.png`` and ``rooms.png`` into ``directory``. Returns their paths."""
    import matplotlib

    if not rows:
        return []
    matplotlib.use("Agg")  # needs no display
    directory.mkdir(parents=True, exist_ok=True)
    paths = [
        _lines(rows, directory / "latency.png", "Time of a room (p50)", "ms", lambda row: row.median_ms),
        _lines(rows, directory / "speed.png", "Speed at the p50", "GB/s", lambda row: row.gbytes_per_s),
        _lines(rows, directory / "cpu.png", "CPU time of both processes", "s per GB", lambda row: row.cpu_s_per_gbyte),
    ]
    return [*paths, _concurrency(rows, directory / "rooms.png")]


def _lines(rows, path, title, unit, figure):  # type: ignore[no-untyped-def]
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(figsize=(8, 5))
    for transport in dict.fromkeys(row.transport for row in rows):
        same = sorted((row for row in rows if row.transport == transport), key=lambda row: row.nbytes)
        axes.plot([row.nbytes for row in same], [figure(row) for row in same], marker="o", label=transport)
    sizes = sorted({row.nbytes for row in rows})
    axes.set(title=title, ylabel=unit, xscale="log", yscale="log")
    axes.set_xticks(sizes, [show_size(nbytes) for nbytes in sizes])
    axes.minorticks_off()
    return _save(canvas, axes, path)


def _concurrency(rows: Sequence[Row], path: Path) -> Path:
    """rooms/s over the number of rooms in flight, at the smallest size."""
    import matplotlib.pyplot as plt

    smallest = min(row.nbytes for row in rows)
    canvas, axes = plt.subplots(figsize=(8, 5))
    for row in rows:
        if row.nbytes == smallest and row.rooms_per_s:
            axes.plot(list(row.rooms_per_s), list(row.rooms_per_s.values()), marker="o", label=row.transport)
    axes.set(title=f"Rooms of {show_size(smallest)}", xlabel="rooms in flight", ylabel="rooms/s", xscale="log")
    return _save(canvas, axes, path)


def _save(canvas, axes, path):  # type: ignore[no-untyped-def]
    import matplotlib.pyplot as plt

    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    canvas.tight_layout()
    canvas.savefig(path, dpi=120)
    plt.close(canvas)
    return path
