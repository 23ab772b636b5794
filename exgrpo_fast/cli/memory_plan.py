"""The memory plan of a config on the screen: `train --dry-run` and `doctor --config`."""

from __future__ import annotations

from exgrpo_fast.cli.output import print_lines
from exgrpo_fast.config import Config, require
from exgrpo_fast.core.text import clean_line


def show_plan(
    config: Config,
    device: str | None,
    gib: float | None,
    *,
    prefix: str = "",
    processes: int = 1,
) -> int:
    """Print the memory plan of one of `processes`; ConfigError where the run does not fit.

    The quickstart's model does not exist yet, and fits everywhere.
    """
    if config.model.name == "quickstart":
        return 0
    from exgrpo_fast.build.pretrained import cached_folder
    from exgrpo_fast.memory.fit import NoShapes, machine_of, plan_run

    name = cached_folder(
        require(config.model.name, "model.name", "a folder, a hub name or a .gguf file")
    )
    if name is None:
        print(f"{prefix}no memory plan before model.name {config.model.name} is converted once")
        return 0
    try:
        machine = machine_of(config, device=device, memory_gib=gib, processes=processes)
        planned = plan_run(config, name, machine, is_local=True)
    except NoShapes as error:
        cause = clean_line(error, max_line=200)
        print(f"{prefix}no memory plan without the model's config.json here ({cause})")
        return 0
    planned.accepted(
        lambda text: print_lines(
            "\n".join(f"{prefix}{line}".rstrip() for line in text.splitlines()),
            indent=f"{prefix}    ",
        )
    )
    return 0
