"""The map of the house: every room on its floor, imports only go down, no two-way streets."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Ground floor first. A room is a folder of exgrpo_fast/; the kernels stand alone below them.
FLOORS = [
    ["exgrpo_kernels"],
    ["core"],
    ["config", "data", "model"],
    ["run"],
    ["rewards", "rollout"],
    ["experience"],
    ["training", "memory"],
    ["build", "adapters"],
    ["cli"],
    ["api"],
    ["__main__", "__init__"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What may be loaded before torch, so that a mistake is answered at once: these, and what they load.
LIGHT = [
    "core.allocator",
    "core.answers",
    "core.errors",
    "core.text",
    "core.types",
    "core.heartbeat",
    "core.http_client",
    "core.packs",
    "core.torchrun",
]
LIGHT += ["config", "data", "cli", "rewards", "run.display", "run.report", "run.directory"]
LIGHT += [
    "run.checkpoint.manifest",
    "run.metrics",
    "run.diagnosis",
    "run.sinks",
    "run.supervisor",
    "run.live_page",
]
LIGHT += ["model.folder_reading", "model.folder_settings", "model.gguf_file", "model.weight_files"]
LIGHT += ["build.folder", "build.before_torch", "build.data", "build.rewards"]
LIGHT += ["build.pretrained", "build.quickstart.template"]
LIGHT += ["memory.budgets", "experience.replay.plan", "experience.prior.compatibility"]
LIGHT += ["rollout.vllm.versions"]
# The body of `train`, which its arguments import inside a function.
HEAVY = ["cli.train_run"]


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "exgrpo_kernels"
    return path.relative_to(ROOT / "exgrpo_fast").parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "exgrpo_fast").with_suffix("").parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def modules(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of ours that a file imports, without the package's own."""
    tree = parsed(path)
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {n.removeprefix("exgrpo_fast.") for n in names if n.startswith("exgrpo_fast.")}
    return ours | {"exgrpo_kernels" for n in names if n.split(".")[0] == "exgrpo_kernels"}


def imports(path: Path) -> set[str]:
    """Rooms that a file imports, those inside functions included."""
    return {name.split(".")[0] for name in modules(path)} & FLOOR_OF.keys()


def source_files() -> list[Path]:
    return sorted([*ROOT.glob("exgrpo_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def test_every_room_is_on_the_map() -> None:
    assert {room_of(path) for path in source_files()} == set(FLOOR_OF)


def test_imports_go_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in source_files()
        for other in imports(path)
        if other != room_of(path) and FLOOR_OF[other] >= FLOOR_OF[room_of(path)]
    ]
    assert wrong == []


def test_files_import_in_no_circle() -> None:
    """Imports inside functions included: they would only hide one."""
    paths = (ROOT / "exgrpo_fast").glob("**/*.py")
    files = {module_of(path): path for path in paths if path.name != "__init__.py"}
    graph = {file: modules(path) & files.keys() for file, path in files.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_the_trainer_depends_on_few_files() -> None:
    """It knows protocols; which engines, rewards and methods there are is known in build alone."""
    paths = (ROOT / "exgrpo_fast").glob("**/*.py")
    files = {module_of(path): path for path in paths if path.name != "__init__.py"}
    found, waiting = set[str](), {"training.trainer"}
    while waiting:
        found |= waiting
        waiting = {m for file in waiting for m in modules(files[file]) & files.keys()} - found
    assert len(found) <= 60


def test_few_imports_are_inside_functions() -> None:
    """They hide what a file needs; those left put off torch, or an optional package."""
    inside = {
        (path, node.lineno)
        for path in (ROOT / "exgrpo_fast").glob("**/*.py")
        for function in ast.walk(parsed(path))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert len(inside) <= 30


def test_folders_that_would_shadow_a_package_are_bare() -> None:
    for folder in ("kernels", "tests", "bench"):
        assert not list((ROOT / folder).glob("__init__.py")), folder
    assert not list((ROOT / "tests").glob("**/__init__.py"))


def test_light_rooms_do_not_load_torch() -> None:
    for room in LIGHT:
        place = ROOT / "exgrpo_fast" / room.replace(".", "/")
        for path in [*place.parent.glob(f"{place.name}.py"), *place.glob("**/*.py")]:
            if module_of(path) in HEAVY:
                continue
            heavy = {
                name
                for name in modules(path, top_level_only=True)
                if not any(f"{name}.".startswith(f"{light}.") for light in [*LIGHT, "__version__"])
            }
            assert heavy == set(), f"{path.relative_to(ROOT)} loads {heavy} when imported"


def test_the_kernels_stand_alone() -> None:
    for path in ROOT.glob("kernels/**/*.py"):
        assert "exgrpo_fast" not in path.read_text(), path


def test_httpx2_is_imported_where_a_server_is_used() -> None:
    """Training by the engine in its own process needs none."""
    serving = {"rollout/server/process.py"}  # itself imported inside functions
    build = ROOT / "exgrpo_fast" / "build"
    for path in {*build.glob("*.py")} - {build / "servers.py"}:
        names = modules(path, top_level_only=True)
        assert not any(n.startswith(("rollout.server", "build.servers")) for n in names), path
    for path in (ROOT / "exgrpo_fast").glob("**/*.py"):
        if str(path.relative_to(ROOT / "exgrpo_fast")) not in serving:
            imported = [n for n in parsed(path).body if isinstance(n, ast.Import)]
            assert "httpx2" not in {alias.name for n in imported for alias in n.names}, path


def test_every_folder_of_tests_is_collected(pytestconfig: pytest.Config) -> None:
    ignored = pytestconfig.getini("norecursedirs")
    folders = {path.parent for path in (ROOT / "tests").glob("**/test_*.py")}
    assert [f for f in folders if any(fnmatch(f.name, pattern) for pattern in ignored)] == []


def test_the_makefile_names_tests_that_exist() -> None:
    named = re.findall(r"tests/[-\w/.]+", (ROOT / "Makefile").read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_picture_has_the_floors() -> None:
    """docs/architecture.svg: a band for each floor, the lowest at the bottom."""
    picture = (ROOT / "docs/architecture.svg").read_text()
    bands = re.findall(r'class="r">([^<]+)</text>', picture)
    assert [set(band.split(" · ")) for band in reversed(bands)] == [set(f) for f in FLOORS[:-1]]
