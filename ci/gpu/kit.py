"""Makes the GPU kit: what ci/gpu.sh needs on a machine with a GPU and without a network, in one folder.

The kit holds wheels for Python 3.12 (wheels.txt; the two large ones cut to what is imported), the shared libraries that
Mooncake's engine needs (libraries.txt), and kit.json, which names every file with its size and SHA-256. Beside it,
in <kit>-cpu, lies the Mooncake build without CUDA, with which ``ci/gpu.sh --device cpu`` rehearses; it does not travel.

Two kits from the same wheels.txt and the same Debian packages are equal, file by file.
"""

from __future__ import annotations

import argparse
import base64
import csv
import fnmatch
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = "3.12"
GLIBC = (39, 38, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)  # the GPU machine's is 2.39
CPU_ENGINE = "mooncake-transfer-engine-non-cuda"
LIMIT_MIB = 60  # of the kit and the repository together
_EPOCH = (1980, 1, 1, 0, 0, 0)

# What is kept of a wheel, by shell patterns over its paths; the last pattern that fits decides, "!" leaves out.
_ENGINE = [
    "mooncake/*.py", "mooncake/engine.so", "mooncake/libasio.so", "mooncake/libetcd_wrapper.so",
    "*.libs/libgflags-*", "*.libs/libglog-*", "*.libs/libjsoncpp-*", "*.libs/libyaml-cpp-*", "*.dist-info/*",
]  # fmt: skip
# fmt: off
KEPT = {
    "sglang": [
        "*.py", "sglang/kernels/jit/*", "*.dist-info/*",
        "!sglang/multimodal_gen/*", "!sglang/test/*", "!sglang/benchmark/*",
    ],
    "mooncake_transfer_engine_cuda13": _ENGINE,
    "mooncake_transfer_engine_non_cuda": _ENGINE,
    "jedi": ["*.py", "*.txt", "*.dist-info/*", "!jedi/third_party/*"],
}
# fmt: on


class KitError(Exception):
    """The kit cannot be made; the message says why."""


def is_kept(path: str, patterns: Sequence[str]) -> bool:
    kept = False
    for pattern in patterns:
        if fnmatch.fnmatchcase(path, pattern.lstrip("!")):
            kept = not pattern.startswith("!")
    return kept


def cut(wheel: Path, patterns: Sequence[str]) -> None:
    """Leave only what ``patterns`` keep in ``wheel``, and a RECORD that names just that. The same input always gives
    the same bytes."""
    with zipfile.ZipFile(wheel) as source:
        names = sorted(name for name in source.namelist() if is_kept(name, patterns) and not name.endswith("/"))
        if all(".dist-info/" in name for name in names):
            raise KitError(f"{wheel.name}: nothing is left: KEPT in {Path(__file__).name} does not fit its layout")
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        contents = {name: source.read(name) for name in names if name != record}
        modes = {name: source.getinfo(name).external_attr for name in names}
    contents[record] = _record(contents, record)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        for name in names:
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = modes[name]
            target.writestr(info, contents[name])


def _record(contents: dict[str, bytes], record: str) -> bytes:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(data)])
    rows.writerow([record, "", ""])
    return text.getvalue().encode()


def pack_libraries(folders: Sequence[Path], archive: Path) -> list[str]:
    """Every ``lib*.so*`` below ``folders`` under the names by which programs ask for it. Returns the names."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("lib*.so*")):
            if path.is_symlink() or path.is_file():
                found[path.name] = path.resolve()
    # Of a library's names (libz.so.1.2.13, libz.so.1) its soname is the shortest that ends in a number.
    sonames: dict[Path, str] = {}
    for name, path in sorted(found.items()):
        if name.partition(".so.")[2] and len(name) < len(sonames.get(path, name + "x")):
            sonames[path] = name
    with tarfile.open(archive, "w:xz") as tar:
        for path, name in sorted(sonames.items(), key=lambda item: item[1]):
            info = tarfile.TarInfo(name)
            data = path.read_bytes()
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return sorted(sonames.values())


def listed(name: str) -> list[str]:
    """The lines of a list beside this file, without its comments."""
    lines = (HERE / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise KitError(f"{' '.join(command[:4])} ... failed:\n{(done.stdout + done.stderr)[-2000:]}")


def download(requirements: Sequence[str], folder: Path) -> None:
    """Wheels of exactly these for the GPU machine's Python, whatever runs here. Raises KitError."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64", "any"]
    _run(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", PYTHON, "--implementation", "cp", *(f"--abi={abi}" for abi in ("cp312", "abi3", "none")),
        *(f"--platform={platform}" for platform in platforms), "--dest", str(folder), *requirements,
    )  # fmt: skip


def cut_all(folder: Path) -> None:
    for wheel in sorted(folder.glob("*.whl")):
        patterns = KEPT.get(wheel.name.partition("-")[0])
        if patterns is not None:
            cut(wheel, patterns)


def collect_libraries(archive: Path) -> list[str]:
    """From Debian's packages, which are unpacked and not installed. Raises KitError."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        folder.chmod(0o755)
        _run("apt-get", "download", "-q", *listed("libraries.txt"), cwd=folder)
        for package in sorted(folder.glob("*.deb")):
            _run("dpkg-deb", "--extract", str(package), str(folder / "root"))
        return pack_libraries([folder / "root"], archive)


def manifest(kit: Path, libraries: Sequence[str]) -> dict[str, Any]:
    files = sorted(path for path in kit.rglob("*") if path.is_file() and path.name != "kit.json")
    described = [
        {
            "file": str(path.relative_to(kit)),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
    total = sum(path.stat().st_size for path in files)
    return {"python": PYTHON, "bytes": total, "files": described, "libraries": list(libraries)}


def repository_bytes() -> int:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return sum(path.stat().st_size for name in listing.split("\0") if name and (path := ROOT / name).is_file())


def check_size(kit_bytes: int, others: int, limit_mib: float) -> str:
    """One line about the sizes. Raises KitError where they exceed the limit."""
    kit, repository = kit_bytes / (1 << 20), others / (1 << 20)
    whole = kit + repository
    line = f"kit {kit:.1f} MiB, repository {repository:.1f} MiB: {whole:.1f} of {limit_mib:g} MiB"
    if whole > limit_mib:
        raise KitError(f"{line}: {whole - limit_mib:.1f} MiB too much")
    return line


def make(kit: Path, limit_mib: float, say: Callable[[str], None]) -> None:
    """Raises KitError; what was made until then stays, without a kit.json."""
    rehearsal = kit.with_name(kit.name + "-cpu")
    for folder in (kit, rehearsal):
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("*.whl"), *folder.glob("libraries.tar.xz"), *folder.glob("kit.json")]:
            old.unlink()
    requirements = listed("wheels.txt")
    say(f"downloading {len(requirements)} wheels for Python {PYTHON}")
    download(requirements, kit)
    engine = next(line for line in requirements if line.startswith("mooncake"))
    download([f"{CPU_ENGINE}=={engine.partition('==')[2]}"], rehearsal)
    say("cutting wheels")
    cut_all(kit)
    cut_all(rehearsal)
    say("collecting shared libraries")
    libraries = collect_libraries(kit / "libraries.tar.xz")
    facts = manifest(kit, libraries)
    say(check_size(facts["bytes"], repository_bytes(), limit_mib))
    (kit / "kit.json").write_text(json.dumps(facts, indent=1) + "\n")
    for file in sorted(facts["files"], key=lambda one: -one["bytes"])[:8]:
        say(f"  {file['bytes'] / (1 << 20):6.1f} MiB  {file['file']}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the kit that ci/gpu.sh takes along to a machine with a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-kit", help="the kit (default: build/gpu-kit)")
    parser.add_argument(
        "--limit-mib", type=float, default=LIMIT_MIB,
        help=f"refuse a kit that is larger than this together with the repository (default: {LIMIT_MIB})",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        make(args.out, args.limit_mib, print)
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
