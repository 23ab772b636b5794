"""The map of the house: every room on its floor, imports only go down, no two-way streets."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Ground floor first. A room is a file, or a folder of files that may import each other.
FLOORS = [
    ["exgrpo_kernels"],
    ["errors", "experience", "heartbeat", "torchrun"],
    ["processes", "parted"],
    ["config", "metrics", "model", "run_folder", "checkpoint", "data", "endpoint", "random_state"],
    ["display", "rewards", "checkpoint_writer", "supervisor"],
    ["buffer", "rollout", "report"],
    ["mismatch", "verify", "memory", "training_data", "resampling", "learning"],
    ["sources", "doctor"],
    ["collect", "quickstart", "evaluate"],
    ["step_metrics", "bad_batches", "preflight"],
    ["trainer", "engines", "distributed"],
    ["planning"],
    ["composition", "scaffold"],
    ["session", "buffer_session", "export"],
    ["cli"],
    ["__main__", "__init__"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms that may be loaded before torch, so that a mistake is answered at once.
LIGHT = ["errors", "endpoint", "config", "cli", "scaffold", "rewards", "display", "report"]
LIGHT += ["heartbeat", "run_folder", "supervisor", "torchrun"]


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "exgrpo_kernels"
    return path.relative_to(ROOT / "exgrpo_fast").parts[0].removesuffix(".py")


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Rooms of ours that a file imports, those inside functions included."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {n.split(".")[1] for n in names if n.startswith("exgrpo_fast.")}
    rooms |= {"exgrpo_kernels" for n in names if n.split(".")[0] == "exgrpo_kernels"}
    return rooms & FLOOR_OF.keys()


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


def test_folders_that_would_shadow_a_package_are_bare() -> None:
    for folder in ("kernels", "tests", "bench"):
        assert not list((ROOT / folder).glob("__init__.py")), folder
    assert not list((ROOT / "tests").glob("**/__init__.py"))


def test_light_rooms_do_not_load_torch() -> None:
    for room in LIGHT:
        paths = [*ROOT.glob(f"exgrpo_fast/{room}.py"), *ROOT.glob(f"exgrpo_fast/{room}/**/*.py")]
        for path in paths:
            heavy = imports(path, top_level_only=True) - {room, *LIGHT, "metrics", "data"}
            assert heavy == set(), f"{path.relative_to(ROOT)} loads {heavy} when imported"


def test_the_kernels_stand_alone() -> None:
    for path in ROOT.glob("kernels/**/*.py"):
        assert "exgrpo_fast" not in path.read_text(), path
