"""One schema for YAML, command line and recipes. Every class elsewhere takes plain keyword arguments.

sections    which keys exist and which values they accept    schema    what has to fit together
load        files, recipes and overrides -> Config           messages  one line for every mistake
limits      what depends on the world size or on vLLM

It imports no torch, so that a mistake is reported before anything heavy is loaded.
"""

from exgrpo_fast.config.limits import refuse_engine_with_several, refuse_with_several
from exgrpo_fast.config.load import (
    MAY_CHANGE,
    StrictLoader,
    dump_yaml,
    from_dotted,
    load_config,
    read_yaml,
    recipe_names,
    refuse_other_config,
    require,
    validate,
)
from exgrpo_fast.config.messages import all_keys, keys_by_last_word
from exgrpo_fast.config.schema import Config
from exgrpo_fast.config.sections import PREFERRED_TOKENS, ConfigError, GymTask

__all__ = [
    "Config",
    "ConfigError",
    "GymTask",
    "MAY_CHANGE",
    "PREFERRED_TOKENS",
    "StrictLoader",
    "all_keys",
    "dump_yaml",
    "from_dotted",
    "keys_by_last_word",
    "load_config",
    "read_yaml",
    "recipe_names",
    "refuse_other_config",
    "refuse_engine_with_several",
    "refuse_with_several",
    "require",
    "validate",
]
