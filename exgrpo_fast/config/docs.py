"""Tables of docs/, made from the schema and from the names that other trainers give its keys.

python -m exgrpo_fast.config.docs > docs/config.md
python -m exgrpo_fast.config.docs other-names     # the table of docs/from-trl-and-verl.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from exgrpo_fast.config.hints import OTHER_NAMES
from exgrpo_fast.config.load import section_of
from exgrpo_fast.config.schema import Config

HEAD = """# Config

Every key of a YAML config; on the command line `--train.lr 1e-5`. Keys that equal their default may be left out,
recipes (`exgrpo_fast/config/recipes/`) are such files, and `--dry-run` prints the whole config. An unknown key is
refused with the nearest one; names of TRL and verl are answered with the key of this table.
Written by `python -m exgrpo_fast.config.docs` from the schema; a test compares the two.
"""


def reference() -> str:
    """A table for each section: key, default, accepted values, what it does."""
    paths: dict[type[BaseModel], list[str]] = {}
    for section, path in sections(Config, ""):
        paths.setdefault(section, []).append(path)
    parts = [HEAD]
    for section, found in paths.items():
        names = [f"`{path}`" for path in found if path]
        title = ", ".join(names) if names else "Top level"
        about = " ".join((section.__doc__ or "").split()) if names else ""
        parts.append(
            "\n".join(
                [f"## {title}", *(["", about] if about else []), "", *rows(section, found[0])]
            )
        )
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def sections(section: type[BaseModel], path: str) -> Iterator[tuple[type[BaseModel], str]]:
    """Every section with its dotted path, outermost first."""
    yield section, path
    for name, info in section.model_fields.items():
        if inner := section_of(info.annotation):
            yield from sections(inner, f"{path}.{name}".lstrip("."))


def rows(section: type[BaseModel], path: str) -> list[str]:
    schema = section.model_json_schema()
    lines = ["| key | default | values | what it does |", "|---|---|---|---|"]
    for name, info in section.model_fields.items():
        if section_of(info.annotation) and not info.description:
            continue  # a table of its own
        default = ""
        if not info.is_required():
            default = f"`{json.dumps(info.get_default(call_default_factory=True))}`"
        found = values(schema["properties"][name], schema.get("$defs", {}))
        key, text = f"{path}.{name}".lstrip("."), str(info.description).replace("|", "\\|")
        lines.append(f"| `{key}` | {default} | {found} | {text} |")
    return lines


def values(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The accepted values of a JSON schema node in words: 'int >= 1 or `auto`'."""
    if "anyOf" in node:
        return " or ".join(values(inner, definitions) for inner in node["anyOf"])
    if "$ref" in node:
        return "section"
    if "enum" in node or "const" in node:
        return ", ".join(f"`{word}`" for word in node.get("enum", [node.get("const")]))
    if node["type"] == "array":
        return f"list of {values(node['items'], definitions)}" if "items" in node else "pair"
    name = {"integer": "int", "number": "float", "boolean": "bool", "string": "text"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {node[key]:g}" for key, sign in bounds.items() if key in node]
    kind: str = node["type"]
    return " ".join([name.get(kind, kind), *limits])


def other_names() -> str:
    """A table of our keys beside TRL's and verl's."""
    lines = ["| here | TRL | verl | what differs |", "|---|---|---|---|"]
    for key, names in OTHER_NAMES.items():
        trl, verl = (
            ", ".join(f"`{name.strip('/').replace('/', '.')}`" for name in spelled.split())
            for spelled in (names.trl, names.verl)
        )
        if trl or verl:
            lines.append(f"| `{key}` | {trl} | {verl} | {names.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(other_names() if sys.argv[1:] == ["other-names"] else reference(), end="")
