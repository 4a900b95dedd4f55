"""Files of torch.save: where the weights are in them, what is refused, what tied heads become."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import tarfile
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ortho
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ortho_cli.errors import CheckpointError, UsageError

Tensors = dict[str, Tensor]


def weights(seed: int = 0, prefix: str = "") -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}layers.0.weight": torch.randn(6, 8, generator=generator),
        f"{prefix}layers.0.bias": torch.randn(6, generator=generator),
        f"{prefix}norm.weight": torch.randn(8, generator=generator).to(torch.bfloat16),
    }


def adam(tensors: Tensors) -> dict[str, Any]:
    moments = {i: {"exp_avg": torch.randn(t.shape)} for i, t in enumerate(tensors.values())}
    return {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def convert(ortho: Ortho, source: Path, *options: object) -> tuple[Tensors, str]:
    out = source.parent / "out"
    ran = ortho("convert", source, "-o", out, "--force", *options)
    assert ran.code == 0, ran.err
    return load_file(out / "model.safetensors"), ran.err


def refused(ortho: Ortho, source: Path, *options: object, code: int = 4) -> str:
    before = sorted(source.parent.iterdir())
    ran = ortho("convert", source, *options)
    assert ran.code == code, ran.err
    assert ran.err.startswith("error: ")
    assert "\nhint: " in ran.err
    assert ran.err.count("\n") == 2
    assert sorted(source.parent.iterdir()) == before
    return ran.err


def run_hint(ortho: Ortho, said: str) -> str:
    """Run the `ortho convert` of a hint; return what it said."""
    command = re.findall(r"`ortho ([^`]*)`", said)[0]
    ran = ortho(*shlex.split(command), "-o", "hinted")
    assert ran.code == 0, ran.err
    return ran.err


W = weights()
CONTAINERS: dict[str, tuple[Any, str]] = {
    **{
        key: ({key: W, "epoch": 3}, key)
        for key in ("state_dict", "model", "model_state_dict", "module", "params", "params_ema")
    },
    **{
        key: ({key: W, "loss": torch.tensor(1.5)}, key)
        for key in ("ema", "ema_state_dict", "net", "network", "generator", "weights", "anything")
    },
    "flat": (W, ""),
    "flat beside plain values": ({**W, "epoch": 3, "loss": 0.4, "optimizer": adam(W)}, ""),
    "ordered": (OrderedDict(W), ""),
    "twice": ({"model": {"state_dict": W, "config": {"n": 1}}, "step": 1}, "model.state_dict"),
    "four deep": ({"a": {"b": {"c": {"d": W}}}}, "a.b.c.d"),
    "seven deep": ({"a": {"model": {"c": {"d": {"e": {"f": {"g": W}}}}}}}, "a.model.c.d.e.f.g"),
    "adam is larger": (
        {"model": W, "optimizer": adam(weights(1)), "exp_avg": weights(2), "grads": weights(3)},
        "model",
    ),
    "optimizer by its form": ({"net": W, "solver": adam(W)}, "net"),
    "deepspeed": (
        {"module": W, "optimizer": None, "param_shapes": [OrderedDict(a=torch.Size([6, 8]))],
         "buffer_names": [], "global_steps": 4, "ds_config": {"zero_optimization": {"stage": 1}}},
        "module",
    ),
    "lightning": (
        {"state_dict": W, "epoch": 1, "global_step": 9, "optimizer_states": [adam(W)],
         "lr_schedulers": [{"last_epoch": 1}], "callbacks": {"x": {"best": torch.tensor(1.0)}},
         "loops": {"fit": {"steps": torch.ones(400)}}, "hyper_parameters": {"lr": 0.1}},
        "state_dict",
    ),
    "loose tensors": (
        {"model": W, "loss": torch.tensor(2.0), "rng_state": torch.get_rng_state(),
         "best": torch.tensor([1.0, 2.0])},
        "model",
    ),
    "small other": ({"model": weights(prefix="x."), "norm": {"mean": torch.ones(1)}}, "model"),
    "one set under two keys": ({"state_dict": W, "model": W}, "state_dict"),
    "composer": (
        {"state": {"model": W, "optimizers": {"AdamW": adam(W)}, "metadata": {"n": 1}},
         "rng": [{"torch": torch.get_rng_state()}]},
        "state.model",
    ),
    "averages in a list": ({"model": W, "ema": {"shadow_params": [*W.values()]}}, "model"),
    "list beside": ({"model": W, "history": [torch.randn(90), torch.randn(90)]}, "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_weights_are_found_under_any_key_and_the_rest_is_named(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    content, key = CONTAINERS[name]
    torch.save(content, tmp_path / "m.pt")
    found, said = convert(ortho, tmp_path / "m.pt")
    wanted = weights(prefix="x.") if name == "small other" else W
    assert same(found, wanted)
    assert (f"are those under `{key}`" in said) == bool(key)
    left = content.keys() - {key.split(".")[0], *W}
    assert all(f"`{other}`" in said for other in left)


PART_NAMES = ("opt_model", "sampler", "loop", "scheduler_embed", "lr_encoder", "random_proj")


@pytest.mark.parametrize("name", PART_NAMES)
@pytest.mark.parametrize("nested", [False, True])
def test_part_of_a_model_that_is_named_like_training_state_is_not_left_out(
    tmp_path: Path, ortho: Ortho, name: str, nested: bool
) -> None:
    parts = {name: {"weight": torch.ones(8, 8)}, "vision": {"proj": {"weight": torch.ones(4, 4)}}}
    torch.save({"model": parts} if nested else parts, tmp_path / "m.pt")
    found, _ = convert(ortho, tmp_path / "m.pt")
    assert found.keys() == {f"{name}.weight", "vision.proj.weight"}


@pytest.mark.parametrize("name", PART_NAMES)
def test_part_beside_weights_that_is_named_like_training_state_is_asked_about(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    torch.save({"state_dict": W, name: {"weight": torch.ones(8, 8)}}, tmp_path / "m.pt")
    said = refused(ortho, tmp_path / "m.pt")
    assert f"`{name}` (64 elements)" in said


MOMENTS = {f"{name}.{of}": torch.ones(8, 8) for name in W for of in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize(
    "content",
    [
        {"state": {name: {"momentum_buffer": torch.ones(8, 8)} for name in W}},
        {"state": {0: {"x": torch.ones(8, 8)}}},
        MOMENTS,
        {"param_groups": [{"lr": 0.1}], "shadow": {"w": torch.ones(8, 8)}},
        {"order": torch.arange(99), "generator": torch.ones(99)},
        [torch.ones(8, 8)],
    ],
)
@pytest.mark.parametrize("name", ["opt_g", "sampler", "lr_scheduler", "loops", "optim_fp32"])
def test_training_state_is_known_by_what_it_holds(
    tmp_path: Path, ortho: Ortho, name: str, content: Any
) -> None:
    torch.save({"net": W, name: content}, tmp_path / "m.pt")
    found, said = convert(ortho, tmp_path / "m.pt")
    assert same(found, W)
    assert f"left out of `m.pt`: `{name}`" in said


@pytest.mark.parametrize("name", ["m.ckpt", "m.pkl", "m.weights", "m", "m.pt.tar", "m.BIN"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_file_is_known_by_its_bytes(
    tmp_path: Path, ortho: Ortho, name: str, legacy: bool
) -> None:
    torch.save(W, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert same(convert(ortho, tmp_path / name)[0], W)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("last.ckpt", "m-converted"), ("m.pth.tar", "m-converted"), ("a.tar", "a.tar-converted")],
)
def test_output_is_named_after_the_file_without_its_suffixes(
    tmp_path: Path, ortho: Ortho, name: str, folder: str
) -> None:
    torch.save(W, tmp_path / name)
    assert ortho("convert", tmp_path / name, "-q").code == 0
    assert (tmp_path / folder.replace("m-", f"{name.split('.')[0]}-")).is_dir()


RIVALS: dict[str, tuple[Any, list[str]]] = {
    "basicsr": ({"params": W, "params_ema": weights(1)}, ["params", "params_ema"]),
    "timm": ({"model": W, "model_ema": weights(1), "epoch": 1}, ["model", "model_ema"]),
    "ema": ({"state_dict": W, "ema": weights(1)}, ["state_dict", "ema"]),
    "gan": ({"g": W, "d": weights(1), "g_ema": weights(2)}, ["g", "d", "g_ema"]),
    "nested": ({"model": {"net": W, "ema": weights(1)}}, ["model.net", "model.ema"]),
    "megatron virtual": ({"model0": W, "model1": weights(1)}, ["model0", "model1"]),
    "unknown keys": ({"left": W, "right": weights(1), "n": 1}, ["left", "right"]),
    "unknown keys alone": ({"left": W, "right": weights(1)}, ["left", "right"]),
    "head apart": ({"model": W, "lm_head": {"weight": torch.ones(4, 6)}}, ["model", "lm_head"]),
    "list inside": ({"models": [W, weights(1)], "loss": torch.ones(1)}, ["models.0", "models.1"]),
    "list": ([W, weights(1)], ["0", "1"]),
    "tuple with optimizer": ((W, adam(W)), ["0"]),
}


@pytest.mark.parametrize("name", RIVALS)
def test_weights_that_are_as_large_are_not_guessed_and_key_chooses(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content, keys = RIVALS[name]
    torch.save(content, tmp_path / "my model.pt")
    said = refused(ortho, tmp_path / "my model.pt")
    if name not in ("list", "tuple with optimizer"):
        assert all(f"`{key}`" in said for key in keys)
    assert f"under `{keys[0]}`" in run_hint(ortho, said)
    for key in keys:
        wanted: Any = content
        for step in key.split("."):
            wanted = wanted[int(step) if isinstance(wanted, list | tuple) else step]
        found, told = convert(ortho, tmp_path / "my model.pt", "--key", key)
        assert same(found, wanted), key
        assert f"under `{key}`" in told


def test_weights_beside_an_average_at_the_top_level_are_not_guessed(
    tmp_path: Path, ortho: Ortho
) -> None:
    torch.save({**W, "ema": weights(1)}, tmp_path / "m.pt")
    said = refused(ortho, tmp_path / "m.pt")
    assert "the top level (62 elements) and `ema`" in said
    assert same(convert(ortho, tmp_path / "m.pt", "--key", "ema")[0], weights(1))
    whole = convert(ortho, tmp_path / "m.pt", "--key", ".")[0]
    assert same(whole, {**W, **weights(1, "ema.")})


def test_many_tensors_of_one_memory_are_noted_in_few_words(tmp_path: Path, ortho: Ortho) -> None:
    tensor = torch.randn(3, 3)
    torch.save({f"layers.{i}.weight": tensor for i in range(40)}, tmp_path / "m.pt")
    found, said = convert(ortho, tmp_path / "m.pt")
    assert len(found) == 40
    assert said.count("the same memory") == 9
    assert "31 other tensors" in said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("emma", "--key emma is not in"),
        ("model.x", "`model` of"),
        ("epoch", "without named tensors"),
        ("loss", "without named tensors"),
        ("optimizer", "without named tensors"),
    ],
)
def test_key_that_leads_to_no_weights_is_refused(
    tmp_path: Path, ortho: Ortho, key: str, said: str
) -> None:
    content = {"model": W, "epoch": 1, "loss": torch.ones(1), "optimizer": adam(W)}
    torch.save(content, tmp_path / "m.pt")
    told = refused(ortho, tmp_path / "m.pt", "--key", key, code=UsageError.exit_code)
    assert said in told


def test_key_may_hold_dots(tmp_path: Path, ortho: Ortho) -> None:
    torch.save({"a.b": {"c": W}, "a": {"b": weights(1)}}, tmp_path / "m.pt")
    assert same(convert(ortho, tmp_path / "m.pt", "--key", "a.b.c")[0], W)


def test_key_for_anything_but_a_torch_file_is_refused(
    tmp_path: Path, ortho: Ortho, pico: Path, artifact: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for source in (pico, artifact, tmp_path / "m.gguf"):
        ran = ortho("convert", source, "--key", "ema")
        assert ran.code == UsageError.exit_code
        assert "--key ema is for files of torch.save" in ran.err


def test_two_keys_of_one_file_have_different_plans(tmp_path: Path, ortho: Ortho) -> None:
    """Else half-done work of one would be finished with the other's tensors."""
    torch.save({"model": W, "ema": weights(1)}, tmp_path / "m.pt")
    plans = {
        ortho("convert", tmp_path / "m.pt", "--key", key, "--dry-run", "--json").json["plan_sha256"]
        for key in ("model", "ema")
    }
    assert len(plans) == 2


TREES: dict[str, tuple[Any, list[str]]] = {
    "megatron": (
        {"model": {"language_model": {
            "embedding": {"word_embeddings": {"weight": torch.randn(9, 8)}},
            "encoder": weights()}, "word_embeddings_for_head": {"weight": torch.randn(9, 8)}},
         "iteration": 3, "checkpoint_version": 3.0},
        ["language_model.embedding.word_embeddings.weight",
         *(f"language_model.encoder.{name}" for name in W), "word_embeddings_for_head.weight"],
    ),
    "megatron without a head": (
        {"model": {"language_model": {"embedding": {"weight": torch.ones(3, 3)}, "encoder": W}}},
        ["language_model.embedding.weight", *(f"language_model.encoder.{name}" for name in W)],
    ),
    "parts": (
        {"encoder": W, "decoder": {"a.weight": torch.ones(4, 4)}},
        [*(f"encoder.{name}" for name in W), "decoder.a.weight"],
    ),
    "tree": (
        {"layers": {"0": {"w": torch.ones(2, 2)}, "1": {"w": torch.ones(2, 2)}},
         "embed": {"weight": torch.ones(5, 2)}},
        ["layers.0.w", "layers.1.w", "embed.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_dicts_within_dicts_are_one_model_with_joined_names(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    content, names = TREES[name]
    torch.save(content, tmp_path / "m.pt")
    found, said = convert(ortho, tmp_path / "m.pt")
    assert sorted(found) == sorted(names)
    assert "their names are joined with dots" in said


def test_names_that_meet_when_they_are_joined_are_refused(tmp_path: Path, ortho: Ortho) -> None:
    torch.save({"a.b": torch.ones(2, 2), "a": {"b": torch.ones(2, 2)}}, tmp_path / "m.pt")
    assert "two tensors of the name `a.b`" in refused(ortho, tmp_path / "m.pt", "--key", ".")


@pytest.mark.parametrize("name", ["w.weight", "w", None])
@pytest.mark.parametrize("keys", [("self",), ("model", "ema"), ("model",)])
@pytest.mark.parametrize("asked", [(), ("--key", ".")])
def test_dict_that_holds_itself_comes_to_an_end(
    tmp_path: Path,
    ortho: Ortho,
    monkeypatch: pytest.MonkeyPatch,
    name: str | None,
    keys: tuple[str, ...],
    asked: tuple[str, ...],
) -> None:
    monkeypatch.setattr("ortho_cli.convert.sources.state_dicts.MOST_NAMES", 1000)
    content: dict[str, Any] = {name: torch.ones(2, 2)} if name else {}
    for key in keys:
        content[key] = content
    torch.save({"model": content}, tmp_path / "m.pt")
    ran = ortho("convert", tmp_path / "m.pt", *asked)
    assert ran.code in (0, CheckpointError.exit_code)


def test_dicts_that_multiply_are_refused(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ortho_cli.convert.sources.state_dicts.MOST_NAMES", 1000)
    node: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(40):
        node = {"a": node, "b": node, "c": {"x": torch.ones(1)}}
    torch.save(node, tmp_path / "m.pt")
    assert "more than 1000 tensors" in refused(ortho, tmp_path / "m.pt")


REFUSED: dict[str, tuple[Any, str]] = {
    "module": (nn.Linear(2, 3), "`torch.nn.modules.linear.Linear`"),
    "module inside": ({"model": nn.Linear(2, 3)}, "`torch.nn.modules.linear.Linear`"),
    "list of tensors": ([torch.ones(2)], "holds a list of 1 entries"),
    "tensor": (torch.ones(2, 2), "holds a Tensor"),
    "parameter": (nn.Parameter(torch.ones(2, 2)), "holds a Parameter"),
    "empty": ({}, "no tensors of a model among 0 entries"),
    "nothing": (None, "holds a NoneType"),
    "text": ("weights", "holds a str"),
    "counter": (Counter("aab"), "no tensors of a model among 2 entries: `a`, `b`"),
    "optimizer": (adam(W), "among 2 entries: `state`, `param_groups`"),
    "loss alone": ({"model": None, "loss": torch.tensor(1.0)}, "`model`, `loss`"),
    "numbered": ({0: torch.ones(2, 2), 1: torch.ones(2)}, "among 2 entries"),
    "quint8": (
        lambda: {"a.weight": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.quint8)},
        "quantized (quint8)",
    ),
    "sparse": (lambda: {"a.weight": torch.eye(3).to_sparse()}, "sparse (sparse_coo)"),
    "sparse rows": (
        lambda: {"m": {"a.weight": torch.eye(3).to_sparse_csr()}},
        "sparse (sparse_csr)",
    ),
    "meta": ({"a.weight": torch.ones(2, 2, device="meta")}, "on the meta device"),
    "complex128": ({"a.weight": torch.ones(2, 2, dtype=torch.complex128)}, "complex128"),
    "nested": (
        lambda: {"a.weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "nested tensor",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of torch, on quantized, sparse and nested tensors
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_state_dict_is_refused_by_name(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    content, said = REFUSED[name]
    torch.save(content() if isinstance(content, FunctionType) else content, tmp_path / "m.pt")
    assert said in refused(ortho, tmp_path / "m.pt")


LINEAR = nn.Linear(2, 3)


@pytest.mark.parametrize(
    "content",
    [
        LINEAR,
        {"model": LINEAR, "args": Namespace(lr=0.1)},
        {"state_dict": LINEAR.state_dict(), "args": Namespace(lr=0.1), "path": Path("x")},
        {"model": LINEAR.state_dict(), "best": np.float64(1.0), "data": np.ones(3)},
    ],
)
def test_way_out_of_a_file_that_would_run_code_works(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "made here.pt")
    said = refused(ortho, tmp_path / "made here.pt")
    assert "nothing was run" in said
    python, command = re.findall(r"`((?:python|ortho) [^`]*)`", said)
    _, _, code, path = shlex.split(python)
    monkeypatch.setattr("sys.argv", ["-c", path])
    exec(code, {})
    assert ortho(*shlex.split(command)[1:], "-o", "out").code == 0
    assert same(load_file("out/model.safetensors"), dict(LINEAR.state_dict()))


KEPT: dict[str, Tensor] = {
    "parameter": nn.Parameter(torch.randn(2, 3)),
    "transposed": torch.randn(4, 3).t(),
    "expanded": torch.randn(1, 3).expand(4, 3),
    "strided": torch.randn(8, 6)[::2, ::3],
    "scalar": torch.tensor(2.5),
    "no elements": torch.empty(0, 5),
    "no columns": torch.empty(3, 0),
    "bool": torch.tensor([[True, False]]),
    "int8": torch.arange(-3, 3, dtype=torch.int8).view(2, 3),
    "complex": torch.randn(2, 3, dtype=torch.complex64),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", KEPT)
def test_tensor_of_any_form_is_written_as_its_values(
    tmp_path: Path, ortho: Ortho, name: str
) -> None:
    tensor = KEPT[name]
    torch.save({"model": {"a.weight": tensor, **W}}, tmp_path / "m.pt")
    found, _ = convert(ortho, tmp_path / "m.pt")
    assert same(found, {"a.weight": tensor.detach(), **W})


def jit(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(nn.Linear(2, 2)).save(path)


def nemo(path: Path) -> None:
    torch.save(W, path.with_suffix(".inner"))
    path.with_suffix(".yaml").write_text("x: 1")
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_suffix(".yaml"), "./model_config.yaml")
        archive.add(path.with_suffix(".inner"), "./model_weights.ckpt")


def put(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n"
PLAIN_PICKLE = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."


def old_pickle(path: Path) -> None:
    torch.save(W, path, pickle_protocol=4, _use_new_zipfile_serialization=False)


def zip_of_numpy(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), a=np.ones(2))
    path.with_suffix(".npz").rename(path)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "safetensors": (put(save(W)), "is a safetensors file"),
    "lfs": (put(LFS), "is a Git LFS pointer"),
    "html": (put(b"\n<!DOCTYPE html><html><body>404"), "is an HTML page"),
    "bare html": (put(b"<HTML lang=en>"), "is an HTML page"),
    "xml": (put(b'<?xml version="1.0"?><Error>AccessDenied</Error>'), "is an XML document"),
    "answer": (put(b'{"error": "Repository not found"}'), "is an error message"),
    "words": (put("Invalid username or password. \u2717".encode()), "is an error message"),
    "json": (put(b'\xef\xbb\xbf {"model_type": "x"}'), "is JSON text"),
    "text": (put("\u2717".encode() * 400), "is plain text"),
    "empty": (put(b""), "is an empty file"),
    "zeros": (put(bytes(5000)), "is a file of zeros"),
    "gzip": (put(b"\x1f\x8b\x08" + bytes(30)), "is a gzip file"),
    "npy": (put(b"\x93NUMPY\x01\0"), "is a NumPy array"),
    "hdf5": (put(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file"),
    "pickle": (put(PLAIN_PICKLE), "is a pickle, which can run code"),
    "npz": (zip_of_numpy, "is a NumPy archive"),
    "torchscript": (jit, "is a TorchScript program"),
    "nemo": (nemo, "is a NeMo archive"),
    "ggml": (put(b"lmgg" + bytes(40)), "is a GGML file of before GGUF"),
    "fasttext": (put(b"\xba\x16\x4f\x2f" + bytes(40)), "is a fastText model"),
    "unknown": (put(b"\x01\x02\xff\xfe" * 300), "it begins with b'\\x01\\x02"),
    "protocol 4": (old_pickle, "no readable torch file: Unsupported operand 149"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("where", ["pytorch_model.bin", "m.pt"])
def test_file_of_another_kind_is_called_what_it_is(
    tmp_path: Path, ortho: Ortho, name: str, where: str
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write, said = KINDS[name]
    write(folder / where)
    assert said in refused(ortho, folder / where)
    assert said in refused(ortho, folder)


def test_gguf_in_a_folder_of_torch_is_called_what_it_is(tmp_path: Path, ortho: Ortho) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"GGUF\x03\0\0\0" + bytes(40))
    said = refused(ortho, tmp_path)
    assert "is a GGUF file" in said
    assert f"`ortho convert {tmp_path}/pytorch_model.bin`" in said


def test_way_out_of_a_wrong_name_works(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.bin").write_bytes(save(W))
    said = refused(ortho, tmp_path / "m.bin")
    move, command = re.findall(r"`(\w+ [^`]*)`", said.partition("hint:")[2])
    old, new = shlex.split(move)[1:]
    Path(old).rename(new)
    assert ortho(*shlex.split(command)[1:], "-o", "out").code == 0
    assert same(load_file("out/model.safetensors"), W)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(nn.Linear(2, 2).state_dict()))


@pytest.mark.parametrize("write", [jit, exported, plain_pickle])
def test_way_out_of_another_program_makes_weights(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a model's"
    folder.mkdir()
    write(folder / "m.pt")
    said = refused(ortho, folder / "m.pt")
    python, command = re.findall(r"`(\w+ [^`]*)`", said.partition("hint:")[2])
    _, _, code, path = shlex.split(python)
    monkeypatch.setattr("sys.argv", ["-c", path])
    with warnings.catch_warnings(action="ignore"):
        exec(code)  # it is what the hint says
    assert ortho(*shlex.split(command)[1:], "-o", "out").code == 0
    assert set(load_file("out/model.safetensors")) == {"weight", "bias"}


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ""])
def test_fifo_is_refused_and_not_waited_for(tmp_path: Path, ortho: Ortho, suffix: str) -> None:
    os.mkfifo(tmp_path / f"m{suffix}")
    assert ortho("convert", tmp_path / f"m{suffix}").code == CheckpointError.exit_code


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(W, folder / name)
    return folder


FOLDERS: dict[str, tuple[str, ...]] = {
    "lightning": ("last.ckpt",),
    "tar": ("model_best.pth.tar",),
    "variant alone": ("pytorch_model.fp16.bin",),
    "variant beside": ("pytorch_model.bin", "pytorch_model.fp16.bin"),
    "meta": ("consolidated.00.pth",),
    "deepspeed": ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "trainer": ("model.pt", "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_with_one_file_of_weights_is_read(tmp_path: Path, ortho: Ortho, name: str) -> None:
    found, _ = convert(ortho, fill(tmp_path / "m", *FOLDERS[name]))
    assert same(found, W)


def test_variant_is_read_through_its_index(tmp_path: Path, ortho: Ortho) -> None:
    names = [f"pytorch_model.fp16-{i + 1:05d}-of-00002.bin" for i in range(2)]
    folder = fill(tmp_path / "m")
    torch.save(W, folder / names[0])
    torch.save({"other.weight": torch.ones(2, 2)}, folder / names[1])
    weight_map = dict.fromkeys(W, names[0]) | {"other.weight": names[1]}
    index = folder / "pytorch_model.bin.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert convert(ortho, folder)[0].keys() == weight_map.keys()


PIECES: dict[str, tuple[tuple[str, ...], str]] = {
    "meta": (("consolidated.00.pth", "consolidated.01.pth"), "model-parallel pieces"),
    "deepspeed": (
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        "model-parallel pieces",
    ),
    "zero": (
        tuple(f"zero_pp_rank_{i}_mp_rank_00_model_states.pt" for i in range(2)),
        "model-parallel pieces",
    ),
    "two models": (("a.pt", "b.pt"), "holds 2 files of weights and no index: a.pt, b.pt"),
    "distcp": (("__0_0.distcp", "__1_0.distcp"), "distributed checkpoint"),
    "distcp below": (("pytorch_model_fsdp_0/__0_0.distcp",), "distributed checkpoint"),
    "zero to join": (("zero_to_fp32.py", "latest"), "checkpoint of DeepSpeed in pieces"),
}


@pytest.mark.parametrize("name", PIECES)
def test_folder_of_pieces_is_refused_by_name(tmp_path: Path, ortho: Ortho, name: str) -> None:
    names, said = PIECES[name]
    folder = fill(tmp_path / "m", *names)
    assert said in refused(ortho, folder)
    if "pieces" in said and names[0].endswith(".pt"):
        assert said in refused(ortho, folder / names[0])
    if names[0].endswith(".distcp"):
        assert said in refused(ortho, folder / names[0])


def test_piece_of_megatron_is_known_by_its_folder(tmp_path: Path, ortho: Ortho) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        fill(tmp_path / rank, "model_optim_rng.pt")
    assert "`mp_rank_01`" in refused(ortho, tmp_path / "mp_rank_00" / "model_optim_rng.pt")


def test_zero3_state_without_elements_is_refused(tmp_path: Path, ortho: Ortho) -> None:
    torch.save({"module": {"a.weight": torch.empty(0)}}, tmp_path / "mp_rank_00_model_states.pt")
    told = refused(ortho, tmp_path / "mp_rank_00_model_states.pt")
    assert "holds 1 tensors and no elements: ZeRO-3 keeps those in pieces" in told


def tied(folder: Path, config: dict[str, Any] | None, **names: str) -> Tensors:
    """Write a .bin in which some names are one tensor."""
    folder.mkdir()
    shared = torch.randn(9, 8)
    tensors = {**W, **dict.fromkeys(names.values(), shared)}
    torch.save(tensors, folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize(
    ("config", "dropped"),
    [
        (None, False),
        ({}, False),
        ({"model_type": "nobody-knows"}, False),
        ({"model_type": 7}, False),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True),
        ({"model_type": "llama", "tie_word_embeddings": False}, False),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
        ({"model_type": "gemma"}, True),
        ({"model_type": "x", "tie_word_embeddings": True, "text_config": {}}, True),
        (
            {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}},
            False,
        ),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_head_is_dropped_only_where_the_model_ties_it(
    tmp_path: Path, ortho: Ortho, config: dict[str, Any] | None, dropped: bool, order: int
) -> None:
    names = ["model.embed_tokens.weight", "lm_head.weight"][::order]
    tensors = tied(tmp_path / "m", config, **{f"n{i}": name for i, name in enumerate(names)})
    found, said = convert(ortho, tmp_path / "m")
    if dropped:
        del tensors["lm_head.weight"]
    assert same(found, tensors)
    verb = "kept once" if dropped else "written out as copies"
    assert f"`lm_head.weight` is the same memory as `model.embed_tokens.weight`: {verb}" in said
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as opened:
        assert ("lm_head.weight" in opened.metadata()) == dropped


@pytest.mark.parametrize(
    ("names", "dropped"),
    [
        (["shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"], ["lm_head.weight"]),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], ["embed_out.weight"]),
        (["transformer.wte.weight", "lm_head.weight"], ["lm_head.weight"]),
        (["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
         ["cls.predictions.decoder.weight"]),
        (["tok_embeddings.weight", "output.weight"], ["output.weight"]),
        (["layers.1.mlp.weight", "layers.2.mlp.weight"], []),
        (["layers.1.weight", "lm_head.weight"], []),
        (["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"], []),
    ],
)  # fmt: skip
def test_only_a_head_is_dropped_for_its_embedding(
    tmp_path: Path, ortho: Ortho, names: list[str], dropped: list[str]
) -> None:
    config = {"tie_word_embeddings": True}
    tensors = tied(tmp_path / "m", config, **{f"n{i}": name for i, name in enumerate(names)})
    found, _ = convert(ortho, tmp_path / "m")
    assert same(found, {name: t for name, t in tensors.items() if name not in dropped})


def test_head_is_written_twice_without_transformers(
    tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"a": "transformer.wte.weight", "b": "lm_head.weight"}
    tensors = tied(tmp_path / "m", {"model_type": "gpt2"}, **names)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    found, said = convert(ortho, tmp_path / "m")
    assert same(found, tensors)
    assert "nothing says that they are tied" in said
