"""`python -m exgrpo_kernels`: passes here, and fails where the loss is wrong."""

from __future__ import annotations

import pytest
import torch

from exgrpo_kernels import __main__ as command
from exgrpo_kernels import self_check


def test_it_passes_and_names_backend_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main() == 0
    text = capsys.readouterr().out
    assert "backend: " in text and text.rstrip().endswith("correct")
    assert text.count("against float64") == 3


def test_a_wrong_gradient_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    correct = self_check.linear_policy_loss

    def wrong(hidden: torch.Tensor, **inputs):
        return correct(hidden=hidden * 1.001, **inputs)

    monkeypatch.setattr(self_check, "linear_policy_loss", wrong)
    assert command.main() == 1
    assert "WRONG" in capsys.readouterr().out
