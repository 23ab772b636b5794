"""A name or a reference becomes a function: `math_verify`, `file.py:function`, `package.module:name`.

A list of `Rubric` may stand where a function may.

`check_reference` and `as_reference` run in the trainer and execute no code of the user;
`load_function` runs in the worker and does.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from exgrpo_fast.rewards.judgement import RewardError, RewardFunction, describe
from exgrpo_fast.rewards.rubrics.rubrics import RUBRIC_SETS, Rubric, RubricReward
from exgrpo_fast.rewards.verifiers.functions import BUILT_IN

REWARDS: dict[str, RewardFunction] = {**BUILT_IN, **RUBRIC_SETS}  # all that have a name

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
    if name not in REWARDS:
        raise RewardError(
            f"unknown reward '{name}'{_hint(name, REWARDS)} built in: {', '.join(REWARDS)}; "
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


def _no_such_function(reference: str, functions: Sequence[str], rubrics: Sequence[str] = ()) -> str:
    location, _, name = reference.rpartition(":")
    there = f"functions there: {', '.join(functions) or 'none'}"
    if rubrics:
        there += f"; rubrics there: {', '.join(rubrics)}"
    hint = _hint(name, [*functions, *rubrics])
    return f"reward '{reference}': no function '{name}' in {location}; {there}{hint}"


# --- functions handed over as objects -------------------------------------------------------------


def as_reference(function: str | Callable[..., Any]) -> str:
    """A function -> the reference under which a worker can import it; strings stay.

    RewardError for what has no name at the top level of a file.
    """
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", None)
    if not inspect.isfunction(function) or name is None:
        raise RewardError(
            f"reward {function!r} is a {type(function).__name__}: a worker process imports rewards "
            "by name, so write a function at the top level of a file"
        )
    if name == "<lambda>" or "<locals>" in name or "." in name:
        kind = "a lambda" if "<lambda>" in name else "not at the top level of its file"
        raise RewardError(
            f"reward '{name}' is {kind}: a worker process imports rewards by name, so define it "
            "with `def` at the top level of a file and hand it over again"
        )
    for built_in_name, built_in in BUILT_IN.items():
        if function is built_in:
            return built_in_name
    module = sys.modules.get(function.__module__)
    file = inspect.getsourcefile(function)
    if _in_regular_package(function.__module__):
        return f"{function.__module__}:{name}"  # its relative imports need the package
    if file is None or module is None or not Path(file).is_file():
        raise RewardError(
            f"reward '{name}' has no source file (typed into a prompt?): save it in one"
        )
    if getattr(module, name, function) is not function:
        raise RewardError(f"reward '{name}' is hidden by another object of that name in {file}")
    return f"{file}:{name}"


def _in_regular_package(module_name: str) -> bool:
    root, _, rest = module_name.partition(".")
    return bool(rest) and getattr(importlib.import_module(root), "__file__", None) is not None


# --- in the worker --------------------------------------------------------------------------------


def load_function(reference: str) -> RewardFunction:
    """Import the function that a checked reference names, and warm it up. Runs in the worker.

    RewardError with one line when it cannot be imported.
    """
    function = REWARDS.get(reference) or _import_function(reference)
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
    found = getattr(module, name, None)
    if isinstance(found, list | tuple):
        return RubricReward(found, f"reward '{reference}'")
    if not callable(found):
        own = [key for key, value in vars(module).items() if _is_own_function(module, value)]
        rubrics = [key for key, value in vars(module).items() if _is_rubrics(value)]
        raise RewardError(_no_such_function(reference, own, rubrics))
    return found


class TrainingCalled(BaseException):
    """A script that a worker imports for its rewards has come to its call of `train`."""


_is_importing = False


def stop_where_imported() -> None:
    """TrainingCalled where this process imports a file for the rewards in it.

    `train` and `evaluate` begin with it: a script without a main guard is then read up to its
    call, which comes after the functions that it hands over.
    """
    if _is_importing:
        raise TrainingCalled


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
    global _is_importing
    _is_importing = True
    try:
        spec.loader.exec_module(module)
    except TrainingCalled:
        pass
    finally:
        _is_importing = False
    return module


def _is_own_function(module: Any, value: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _is_rubrics(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(entry, Rubric) for entry in value)
