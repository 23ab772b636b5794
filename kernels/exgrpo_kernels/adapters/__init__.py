"""The fused losses inside other trainers: one module for each, imported only when asked for.

None of the packages adapted here is a dependency. Each adapter names the version it is tested
with, warns once beside another one, and raises `AdapterError` where an interface that it builds
on has changed.
"""

import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import version


class AdapterError(RuntimeError):
    """The installed package does not offer the interface that an adapter builds on."""


def warn_if_untested(package: str, tested: str) -> None:
    """Name both versions when `package` is installed in another version than `tested`."""
    if (installed := version(package)) != tested:
        warnings.warn(
            f"exgrpo_kernels.adapters is tested with {package} {tested}; {installed} is installed",
            stacklevel=3,
        )


def require_parameters(function: Callable, *names: str) -> None:
    """AdapterError unless `function` takes parameters of these names."""
    present = inspect.signature(function).parameters
    if missing := [name for name in names if name not in present]:
        raise AdapterError(
            f"{function.__module__}.{function.__qualname__} was expected to take "
            f"{', '.join(names)}; it has no {', '.join(missing)}"
        )
