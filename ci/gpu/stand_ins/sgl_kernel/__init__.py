"""Stand-in for sglang's compiled kernels, hundreds of MiB that the GPU kit leaves out.

Moving an embedding calls none of them, but sglang's modules import them by name. Every name is there, in every
submodule, and raises when it is called.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import torch

__version__ = "0.0.0+stand.in"


class _Absent:
    """Whatever is asked of it is absent too; a call raises."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(f"{self._path} has no attribute {name!r}")
        return _Absent(f"{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self._path} is a stand-in of the GPU kit")


__getattr__ = _Absent(__name__).__getattr__


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _Absent(module.__name__).__getattr__  # type: ignore[method-assign]


sys.meta_path.append(_Submodules())

# Operators that the Qwen processors look up when they are imported; a schema is enough.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _schema in (
    "fused_sigmoid_mul_cpu(Tensor(a!) x, Tensor gate) -> ()",
    "fused_qk_gemma_rmsnorm_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps) -> (Tensor, Tensor)",
    "fused_qk_gemma_rmsnorm_with_gate_cpu(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_schema)
