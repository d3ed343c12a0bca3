"""Adds one file that pyproject.toml cannot describe: a .pth at the root of site-packages."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "cpu_bed.pth"


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        Path(self.build_lib, PTH).write_text("import cpu_bed.boot\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib, PTH))]


setup(cmdclass={"build_py": BuildPy})
