"""Adapters given instead of a model, or with one: told by files and by names, and refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from conftest import Ortho
from safetensors.torch import save_file

from ortho_cli.errors import CheckpointError

COMMANDS = ("decompose", "convert", "inspect")
LORA = {
    f"base_model.model.layers.0.q_proj.lora_{part}.weight": torch.ones(8, 64) for part in "AB"
}  # fmt: skip


def adapter(folder: Path, file: str = "adapter_model.safetensors", **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if file.endswith(".bin"):
        torch.save(LORA, folder / file)
    else:
        save_file(LORA, folder / file)
    return folder


def refused(ortho: Ortho, command: str, source: Path) -> str:
    before = sorted(source.parent.iterdir())
    ran = ortho(command, source)
    assert ran.code == CheckpointError.exit_code, ran.err
    assert sorted(source.parent.iterdir()) == before
    return ran.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"]
)
@pytest.mark.parametrize("told", [True, False])
def test_adapter_folder_is_refused_with_the_command_that_merges(
    tmp_path: Path, ortho: Ortho, command: str, file: str, told: bool
) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"} if told else {}
    source = adapter(tmp_path / "it's one", file, **config)
    said = refused(ortho, command, source)
    assert "adapter" in said
    assert ("of `org/base`" in said) == told
    command = said.partition("merge it first: `")[2].partition("`")[0]
    program, flag, code, *paths = shlex.split(command)
    assert (program, flag) == ("python", "-c")
    compile(code, "hint", "exec")
    assert paths == [str(source), f"{source}-merged"]
    assert "merge_and_unload().save_pretrained(" in code


@pytest.mark.parametrize(
    ("task", "name"),
    [("CAUSAL_LM", "AutoPeftModelForCausalLM"), (None, "AutoPeftModelForCausalLM"),
     ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
     ("SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM")],
)  # fmt: skip
def test_command_names_the_class_of_the_adapters_task(
    tmp_path: Path, ortho: Ortho, task: str | None, name: str
) -> None:
    source = adapter(tmp_path / "a", peft_type="LORA", task_type=task)
    assert f"import {name} as" in refused(ortho, "decompose", source)


def test_prompts_cannot_be_merged_and_that_is_said(tmp_path: Path, ortho: Ortho) -> None:
    source = adapter(tmp_path / "a", peft_type="PROMPT_TUNING", base_model_name_or_path="x")
    said = refused(ortho, "decompose", source)
    assert "cannot be merged" in said
    assert "merge_and_unload" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_model_with_an_adapter_on_top_is_refused(pico: Path, ortho: Ortho, command: str) -> None:
    adapter(pico, peft_type="LORA")
    said = refused(ortho, command, pico)
    assert "holds a model and" in said
    assert "move `adapter_config.json` away" in said
    (pico / "adapter_config.json").unlink()
    (pico / "adapter_model.safetensors").unlink()
    assert ortho(command, pico, "-q").code == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.lora_B.weight",
     "model.layers.0.q_proj.base_layer.weight", "base_model.model.model.norm.weight",
     "lora_unet_mid.lora_down.weight", "model.layers.0.k_proj.ia3_l",
     "model.layers.0.q_proj.hada_w1_a", "model.embed_tokens.lora_embedding_A",
     "model.layers.0.q_proj.lora_magnitude_vector"],
)  # fmt: skip
def test_adapter_among_the_weights_is_refused_by_name(
    tmp_path: Path, ortho: Ortho, command: str, name: str
) -> None:
    tensors = {"model.layers.0.q_proj.weight": torch.ones(64, 64), name: torch.ones(64, 64)}
    save_file(tensors, tmp_path / "m.safetensors")
    said = refused(ortho, command, tmp_path / "m.safetensors")
    assert f"`{name}`" in said
    assert "merge" in said


def test_adapter_in_a_torch_file_is_refused_by_name(tmp_path: Path, ortho: Ortho) -> None:
    torch.save(LORA, tmp_path / "m.bin")
    assert "lora_A" in refused(ortho, "convert", tmp_path / "m.bin")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_file_is_refused(tmp_path: Path, ortho: Ortho, name: str) -> None:
    source = adapter(tmp_path / "a", name, peft_type="LORA") / name
    assert "merge it first: `python -c" in refused(ortho, "convert", source)


def test_models_whose_own_names_speak_of_ranks_are_read(tmp_path: Path, ortho: Ortho) -> None:
    names = ("layers.0.q_a_proj", "layers.0.kv_b_proj", "att.w_lora.lora.0", "fc1_lora_A_list.0",
             "speech_adapter.proj", "prompt_encoder.mask")  # fmt: skip
    save_file({f"{name}.weight": torch.ones(64, 64) for name in names}, tmp_path / "m.safetensors")
    for command in COMMANDS:
        assert ortho(command, tmp_path / "m.safetensors", "-q").code == 0, command


def test_calibrate_refuses_an_adapter_before_it_reads_data(tmp_path: Path, ortho: Ortho) -> None:
    source = adapter(tmp_path / "a", peft_type="LORA")
    ran = ortho("calibrate", source, "--data", tmp_path / "nowhere.txt", "-o", tmp_path / "s")
    assert ran.code == CheckpointError.exit_code
    assert "merge it first" in ran.err


@pytest.mark.parametrize("flag", ["--model", "--reference-model"])
def test_bench_refuses_an_adapter_beside_the_artifact(
    artifact: Path, tmp_path: Path, ortho: Ortho, flag: str
) -> None:
    source = adapter(tmp_path / "a", peft_type="LORA")
    (tmp_path / "text.txt").write_text("a b c\n")
    ran = ortho("bench", artifact, flag, source, "--data", tmp_path / "text.txt")
    assert ran.code == CheckpointError.exit_code
    assert "merge it first" in ran.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("config", "own"),
    [
        ({"model_type": "phi4mm"}, True),
        ({"model_type": "x", "vision_lora": {"r": 256}}, True),
        ({"model_type": "x", "speech_lora": {"r": 320}}, True),
        ({"model_type": "phi3", "vision_lora": None}, False),
    ],
)
def test_model_with_adapters_of_its_own_is_not_sent_to_peft(
    tmp_path: Path, ortho: Ortho, command: str, config: dict[str, object], own: bool
) -> None:
    source = tmp_path / "m"
    source.mkdir()
    name = "model.layers.0.qkv_proj"
    tensors = {f"{name}.base_layer.weight": torch.ones(64, 64)}
    tensors |= {f"{name}.lora_A.vision.weight": torch.ones(8, 64)}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config))
    said = refused(ortho, command, source)
    assert f"`{name}." in said
    assert ("merge_and_unload" in said) != own
    assert ("adapters of its own" in said) == own
    assert ("revision" in said) == own
