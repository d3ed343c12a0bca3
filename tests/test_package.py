"""What `import sglang_mm_conn` exports, and what it costs."""

import subprocess
import sys

import pytest

import sglang_mm_conn


def test_the_package_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, sglang_mm_conn\n"
        "assert sglang_mm_conn.__version__ and 'Settings' in dir(sglang_mm_conn)\n"
        "heavy = {'torch', 'sglang', 'zmq', 'numpy', 'msgspec', 'sglang_mm_conn.core'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from sglang_mm_conn import Settings, TransferFailed\n"
        "assert not {'torch', 'sglang'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", sglang_mm_conn.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(sglang_mm_conn, name) is not None


def test_every_public_class_and_error_is_exported() -> None:
    from sglang_mm_conn import conn_multimodal
    from sglang_mm_conn.core import errors

    public = {*conn_multimodal.__all__, *(name for name, one in vars(errors).items() if isinstance(one, type))}
    assert public - {"HTTPStatus"} <= set(sglang_mm_conn.__all__)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        sglang_mm_conn.Nothing  # noqa: B018
