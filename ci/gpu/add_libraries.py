"""Adds the shared libraries of the GPU kit that a machine has not: ``add_libraries.py ARCHIVE FOLDER``."""

from __future__ import annotations

import ctypes
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

# Built together, and with private symbols of one another's: a machine's libibverbs does not fit the kit's libmlx5.
FAMILIES = (
    ("libibverbs", "libmlx", "libefa", "libmana", "libhns", "librxe", "libsiw", "libnl-"),
    ("libssl", "libcrypto"),
    ("libldap", "liblber"),
    ("libgssapi_krb5", "libkrb5", "libk5crypto"),
    ("libgnutls", "libnettle", "libhogweed"),
    ("libbrotli",),
)


def is_there(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def chosen(names: Iterable[str], there: Callable[[str], bool] = is_there) -> list[str]:
    """Those of ``names`` to take: what is not there, and with it the rest of its family."""
    names = list(names)
    missing = {name for name in names if not there(name)}
    families = [family for family in FAMILIES if any(name.startswith(family) for name in missing)]
    return [name for name in names if name in missing or any(name.startswith(family) for family in families)]


def main() -> int:
    archive, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        taken = chosen(tar.getnames())
        for name in taken:
            data = tar.extractfile(name)
            assert data is not None, name
            (folder / name).write_bytes(data.read())
    print("shared libraries from the kit:", ", ".join(taken) or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
