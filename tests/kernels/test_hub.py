"""The kernels in the layout of the Hugging Face hub, loaded from a folder by the package `kernels`."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import exgrpo_kernels

ROOT = Path(__file__).resolve().parents[2]


def hub_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hub", ROOT / "kernels/hub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loss_and_gradients(kernels: ModuleType) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 16, generator=g).requires_grad_()
    weight = torch.randn(50, 16, generator=g).requires_grad_()
    result = kernels.linear_policy_loss(
        hidden,
        weight,
        torch.randint(50, (9,), generator=g),
        advantages=torch.randn(9, generator=g),
        behaviour_logprobs=-4 + torch.rand(9, generator=g),
        weights=torch.full((9,), 1 / 9),
        objective=kernels.PolicyObjective(entropy_coef=0.01),
    )
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return [result.loss.detach(), hidden.grad, weight.grad]


def test_a_variant_names_neither_the_package_nor_its_operators(tmp_path: Path) -> None:
    variants = hub_script().write_hub_folder(tmp_path)
    assert [v.relative_to(tmp_path).as_posix() for v in variants] == [
        "build/torch-cpu",
        "build/torch-cuda",
    ]
    for variant in variants:
        identity = json.loads((variant / "metadata.json").read_text())["id"]
        files = sorted(variant.glob("*.py"))
        assert {"__init__.py", "row_kernels.py", "policy_loss.py"} <= {f.name for f in files}
        text = "\n".join(f.read_text() for f in files)
        assert not re.findall(r"^\s*(?:from|import) exgrpo_kernels", text, flags=re.MULTILINE)
        assert set(re.findall(r'"(\w+)::\w+"', text)) == {identity}
        for file in files:
            compile(file.read_text(), file.name, "exec")


def test_the_hubs_loader_brings_the_same_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `kernels` alone is also what a checkout's folder of that name imports as
    hub = pytest.importorskip("kernels.load", reason="make test-adapters installs kernels")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_script().write_hub_folder(tmp_path)
    loaded = hub.get_local_kernel(tmp_path, backend="cpu", trust_remote_code=True)
    assert loaded is not exgrpo_kernels
    assert Path(loaded.__file__).is_relative_to(tmp_path)
    assert loaded.linear_policy_loss is not exgrpo_kernels.linear_policy_loss
    for ours, theirs in zip(
        loss_and_gradients(loaded), loss_and_gradients(exgrpo_kernels), strict=True
    ):
        assert torch.equal(ours, theirs)
