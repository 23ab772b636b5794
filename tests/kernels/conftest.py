"""The kernels of these tests run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest

from exgrpo_kernels import runtime

if runtime.is_interpreting():
    from interpreter import install_bfloat16_rounding

    install_bfloat16_rounding()


@pytest.fixture
def small_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few hundred columns take several blocks."""
    monkeypatch.setattr(runtime, "ROW_BLOCK", 128)
