"""A name or a reference becomes a function: `math_verify`, `file.py:function`, `package.module:name`.

`check_reference` runs in the trainer and executes no code of the user; `load_function` runs in the
worker and does.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from exgrpo_fast.rewards.functions import BUILT_IN
from exgrpo_fast.rewards.judgement import RewardError, RewardFunction

# --- in the trainer -------------------------------------------------------------------------------


def check_reference(reference: str) -> str:
    """A name or reference as it is given to a worker, file paths made absolute.

    RewardError for an unknown name, a missing file, or a function that the file does not define.
    No code of the user runs here.
    """
    if ":" not in reference:
        return _check_name(reference)
    location, _, name = reference.rpartition(":")
    if not location or not name:
        raise RewardError(f"reward '{reference}': expected 'file.py:function' or 'module:name'")
    if not location.endswith(".py"):
        return reference
    _check_file(reference, location, name)
    return f"{Path(location).resolve()}:{name}"


def _check_name(name: str) -> str:
    if name not in BUILT_IN:
        raise RewardError(
            f"unknown reward '{name}'{_hint(name, BUILT_IN)} built in: {', '.join(BUILT_IN)}; "
            "or give 'file.py:function' or 'package.module:name'"
        )
    return name


def _check_file(reference: str, location: str, name: str) -> None:
    path = Path(location)
    if not path.is_file():
        hint = _hint(path.name, _python_files(path.parent), path.with_name)
        raise RewardError(f"reward '{reference}': no file {location}{hint}")
    try:
        known = _functions_in(path)
    except (SyntaxError, ValueError, OSError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise RewardError(f"reward '{reference}': {location}{where}: {error}") from None
    if known is not None and name not in known:
        raise RewardError(_no_such_function(reference, known))


def _hint(wanted: str, known: Iterable[str], write: Callable[[str], object] = str) -> str:
    near = difflib.get_close_matches(wanted, known, n=1)
    return f"; did you mean '{write(near[0])}'?" if near else ""


def _python_files(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.py")] if folder.is_dir() else []


def _functions_in(path: Path) -> list[str] | None:
    """Names of the functions that a file defines; None when it may define more than that."""
    tree = ast.parse(path.read_bytes())
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.append(node.name)
        elif not isinstance(node, ast.Expr | ast.Import) and not _is_future_import(node):
            # An assignment, a class, `from x import y`, an `if`: a function may come out of it.
            return None
    return names


def _is_future_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _no_such_function(reference: str, known: Sequence[str]) -> str:
    location, _, name = reference.rpartition(":")
    there = ", ".join(known) or "none"
    return (
        f"reward '{reference}': no function '{name}' in {location}; functions there: {there}"
        f"{_hint(name, known)}"
    )


# --- in the worker --------------------------------------------------------------------------------


def load_function(reference: str) -> RewardFunction:
    """Import the function that a checked reference names, and warm it up. Runs in the worker.

    RewardError with one line when it cannot be imported.
    """
    function = BUILT_IN.get(reference) or _import_function(reference)
    warm_up = getattr(function, "warm_up", None)
    if warm_up is not None:
        warm_up()
    return function


def _import_function(reference: str) -> RewardFunction:
    location, _, name = reference.rpartition(":")
    try:
        is_file = location.endswith(".py")
        module = _import_file(location) if is_file else importlib.import_module(location)
    except RewardError:
        raise
    except BaseException as error:  # a user's file may raise anything, SystemExit included
        raise RewardError(
            f"reward '{reference}': {location} does not import: {describe(error)}"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if _is_own_function(module, value)]
        raise RewardError(_no_such_function(reference, own))
    return function


def _import_file(location: str) -> Any:
    path = Path(location)
    name = f"exgrpo_reward_{path.stem}"
    if name in sys.modules and sys.modules[name].__file__ == location:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, location)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward file {location} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file may import its neighbours
    spec.loader.exec_module(module)
    return module


def _is_own_function(module: Any, value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its message, and the line of code where it was raised."""
    message = " ".join(str(error).split())[:200]
    trace, where = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        where = f" ({Path(code.co_filename).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}{': ' if message else ''}{message}{where}"
