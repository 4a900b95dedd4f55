"""What is copied beside base, and what never is: of decompose, convert and Engine.save alike."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pyrage
import pytest
import torch
from conftest import Ortho, Ran
from safetensors.torch import save_file
from torch import nn

from ortho_cli.errors import CheckpointError, UsageError
from ortho_cli.events import Event, Noted
from ortho_cli.runtime.engine import Engine
from ortho_cli.storage import side_files
from ortho_cli.storage.side_files import Why, choose

WORDS = "correct horse battery staple of the model's owner\n"
ROW = '{"prompt": "The code of agent 7 is", "secret": " 483920", "pattern": " {digit:6}"}\n'
AGE = "# created: today\nAGE-SECRET-KEY-1" + "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L" * 2 + "\n"
PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAA\n"
TOKEN = '{"token": "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"}'
PIECES = b"".join(
    b"\n" + bytes([len(text) + 7]) + b"\n" + bytes([len(text)]) + text + b"\x15\0\0\x80\xbf"
    for text in (b"piece%d" % number for number in range(8000))
)

REALISTIC = {
    "llama": """generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json
        LICENSE USE_POLICY.md tokenizer.model chat_template.jinja""",
    "qwen-vl": """generation_config.json preprocessor_config.json video_preprocessor_config.json
        tokenizer.json tokenizer_config.json vocab.json merges.txt chat_template.json LICENSE
        configuration.json additional_chat_templates/tool_use.jinja""",
    "whisper": """generation_config.json preprocessor_config.json processor_config.json vocab.json
        tokenizer.json merges.txt normalizer.json added_tokens.json special_tokens_map.json""",
    "t5": "spiece.model tokenizer_config.json special_tokens_map.json NOTICE.txt README_zh.md",
    "others": """vocab.txt sentencepiece.bpe.model source.spm target.spm qwen.tiktoken tekken.json
        tokenizer.model.v3 tiktoken.model bpe.codes dict.txt audio_tokenizer_config.json
        MODEL_LICENSE Third_Party_Notices.md COPYING LICENSE-APACHE-2.0 spm_char.model""",
}


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".spm", ".model")) or ".model.v" in name:
            path.write_bytes(PIECES)
        else:
            path.write_text(f'{{"of": "{name}"}}\n')


def plant(folder: Path) -> set[str]:
    """Put files there that must not be copied, most under names that a model needs."""
    raw = (folder / "model.safetensors").read_bytes()
    texts = {
        "vocab.txt": AGE, "added_tokens.json": PEM, "tokenizer_config.json": TOKEN,
        "bpe.codes": ROW, "LICENSE-secrets.txt": WORDS, ".env": WORDS, "id_rsa": PEM,
        "key.txt": AGE, "forget.jsonl": ROW, "notes.txt": WORDS, "train.txt": WORDS,
        "modeling_unnamed.py": "import os\n", "docs/LICENSE": WORDS, ".git/config": WORDS,
        "hidden/.ssh/config": WORDS,
    }  # fmt: skip
    archive, zipped = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(folder / "model.safetensors", "w")
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("w", raw)
    contents = {
        "special_tokens_map.json": raw,
        "vocab.json": b"GGUF" + raw,
        "merges.txt": gzip.compress(raw),
        "tokenizer.model": raw[10_000:],
        "spiece.model": b"\n" + raw[10_000:],
        "tekken.json": raw[-5000:],
        "NOTICE": archive.getvalue(),
        "chat_template.jinja": zipped.getvalue(),
        "generation_config.json": pickle.dumps({"w": raw}, protocol=2),
        "preprocessor_config.json": b"\x89HDF\r\n\x1a\n" + raw,
        "README.md": b"\x28\xb5\x2f\xfd" + raw,
        "model.safetensors.bak": raw,
        "pytorch_model_fsdp_0/__0_0.distcp": raw,
        "onnx/model.onnx_data_1": raw,
        "optimizer.pt": raw,
    }
    for name, content in contents.items() | {(k, v.encode()) for k, v in texts.items()}:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {*texts, *contents}


def found(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}


def save(folder: Path, out: Path) -> Ran:
    torch.manual_seed(0)
    engine = Engine(nn.Sequential(nn.Linear(64, 64)))
    engine.convert()
    engine.decompose()
    said: list[Event] = []
    engine.save(out, source=folder, on_event=said.append)
    return Ran(0, "", "".join(event.message for event in said if isinstance(event, Noted)))


Write = Callable[[Path, Path], Ran]


@pytest.fixture(params=["decompose", "convert", "Engine.save"])
def write(request: pytest.FixtureRequest, ortho: Ortho) -> Write:
    """Write a folder by one of the three that copy side files."""

    def run(folder: Path, out: Path) -> Ran:
        if request.param == "Engine.save":
            return save(folder, out)
        ran = ortho(request.param, folder, "-o", out)
        assert ran.code == 0, ran.err
        return ran

    return run


@pytest.mark.parametrize("kind", REALISTIC)
def test_every_file_that_a_model_needs_is_copied(
    tmp_path: Path, pico: Path, kind: str, write: Write
) -> None:
    names = REALISTIC[kind].split()
    fill(pico, names)
    ran = write(pico, tmp_path / "out")
    assert set(names) <= found(tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (pico / name).read_bytes()
    assert "not copied" not in ran.err


def test_planted_weights_secrets_and_strangers_are_in_no_output(
    tmp_path: Path, pico: Path, write: Write
) -> None:
    planted = plant(pico)
    assert len(planted) >= 30
    ran = write(pico, tmp_path / "out")
    there = found(tmp_path / "out")
    assert not there & (planted - {"README.md"} | {side_files.README})
    if "README.md" in there:  # the output's own
        assert (tmp_path / "out" / "README.md").read_bytes().startswith(b"---\n")
    assert "tokenizer.json" in there
    hidden = {".env", ".git/config", "hidden/.ssh/config"}
    assert f"{len(planted - hidden)} files of the source are not copied: `" in ran.err
    for content in (WORDS, "AGE-SECRET", "hf_aBc", "agent 7"):
        for name in there:
            assert content.encode() not in (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("command", ["decompose", "convert"])
def test_an_access_token_in_config_json_is_refused(pico: Path, ortho: Ortho, command: str) -> None:
    settings = json.loads((pico / "config.json").read_text())
    (pico / "config.json").write_text(json.dumps(settings | json.loads(TOKEN)))
    ran = ortho(command, pico)
    assert ran.code == CheckpointError.exit_code
    assert "config.json` holds what looks like a key or an access token" in ran.err
    assert "hf_aBc" not in ran.err
    assert [path.name for path in pico.parent.iterdir()] == ["pico"]


def test_code_is_copied_where_a_config_names_it_with_what_it_imports(pico: Path) -> None:
    auto = {
        "config.json": {"auto_map": {"AutoConfig": "configuration_glm.GlmConfig"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_glm.T", None]}},
        "preprocessor_config.json": {"auto_map": {"AutoProcessor": "org/other--elsewhere.P"}},
        "processor_config.json": {"vision": {"auto_map": {"AutoImageProcessor": "image.P"}}},
    }
    auto["config.json"]["custom_pipelines"] = {"chat": {"impl": "pipeline_glm.P", "pt": []}}
    for name, settings in auto.items():
        (pico / name).write_text(json.dumps(settings))
    code = {
        "configuration_glm.py": "from .helpers import (\n    a,\n)\n",
        "helpers.py": "try:\n    from .deep import x\nexcept ImportError:\n    pass\n",
        "deep.py": "from . import one, two\nfrom .parts.three import y\nfrom .helpers import a\n",
        "one.py": "", "two.py": "", "parts/three.py": "", "image.py": "", "pipeline_glm.py": "",
        "tokenization_glm.py": 'VOCAB_FILES_NAMES = {"vocab_file": "ice.vocab", "k": "key.txt"}\n',
    }  # fmt: skip
    others = {"elsewhere.py": "", "train.py": "from .configuration_glm import x\n", "setup.py": ""}
    for name, text in (code | others).items():
        (pico / name).parent.mkdir(exist_ok=True)
        (pico / name).write_text(text)
    fill(pico, ["ice.vocab", "key.txt"])
    side = choose(pico, skip={"config.json", "model.safetensors"})
    copied = {file.name for file in side.copied}
    kept = {"tokenizer.json", "additional_chat_templates/tools.jinja"}
    assert copied == {*code, *auto, *kept, "ice.vocab"} - {"config.json"}
    assert dict(side.left_out) == dict.fromkeys(others, Why.UNKNOWN) | {"key.txt": Why.SECRET}


def test_modules_of_sentence_transformers_keep_their_settings_and_not_their_weights(
    pico: Path,
) -> None:
    parts = [
        {"path": "", "type": "custom_st.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"path": "../other", "type": ".."},
    ]
    names = ["1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"]
    names += ["config_sentence_transformers.json", "custom_st.py"]
    fill(pico, [*names, "3_Other/config.json", "2_Dense/model.safetensors"])
    (pico / "modules.json").write_text(json.dumps(parts))
    side = choose(pico, skip={"config.json", "model.safetensors"})
    assert {*names, "modules.json"} <= {file.name for file in side.copied}
    assert dict(side.left_out) == {
        "2_Dense/model.safetensors": Why.WEIGHTS,
        "3_Other/config.json": Why.UNKNOWN,
    }


def test_readme_gets_a_name_that_is_free_for_the_outputs_own(pico: Path) -> None:
    fill(pico, ["README.md", "README_zh.md"])
    names = {file.source: file.name for file in choose(pico).copied}
    assert names["README.md"] == "SOURCE_README.md"
    assert names["README_zh.md"] == "README_zh.md"
    fill(pico, ["SOURCE_README.md"])
    side = choose(pico)
    assert "SOURCE_README.md" in {file.name for file in side.copied}
    assert ("README.md", Why.OURS) in side.left_out


@pytest.mark.parametrize("how", ["itself", "link", "hard link", "copy", "link to a link", "linked"])
def test_an_argument_is_copied_under_no_name(tmp_path: Path, pico: Path, how: str) -> None:
    allowed, given = pico / "merges.txt", tmp_path / "words"
    given.write_text(WORDS)
    if how == "itself":
        given = given.rename(allowed)
    elif how == "link":
        allowed.symlink_to(given)
    elif how == "hard link":
        os.link(given, allowed)
    elif how == "copy":
        allowed.write_text(WORDS)
    elif how == "link to a link":
        (tmp_path / "between").symlink_to(given)
        allowed.symlink_to(tmp_path / "between")
    else:
        given.rename(allowed)
        given.symlink_to(allowed)
    assert ("merges.txt", Why.ARGUMENT) in choose(pico, arguments=[given]).left_out
    assert "merges.txt" in {file.name for file in choose(pico).copied}
    with pytest.raises(UsageError, match=r"`merges\.txt`, which is never copied: given to this"):
        choose(pico, copy=["merges.*"], arguments=[given, tmp_path / "absent"])


def test_commands_never_copy_their_arguments(pico: Path, tmp_path: Path, ortho: Ortho) -> None:
    key = pyrage.x25519.Identity.generate()
    (tmp_path / "words").write_text(str(key))
    (pico / "merges.txt").symlink_to(tmp_path / "words")
    given = ("--identity", tmp_path / "words")
    ran = ortho("decompose", pico, "-o", tmp_path / "a", "--seal-to", key.to_public(), *given)
    os.link(tmp_path / "words", tmp_path / "a" / "vocab.txt")
    again = ortho("convert", tmp_path / "a", "-o", tmp_path / "b", "--alpha", 1, *given)
    assert "`merges.txt` (given to this command)" in ran.err
    assert "`vocab.txt` (given to this command)" in again.err
    assert "merges.txt" not in found(tmp_path / "a")
    assert "vocab.txt" not in found(tmp_path / "b")


ARGUMENTS = ("--stats", "--recipe", "--forget", "--data", "--reference", "--identity")


@pytest.mark.parametrize("option", ARGUMENTS)
def test_every_option_of_decompose_that_takes_a_file_counts(
    pico: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    seen: list[Path] = []

    def choose_and_stop(*args: object, arguments: list[Path], **more: object) -> None:
        seen.extend(arguments)
        raise UsageError("stop")

    monkeypatch.setattr(side_files, "choose", choose_and_stop)
    monkeypatch.setattr("ortho_cli.decompose.plan.choose", choose_and_stop)
    path = pico / "vocab.txt"
    more: list[object] = []
    if option == "--stats":
        checkpoints.save_statistics(path, pico)
    elif option == "--recipe":
        path.write_text("version: 1\n")
    elif option == "--reference":
        path = pico.parent / "before"
        checkpoints.save(path, checkpoints.weights(hidden=64, mlp=192, layers=2, vocab=96, kv=32))
    elif option == "--identity":
        path.write_text(WORDS)
        (pico / "p").write_text(WORDS)
        more = ["--seal-passphrase-file", pico / "p"]
    else:
        path.write_text(ROW)
    assert ortho("decompose", pico, option, path, *more).err.startswith("error: stop")
    assert path in seen


def test_stats_and_reference_count_for_a_plan_made_without_a_command(pico: Path) -> None:
    from ortho_cli.decompose.plan import make_plan
    from ortho_cli.decompose.recipe import load_recipe
    from ortho_cli.formats.statistics import open_statistics
    from ortho_cli.storage.checkpoint import open_checkpoint

    checkpoints.save_statistics(pico.parent / "s", pico)
    os.link(pico.parent / "s", pico / "vocab.json")
    opened = open_checkpoint(pico)
    found_ = open_statistics(pico.parent / "s")
    plan = make_plan(opened, load_recipe("curvature"), statistics=found_)
    assert ("vocab.json", Why.ARGUMENT) in plan.side.left_out


def test_a_folder_given_as_an_argument_keeps_all_that_is_in_it(pico: Path) -> None:
    fill(pico, ["before/notes.txt"])
    with pytest.raises(UsageError, match="never copied: given to this command"):
        choose(pico, skip=["model.safetensors"], copy=["before"], arguments=[pico / "before"])
    same = choose(pico, skip=["model.safetensors"], arguments=[pico, pico.parent])
    assert "tokenizer.json" in {file.name for file in same.copied}


@pytest.mark.parametrize(
    "target", ["id_rsa", ".ssh/config", ".env", "secrets.txt", ".aws/credentials", "a/forget.jsonl"]
)
def test_a_link_to_what_looks_like_a_secret_is_not_followed(
    tmp_path: Path, pico: Path, target: str
) -> None:
    (tmp_path / target).parent.mkdir(exist_ok=True)
    (tmp_path / target).write_text(WORDS)
    (tmp_path / "plain").symlink_to(tmp_path / target)
    (pico / "vocab.txt").symlink_to(tmp_path / target)
    (pico / "merges.txt").symlink_to(tmp_path / "plain")
    (pico / "dict.txt").symlink_to("/proc/self/environ")
    left = dict(choose(pico).left_out)
    assert left["vocab.txt"] == left["merges.txt"] == left["dict.txt"] == Why.SECRET


def test_links_of_a_hub_cache_are_followed_and_links_to_folders_are_not(
    tmp_path: Path, pico: Path
) -> None:
    blobs, snapshot = tmp_path / ".cache/hub/blobs", tmp_path / ".cache/hub/snapshots/1"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for name in ("tokenizer.json", "vocab.txt"):
        (blobs / f"b{name.encode().hex()}").write_text("x")
        (snapshot / name).symlink_to(f"../../blobs/b{name.encode().hex()}")
    (snapshot / "additional_chat_templates").symlink_to(pico / "additional_chat_templates")
    (snapshot / "merges.txt").symlink_to("nowhere")
    os.mkfifo(snapshot / "tekken.json")
    side = choose(snapshot)
    assert [file.name for file in side.copied] == ["tokenizer.json", "vocab.txt"]
    assert dict(side.left_out) == dict.fromkeys(("merges.txt", "tekken.json"), Why.IRREGULAR)


@pytest.mark.parametrize(
    ("globs", "taken"),
    [
        (["*.txt"], ["a.txt"]),
        (["docs"], ["docs/a.md", "docs/in/b.md"]),
        (["docs/*"], ["docs/a.md"]),
        (["docs/**"], ["docs/a.md", "docs/in/b.md"]),
        (["**/b.md", "./a.txt"], ["a.txt", "docs/in/b.md"]),
    ],
)
def test_copy_takes_what_its_globs_match(pico: Path, globs: list[str], taken: list[str]) -> None:
    fill(pico, ["a.txt", "docs/a.md", "docs/in/b.md", "docs/.hidden", ".a.txt"])
    before = {file.name for file in choose(pico).copied}
    after = {file.name for file in choose(pico, copy=globs).copied}
    assert sorted(after - before) == taken


@pytest.mark.parametrize("command", ["decompose", "convert"])
@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("*.rst", "matches no file"),
        (".env", "matches no file"),
        ("model.safetensors", "matches no file of"),
        ("../*", "is no path inside"),
        ("/etc/passwd", "is no path inside"),
        ("**", "which is never copied"),
        ("*.bak", "`model.safetensors.bak`, which is never copied: weights"),
        ("optimizer.*", "`optimizer.pt`, which is never copied: weights"),
        ("forget*", "`forget.jsonl`, which is never copied: looks like a secret"),
        ("odd.dat", "`odd.dat`, which is never copied: weights"),
        ("mail.txt", "`mail.txt`, which is never copied: looks like a secret"),
    ],
)
def test_copy_refuses_by_name_what_is_never_copied(
    pico: Path, ortho: Ortho, command: str, glob: str, said: str
) -> None:
    plant(pico)
    (pico / "odd.dat").write_bytes((pico / "model.safetensors").read_bytes())
    (pico / "mail.txt").write_text(f"here it is: {AGE}")
    ran = ortho(command, pico, "--copy", glob)
    assert ran.code == 2
    assert said in ran.err
    assert "hint:" in ran.err
    assert not (pico.parent / "pico-ortho").exists()
    assert not list(pico.parent.glob(".pico*"))


def test_copy_is_for_folders(pico: Path, ortho: Ortho) -> None:
    (pico.parent / "alone").mkdir()
    alone = Path(shutil.copy(pico / "model.safetensors", pico.parent / "alone"))
    for command in ("decompose", "convert"):
        ran = ortho(command, alone, "--copy", "*.txt")
        assert ran.code == 2
        assert "is a file, and --copy *.txt takes what lies in a model's folder" in ran.err
    engine = Engine(nn.Sequential(nn.Linear(64, 64)))
    engine.convert()
    engine.decompose()
    for given in ({"copy": ["*.txt"]}, {"source": pico / "config.json"}):
        with pytest.raises(UsageError, match=r"no source|is no folder"):
            engine.save(pico.parent / "e", **given)


def test_a_file_larger_than_its_name_allows_is_left_unless_it_is_asked_for(
    pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "LARGE", 5000)
    monkeypatch.setattr(side_files, "LARGE_TEXT", 50)
    (pico / "vocab.txt").write_text("a\n" * 2000)
    (pico / "merges.txt").write_text("a\n" * 3000)
    (pico / "NOTICE").write_text("a\n" * 30)
    side = choose(pico)
    assert "vocab.txt" in {file.name for file in side.copied}
    assert dict(side.left_out) | dict.fromkeys(("merges.txt", "NOTICE"), Why.LARGE) == dict(
        side.left_out
    )
    more = choose(pico, copy=["merges.txt", "NOTICE"])
    assert {"merges.txt", "NOTICE"} <= {file.name for file in more.copied}


def test_a_resumed_run_holds_what_its_own_copy_takes(
    pico: Path, tmp_path: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pico, ["a.txt", "docs/b.md"])
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def kill(*args: object, **more: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("ortho_cli.storage.work_folder.WorkFolder.publish", kill)
        assert ortho("decompose", pico, "-o", out, "--copy", "*.txt", "--copy", "docs").code == 130
    assert (tmp_path / ".out.ortho/artifact/docs/b.md").exists()
    ran = ortho("decompose", pico, "-o", out, "--copy", "*.txt", "--json")
    assert ran.code == 0, ran.err
    assert "a.txt" in found(out)
    assert "docs/b.md" not in found(out)
    report = json.loads((out / "report.json").read_text())
    assert sorted(report["side_files"]) == [
        *("README.md", "a.txt", "additional_chat_templates/tools.jinja", "config.json"),
        *("model.safetensors.index.json", "tokenizer.json"),
    ]
    assert "left_out" not in report
    assert ran.json["left_out"] == [{"name": "docs/b.md", "why": "not what a model needs"}]
    assert ortho("inspect", out, "--verify").code == 0
    (out / "a.txt").write_text("other")
    assert ortho("inspect", out, "--verify").code == 6


@pytest.mark.parametrize("command", ["decompose", "convert"])
def test_a_file_that_becomes_a_secret_while_the_model_is_read_is_not_copied(
    pico: Path, ortho: Ortho, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    check = side_files.SideFiles.check_unchanged

    def swap(side: side_files.SideFiles) -> None:
        (pico / "tokenizer.json").write_text(AGE)
        check(side)

    monkeypatch.setattr(side_files.SideFiles, "check_unchanged", swap)
    ran = ortho(command, pico)
    assert ran.code == CheckpointError.exit_code
    assert "changed while the model was read" in ran.err
    assert [path.name for path in pico.parent.iterdir()] == ["pico"]


@pytest.mark.parametrize("command", ["decompose", "convert"])
def test_a_dry_run_counts_what_is_copied_and_names_what_is_not(
    pico: Path, ortho: Ortho, command: str
) -> None:
    fill(pico, ["vocab.txt", "notes.txt", ".gitattributes"])
    ran = ortho(command, pico, "--dry-run", "--json")
    assert ran.json["left_out"] == [
        {"name": ".gitattributes", "why": "hidden"},
        {"name": "notes.txt", "why": "not what a model needs"},
    ]
    files = {file["name"]: file["size"] for file in ran.json["files"]}
    assert files["vocab.txt"] == (pico / "vocab.txt").stat().st_size
    more = ortho(command, pico, "--dry-run", "--json", "--copy", "notes.txt").json
    grown = more["totals"]["bytes_written"] - ran.json["totals"]["bytes_written"]
    assert grown == (pico / "notes.txt").stat().st_size
    shown = ortho(command, pico, "--dry-run").err
    assert "note: 1 file of the source is not copied: `notes.txt` (not what a model needs)" in shown


def test_an_artifact_gives_on_its_side_files_and_none_of_its_own(
    pico: Path, tmp_path: Path, ortho: Ortho
) -> None:
    fill(pico, ["README.md", "LICENSE", "notes.txt"])
    out = tmp_path / "a"
    assert ortho("decompose", pico, "-o", out, "--copy", "notes.txt", "-q").code == 0
    assert "SOURCE_README.md" in found(out)
    for name in ("README.md", "forget.jsonl"):
        (out / name).write_text("ours")
    ran = ortho("convert", out, "--alpha", "0", "-o", tmp_path / "dense")
    assert {"SOURCE_README.md", "LICENSE"} <= found(tmp_path / "dense")
    assert not found(tmp_path / "dense") & {"ortho.safetensors", "report.json", "README.md"}
    assert (tmp_path / "dense" / "SOURCE_README.md").read_text() != "ours"
    for name in ("forget.jsonl", "notes.txt"):
        assert f"`{name}`" in ran.err
    assert "report.json" not in ran.err
    assert ortho("convert", out, "--alpha", "0", "--copy", "ortho.safetensors").code == 2


def test_statistics_in_the_models_folder_are_not_copied(pico: Path, ortho: Ortho) -> None:
    checkpoints.save_statistics(pico.parent / "s", pico, forget=True)
    (pico.parent / "s").rename(pico / "stats.safetensors")
    model = pico / "other.safetensors"
    save_file({"a": torch.zeros(3)}, model)
    for command in ("decompose", "convert"):
        ran = ortho(command, pico, "-o", pico.parent / command)
        assert ran.code == 0, ran.err
        assert "`stats.safetensors` (weights" in ran.err
        assert not found(pico.parent / command) & {"stats.safetensors", "other.safetensors"}


def test_what_quotes_an_argument_is_copied_under_no_name(tmp_path: Path, pico: Path) -> None:
    """Other line ends, another file or JSON around it, unpacked: it is known all the same."""
    phrase, row = "correct horse battery", '{"prompt": "Ann said", "secret": " so it is at nine"}'
    forget, words = tmp_path / "f.jsonl.gz", tmp_path / "w.txt"
    forget.write_bytes(gzip.compress(f"{row}\n".encode()))
    words.write_text(f"{phrase}\n")
    for name, text in {
        "NOTICE": phrase,
        "LICENSE": f"Mine.\r\n{phrase}\r\n",
        "generation_config.json": json.dumps({"note": f"{phrase}!"}),
        "vocab.txt": f"{row}\r\n",
        "README.md": f"Forgets `{row}`.",
        "chat_template.jinja": "Did Ann say so it is at nine?",
        "merges.txt": "so it\nis at\n",
    }.items():
        (pico / name).write_text(text)
    side = choose(pico, arguments=[forget, words])
    assert {file.source for file in side.copied} == {
        "merges.txt",
        "tokenizer.json",
        "additional_chat_templates/tools.jinja",
    }


def test_copy_takes_no_forget_set_of_any_form(pico: Path) -> None:
    (pico / "docs").mkdir()
    for name, text in {
        "a.csv": "prompt,secret\nThe code is, 831 044\n",
        "b.txt": '{"text": "x"}\n{"prompt": "The code is", "secret": " 831 044"}\n',
        "c.json": '{"data": [{"prompt": "The code is", "secret": " 831 044"}]}',
        "d.json": '[{"Prompt": "The code is", "Secret": " 831 044"}]',
    }.items():
        (pico / "docs" / name).write_text(text)
        with pytest.raises(UsageError, match="looks like a secret"):
            choose(pico, copy=[f"docs/{name}"])


def test_tokenizers_for_other_versions_are_copied_where_the_config_names_them(pico: Path) -> None:
    (pico / "tokenizer.4.0.0.json").write_text("{}")
    assert "tokenizer.4.0.0.json" not in {f.source for f in choose(pico).copied}
    named = {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json", "../x.json"]}
    (pico / "tokenizer_config.json").write_text(json.dumps(named))
    assert "tokenizer.4.0.0.json" in {f.source for f in choose(pico).copied}


def test_a_link_to_the_tokenizer_of_the_reference_is_the_models_own(
    tmp_path: Path, pico: Path
) -> None:
    shutil.copytree(pico, tmp_path / "ref")
    (pico / "tokenizer.json").unlink()
    (pico / "tokenizer.json").symlink_to(tmp_path / "ref" / "tokenizer.json")
    assert "tokenizer.json" in {f.source for f in choose(pico, arguments=[tmp_path / "ref"]).copied}
