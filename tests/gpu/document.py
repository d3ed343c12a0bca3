"""The generated part of docs/results/gpu.md, from the figures of one run. Pure but for `write`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_mm_conn.bench.markdown_blocks import write as write_between_markers
from sglang_mm_conn.bench.report import markdown_table
from tests.gpu.steps import NOT_RUN, ROOT

DOCUMENT = ROOT / "docs" / "results" / "gpu.md"
BLOCK = "gpu"
NO_GPU = "**This was not run on a GPU yet.**"
MIB = 1 << 20
# Columns that hold words; the others hold figures.
_WORDS = {
    "step", "what", "result", "copy", "compared", "bytes", "transport", "descriptors", "GPU memory", "pinned at most",
    "problems",
}  # fmt: skip


def render(run: dict[str, Any]) -> str:
    """Markdown: what it ran on, every step, and the figures. Of a run without a GPU there are no figures."""
    machine = run["machine"]
    processor = f"{machine['cores']} cores" + (f" ({machine['cpu']})" if machine["cpu"] else "")
    software = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    parts = []
    if run["device"] == "cuda":
        parts.append(
            f"Run on one **{machine['gpu']}** ({machine['gpu_mib']} MiB, driver {machine['driver'] or 'unknown'}), "
            f"{processor}, Linux {machine['kernel']}, Python {machine['python']}, {software}."
        )
    else:
        parts.append(
            f"{NO_GPU} What follows is a rehearsal on a CPU, without figures: it shows that every step starts, runs "
            f"and reports ({machine['cores']} cores, Python {machine['python']}, {software})."
        )
    parts.append(_table(("step", "what", "result", "s"), [_step(step) for step in run["steps"]]))
    if run["device"] == "cuda":
        figures = {step["name"]: step["figures"] for step in run["steps"] if step["figures"]}
        parts += [_rates(figures["rates"])] if "rates" in figures else []
        parts += _benches(figures)
        parts += [_endurance(figures["endurance"])] if "endurance" in figures else []
    return "\n\n".join(parts)


def _step(step: dict[str, Any]) -> tuple[str, ...]:
    reason = re.sub(r"(?<!\S)/\S*/", "", step["reason"])  # folders of that machine mean nothing to a reader
    result = step["status"] + (f": {reason}" if reason else "")
    figures = step["figures"]
    if step["name"].startswith("tests") and figures:
        counts = f"{figures['passed']} passed, {len(figures['failed'])} failed, {figures['skipped']} skipped"
        reasons = figures["failed"] + figures["skipped_because"]
        result = "; ".join([step["status"], counts, *reasons])
    seconds = "" if step["status"] == NOT_RUN else f"{step['seconds']:.0f}"
    return f"`{step['name']}`", step["what"], result, seconds


def _rates(rates: list[dict[str, Any]]) -> str:
    plain = {rate["transport"]: rate["bytes_per_second"] for rate in rates}
    rows = [
        (
            rate["transport"], f"{rate['bytes_per_second'] / 1e9:.1f}",
            f"{rate['bytes_per_second'] / plain[rate['plain']]:.0%} of {rate['plain']}",
            "right" if rate["right"] else "**WRONG**",
        )
        for rate in rates
    ]  # fmt: skip
    return "### Copies\n\n" + _table(("copy", "GB/s", "compared", "bytes"), rows)


def _benches(figures: dict[str, Any]) -> list[str]:
    """Transports of one run were measured in turns; memcpy (one copy off the GPU, one onto it) or shm is in each of
    them."""
    rows = []
    for name in ("connector", "mooncake", "gpu_pool", "zmq_to_scheduler", "mooncake_builtin"):
        if name not in figures:
            continue
        measured = figures[name]["rows"]
        for size in dict.fromkeys(row["nbytes"] for row in measured):
            same = [row for row in measured if row["nbytes"] == size]
            base = same[0]
            for row in same:
                times = (f"{row[key]:.2f}" for key in ("median_ms", "p99_ms", "gbytes_per_s"))
                ratio = f"{row['median_ms'] / base['median_ms']:.2f} of {base['transport']}"
                rows.append((f"`{name}`", row["transport"], f"{size // MIB} MiB", *times, ratio))
    if not rows:
        return []
    heading = "### One embedding, from the encoder's GPU memory to the language server's\n\n"
    columns = ("step", "transport", "size", "p50 ms", "p99 ms", "GB/s", "time")
    return [heading + _table(columns, rows)]


def _endurance(results: list[dict[str, Any]]) -> str:
    rows = [
        (
            one["transport"], str(one["rooms"]), str(one["wrong"]), f"{one['seconds']:.1f}",
            _change(one, "descriptors", 1, ""), _change(one, "gpu_bytes", MIB, " MiB"),
            f"{one['most_pinned_bytes'] / MIB:.1f} MiB", "; ".join(one["problems"]) or "none",
        )
        for one in results
    ]  # fmt: skip
    columns = ("transport", "rooms", "wrong", "s", "descriptors", "GPU memory", "pinned at most", "problems")
    return "### A thousand rooms beside a busy GPU\n\n" + _table(columns, rows)


def _change(one: dict[str, Any], name: str, unit: int, suffix: str) -> str:
    if not one["before"] or not one["after"]:
        return ""
    return f"{one['before'][name] // unit} → {one['after'][name] // unit}{suffix}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(columns, [[cell.replace("|", "\\|") for cell in row] for row in rows], _WORDS)


def write(run: dict[str, Any], path: Path = DOCUMENT) -> None:
    """Raises ValueError, OSError."""
    write_between_markers(path, render(run), BLOCK)
