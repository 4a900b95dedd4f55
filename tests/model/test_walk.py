"""A model read from disk block by block: the same as in memory, and never more than one block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, saved
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ortho_cli.errors import CalibrationError, CheckpointError
from ortho_cli.model import on_disk
from ortho_cli.model.load import find_linears
from ortho_cli.model.walk import Walk
from ortho_cli.storage.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

CPU = torch.device("cpu")


def names_of(folder: Path) -> list[str]:
    """Weights of attention and of the rest of a block that are matrices, by their usual names."""
    words = ("proj", "dense", "query_key_value", "fc")
    return [
        tensor.name
        for tensor in open_checkpoint(folder).tensors
        if len(tensor.shape) == 2 and any(word in tensor.name for word in words)
    ]


def walk_of(folder: Path, *, dtype: torch.dtype | None = torch.float32) -> Walk:
    return Walk(open_checkpoint(folder), names_of(folder), dtype=dtype, device=CPU)


def batches() -> list[tuple[Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 48, (2, 12), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    return [(tokens, None), (tokens.flip(1), mask), (tokens[:1, :7], None)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_walk_gives_the_logits_of_the_model_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind)
    walk = walk_of(tmp_path)
    assert len(walk) == 3
    assert all(walk.linears)
    walk.read_only(torch.cat([tokens.reshape(-1) for tokens, _ in batches()]))
    entered = [walk.enter(tokens, mask) for tokens, mask in batches()]
    hidden = [first for first, _ in entered]
    with torch.no_grad():
        for number in range(3):
            with walk.held(number):
                for index, (_, options) in enumerate(entered):
                    hidden[index] = walk.call(number, hidden[index], options[number])
    for found, (tokens, mask) in zip(hidden, batches(), strict=True):
        options = {} if mask is None else {"attention_mask": mask}
        expected = model(input_ids=tokens, use_cache=False, **options).logits
        there = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        assert torch.equal(walk.logits(found)[there], expected[there])
    walk.close()


@pytest.mark.parametrize("kind", ["DeepseekV3", "Glm4Moe", "Llama"])
def test_what_transformers_keeps_in_float32_stays_so(tmp_path: Path, kind: str) -> None:
    import transformers

    saved(tmp_path, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens, walk = batches()[0][0], walk_of(tmp_path, dtype=torch.bfloat16)
    kept = {name: one.dtype for name, one in model.named_buffers() if "bias" in name}
    assert {n: one.dtype for n, one in walk.model.named_buffers() if "bias" in n} == kept
    assert bool(kept) == (kind != "Llama")
    names = [tensor.name for tensor in open_checkpoint(tmp_path).tensors]
    find_linears(model, [name for name in names if ".experts." in name])  # called one by one
    hidden, options = walk.enter(tokens, None)
    with torch.no_grad():
        for number in range(3):
            with walk.held(number):
                hidden = walk.call(number, hidden, options[number])
        expected = model.eval()(input_ids=tokens, use_cache=False).logits
    assert torch.equal(walk.logits(hidden), expected)
    walk.close()


def test_what_an_unknown_transformers_keeps_in_float32_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    saved(tmp_path, "Glm4Moe")
    monkeypatch.delattr(PreTrainedModel, "_get_dtype_plan")
    walk_of(tmp_path).close()
    with pytest.raises(CheckpointError, match="keeps some modules in float32") as caught:
        walk_of(tmp_path, dtype=torch.bfloat16)
    assert "--max-memory" in caught.value.hint


def in_memory(walk: Walk) -> set[str]:
    return {name for name, one in walk.model.named_parameters() if not one.is_meta}


def test_no_more_than_one_block_is_ever_held(tmp_path: Path) -> None:
    saved(tmp_path, "Llama", tie_word_embeddings=False)
    walk = walk_of(tmp_path)
    assert not in_memory(walk)
    ((tokens, _), *_) = batches()
    hidden, options = walk.enter(tokens, None)
    assert in_memory(walk) == {"model.embed_tokens.weight"}
    for number in range(3):
        with walk.held(number):
            assert all(name.startswith(f"model.layers.{number}.") for name in in_memory(walk))
            assert len(in_memory(walk)) == 9
            hidden = walk.call(number, hidden, options[number])
        assert not in_memory(walk)
    walk.logits(hidden)
    assert in_memory(walk) == {"model.norm.weight", "lm_head.weight"}
    walk.close()
    assert not in_memory(walk)
    assert walk.block_bytes == 4 * (64 * (64 + 32 + 32 + 64 + 3 * 128) + 2 * 64)
    assert walk.tail_bytes == 4 * 64 * (48 + 1)


def test_of_the_embedding_only_rows_of_the_text_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path, "Llama", tie_word_embeddings=False)
    walk = walk_of(tmp_path)
    tokens = torch.tensor([[3, 9, 3, 47]])
    walk.read_only(tokens)
    hidden, _ = walk.enter(tokens, None)
    whole, table = model.model.embed_tokens.weight, walk.model.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(hidden, whole[tokens])
    assert walk.entry_bytes == 3 * 64 * 4
    assert table.any(1).nonzero().flatten().tolist() == [3, 9, 47]
    walk.close()


def test_shards_and_dtypes_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "whole", "Llama").bfloat16(), tmp_path / "shards"
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    for dtype in (torch.float32, None):
        walk = walk_of(folder, dtype=dtype)
        with walk.held(1):
            held = {name: one for name, one in walk.model.named_parameters() if not one.is_meta}
            assert len(held) == 9
            for name, found in held.items():
                assert found.dtype == (dtype or torch.bfloat16)
                assert torch.equal(found, model.get_parameter(name).to(found.dtype))
        walk.close()


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def with_shape(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name][:, :32].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), "up_proj.weight` of LlamaForCausalLM is no"),
        (without("model.norm.weight"), "`model.norm.weight` of LlamaForCausalLM is no tensor"),
        (with_shape("model.layers.2.mlp.up_proj.weight"), r"is \[128, 32\] and the model .* \[128"),
    ],
)
def test_what_the_file_lacks_is_named_before_anything_is_read(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    saved(tmp_path, "Llama")
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        walk_of(tmp_path)


def test_weight_outside_of_blocks_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "Llama", tie_word_embeddings=False)
    names = [*names_of(tmp_path), "lm_head.weight"]
    walk = Walk(open_checkpoint(tmp_path), names, dtype=torch.float32, device=CPU)
    assert walk.left == ["lm_head.weight"]
    with pytest.raises(CalibrationError, match="has no blocks with a Linear") as caught:
        Walk(open_checkpoint(tmp_path), names[-1:], dtype=None, device=CPU, way_out="another way")
    assert caught.value.hint == "another way"


def test_experts_of_an_unknown_layout_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "Mixtral")
    names = [name for name in names_of(tmp_path) if "self_attn" in name]
    assert len(Walk(open_checkpoint(tmp_path), names, dtype=torch.float32, device=CPU)) == 3
    monkeypatch.setattr(on_disk, "separate", lambda model, names: {})
    with pytest.raises(CheckpointError, match=r"of MixtralForCausalLM is no tensor .* of others"):
        Walk(open_checkpoint(tmp_path), names, dtype=torch.float32, device=CPU)


def test_blocks_that_get_more_than_hidden_states_are_named(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=48, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    names = ["transformer.h.0.attn.c_attn.weight"]
    walk = Walk(open_checkpoint(tmp_path), names, dtype=torch.float32, device=CPU)
    with pytest.raises(CalibrationError, match="4 positional arguments where 1") as caught:
        walk.enter(batches()[0][0], None)
    assert "--max-memory" in caught.value.hint
    walk.close()


def test_tensors_that_config_ties_and_that_differ_are_named(tmp_path: Path) -> None:
    saved(tmp_path, "Llama", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    for head, fits in ((table.clone(), True), (table + 1, False)):
        changed = {**tensors, "lm_head.weight": head}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if fits:
            walk_of(tmp_path).close()
            continue
        with pytest.raises(CheckpointError, match=r"ties `lm_head.weight` and `model.embed"):
            walk_of(tmp_path)


def test_blocks_that_do_not_simply_follow_are_named(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    ((tokens, _), *_) = batches()

    def between(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (2 * args[0], *args[1:])

    def sharing(module: nn.Module, args: object, options: Any) -> Any:
        return args, {**options, "memory": {}}

    for hook, message in ((between, "do not simply follow"), (sharing, "share a dict, `memory`")):
        walk = walk_of(tmp_path)
        second = walk.model.model.layers[1]  # type: ignore[index, union-attr]
        second.register_forward_pre_hook(hook, with_kwargs=hook is sharing)
        with pytest.raises(CalibrationError, match=f"blocks of LlamaForCausalLM.* {message}"):
            walk.enter(tokens, None)
        walk.close()
