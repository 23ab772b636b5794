"""The text that a reward sees is the text that the policy wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerFast

from exgrpo_fast.model.folder_reading import make_decode

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
WORDS = ["[PAD]", "[EOS]", "[TURN]", "[UNK]", *TAGS, "so", "7", ",", "n't", "it", " "]


@pytest.fixture
def tagged(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A saved tokenizer whose answer tags are special tokens; a second token may end a turn."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        additional_special_tokens=["[TURN]", *TAGS],
        clean_up_tokenization_spaces=True,
    )
    made.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained(tmp_path)
    return PreTrainedTokenizerFast.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("<think> so </think> <answer> 7 </answer> [EOS]", "<think>so</think><answer>7</answer>"),
        ("<answer> 7 </answer>", "<answer>7</answer>"),
        ("7 [TURN] [PAD] [PAD]", "7"),
        ("7 [TURN] so [TURN]", "7[TURN]so"),  # a second turn that it made up
        ("[PAD] 7", "[PAD]7"),
        ("[EOS]", ""),
        ("", ""),
    ],
)
def test_only_the_end_and_the_padding_are_left_out(tagged, words: str, text: str) -> None:
    decode = make_decode(tagged)
    assert decode([WORDS.index(word) for word in words.split()]) == text


def test_no_space_that_was_written_is_tidied_away(tagged) -> None:
    assert make_decode(tagged)([WORDS.index(word) for word in ("7", " ", ",", "it")]) == "7 ,it"
