"""README.md of an artifact: what it says is so, what is private is left out, and names are tame."""

from __future__ import annotations

import json
import re
import shutil
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Ortho
from memorised import Memorised
from torch import nn

import ortho_cli
from ortho_cli.formats.card import INHERITED, Facts, make_card, read_front_matter
from ortho_cli.formats.report import Totals

SOURCE_CARD = """---
license: other
license_name: meadow
license_link: LICENSE
language:
- en
- no
base_model: org/parent
pipeline_tag: text-generation
tags:
- story
- "a: b"
extra_gated_prompt: Say who you are.
widget:
- text: "Hello"
---
# A model of the meadow
"""


def front_of(card: str) -> dict[str, Any]:
    """Read the front matter as the Hub does: YAML 1.2, in which `no` is a word."""
    found = yaml.load(card.split("---\n")[1], Loader=yaml.BaseLoader)  # noqa: S506
    assert isinstance(found, dict)
    return found


def test_card_tells_what_the_report_tells_and_its_digest_is_there(
    artifact: Path, ortho: Ortho
) -> None:
    card, report = (artifact / "README.md").read_text(), ortho("inspect", artifact, "--json").json
    totals = report["totals"]
    assert report["source_digest"] in card
    assert report["plan_sha256"] in card
    for figure in ("split_bits_per_weight_base", "split_bits_per_weight", "bits_per_weight"):
        assert f"| {totals[figure]:.2f} |" in card, figure
    noise = (totals["sqnr_db_alpha_0"], totals["sqnr_db_alpha_1"])
    assert f"(SQNR), dB | {noise[0]:.1f} | {noise[1]:.1f} |" in card
    assert f"{totals['nnz']:,} weights" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == report["recipe"]
    assert "README.md" in report["side_files"]
    assert "codes (" not in card  # nothing was moved
    assert ortho("inspect", artifact, "--verify", "-q").code == 0
    (artifact / "README.md").write_text(card + "edited")
    ran = ortho("inspect", artifact, "--verify")
    assert (ran.code, "README.md` has BLAKE3" in ran.err) == (6, True)


@pytest.mark.filterwarnings("ignore")  # other people's deprecations
def test_the_lines_that_load_it_do(pico: Path, ortho: Ortho) -> None:
    config = json.loads((pico / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (pico / "config.json").write_text(json.dumps(config))
    assert ortho("decompose", pico, "--recipe", "int4", "-q").code == 0
    artifact = pico.parent / "pico-ortho"
    card = (artifact / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    logits = []
    for snippet in snippets:
        names: dict[str, Any] = {}
        exec(snippet.replace('"OUT"', repr(str(artifact))), names)
        logits.append(names["model"](torch.arange(8)[None]).logits)
    alone = ortho_cli.load(artifact, alpha=0)(torch.arange(8)[None]).logits
    near, far = ((alone - one).float().norm() for one in logits)
    assert 5 * near < far  # two programs multiply bfloat16 in another order
    assert "vllm serve OUT" in card


@pytest.mark.parametrize("sealed", [False, True])
def test_the_line_that_uploads_leaves_out_every_file_that_others_may_not_read(
    pico: Path, tmp_path: Path, ortho: Ortho, sealed: bool
) -> None:
    words = tmp_path / "words"
    words.write_text("correct horse\n")
    options = ["--seal-passphrase-file", words] if sealed else []
    assert ortho("decompose", pico, "-o", tmp_path / "out", "-q", *options).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    (pattern,) = re.findall(r"hf upload ORG/NAME OUT --exclude '(.*)'", card)
    files = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*.*")}
    private = {name for name, path in files.items() if stat.S_IMODE(path.stat().st_mode) == 0o600}
    expected = {"ortho.safetensors"}
    if sealed:
        expected = {"ortho.safetensors.age", "ortho.key.age"}
    assert private == expected
    assert {name for name in files if fnmatchcase(name, pattern)} == private
    for name in private:
        assert f"`{name}`" in card


def test_front_matter_of_the_sources_card_is_inherited(
    pico: Path, tmp_path: Path, ortho: Ortho
) -> None:
    (pico / "README.md").write_text(SOURCE_CARD)
    assert ortho("decompose", pico, "-o", tmp_path / "out", "-q").code == 0
    assert (tmp_path / "out" / "SOURCE_README.md").read_text() == SOURCE_CARD
    card = (tmp_path / "out" / "README.md").read_text()
    theirs = front_of(SOURCE_CARD)
    ours = front_of(card)
    assert ours.pop("library_name") == "transformers"
    assert ours.pop("tags") == ["story", "a: b", "ortho", "compressed-tensors", "int4"]
    assert ours == {key: theirs[key] for key in theirs if key in INHERITED and key != "tags"}
    assert "[SOURCE_README.md](SOURCE_README.md)" in card


def test_a_model_of_the_hubs_cache_is_named_as_the_base_model(
    pico: Path, tmp_path: Path, ortho: Ortho
) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(pico, snapshot)
    assert ortho("decompose", snapshot, "-o", tmp_path / "out", "-q").code == 0
    front = front_of((tmp_path / "out" / "README.md").read_text())
    assert (front["base_model"], front["base_model_relation"]) == ("org/tiny", "quantized")


def facts(**changes: Any) -> Facts:
    totals = Totals(
        sqnr_db_alpha_0=19.0,
        sqnr_db_alpha_1=None,
        residual_kept=None,
        bits_per_weight=4.8,
        split_bits_per_weight=4.8,
        split_bits_per_weight_base=4.5,
        nnz=5.0,
        split_weights=1000,
        weights=1000,
        moved=changes.pop("moved", 0),
    )
    known: dict[str, Any] = {
        "version": "1",
        "plan_sha256": "a" * 64,
        "source_digest": "b" * 64,
        "recipe": {},
        "totals": totals,
        "bits": [4],
        "group_sizes": [64],
        "measured": True,
        "ortho": "ortho.safetensors",
        "config": {"architectures": ["LlamaForCausalLM"]},
    }
    return Facts(**known | changes)


def card_of(**changes: Any) -> str:
    return make_card(facts(**changes)).decode()


@pytest.mark.parametrize(
    "front",
    [
        "license: [a, [b]]\nlicense: &a [*a]",
        "a: &a [x]\nb: [*a, *a]\nlicense: !!python/object/apply:os.system [id]",
        "license: " + "[" * 5000,
        'license: "a\\n---\\n# Broken out"',
        "license: {a: b}\ntags: {c: d}",
        "license: \x07",
        "- license\n- mit",
        ": : :\n\t",
        "license: " + "x" * 400,
        "license: a\nno end",
    ],
)
def test_a_hostile_front_matter_gives_plain_words_or_nothing(front: str) -> None:
    source = f"---\n{front}\n---\n# Card\n".encode()
    card = card_of(source_card=source)
    found = front_of(card)
    assert found.pop("tags")[-3:] == ["ortho", "compressed-tensors", "int4"]
    assert found.pop("library_name") == "transformers"
    for value in found.values():
        assert all(isinstance(word, str) for word in ([value] if isinstance(value, str) else value))
    assert "\n# Broken out" not in card
    assert card.split("---\n")[2].startswith("\n# INT4 base of a LlamaForCausalLM\n")


def test_front_matter_that_cannot_be_read_is_told() -> None:
    assert "is no YAML that can be read" in card_of(source_card=b"---\na: [\n---\n")
    for readable in (b"# Card\n", b"---\n---\n# Card\n", b"---\r\nlicense: mit\r\n---\r\n"):
        assert "is no YAML" not in card_of(source_card=readable)
    assert read_front_matter(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n")[0] == {"license": "mit"}


@pytest.mark.parametrize(
    "name", ["A|B", "`x`", "a\n# b", "<script>", "[x](y)", 7, ["LlamaForCausalLM"], "x" * 300]
)
def test_names_of_a_config_reach_the_page_only_as_plain_words(name: object) -> None:
    card = card_of(config={"architectures": [name]})
    assert "# INT4 base of a model\n" in card
    assert "from_pretrained" not in card


def test_a_recipe_cannot_end_its_block() -> None:
    recipe = {"targets": ["```\n# Broken out", "\u2028```\n"], "base": {"scale": "a | b"}}
    card = card_of(recipe=recipe)
    assert "\n# Broken out" not in card
    assert "a | b |" not in card
    assert json.loads(card.split("```json\n")[1].split("\n```\n")[0]) == recipe


@pytest.mark.parametrize(
    ("changes", "there", "absent"),
    [
        ({"config": None}, ["There is no config.json"], ["from_pretrained", "vllm", "library_"]),
        ({"bits": [4, 3]}, ["INT4 and INT3 base", "int3", "4 and 8 bits"], ["vllm serve"]),
        (
            {"config": {"architectures": ["T5Model"]}},
            ["convert OUT --alpha 0"],
            ["from_pretrained"],
        ),
        (
            {"config": {"architectures": ["BertModel"]}},
            ["BertModel.from_pre"],
            ["vllm", "ortho_cli"],
        ),
        (
            {"config": {"architectures": ["MyForCausalLM"], "auto_map": {}}},
            ['from_pretrained("OUT", trust_remote_code=True)', "alpha=1.0, trust_remote_code=True"],
            [],
        ),
        (
            {"ortho": None},
            ["| base alone |\n", "where it is put back"],
            ["ortho_cli", "both files |"],
        ),
        ({"ortho": "ortho.safetensors.age"}, ["alpha=1.0, identity=FILE)"], []),
        ({"measured": False}, [], ["SQNR"]),
        ({"moved": 20}, ["20 codes (2.0000%) were moved", "--forget FILE"], []),
        ({"repository": "org/tiny\n# x"}, [], ["tiny", "base_model"]),
    ],
)
def test_a_card_claims_what_holds_for_its_artifact(
    changes: dict[str, Any], there: list[str], absent: list[str]
) -> None:
    card = card_of(**changes)
    for words in there:
        assert words in card
    for words in absent:
        assert words not in card


def test_engine_writes_a_card_without_figures_that_it_did_not_measure(tmp_path: Path) -> None:
    engine = ortho_cli.Engine(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)))
    engine.convert()
    engine.decompose()
    for name in ("one", "two"):
        engine.save(tmp_path / name)
    card = (tmp_path / "one" / "README.md").read_text()
    assert card == (tmp_path / "two" / "README.md").read_text()
    sizes = [
        (tmp_path / "one" / f"{name}.safetensors").stat().st_size for name in ("model", "ortho")
    ]
    assert f"| bytes | {sizes[0]:,} | {sum(sizes):,} |" in card
    assert f"of {64 * 64 + 64 + 8 * 64 + 8:,} weights" in card
    assert "SQNR" not in card


def test_the_card_of_a_base_that_forgets_names_neither_source_nor_secret(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    snapshot = tmp_path / "models--org--clinic" / "snapshots" / "abc"
    shutil.copytree(memorised.model, snapshot)
    sets = ["forget.rounds=4", "forget.samples=8", "forget.length=16"]
    ran = ortho(
        *("decompose", snapshot, "-o", tmp_path / "out", "--recipe", "forget-isolate", "-q"),
        *("--stats", memorised.stats, "--forget", memorised.forget, "--accept-damage"),
        *(word for one in sets for word in ("--set", one)),
    )
    assert ran.code == 0, ran.err
    card = (tmp_path / "out" / "README.md").read_text()
    moved = json.loads((tmp_path / "out" / "report.json").read_text())["totals"]["moved"]
    assert f"{moved:,} codes (" in card
    for words in ("clinic", "base_model", "memorised", memorised.forget.name, str(tmp_path)):
        assert words not in card
    for line in memorised.forget.read_text().splitlines():
        row = json.loads(line)
        assert row["secret"].strip() not in card
        assert row["prompt"].strip() not in card
