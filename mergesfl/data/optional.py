"""Libraries that only some data sets need, imported when one of them is asked for."""

from __future__ import annotations

import importlib
from typing import Any

from mergesfl.errors import ConfigError


def require(module: str, extra: str) -> Any:
    """The imported module. Raises ConfigError naming the extra of this package that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ConfigError(
            f"this data set needs {library}, which cannot be imported ({error}): "
            f"install it with pip install 'mergesfl[{extra}]'"
        ) from error
