"""Write `exgrpo_kernels` in the layout of the Hugging Face kernels hub.

    python kernels/hub.py FOLDER

makes FOLDER/build/torch-cpu and FOLDER/build/torch-cuda, one variant for each backend that a
package without compiled code serves, with the `metadata.json` that the package `kernels` reads:

    from kernels import get_local_kernel
    exgrpo_kernels = get_local_kernel(Path(FOLDER), trust_remote_code=True)

The hub imports a variant under a name of its own, beside an installed `exgrpo_kernels` perhaps.
So the imports of the copy are relative, and its operators are registered under that name.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "exgrpo_kernels"
BACKENDS = ("cpu", "cuda")
VERSION = 1  # of the hub repository: raised where a public signature changes
OWN_IMPORT = re.compile(r"^(\s*from) exgrpo_kernels(?:\.(\w+))? import ", re.MULTILINE)
OPERATOR = re.compile(r'(["\'])exgrpo_kernels::')


def sources() -> dict[str, str]:
    """Name -> text of the modules of a variant: without adapters, which need the package's name."""
    paths = [path for path in sorted(SOURCE.glob("*.py")) if path.name != "__main__.py"]
    return {path.name: path.read_text() for path in paths}


def as_variant(text: str, name: str) -> str:
    """One module with relative imports and with operators in the namespace `name`."""
    text = OWN_IMPORT.sub(lambda m: f"{m[1]} .{m[2] or ''} import ", text)
    return OPERATOR.sub(rf"\1{name}::", text)


def write_hub_folder(folder: Path) -> list[Path]:
    """The variants of all backends below `folder`/build; returns their folders."""
    modules = sources()
    digest = hashlib.sha256("".join(modules.values()).encode()).hexdigest()[:10]
    variants = []
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        name = f"_exgrpo_kernels_{backend}_{digest}"
        for file, text in modules.items():
            (variant / file).write_text(as_variant(text, name))
        metadata = {
            "id": name,
            "name": "exgrpo-kernels",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python kernels/hub.py FOLDER")
    for written in write_hub_folder(Path(sys.argv[1])):
        print(written)
