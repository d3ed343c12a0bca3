"""Makes `import torchvision` work where its compiled half cannot be loaded.

torchvision's usual wheel is linked to CUDA. Beside a CPU-only torch the shared object stays unloaded, and the import
fails at the first operator whose fake is registered without a schema. With the schema declared, the Python half
imports.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_libraries: list[Any] = []  # torch drops the schema when its Library object is collected


class TorchvisionFinder:
    """Declares the schema when torchvision is first asked for, and then takes itself away."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_schema()
        return None


def _declare_schema() -> None:
    import torch

    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
