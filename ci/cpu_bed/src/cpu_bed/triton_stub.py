"""Inert `triton` modules: they import and decorate, and raise as soon as a kernel would run.

sglang imports triton at module level almost everywhere but starts no triton kernel on the CPU paths used here, and the
real wheel is large.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _StubModule(ModuleType):
    """Grows an attribute for every name asked for: a class for Capitalised names, a submodule for the others."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, _LOADER, is_package=True)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        value = self._stub_class(attribute) if attribute[0].isupper() else self._submodule(attribute)
        setattr(self, attribute, value)
        return value

    def _stub_class(self, name: str) -> type:
        members: dict[str, Any] = {
            "__module__": self.__name__,
            "__init__": lambda self, *args, **kwargs: None,
            "__init_subclass__": classmethod(lambda cls, **kwargs: None),
        }
        return type(name, (), members)

    def _submodule(self, name: str) -> ModuleType:
        full_name = f"{self.__name__}.{name}"
        return sys.modules.setdefault(full_name, _StubModule(full_name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A name of triton used as a decorator, with or without arguments."""
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return _kernel(args[0])
        return _kernel

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _Kernel:
    """What a decorated kernel becomes."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__doc__ = getattr(function, "__doc__", None)
        self.__module__ = getattr(function, "__module__", __name__)

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"triton kernel {self.__name__} started, but triton is a stub on the CPU bed")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"triton kernel {self.__name__} called, but triton is a stub on the CPU bed")


def _kernel(function: Any) -> Any:
    return function if isinstance(function, _Kernel | type) else _Kernel(function)


class _ConstExpr:
    def __init__(self, value: Any = None) -> None:
        self.value = value


class _TritonLoader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return sys.modules.get(spec.name) or _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        names: dict[str, Any] = {}
        if module.__name__ == "triton":
            names = {
                "__version__": "0.0.0+cpu.bed",
                "cdiv": lambda a, b: -(a // -b),
                "next_power_of_2": lambda n: 1 << (n - 1).bit_length() if n > 0 else 1,
            }
        elif module.__name__ == "triton.language":
            names = {"constexpr": _ConstExpr}
        vars(module).update(names)


_LOADER = _TritonLoader()


class TritonFinder:
    """Answers for `triton` and everything below it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "triton":
            return None
        return importlib.machinery.ModuleSpec(name, _LOADER, is_package=True)
