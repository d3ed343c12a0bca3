"""Stands in for the package `datasets`, which sglang's benchmark imports for data sets that are not used here."""

from typing import NoReturn

__version__ = "0.0.0"


def load_dataset(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("the package datasets is not installed")
