"""docs/models.md lists what the check of the forward pass says of each family."""

from __future__ import annotations

import pytest
import transformers
from model_families import FAMILIES, PAGE, PASSING, REFUSED, ROWS, outcome, shell_of, tiny_config
from packaging.version import Version
from transformers import CONFIG_MAPPING

from exgrpo_fast.model.folder_reading import PlainConfig, PolicyError
from exgrpo_fast.model.weight_files import refuse_other_shapes

QUICK = ["llama", "gpt2", "gpt_oss", "gemma3_text", "mixtral", "stablelm"]


def test_the_page_has_every_family() -> None:
    assert ROWS.keys() == FAMILIES.keys()
    assert f"{len(PASSING)} families pass and {len(REFUSED) - 1} are refused" in PAGE
    assert len(PASSING) >= 85


@pytest.mark.parametrize("family", QUICK)
def test_usual_families_are_as_the_page_says(family: str) -> None:
    assert outcome(family) == ROWS[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(QUICK)))
def test_families_are_as_the_page_says(family: str) -> None:
    """A newer transformers may move a family; `python tests/model_families.py` prints them all."""
    assert outcome(family) == ROWS[family]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_weights_are_those_of_their_own_config(family: str) -> None:
    """And of none with a larger vocabulary, wherever config.json states the sizes."""
    if family not in CONFIG_MAPPING:
        assert Version(transformers.__version__) < Version("5.24"), "the page is of 5.24"
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = tiny_config(family)
    shapes = {name: list(w.shape) for name, w in shell_of(config).state_dict().items()}
    values = config.to_dict()
    refuse_other_shapes(PlainConfig(**values), shapes, family)
    with pytest.raises(PolicyError, match="embed|no weight"):
        larger = values | {"vocab_size": values["vocab_size"] + 1}
        refuse_other_shapes(PlainConfig(**larger), shapes, family)
