"""`python -m exgrpo_kernels`: passes here, and fails where the loss is wrong."""

from __future__ import annotations

import pytest
import torch

from exgrpo_kernels import __main__ as check


def test_it_passes_and_names_backend_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main() == 0
    text = capsys.readouterr().out
    assert "backend: " in text and text.rstrip().endswith("right")
    assert text.count("against float64") == 3


def test_a_wrong_gradient_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = check.linear_policy_loss

    def wrong(hidden: torch.Tensor, **inputs):
        return right(hidden=hidden * 1.001, **inputs)

    monkeypatch.setattr(check, "linear_policy_loss", wrong)
    assert check.main() == 1
    assert "WRONG" in capsys.readouterr().out
