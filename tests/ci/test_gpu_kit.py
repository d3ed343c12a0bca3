"""The GPU kit: what it keeps of a wheel, that it is reproducible, and that it refuses what does not fit."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", ROOT / "ci" / "gpu" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kit, add_libraries = load("kit"), load("add_libraries")


def wheel(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, f"# {name}\n" * 20)
        file.writestr("a-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("a-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: a\nVersion: 1\n")
        file.writestr("a-1.dist-info/RECORD", "".join(f"{name},,\n" for name in names))
    return path


def test_a_cut_wheel_holds_what_is_kept_and_can_be_installed(tmp_path: Path) -> None:
    cut = wheel(tmp_path / "a-1-py3-none-any.whl", ["a/__init__.py", "a/large.so", "a/test/one.py"])
    kit.cut(cut, ["*.py", "*.dist-info/*", "!a/test/*"])
    with zipfile.ZipFile(cut) as file:
        record = [row[0] for row in csv.reader(file.read("a-1.dist-info/RECORD").decode().splitlines())]
        assert sorted(record) == sorted(file.namelist())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path / "site", cut],
        check=True,
    )
    assert (tmp_path / "site" / "a" / "__init__.py").is_file()
    assert not (tmp_path / "site" / "a" / "large.so").exists() and not (tmp_path / "site" / "a" / "test").exists()


def test_two_cuts_of_one_wheel_are_equal_to_the_byte(tmp_path: Path) -> None:
    first, second = (wheel(tmp_path / f"{name}-1-py3-none-any.whl", ["a/b.py", "a/c.so"]) for name in "xy")
    for one in (first, second):
        kit.cut(one, ["*.py", "*.dist-info/*"])
    assert first.read_bytes() == second.read_bytes()


def test_a_wheel_whose_layout_has_changed_is_an_error(tmp_path: Path) -> None:
    other = wheel(tmp_path / "a-1-py3-none-any.whl", ["elsewhere/b.so"])
    with pytest.raises(kit.KitError, match=r"a-1-py3-none-any.whl: nothing is left"):
        kit.cut(other, ["a/*.py", "*.dist-info/*"])


def test_a_kit_that_is_too_large_is_refused_with_both_sizes() -> None:
    assert kit.check_size(40 << 20, 2 << 20, 60) == "kit 40.0 MiB, repository 2.0 MiB: 42.0 of 60 MiB"
    with pytest.raises(kit.KitError, match=r"kit 59.0 MiB, repository 2.0 MiB: 61.0 of 60 MiB: 1.0 MiB too much"):
        kit.check_size(59 << 20, 2 << 20, 60)


def test_every_wheel_of_the_kit_is_pinned_and_every_large_one_has_its_cut() -> None:
    lines = kit.listed("wheels.txt")
    assert all(line.count("==") == 1 for line in lines) and len(set(lines)) == len(lines)
    named = {line.partition("==")[0].replace("-", "_") for line in lines} | {kit.CPU_ENGINE.replace("-", "_")}
    assert set(kit.KEPT) <= named


def test_libraries_are_packed_under_the_names_that_programs_ask_for(tmp_path: Path) -> None:
    folder = tmp_path / "usr" / "lib"
    folder.mkdir(parents=True)
    (folder / "libz.so.1.2.13").write_bytes(b"code")
    (folder / "libz.so.1").symlink_to("libz.so.1.2.13")
    assert kit.pack_libraries([tmp_path], tmp_path / "packed.tar.xz") == ["libz.so.1"]
    with tarfile.open(tmp_path / "packed.tar.xz") as tar:
        assert tar.getnames() == ["libz.so.1"]
        packed = tar.extractfile("libz.so.1")
        assert packed is not None and packed.read() == b"code"


def test_libraries_that_belong_together_are_taken_together() -> None:
    names = ["libcurl.so.4", "libibverbs.so.1", "libmlx5.so.1", "libz.so.1"]
    assert add_libraries.chosen(names, lambda name: name != "libmlx5.so.1") == ["libibverbs.so.1", "libmlx5.so.1"]
    assert add_libraries.chosen(names, lambda name: True) == []


def test_a_missing_kit_and_another_python_are_refused_by_name(tmp_path: Path) -> None:
    def gpu(*arguments: str) -> str:
        done = subprocess.run([ROOT / "ci" / "gpu.sh", *arguments], capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "holds no kit: run 'make gpu-kit'" in gpu("--kit", str(tmp_path))
    (tmp_path / "kit.json").write_text("{}")
    assert "the kit's wheels are for Python 3.12" in gpu("--kit", str(tmp_path), "--python", "false")
