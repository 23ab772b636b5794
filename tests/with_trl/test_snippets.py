"""What README and docs/adapters.md show is run: in the real TRL, verl's config, the hub's loader."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

trl = pytest.importorskip("trl", reason="make test-adapters installs TRL")

from datasets import Dataset  # noqa: E402
from test_trl_adapter import even_words, save_tiny_model, tokenizer  # noqa: E402

from exgrpo_kernels.adapters import prime_rl  # noqa: E402
from exgrpo_kernels.adapters.trl import FusedGRPOTrainer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def snippets(language: str, word: str) -> list[str]:
    """The code blocks of a language that hold a word, of both pages."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/adapters.md")]
    blocks = [block for page in pages for block in BLOCK.findall(page)]
    return [text for found, text in blocks if found == language and word in text]


MADE = snippets("python", "trainer = ")


def test_both_trainers_are_shown() -> None:
    assert sum("trainer = FusedGRPOTrainer(" in shown for shown in MADE) == 2
    assert sum("trainer = ReplayGRPOTrainer(" in shown for shown in MADE) == 1


@pytest.mark.parametrize("shown", MADE)
def test_a_trainer_is_made_as_shown(
    shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And makes one step. TRL finds the tokenizer by the model's folder."""
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.AutoProcessor.from_pretrained", lambda *_, **__: tokenizer()
    )
    folder = save_tiny_model(tmp_path)
    names = {
        "model": str(folder),
        "reward": even_words,
        "config": trl.GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            max_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        "rows": Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(1, 9)]}),
    }
    exec(shown, names)
    trainer = names["trainer"]
    assert isinstance(trainer, FusedGRPOTrainer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_head_is_replaced_as_shown_and_put_back() -> None:
    import trl.trainer.utils as trl_utils

    original = trl_utils._ChunkedLogProbFunction
    (shown,) = snippets("python", "undo =")
    names: dict = {}
    exec(shown, names)
    try:
        assert trl_utils._ChunkedLogProbFunction is not original
    finally:
        names["undo"]()
    assert trl_utils._ChunkedLogProbFunction is original


def test_verls_overrides_are_keys_of_its_config() -> None:
    pytest.importorskip("transfer_queue", reason="make test-adapters installs verl")
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.import_utils import load_extern_object

    overrides = re.findall(r"[\w.]+=\S+", "\n".join(snippets("", "verl.trainer.main_ppo")))
    overrides = [word for word in overrides if not word.startswith("EXGRPO_VERL_HEAD")]
    assert len(overrides) == 5
    folder = Path(verl.__file__).parent / "trainer/config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("ppo_trainer", overrides)
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "exgrpo_gspo"
    assert config.algorithm.rollout_correction.rollout_is == "token"
    custom = config.trainer.v1.sampler.custom_sampler
    assert load_extern_object(custom.path, custom.name).__name__ == "ExperienceReplayBuffer"


def test_prime_rls_section_names_a_loss_and_its_settings() -> None:
    (shown,) = snippets("toml", "trainer.loss")
    section = tomllib.loads(shown)["trainer"]["loss"]
    module, _, name = section["import_path"].rpartition(".")
    assert (module, name) == (prime_rl.__name__, "policy_loss")
    assert prime_rl.objective_from(section["kwargs"]).surrogate == "cispo"


def test_the_hubs_folder_is_loaded_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kernels.load", reason="make test-adapters installs kernels")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (command,) = snippets("", "kernels/hub.py")
    words = command.split("#")[0].split()
    assert words[:2] == ["python", "kernels/hub.py"]
    subprocess.run([sys.executable, ROOT / words[1], words[2]], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    (shown,) = snippets("python", "get_local_kernel")
    names: dict = {}
    exec(shown, names)
    assert Path(names["losses"].__file__).is_relative_to(tmp_path)
