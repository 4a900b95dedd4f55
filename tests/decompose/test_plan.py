from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

from ortho_cli.decompose import plan, recipe
from ortho_cli.decompose.job import KIND
from ortho_cli.decompose.plan import choose_side_files
from ortho_cli.errors import (
    CheckpointError,
    OrthoError,
    OutputExistsError,
    RecipeError,
    ResourceError,
    UsageError,
)
from ortho_cli.formats.quantization_config import patterns as reader_patterns
from ortho_cli.formats.quantization_config import quantization_config
from ortho_cli.storage import job
from ortho_cli.storage.checkpoint import Checkpoint, open_checkpoint


def make(source: Path, *sets: str) -> plan.Plan:
    return plan.make_plan(open_checkpoint(source), recipe.load_recipe(None, sets))


def reasons_of(made: plan.Plan) -> dict[str, str | None]:
    return {tensor["name"]: tensor["reason"] for tensor in made.to_json()["tensors"]}


def bare(folder: Path, **tensors: torch.Tensor) -> Path:
    path = folder / "bare.safetensors"
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
    return path


def refusal(source: Path, *sets: str) -> OrthoError:
    with pytest.raises(OrthoError) as caught:
        make(source, *sets)
    assert caught.value.hint
    return caught.value


def test_default_targets_split_linears_and_say_why_not_the_rest(tmp_path: Path) -> None:
    source = bare(
        tmp_path,
        model__layers__0__mlp__up_proj__weight=torch.ones(8, 64),
        model__layers__0__mlp__narrow__weight=torch.ones(64, 32),
        model__layers__0__mlp__gate__weight=torch.ones(4, 64),
        model__layers__0__mlp__up_proj__bias=torch.ones(8),
        model__embed_tokens__weight=torch.ones(16, 64),
        transformer__wte__weight=torch.ones(16, 64),
        lm_head__weight=torch.ones(16, 64),
        model__norm2d__weight=torch.ones(4, 64),
        conv__weight=torch.ones(4, 64, 3),
        step=torch.tensor(3),
        table__weight=torch.ones(4, 64, dtype=torch.int32),
        odd_name=torch.ones(4, 64),
    )
    assert reasons_of(make(source)) == {
        "model.layers.0.mlp.up_proj.weight": None,
        "model.layers.0.mlp.narrow.weight": "in_features 32 < 64",
        "model.layers.0.mlp.gate.weight": "router",
        "model.layers.0.mlp.up_proj.bias": "1-D",
        "model.embed_tokens.weight": "embedding",
        "transformer.wte.weight": "embedding",
        "lm_head.weight": "output head",
        "model.norm2d.weight": "norm",
        "conv.weight": "3-D",
        "step": "0-D",
        "table.weight": "dtype I32",
        "odd_name": "not named <module>.weight",
    }


def test_plan_every_byte_of_both_files_is_accounted_for(pico: Path) -> None:
    made = make(pico)
    for layout in (made.base, made.ortho):
        position = len(layout.header)
        widths = []
        for region in layout.regions.values():
            assert region.offset == position
            widths.append(region.nbytes // max(1, torch.tensor(region.shape).prod().item()))
            position += region.nbytes
        assert position == layout.size
        assert len(layout.header) % 8 == 0
        assert widths == sorted(widths, reverse=True)
    assert made.bytes_read == sum(t.source.nbytes for t in made.tensors)
    assert [t.k for t in made.split] == [round(0.005 * t.source.numel) for t in made.split]
    json.dumps(made.to_json())


def test_plan_same_input_same_digest_and_workers_do_not_matter(pico: Path) -> None:
    opened = open_checkpoint(pico)
    one = plan.make_plan(opened, recipe.DEFAULT, workers=1)
    two = plan.make_plan(opened, recipe.DEFAULT, workers=2)
    assert one.sha256 == two.sha256
    assert one.base == two.base
    assert one.sha256 != make(pico, "ortho.density=0.01").sha256


@pytest.mark.parametrize(("columns", "expected"), [(128, 128), (192, 64), (576, 64), (96, 32)])
def test_group_size_auto_is_the_largest_that_divides(
    tmp_path: Path, columns: int, expected: int
) -> None:
    assert make(bare(tmp_path, a__weight=torch.ones(4, columns))).group_size == expected


def test_group_size_that_does_not_divide_names_tensor_and_sizes_that_do(tmp_path: Path) -> None:
    source = bare(tmp_path, a__weight=torch.ones(4, 128), b__weight=torch.ones(4, 576))
    error = refusal(source, "base.group_size=128")
    assert error.message == "group_size 128 does not divide in_features 576 of `b.weight`"
    assert error.hint is not None
    assert "`--set base.group_size=64` fits every target (so do 32, 16, 8)" in error.hint
    source = bare(tmp_path, b__weight=torch.ones(4, 100))
    error = refusal(source)
    assert (
        "none of the group sizes 128, 64, 32 divides in_features 100 of `b.weight`" in error.message
    )
    assert error.exit_code == 3


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["targets=[nope.weight]"], "target `nope.weight` matches no tensor"),
        (
            ["targets=['re:.*embed']"],
            "matches `model.embed_tokens.weight`, which cannot be split (embedding)",
        ),
        (["overrides=[{match: '*lm_head*'}]"], "override `*lm_head*` matches no tensor"),
        (["ignore=['*.k_proj.weight']"], "vLLM runs them as one matrix"),
        (["ignore=['*.gate_proj.weight']"], "`model.layers.0.mlp.gate_proj.weight` not (ignored"),
    ],
)
def test_recipe_that_does_not_fit_is_refused(pico: Path, sets: list[str], expected: str) -> None:
    error = refusal(pico, *sets)
    assert isinstance(error, RecipeError)
    assert expected in error.message


def test_ignore_that_matches_nothing_is_fine(pico: Path) -> None:
    assert make(pico, "ignore=[lm_head.weight]").split


def test_overrides_change_density_and_scale_and_the_last_wins(pico: Path) -> None:
    made = make(
        pico,
        "overrides=[{match: '*.v_proj.*', ortho: {density: 0.5}, base: {scale: mse}},"
        " {match: '*.1.self_attn.v_proj.*', ortho: {density: 0.25}}]",
    )
    chosen = {t.name: (t.scale, t.density) for t in made.split}
    assert chosen["model.layers.0.self_attn.v_proj.weight"] == ("mse", 0.5)
    assert chosen["model.layers.1.self_attn.v_proj.weight"] == ("mse", 0.25)
    assert chosen["model.layers.1.self_attn.q_proj.weight"] == ("absmax", 0.005)


def test_bits_of_an_override_make_words_and_the_last_wins(pico: Path) -> None:
    made = make(
        pico,
        "overrides=[{match: '*.mlp.*', base: {bits: 3}}, {match: '*.1.mlp.*', base: {bits: 4}}]",
    )
    found = {t.name: (t.bits, t.base[0].shape) for t in made.split}
    assert found["model.layers.0.mlp.down_proj.weight"] == (3, (64, 18))
    assert found["model.layers.1.mlp.down_proj.weight"] == (4, (64, 24))
    assert found["model.layers.0.self_attn.q_proj.weight"] == (4, (64, 8))
    assert made.base.size < make(pico).base.size
    assert {t.bits for t in make(pico, "base.bits=3").split} == {3}


@pytest.mark.parametrize(("leaf", "other"), [("k_proj", "q_proj"), ("up_proj", "gate_proj")])
def test_siblings_of_different_bits_are_refused_with_both_names(
    pico: Path, leaf: str, other: str
) -> None:
    error = refusal(pico, f"overrides=[{{match: '*.1.*.{leaf}.*', base: {{bits: 3}}}}]")
    assert isinstance(error, RecipeError)
    parent = "model.layers.1." + ("mlp" if "up" in leaf else "self_attn")
    assert f"`{parent}.{leaf}.weight`" in error.message
    assert f"`{parent}.{other}.weight`" in error.message
    assert " 3" in error.message
    assert "4" in error.message
    assert "vLLM runs them as one matrix" in error.message


def test_3_bits_need_columns_in_32s(tmp_path: Path) -> None:
    source = bare(tmp_path, a__weight=torch.ones(4, 64), b__weight=torch.ones(4, 72))
    error = refusal(source, "base={bits: 3, group_size: 8}")
    assert error.message.startswith("bits is 3 for `b.weight`, whose in_features 72 does not")
    kept = "overrides=[{match: b.weight, base: {bits: 4}}]"
    assert [t.bits for t in make(source, "base={bits: 3, group_size: 8}", kept).split] == [3, 4]
    wide = bare(tmp_path, a__weight=torch.ones(4, 576))
    for size in (64, 32, 16, 8):
        made = make(wide, f"base={{bits: 3, group_size: {size}}}")
        assert made.split[0].base[0].shape == (4, 54)


def test_fused_experts_are_an_error_with_their_share_unless_kept(tmp_path: Path) -> None:
    experts = "model__layers__0__mlp__experts__gate_up_proj"
    source = bare(tmp_path, **{experts: torch.ones(2, 64, 64), "a__weight": torch.ones(64, 64)})
    error = refusal(source)
    assert isinstance(error, CheckpointError)
    assert "`model.layers.0.mlp.experts.gate_up_proj` [2, 64, 64]" in error.message
    assert "66.7% of all weights" in error.message
    assert "on_unsupported=keep" in str(error.hint)
    assert isinstance(refusal(source, "targets=[a.weight]"), CheckpointError)
    kept = make(source, "on_unsupported=keep")
    assert reasons_of(kept)[experts.replace("__", ".")] == ("3-D, fused experts")


def gpt2(folder: Path, *, with_config: bool) -> Path:
    tensors = {
        "h.0.attn.c_attn.weight": torch.ones(64, 192),
        "h.0.attn.c_attn.bias": torch.ones(192),
        "h.0.attn.c_proj.weight": torch.ones(64, 64),
        "h.0.attn.c_proj.bias": torch.ones(64),
        "wte.weight": torch.ones(96, 64),
    }
    checkpoints.save(folder, tensors)
    if with_config:
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.mark.parametrize("with_config", [True, False])
def test_gpt2_conv1d_is_refused_by_name_never_split_along_the_wrong_axis(
    tmp_path: Path, with_config: bool
) -> None:
    error = refusal(gpt2(tmp_path / "gpt2", with_config=with_config))
    assert "`h.0.attn.c_attn.weight` [64, 192] and 1 more" in error.message
    assert "stored (in, out)" in error.message
    assert error.exit_code == 4


def test_linear_that_only_shares_a_conv1d_name_is_split(tmp_path: Path) -> None:
    source = bare(
        tmp_path, h__0__c_attn__weight=torch.ones(192, 64), h__0__c_attn__bias=torch.ones(192)
    )
    assert [t.name for t in make(source).split] == ["h.0.c_attn.weight"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtype_that_cannot_be_split_is_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    source = bare(tmp_path, a__weight=torch.ones(64, 64).to(dtype), b__weight=torch.ones(64, 64))
    error = refusal(source)
    assert "`a.weight`" in error.message
    assert re.search("dtype (F64|C64)", error.message)
    assert [t.name for t in make(source, "on_unsupported=keep").split] == ["b.weight"]


def test_nothing_to_split_says_what_there_is(tmp_path: Path) -> None:
    error = refusal(bare(tmp_path, norm__weight=torch.ones(64), embed__weight=torch.ones(8, 64)))
    assert "has nothing to split" in error.message
    assert "1 x embedding" in error.message


def test_quantized_source_is_refused(pico: Path) -> None:
    config = json.loads((pico / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (pico / "config.json").write_text(json.dumps(config))
    assert "quantized already (`quantization_config` says 'gptq')" in refusal(pico).message


def test_artifact_as_source_is_refused(artifact: Path) -> None:
    error = refusal(artifact / "model.safetensors")
    assert "is the base file of an artifact already" in error.message


def test_name_that_splitting_would_write_too_is_refused(tmp_path: Path) -> None:
    source = bare(tmp_path, a__weight=torch.ones(4, 64), a__weight_shape=torch.ones(2))
    assert "`a.weight_shape`, which splitting would write too" in refusal(source).message


def test_untied_head_may_be_targeted_and_a_tied_one_not(pico: Path, tmp_path: Path) -> None:
    head = {"lm_head.weight": torch.ones(96, 64), "a.weight": torch.ones(8, 64)}
    checkpoints.save(tmp_path / "m", head)
    assert len(make(tmp_path / "m", "targets=['*']").split) == 2
    (tmp_path / "m" / "config.json").write_text('{"text_config": {"tie_word_embeddings": true}}')
    reasons = reasons_of(make(tmp_path / "m", "targets=['*']"))
    assert reasons["lm_head.weight"] == "tied to the embedding"


def sparse_index(folder: Path, layers: int) -> None:
    """Headers of a 70B model over sparse files: sizes are real, data are holes."""
    hidden, mlp, kv = 8192, 28672, 1024
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    weight_map: dict[str, str] = {}
    for shard in range(0, layers, 8):
        header: dict[str, Any] = {}
        position = 0
        for layer in range(shard, shard + 8):
            for name, (rows, columns) in shapes.items():
                end = position + 2 * rows * columns
                header[f"model.layers.{layer}.{name}.weight"] = {
                    "dtype": "BF16",
                    "shape": [rows, columns],
                    "data_offsets": [position, end],
                }
                position = end
        text = json.dumps(header).encode()
        file = f"model-{shard // 8 + 1:05d}-of-{layers // 8:05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + position)
        weight_map.update(dict.fromkeys(header, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_plan_70b_of_headers_takes_seconds_and_reads_no_data(tmp_path: Path) -> None:
    sparse_index(tmp_path, 80)
    began = time.perf_counter()
    made = make(tmp_path)
    document = json.dumps(made.to_json())
    assert time.perf_counter() - began < 10
    assert len(made.split) == 560
    assert made.split_weights == 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert 4.2 < made.bits_per_weight < 4.4
    assert made.peak_bytes < 200e6
    assert len(document) > 100_000
    free = os.statvfs(tmp_path)
    if free.f_bavail * free.f_frsize < made.bytes_written:
        with pytest.raises(ResourceError, match="MB free and the artifact takes"):
            target_of(tmp_path / "out").check_space(made.bytes_on_disk)


def target_of(out: Path) -> job.Target:
    return job.Target(path=out, kind=KIND, force=False)


def check(out: Path, source: Checkpoint, *, force: bool) -> None:
    job.check_target(out, KIND, job.files_of(source), force=force)


def test_check_space_small_disk_is_refused_with_both_sizes(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "free_bytes", lambda place: 1_000)
    with pytest.raises(ResourceError, match=r"0\.0 MB free and the artifact takes 0\.\d MB"):
        target_of(tmp_path / "out").check_space(make(pico).bytes_on_disk)


def test_check_output_refuses_what_would_lose_something(pico: Path, artifact: Path) -> None:
    opened = open_checkpoint(pico)
    for out in (pico, pico / "inside"):
        with pytest.raises(UsageError, match="is the source"):
            check(out, opened, force=True)
    file = pico.parent / "file"
    file.write_text("precious")
    with pytest.raises(OutputExistsError, match="is a file"):
        check(file, opened, force=True)
    other = pico.parent / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="is no artifact"):
        check(other, opened, force=True)
    with pytest.raises(OutputExistsError, match="exists"):
        check(artifact, opened, force=False)
    check(artifact, opened, force=True)
    (other / "model.safetensors").write_text("version https://git-lfs")
    with pytest.raises(OutputExistsError, match="is no artifact"):
        check(other, opened, force=True)
    loop = pico.parent / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OutputExistsError, match="leads nowhere"):
        check(loop, opened, force=False)
    with pytest.raises(UsageError, match="is under the file"):
        check(file / "out", opened, force=False)
    with pytest.raises(UsageError, match="is a mount point"):
        check(Path("/proc"), opened, force=False)


def test_check_output_that_holds_the_source_is_refused(pico: Path, artifact: Path) -> None:
    inside = artifact / "model"
    pico.rename(inside)
    for source in (inside, inside / "model.safetensors"):
        with pytest.raises(UsageError, match="holds the source"):
            check(artifact, open_checkpoint(source), force=True)


def test_check_memory_refuses_what_does_not_fit(
    pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(pico)
    plan.check_memory(made)
    huge = dataclasses.replace(made, peak_bytes=1 << 60)
    with pytest.raises(ResourceError, match=r"MB of memory and .* MB are available"):
        plan.check_memory(huge)


def test_check_output_current_folder_is_refused(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match="is the current folder"):
        check(Path(), open_checkpoint(pico), force=False)


def test_source_files_named_like_ours_are_not_copied_onto_them(pico: Path) -> None:
    for name in ("Report.json", "report.json.partial", "report.json", "sub/report.json"):
        (pico / name).parent.mkdir(exist_ok=True)
        (pico / name).write_text("theirs")
    opened = open_checkpoint(pico)
    for glob in ("Report.json", "report.json.partial", "report.json"):
        with pytest.raises(UsageError, match="its name is ours"):
            choose_side_files(opened, copy=[glob])
    side = choose_side_files(opened, copy=["sub/*.json"])
    names = [file.name for file in side.copied]
    assert names == ["tokenizer.json", "additional_chat_templates/tools.jinja", "sub/report.json"]


def matched(patterns: list[str], names: list[str]) -> set[str]:
    """Match as compressed-tensors does."""
    return {
        name
        for name in names
        for pattern in patterns
        if (re.match(pattern[3:], name) if pattern.startswith("re:") else pattern == name)
    }


def test_patterns_fold_layers_and_survive_renamed_prefixes() -> None:
    split = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    found = reader_patterns(split, against=["lm_head", "model.embed_tokens"])
    assert found == [r"re:(.*\.)?layers\.\d+\.mlp\.up_proj$"]
    assert matched(found, ["model.language_model.layers.3.mlp.up_proj"])
    assert not matched(found, ["model.layers.3.mlp.up_proj_2", "lm_head"])


TEXT = [f"language_model.model.layers.{i}.self_attn.q_proj" for i in range(3)]
VISION = [f"vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(2)]
PROJECTOR = ["multi_modal_projector.linear_1"]


@pytest.mark.parametrize(
    ("split", "unsplit"),
    [
        (TEXT, VISION + PROJECTOR),
        (TEXT + PROJECTOR, VISION),
        (VISION, TEXT),
        (TEXT[1:], TEXT[:1]),
        (["a.fc", "head"], ["b.fc"]),
    ],
)
def test_patterns_tell_split_from_unsplit_whatever_readers_put_in_front(
    split: list[str], unsplit: list[str]
) -> None:
    targets = reader_patterns(split, against=unsplit)
    ignore = reader_patterns(unsplit, against=split)
    for prefix in ("", "model."):
        names = {name: prefix + name for name in split + unsplit if "." in name}
        wanted = {names[name] for name in split if name in names}
        assert matched(targets, list(names.values())) == wanted
        assert matched(ignore, list(names.values())) == set(names.values()) - wanted


def test_each_width_has_a_config_group_that_matches_nothing_of_the_others() -> None:
    layers = [f"model.layers.{i}.{m}" for i in range(4) for m in ("mlp.down_proj", "self_attn.o")]
    bits = {name: 3 if name.endswith("2.mlp.down_proj") else 4 for name in layers}
    found = quantization_config(split=bits, unsplit=["lm_head"], group_size=64)
    groups = found["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 3]
    for group in groups.values():
        mine = {name for name in layers if bits[name] == group["weights"]["num_bits"]}
        assert matched(group["targets"], layers) == mine
    assert found["ignore"] == ["lm_head"]
    for width in (3, 4):
        only = quantization_config(split={"a": width}, unsplit=[], group_size=64)["config_groups"]
        assert [group["weights"]["num_bits"] for group in only.values()] == [width]


def test_patterns_renamed_by_transformers_still_tell_the_towers_apart() -> None:
    targets = reader_patterns(TEXT, against=VISION)
    assert matched(targets, ["model.language_model.layers.0.self_attn.q_proj"])
    assert not matched(targets, ["model.vision_tower.encoder.layers.0.self_attn.q_proj"])
