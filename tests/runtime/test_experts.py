"""Mixtures of experts at any alpha: as the dense checkpoint of that alpha, each row by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Ortho
from families import saved

import ortho_cli

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations
TOKENS = torch.randint(1, 48, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
@torch.no_grad()
def test_experts_at_an_alpha_are_those_of_the_dense_checkpoint(
    tmp_path: Path, ortho: Ortho, kind: str
) -> None:
    import transformers

    saved(tmp_path / "m", kind)
    out = tmp_path / "a"
    sets = ("--recipe", "int4", "--set", "ortho.density=0.02")
    ran = ortho("decompose", tmp_path / "m", "-o", out, *sets)
    assert ran.code == 0, ran.err
    alone = []
    for alpha in (0, 1):
        dense = tmp_path / f"dense{alpha}"
        ran = ortho("convert", out, "--alpha", alpha, "--dtype", "float32", "-o", dense)
        assert ran.code == 0, ran.err
        expected = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
        model = ortho_cli.load(out, alpha=float(alpha), dtype=torch.float32)
        alone.append(model(TOKENS).logits)
        assert torch.allclose(alone[alpha], expected(TOKENS).logits, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-5)
    model = ortho_cli.load(out, alpha=torch.tensor([0.0, 1.0]), dtype=torch.float32)
    both = model(TOKENS).logits
    assert torch.allclose(both[0], alone[0][0], atol=1e-5)
    assert torch.allclose(both[1], alone[1][1], atol=1e-5)
    found = ortho("bench", out, "--alpha", 0, 1, "--tokens", 32, "--json")
    assert found.code == 0, found.err
