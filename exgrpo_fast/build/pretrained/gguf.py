"""A GGUF file, as llama.cpp uses them -> a Hugging Face folder of float32 weights."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from exgrpo_fast.core.text import clean_line
from exgrpo_fast.model.folder_reading import PolicyError

READS_MERGES = Version("5.18")  # before, transformers fails on the tokenizer of a GGUF file


def convert_gguf(file: Path, out: Path, *, key: str) -> None:
    """Write config, weights, tokenizer and chat template of `file` into the folder `out`.

    By transformers' own reader, every weight dequantised. PolicyError, one line that begins with
    `key`, where the file is damaged, no GGUF, or of an architecture that transformers cannot map.
    """
    if importlib.util.find_spec("gguf") is None:
        raise PolicyError(f"{key}: GGUF files need: pip install 'exgrpo-fast[train]' (gguf)")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise PolicyError(f"{key}: {file.name} is no GGUF file (it does not begin with 'GGUF')")
    if Version(transformers.__version__) < READS_MERGES:
        raise PolicyError(
            f"{key}: GGUF files need transformers {READS_MERGES} or newer, here is "
            f"{transformers.__version__}"
        )
    try:
        # The reader's progress bar heeds no setting of transformers.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                trust_remote_code=False,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        model, loading = loaded
    except Exception as error:  # a damaged file makes three libraries stumble, each its way
        why = clean_line(str(error).splitlines()[0] if str(error) else repr(error), max_line=200)
        raise PolicyError(
            f"{key}: {file.name} is damaged, or transformers cannot map it: {why}"
        ) from None
    # A tensor that is not in the file would keep its random initial values.
    missing = sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])})
    if missing:
        raise PolicyError(f"{key}: {file.name} lacks {len(missing)} weights, such as {missing[0]}")
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise PolicyError(f"{key}: {out}: {clean_line(error, max_line=200)}") from None
