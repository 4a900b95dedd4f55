from __future__ import annotations

from ortho_cli.decompose.report import decibels


def test_decibels_no_noise_is_none_and_no_signal_is_zero() -> None:
    assert decibels(100.0, 1.0) == 20.0
    assert decibels(1.0, 0.0) is None
    assert decibels(0.0, 1.0) == 0.0
