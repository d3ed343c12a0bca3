"""Everything that a GPU can show, in at most five minutes. ci/gpu.sh starts it on a machine with one.

Writes gpu.json (all figures), gpu.md (the table) and gpu.log (what every step printed). ``--write`` puts an earlier
run's gpu.json into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.gpu import document
from tests.gpu.steps import PASSED, ROOT, Outcome, run_all, steps

_NO_INTERFERENCE = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "MC_LOG_LEVEL": "ERROR"}


def facts(device: str) -> dict[str, Any]:
    """The machine; of a GPU its name, memory and driver."""
    import torch

    from sglang_mm_conn.bench import host_info

    described = {**host_info.describe(), "kernel": platform.release(), "gpu": "", "gpu_mib": 0, "driver": ""}
    described["packages"]["torch"] = torch.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described.update(gpu=properties.name, gpu_mib=properties.total_memory >> 20, driver=_driver())
    return described


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in steps("cuda")]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results (build/gpu)")
    parser.add_argument("--seconds", type=float, default=300.0, help="most seconds for all steps (default: 300)")
    parser.add_argument("--only", metavar="STEP,...", help=f"only these steps of {', '.join(names)}")
    parser.add_argument("--stand-ins", type=Path, help="folder added to PYTHONPATH where sglang's kernels are imported")
    parser.add_argument("--write", type=Path, metavar="JSON", help="run nothing: put these figures into docs/gpu.md")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.write is not None:
        try:
            document.write(json.loads(args.write.read_text()))
        except (OSError, ValueError, KeyError) as error:
            print(f"tests.gpu: {args.write}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        print(f"written: {document.DOCUMENT.relative_to(ROOT)}")
        return 0
    chosen = steps(args.device)
    if args.only:
        asked = args.only.split(",")
        names = [step.name for step in chosen]
        if unknown := sorted(set(asked) - set(names)):
            there_are = f"with --device {args.device} there are {', '.join(names)}"
            parser.error(f"--only: no step is called {', '.join(unknown)}; {there_are}")
        chosen = [step for step in chosen if step.name in asked]
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("tests.gpu: torch finds no GPU here; --device cpu rehearses without one", file=sys.stderr)
        return 1
    out: Path = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").write_bytes(b"")
    run: dict[str, Any] = {"device": args.device, "machine": facts(args.device), "steps": []}
    began = time.monotonic()

    def add(outcome: Outcome) -> None:
        """After each step, so that a run that is cut off leaves what it has."""
        run["steps"].append(asdict(outcome))
        run["seconds"] = round(time.monotonic() - began, 1)
        (out / "gpu.json").write_text(json.dumps(run, indent=1) + "\n")
        (out / "gpu.md").write_text(document.render(run) + "\n")

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    environment = {**os.environ, **_NO_INTERFERENCE}
    run_all(chosen, out, args.seconds, environment, args.stand_ins and args.stand_ins.resolve(), say, add)
    print((out / "gpu.md").read_text())
    print(f"results: {out / 'gpu.json'}, gpu.md, gpu.log")
    return 0 if all(step["status"] == PASSED for step in run["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
