"""Stacked experts as one tensor of each: byte ranges, and back to stacks."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, open_checkpoint
from ortho_cli.storage.stacked import APART, LAYOUTS, needs_stacks, restacked, unstack

EXPERTS, WIDTH, INNER = 3, 8, 12
PREFIX = "model.layers.1.mlp."


def stacks(gate_up: str, down: str, prefix: str = PREFIX) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{prefix}{gate_up}": torch.randn(EXPERTS, 2 * WIDTH, INNER, generator=generator),
        f"{prefix}{down}": torch.randn(EXPERTS, INNER, WIDTH, generator=generator),
        "model.norm.weight": torch.randn(INNER, generator=generator),
    }


def opened(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder / "model.safetensors")


def read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    found = {}
    with contextlib.closing(ShardReader(checkpoint.shards)) as reader:
        for tensor in checkpoint.tensors:
            found[tensor.name] = torch.empty(tensor.shape)
            reader.read_into(as_bytes(found[tensor.name]), tensor)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_each_expert_has_the_bytes_of_its_part(tmp_path: Path, layout: tuple, prefix: str) -> None:
    tensors = stacks(layout.gate_up, layout.down, prefix)
    checkpoint = opened(tmp_path, tensors)
    found = read(unstack(checkpoint))
    assert len(found) == 3 * EXPERTS + 1
    assert list(found) == sorted(found)
    both, down = tensors[prefix + layout.gate_up], tensors[prefix + layout.down]
    for number in range(EXPERTS):
        expert = f"{prefix}experts.{number}"
        assert torch.equal(found[f"{expert}.{layout.gate}.weight"], both[number, :WIDTH])
        assert torch.equal(found[f"{expert}.{layout.up}.weight"], both[number, WIDTH:])
        assert torch.equal(found[f"{expert}.{layout.leaf}.weight"], down[number])
    again = list(restacked(found))
    assert {stack.name: stack.experts for stack in again} == {
        prefix + layout.gate_up: EXPERTS,
        prefix + layout.down: EXPERTS,
    }
    for stack in again:
        whole = torch.cat([found[name] for name in stack.parts])
        assert torch.equal(whole.view(tensors[stack.name].shape), tensors[stack.name])


@pytest.mark.parametrize(
    "changed",
    [
        {
            "experts.gate_up_proj": (EXPERTS, INNER, 2 * WIDTH),
            "experts.down_proj": (EXPERTS, 8, 12),
        },
        {"experts.gate_up_proj_bias": (EXPERTS, 2 * WIDTH)},
        {"experts.down_proj": (EXPERTS + 1, INNER, WIDTH)},
        {"experts.down_proj": (EXPERTS, INNER, WIDTH + 1)},
        {"experts.gate_up_proj": (2 * WIDTH, INNER)},
        {"experts.0.gate_proj.weight": (WIDTH, INNER)},
    ],
)
def test_what_is_no_stack_of_rows_stays_as_it_is(
    tmp_path: Path, changed: dict[str, tuple[int, ...]]
) -> None:
    tensors = stacks("experts.gate_up_proj", "experts.down_proj")
    tensors |= {PREFIX + name: torch.zeros(shape) for name, shape in changed.items()}
    checkpoint = opened(tmp_path, tensors)
    assert unstack(checkpoint) is checkpoint


def test_both_stacks_of_a_layer_stay_where_one_does(tmp_path: Path) -> None:
    tensors = stacks("experts.gate_up_proj", "experts.down_proj")
    other = "model.layers.2.mlp."
    tensors |= stacks("experts.gate_up_proj", "experts.down_proj", other)
    checkpoint = opened(tmp_path, tensors)
    apart = unstack(checkpoint, f"{PREFIX}experts.down_proj".__eq__)
    names = [tensor.name for tensor in apart.tensors]
    assert [name for name in names if name.startswith(PREFIX)] == [
        f"{PREFIX}experts.down_proj",
        f"{PREFIX}experts.gate_up_proj",
    ]
    assert sum(name.startswith(other) for name in names) == 3 * EXPERTS


def test_experts_are_stacked_again_where_all_are_there() -> None:
    names = [f"experts.{n}.{leaf}.weight" for n in range(2) for leaf in ("w1", "w2", "w3")]
    found = list(restacked(names))
    assert [stack.name for stack in found] == ["input_linear.weight", "output_linear.weight"]
    assert list(restacked(names[1:])) == found[1:]


def test_transformers_loads_each_expert_of_the_models_that_are_listed() -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping")
    loading = pytest.importorskip("transformers.core_model_loading")
    from transformers import CONFIG_MAPPING

    rules = mapping._build_checkpoint_conversion_mapping()
    alike = mapping._MODEL_TO_CONVERSION_PATTERN
    found = set()
    for kind in CONFIG_MAPPING:
        for rule in rules.get(kind) or rules.get(alike.get(kind, ""), ()):
            if isinstance(rule, loading.WeightConverter):
                sources = rule.source_patterns
                listed = [sources] if isinstance(sources, str) else sources
                if any(re.search(r"experts\.\*\.(gate_proj|w1)\.weight", one) for one in listed):
                    found.add(kind)
    assert found == APART
    assert needs_stacks({"model_type": "granitemoe"})
    assert not needs_stacks({"text_config": {"model_type": "qwen3_5_moe_text"}})
    assert not needs_stacks(None)
