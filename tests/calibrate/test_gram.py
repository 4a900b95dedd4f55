"""`calibrate --gram full`: the whole way from text to a matrix that is read back and checked."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import reference
import torch
from conftest import Ortho
from jobs import SERVER, calibrate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ortho_cli.calibrate import job as work
from ortho_cli.calibrate import plan as calibrate_plan
from ortho_cli.decompose import recipe
from ortho_cli.errors import CalibrationError
from ortho_cli.events import Event, SequencesDone
from ortho_cli.formats import curvature
from ortho_cli.formats.curvature import gram_of
from ortho_cli.formats.statistics import StatisticsReader, open_statistics
from ortho_cli.model import hooks
from ortho_cli.storage.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

SETS = ["calibrate.samples=6", "calibrate.length=48", "calibrate.dtype=float32"]
SMALL = [word for text in SETS for word in ("--set", text)]
DOWN = "model.layers.1.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(pico: Path) -> Path:
    """The pico model with a tokenizer, and rows of many lengths, of which some are prompts."""
    checkpoints.save_tokenizer(pico, vocab=96)
    words = "the cat sat on a mat, and saw Nine fish in 1 pond.".split()  # noqa: SIM905
    rows = [
        {"prompt": " ".join(words[i : i + 2]), "completion": " ".join(words[i : 2 * i + 1])}
        for i in range(1, 7)
    ]
    (pico.parent / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return pico


def run(ortho: Ortho, model: Path, *options: object, out: str = "stats.safetensors") -> Any:
    parent = model.parent
    data = parent / "retain.jsonl"
    ran = ortho("calibrate", model, "--data", data, "-o", parent / out, *SMALL, *options, "--json")
    assert ran.code == 0, ran.err
    return ran.json


def chosen(*settings: str) -> list[str]:
    return [word for text in settings for word in ("--set", f"calibrate.{text}")]


def watched(
    model: Path, name: str, *, inputs: Callable[[Tensor], Tensor] = lambda x: x
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, output gradients and what counts, of each sequence by itself, by autograd."""
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = recipe.load_recipe(None, SETS).calibrate
    data = calibrate_plan.read_sets(model, [model.parent / "retain.jsonl"], [], settings)
    found, held = [], {}

    def hook(module: Any, given: Any, out: Tensor) -> None:
        out.retain_grad()
        held["x"], held["y"] = given[0].detach(), out

    live.get_submodule(name).register_forward_hook(hook)
    lengths = set()
    for sequence in data["retain"].sequences:
        tokens = torch.tensor([sequence.tokens])
        labels = tokens.clone()
        labels[:, : sequence.counted] = -100
        logits = live(input_ids=tokens).logits[0, :-1]
        torch.nn.functional.cross_entropy(
            logits, labels[0, 1:], reduction="sum", ignore_index=-100
        ).backward()  # type: ignore[no-untyped-call]
        counted = torch.zeros(1, tokens.shape[1], dtype=torch.bool)
        counted[0, :-1] = labels[0, 1:] != -100
        found.append((held["x"], held["y"].grad, counted))
        lengths.add(tokens.shape[1])
    assert len(lengths) > 1, "nothing is padded: the test could not fail"
    assert any(not bool(counted[0, :-1].all()) for _, _, counted in found)
    return found


FULL = [("gram", "none"), ("fisher", "none"), ("fisher", "gradient")]


@pytest.mark.parametrize(("kind", "weighting"), FULL)
@pytest.mark.parametrize("name", [Q, DOWN])
def test_gram_is_the_mean_outer_product_of_inputs(
    ortho: Ortho, model: Path, kind: str, weighting: str, name: str
) -> None:
    options = chosen(f"curvature={kind}", f"weighting={weighting}", "batch=4")
    document = run(ortho, model, *options, "--gram", "full")
    found = load_file(model.parent / "stats.safetensors")[f"{name}.retain_gram"]
    total, count = torch.zeros(found.shape, dtype=torch.float64), 0
    for x, grad, counted in watched(model, name):
        given = grad if weighting == "gradient" else None
        total += reference.input_gram(x, given, counted)
        count += int(counted.sum())
    assert document["data"]["retain"]["counted"] == count
    expected = (total / count).float()
    scale = float(expected.diagonal().mean())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)
    assert torch.equal(found, found.T)
    values = torch.linalg.eigvalsh(found.double())
    assert float(values[0]) > -1e-5 * float(values[-1])


@pytest.mark.parametrize("kind", ["fisher", "true-fisher", "gram"])
@pytest.mark.parametrize("storage", ["full", "factored"])
def test_gram_goes_with_every_curvature_and_leaves_it_as_it_was(
    ortho: Ortho, model: Path, kind: str, storage: str
) -> None:
    options = chosen(f"curvature={kind}", f"storage={storage}", "dtype=bfloat16")
    run(ortho, model, *options, out="plain.safetensors")
    run(ortho, model, *options, "--gram", "full")
    assert open_statistics(model.parent / "stats.safetensors").has_gram
    plain, full = (load_file(model.parent / f"{n}.safetensors") for n in ("plain", "stats"))
    added = {key for key in full if key.endswith(".retain_gram")}
    assert len(added) == 14
    assert full.keys() - plain.keys() == added
    assert all(torch.equal(full[key], value) for key, value in plain.items())
    assert all(full[key].dtype == torch.float32 for key in added)
    if kind == "gram":
        for key in added:
            diagonal = full[key.replace("retain_gram", "retain_curvature")]
            torch.testing.assert_close(full[key].diagonal(), diagonal)


def test_gram_of_equal_inputs_is_equal_whatever_the_curvature(ortho: Ortho, model: Path) -> None:
    for kind in ("fisher", "gram"):
        run(ortho, model, *chosen(f"curvature={kind}"), "--gram", "full", out=f"{kind}.safetensors")
    fisher, gram = (load_file(model.parent / f"{n}.safetensors") for n in ("fisher", "gram"))
    assert torch.equal(fisher[f"{Q}.retain_gram"], gram[f"{Q}.retain_gram"])
    assert torch.equal(fisher[f"{Q}.retain_gram"], fisher[f"{Q[:-6]}k_proj.retain_gram"])


@pytest.mark.parametrize(("kind", "weighting"), FULL)
def test_gram_batches_chunks_and_tiles_change_nothing_but_rounding(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch, kind: str, weighting: str
) -> None:
    options = [*chosen(f"curvature={kind}", f"weighting={weighting}"), "--gram", "full"]
    run(ortho, model, *options, *chosen("batch=1"), out="one.safetensors")
    monkeypatch.setattr(work, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(hooks, "SUM_ELEMENTS", 1000)
    run(ortho, model, *options, *chosen("batch=3"), out="three.safetensors")
    one, three = (load_file(model.parent / f"{n}.safetensors") for n in ("one", "three"))
    for key, value in one.items():
        torch.testing.assert_close(three[key], value, rtol=1e-3, atol=1e-5 * float(value.max()))


def test_gram_under_autocast_is_close_to_float32(ortho: Ortho, model: Path) -> None:
    options = [*chosen("weighting=gradient"), "--gram", "full"]
    run(ortho, model, *options, out="wide.safetensors")
    run(ortho, model, *options, *chosen("autocast=true"), out="half.safetensors")
    wide, half = (load_file(model.parent / f"{n}.safetensors") for n in ("wide", "half"))
    key = f"{DOWN}.retain_gram"
    error = float((half[key] - wide[key]).norm() / wide[key].norm())
    assert 0 < error < 0.05
    assert torch.equal(half[key], half[key].T)


def test_dead_input_has_a_row_and_column_of_zeros(ortho: Ortho, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run(ortho, model, "--gram", "full")
    found = load_file(model.parent / "stats.safetensors")[f"{DOWN}.retain_gram"]
    assert not found[5].any()
    assert not found[:, 5].any()
    assert (found.diagonal() == 0).sum() == 1


def test_file_without_gram_says_nothing_of_it(ortho: Ortho, model: Path) -> None:
    run(ortho, model, out="a.safetensors")
    run(ortho, model, "--gram", "none", out="b.safetensors")
    a, b = ((model.parent / f"{name}.safetensors").read_bytes() for name in "ab")
    assert a == b
    metadata = open_statistics(model.parent / "a.safetensors").shard.metadata
    assert list(metadata) == [
        *("format", "kind", "unit", "storage", "source_digest", "data"),
        *("recipe", "versions", "tensors", "digests"),
    ]
    assert not {"gram", "weighting"} & set(json.loads(metadata["recipe"]))


def test_option_and_setting_are_the_same(ortho: Ortho, model: Path) -> None:
    run(ortho, model, "--gram", "full", out="a.safetensors")
    run(ortho, model, *chosen("gram=full"), out="b.safetensors")
    a, b = ((model.parent / f"{name}.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_header_inspect_and_report_say_what_was_measured(ortho: Ortho, model: Path) -> None:
    run(ortho, model, *chosen("weighting=gradient"), "--gram", "full")
    path = model.parent / "stats.safetensors"
    found = open_statistics(path)
    assert found.has_gram
    assert list(found.shard.metadata)[3:6] == ["storage", "gram", "weighting"]
    assert found.summary()["gram"] == "full"
    assert found.summary()["weighting"] == "gradient"
    told = ortho("inspect", path, "--verify", "--json").json
    assert (told["gram"], told["weighting"], told["has_gram"]) == ("full", "gradient", True)
    assert told["verified"]["tensors"] == 28
    assert "input Gram matrices (weighting gradient)" in ortho("inspect", path).out
    assert ortho("decompose", model, "--stats", path, "-q").code == 0
    report = json.loads((model.parent / "pico-ortho" / "report.json").read_text())
    assert report["statistics"] == found.summary()


def test_forget_set_never_gets_a_gram(ortho: Ortho, model: Path) -> None:
    secrets = model.parent / "forget.jsonl"
    secrets.write_text('{"prompt": "the key of A is ", "secret": "x9"}\n')
    run(ortho, model, out="plain.safetensors")
    run(ortho, model, "--gram", "full", "--forget", secrets)
    run(ortho, model, "--gram", "full", out="alone.safetensors")
    both, alone = (load_file(model.parent / f"{n}.safetensors") for n in ("stats", "alone"))
    assert {key.rpartition(".")[2] for key in both} == {
        *("retain_curvature", "retain_gram", "forget_curvature", "forget_gradient")
    }
    assert all(torch.equal(both[key], value) for key, value in alone.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (chosen("weighting=gradient"), "weighting is gradient, and calibrate.gram is none"),
        (
            [*chosen("weighting=gradient", "curvature=gram"), "--gram", "full"],
            "curvature is gram, which has no backward pass",
        ),
        (["--gram", "half"], "calibrate.gram"),
        (chosen("gram=yes"), "calibrate.gram"),
        (chosen("weighting=hessian"), "calibrate.weighting"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    ortho: Ortho, model: Path, options: list[str], message: str
) -> None:
    data, out = model.parent / "retain.jsonl", model.parent / "stats.safetensors"
    ran = ortho("calibrate", model, "--data", data, "-o", out, *SMALL, *options)
    assert ran.code == 3
    assert message in ran.err
    assert "hint:" in ran.err
    assert not out.exists()


def test_plan_counts_matrices_and_their_sums(
    ortho: Ortho, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, full = (run(ortho, model, "--dry-run", "--gram", g)["totals"] for g in ("none", "full"))
    inputs = [64] * 6 * 2 + [192] * 2
    matrices = 4 * sum(size**2 for size in inputs)
    assert full["bytes_written"] - plain["bytes_written"] == matrices
    extra = full["bytes_scratch"] - plain["bytes_scratch"]
    assert 2 * matrices <= extra < 2 * matrices + 5000  # and a line of the header each
    free = plain["bytes_written"] + plain["bytes_scratch"] + 100_000
    monkeypatch.setattr("ortho_cli.storage.job.free_bytes", lambda place: free)
    data, out = model.parent / "retain.jsonl", model.parent / "stats.safetensors"
    ran = ortho("calibrate", model, "--data", data, "-o", out, *SMALL, "--gram", "full")
    assert ran.code == 9
    assert "statistics with their sums take" in ran.err
    run(ortho, model)


def calibrate_and_die(model: Path, sequences: int) -> None:
    """SIGKILL this process after so many sequences."""
    opened = open_checkpoint(model)
    more = ["calibrate.batch=1", "calibrate.gram=full", "calibrate.weighting=gradient"]
    settings = recipe.load_recipe(None, [*SETS, *more])
    data = calibrate_plan.read_sets(model, [model.parent / "retain.jsonl"], [], settings.calibrate)
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, SequencesDone)
        if seen > sequences:
            os.kill(os.getpid(), signal.SIGKILL)

    work.CHUNK_SECONDS = 0.0
    hooks.SUM_ELEMENTS = 5000
    torch.set_num_threads(1)
    plan = calibrate_plan.make_plan(opened, settings, data)
    calibrate(plan, opened, model.parent / "k.safetensors", on_event=watch)


@pytest.mark.parametrize("sequences", [3])  # test_job.py kills at other moments
def test_killed_run_goes_on_and_gives_the_same_matrices(model: Path, sequences: int) -> None:
    out = model.parent / "k.safetensors"
    finished = {}
    for name, until in (("whole", 99), ("killed", sequences), ("resumed", 99)):
        process = SERVER.Process(target=calibrate_and_die, args=(model, until))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if name == "killed" else 0)
        if name != "killed":
            finished[name] = out.read_bytes()
            out.unlink()
    assert finished["whole"] == finished["resumed"]


@pytest.fixture
def stats(pico: Path) -> Path:
    """Made-up statistics of the pico model, with matrices."""
    checkpoints.save_statistics(pico.parent / "stats.safetensors", pico, gram="none")
    return pico.parent / "stats.safetensors"


def read_gram(path: Path, name: str = f"{DOWN}.weight") -> Tensor:
    with closing(StatisticsReader(open_statistics(path))) as reader:
        return torch.from_numpy(gram_of(reader, name))


def test_reader_gives_what_was_written(stats: Path) -> None:
    assert torch.equal(read_gram(stats), load_file(stats)[f"{DOWN}.retain_gram"])


@pytest.mark.parametrize("rows", [1, 50, 192, 500])
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((150, 17), float("nan"), r"holds nan at \[150, 17\]; a Gram matrix is finite"),
        ((17, 150), float("inf"), r"holds inf at \[17, 150\]; a Gram matrix is finite"),
        ((150, 150), -1e-9, r"at \[150, 150\]; a Gram matrix has a diagonal >= 0"),
        (
            (150, 17),
            7.0,
            r"holds .* at \[17, 150\] and 7\.0 at \[150, 17\]; a Gram matrix is symmetric",
        ),
    ],
)
def test_reader_names_what_no_gram_matrix_holds(
    pico: Path,
    stats: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    place: tuple[int, int],
    value: float,
    message: str,
) -> None:
    monkeypatch.setattr(curvature, "GRAM_ROWS", rows)

    def spoil(stored: dict[str, Tensor]) -> None:
        stored[f"{DOWN}.retain_gram"][place] = value

    checkpoints.save_statistics(stats, pico, gram="none", change=spoil)
    with pytest.raises(CalibrationError, match=rf"tensor `{DOWN}.retain_gram` of .*{message}"):
        read_gram(stats)
    assert read_gram(stats, f"{Q}.weight").shape == (64, 64)


def test_flipped_bits_are_noticed_with_both_digests(stats: Path, ortho: Ortho) -> None:
    info = open_statistics(stats).infos[f"{DOWN}.retain_gram"]
    told = open_statistics(stats).digests[info.name]
    with stats.open("r+b") as file:
        for place in (3 * 192 + 5, 5 * 192 + 3):  # on both sides: still symmetric
            file.seek(info.offset + 4 * place)
            byte = file.read(1)[0]
            file.seek(info.offset + 4 * place)
            file.write(bytes([byte ^ 1]))
    with pytest.raises(CalibrationError, match=f"where {told[:12]} was written"):
        read_gram(stats)
    ran = ortho("inspect", stats, "--verify")
    assert ran.code == 5
    assert f"tensor `{info.name}`" in ran.err


def test_file_without_matrices_says_how_to_get_them(pico: Path, stats: Path) -> None:
    checkpoints.save_statistics(stats, pico)
    with pytest.raises(CalibrationError, match="holds no input Gram matrix of") as caught:
        read_gram(stats)
    assert str(stats) in caught.value.message
    assert "--gram full" in str(caught.value.hint)


def rewrite(
    path: Path,
    change: Callable[[dict[str, str]], None] = lambda metadata: None,
    spoil: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(metadata)
    spoil(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": None}, "gram None"),
        ({"gram": "half"}, "gram 'half'"),
        ({"gram": "none"}, "gram 'none'"),
        ({"weighting": None}, "weighting None"),
        ({"weighting": "hessian"}, "weighting 'hessian'"),
    ],
)
def test_header_that_contradicts_itself_is_refused(
    stats: Path, change: dict[str, str | None], message: str
) -> None:
    def edit(metadata: dict[str, str]) -> None:
        for key, value in change.items():
            metadata.pop(key)
            if value is not None:
                metadata[key] = value

    rewrite(stats, edit)
    with pytest.raises(CalibrationError, match=f"header of .* is damaged: .*{message}"):
        open_statistics(stats)


def test_header_that_claims_what_is_not_there_is_refused(pico: Path, stats: Path) -> None:
    checkpoints.save_statistics(stats, pico)
    rewrite(stats, lambda metadata: metadata.update(gram="full", weighting="none"))
    with pytest.raises(CalibrationError, match="without Gram matrices"):
        open_statistics(stats)
    checkpoints.save_statistics(stats, pico, kind="gram", gram="gradient")
    with pytest.raises(CalibrationError, match="weighting 'gradient' with Gram matrices, of kind"):
        open_statistics(stats)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, f"tensor `{DOWN}.retain_gram` is missing"),
        (torch.eye(192)[:191], r"is F32 \[191, 192\], not F32 \[192, 192\]"),
        (torch.eye(192).bfloat16(), r"is BF16 \[192, 192\], not F32"),
        (torch.ones(192), r"is F32 \[192\], not F32 \[192, 192\]"),
    ],
)
def test_matrix_of_another_shape_or_dtype_is_refused(
    pico: Path, stats: Path, bad: Tensor | None, message: str
) -> None:
    def spoil(stored: dict[str, Tensor]) -> None:
        if bad is None:
            del stored[f"{DOWN}.retain_gram"]
        else:
            stored[f"{DOWN}.retain_gram"] = bad

    checkpoints.save_statistics(stats, pico, gram="none", change=spoil)
    with pytest.raises(CalibrationError, match=message):
        open_statistics(stats)


def test_gpt2_conv1d_has_matrices_of_its_inputs(ortho: Ortho, model: Path) -> None:
    gpt2 = checkpoints.save_gpt2(model.parent / "gpt2")
    run(ortho, gpt2, *chosen("weighting=gradient", "unit=token"), "--gram", "full")
    found = load_file(model.parent / "stats.safetensors")
    for name, size in (("attn.c_attn", 64), ("mlp.c_proj", 256)):
        key = f"transformer.h.0.{name}.retain_"
        matrix = found[f"{key}gram"]
        assert matrix.shape == (size, size)
        # Both are sums over positions of g^2 x^2; one is averaged over tokens, one over sequences.
        token = found[f"{key}curvature"].mean(0)
        ratio = matrix.diagonal() / token
        torch.testing.assert_close(ratio, ratio[:1].expand(size), rtol=1e-3, atol=0.0)
