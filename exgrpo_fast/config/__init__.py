"""One schema for YAML, command line and recipes. Every class elsewhere takes plain keyword arguments.

sections   which keys exist and which values they accept
method     the same of the sections that a recipe sets
schema     what must fit together; limits of world size and engine
load       files, recipes and overrides -> Config, or one line that says why not
hints      what TRL, verl and earlier versions call a key
reference  docs/config.md

It imports no torch, so that a mistake is reported before anything heavy is loaded.
"""

from exgrpo_fast.config.hints import hint
from exgrpo_fast.config.load import (
    MAY_CHANGE,
    StrictLoader,
    all_keys,
    dump_yaml,
    from_dotted,
    keys_by_last_word,
    load_config,
    read_yaml,
    recipe_names,
    refuse_other_config,
    require,
    suggest,
    validate,
    with_values,
)
from exgrpo_fast.config.schema import (
    Config,
    engine_kind,
    refuse_engine_world_size,
    refuse_small_packs,
    refuse_world_size,
    require_engine,
)
from exgrpo_fast.config.sections import PREFERRED_TOKENS, ConfigError, GymTask
