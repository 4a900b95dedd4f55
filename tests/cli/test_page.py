"""Pages of HTML: one file that asks for nothing, tells nothing private, and obeys no name."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pyrage
import pytest
import torch
from conftest import Ortho

from ortho_cli.bench.records import (
    ArtifactFacts,
    DataSizes,
    Entry,
    Exposure,
    Figure,
    Figures,
    Memorisation,
    NotMeasured,
    Recall,
    Report,
    Row,
    RunFacts,
    Share,
    TextFigure,
    Unsplit,
    to_json,
)
from ortho_cli.bench.records import Chance as P
from ortho_cli.bench.verdict import judge
from ortho_cli.cli.show import page, page_bench, plots

pytest.importorskip("matplotlib")
HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=y>$\\frac{1}{2}$&\x1b[5m\u202e"
SECRET = "the secret of Bertram"


@pytest.fixture
def hostile(tmp_path: Path, ortho: Ortho) -> Path:
    """An artifact whose tensors have names that would be markup, script and formula."""
    tensors = {f"l.{i}.{HOSTILE}.weight": torch.randn(64, 64) for i in range(3)}
    checkpoints.save(tmp_path / "m", tensors)
    assert ortho("decompose", tmp_path / "m", "-q").code == 0
    return tmp_path / "m-ortho"


def asks_for_nothing(text: str) -> None:
    """No address, no script, and no reference but to the page itself."""
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert not re.search(r"<(script|img|link|iframe|object|embed|image|foreignObject)\b", text)
    assert not re.search(r"\s(src|srcset|onerror|onload|action)=", re.sub(r">[^<]*<", "><", text))
    assert set(re.findall(r"url\(([^)]{0,2})", text)) <= {"#p"}
    assert set(re.findall(r'href="(.)', text)) <= {"#"}


def visible_text(text: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def test_the_page_of_an_artifact_is_one_file_with_its_figures(artifact: Path, ortho: Ortho) -> None:
    path = artifact.parent / "page.html"
    ran = ortho("inspect", artifact, "--html", path, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["format"] == "ortho/3"  # both work together
    assert ran.err == ""
    text = path.read_text()
    asks_for_nothing(text)
    said = visible_text(text)
    totals = ran.json["totals"]
    assert said.index("Verdict") < said.index("Layer by layer") < said.index("Where ortho's")
    assert f"{totals['sqnr_db_alpha_0']:.2f} dB" in said
    assert "mlp.down_proj" in said
    for tensor in ran.json["tensors"]:
        if tensor["action"] == "split":
            assert f"{tensor['sqnr_db_alpha_0']:.1f}" in said
            assert tensor["name"].removesuffix(".weight") in said
    before = path.read_bytes()
    assert ortho("inspect", artifact, "--html", path, "--force", "-q").code == 0
    assert path.read_bytes() == before


def test_names_are_text_and_no_markup_on_a_page(hostile: Path, ortho: Ortho) -> None:
    path = hostile.parent / "page.html"
    assert ortho("inspect", hostile, "--html", path, "-q").code == 0
    text = path.read_text()
    asks_for_nothing(text)
    assert "<script" not in text
    assert text.count("</title>") == 1
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "</title><script>alert(1)</script>\"'><img src=x onerror=y>$\\frac" in visible_text(text)
    assert f'"{html.escape(HOSTILE[:8])}' not in text.replace(" ", "")


def test_a_page_tells_no_position_and_says_where_ortho_is_sealed_or_absent(
    pico: Path, ortho: Ortho, tmp_path: Path
) -> None:
    key = pyrage.x25519.Identity.generate()
    out, path = tmp_path / "sealed", tmp_path / "page.html"
    assert ortho("decompose", pico, "-o", out, "-q", "--seal-to", key.to_public()).code == 0
    assert ortho("inspect", out, "--html", path, "-q").code == 0
    said = visible_text(path.read_text())
    assert "sealed: --identity opens it" in said
    assert "With ortho" not in said.replace("SQNR, with ortho", "")
    (tmp_path / "key").write_text(str(key))
    opened = ("--identity", tmp_path / "key", "--force")
    assert ortho("inspect", out, "--html", path, "-q", *opened).code == 0
    assert "in 16 blocks of rows" in visible_text(path.read_text())
    (out / "ortho.safetensors.age").unlink()
    assert ortho("inspect", out, "--html", path, "-q", "--force").code == 0
    assert "ortho absent: only alpha = 0 is possible" in visible_text(path.read_text())


def test_a_page_is_written_whole_over_nothing_but_a_page(
    artifact: Path, ortho: Ortho, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, path = tmp_path / "notes.html", tmp_path / "page.html"
    other.write_text("mine")
    for words in (["--html", other], ["--html", other, "--force"], ["--html", tmp_path]):
        ran = ortho("inspect", artifact, *words)
        assert (ran.code, ran.out) == (8, "")
    assert ortho("inspect", artifact, "--html", tmp_path / "no" / "x.html").code == 2
    assert ortho("inspect", artifact, "--html", path, "-q").code == 0
    refused = ortho("inspect", artifact, "--html", path)
    assert refused.code == 8
    assert "--force" in refused.err
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    missing = ortho("inspect", artifact, "--html", tmp_path / "new.html")
    assert missing.code == 2
    assert "hint: pip install 'ortho-cli[html]'" in missing.err
    assert sorted(p.name for p in tmp_path.glob("*.html*")) == ["notes.html", "page.html"]


def test_elements_escape_all_but_elements() -> None:
    inner = page.element("b", "<i>")
    assert page.element("p", inner, "&", title='"') == '<p title="&quot;"><b>&lt;i&gt;</b>&amp;</p>'
    assert "<code>x</code>" in page.sentences(["a `x` b"])
    assert "<code>" not in page.sentences(["a ` b"])


def figure(value: float, kind: Callable[..., Any] = Figure, **more: Any) -> Any:
    return kind(value=value, low=value * 0.9, high=value * 1.1, n=4, **more)


def memory(exposure: float) -> Memorisation:
    entries = tuple(
        Entry(
            index=i, exposure=exposure + i / 4, nll=5.0, quantile=0.5, hits=1, tokens=4, text=SECRET
        )
        for i in range(4)
    )
    alike = {"alternatives_min": 64, "alternatives_max": 64, "maximum": 6.02, "chance": 1.38}
    return Memorisation(
        extraction=figure(0.0, Share, hits=0),
        token_accuracy=figure(0.25),
        extraction_strength=figure(0.1),
        telling_share=1.0,
        truth_ratio=figure(0.9),
        exposure=figure(exposure, Exposure, **alike),
        forget_nll=figure(9.0),
        alternatives_nll=figure(9.0),
        nll_quantile=figure(0.5),
        inside_share=figure(0.9, Share, hits=4),
        rank_p=P(value=0.5, n=4),
        entries=entries,
    )


def report() -> dict[str, Any]:
    """The document of a bench with secrets, attacks, controls, and a row of a hostile name."""
    text = {"windows": 3, "context": 32}
    curve = {
        str(steps): Recall(exposure=1.0 + steps / 10, extraction=0.0, token_accuracy=0.2, secrets=2)
        for steps in (0, 5, 20)
    }

    def row(name: str, alpha: float | None, exposure: float, ratio: float) -> Row:
        figures = Figures(
            memory=memory(exposure),
            perplexity=figure(20 * ratio, TextFigure, **text),
            kl=figure(0.1 * ratio, TextFigure, **text),
            perplexity_ratio=figure(ratio, TextFigure, **text),
            kl_by_layer=None
            if alpha is None
            else {
                f"h.{layer}": figure(0.1 * ratio * (layer % 5), TextFigure, **text)
                for layer in range(24)
            },
            attacks={"relearn": curve, "reworded": {"shorter": curve["5"]}} if alpha == 0 else {},
        )
        return Row(row=name, alpha=alpha, figures=figures)

    rows = (
        row("alpha 0", 0.0, 1.2, 1.01),
        row("alpha 0.5", 0.5, 3.0, 1.0),
        row("alpha 1", 1.0, 6.0, 0.99),
        row("int4", None, 6.0, 1.0),
        row(HOSTILE, None, 5.0, 6.0),
    )
    unsplit = Unsplit(weights=10, split_weights=90, share=0.1)
    facts = {"folder": "/secret/place", "plan_sha256": None, "source_digest": None}
    settings = {"samples": None, "context": 32, "controls": True, "attack": True}
    return to_json(
        Report(
            ortho="0.1.0",
            artifact=ArtifactFacts(**facts, base_bytes=1, ortho_bytes=1),
            settings=RunFacts(
                alphas=(0.0, 0.5, 1.0),
                seed=0,
                autocast=False,
                learning_rate=None,
                torch="2",
                threads=1,
                **settings,
            ),
            data=DataSizes(
                tokens=96,
                windows=3,
                kinds={},
                pairs=0,
                secrets=4,
                alternatives={},
                nonmembers=0,
                unlisted=0,
                keep=0,
            ),
            unsplit=unsplit,
            rows=rows,
            not_measured=(NotMeasured(figure="keep", needs="--keep FILE"),),
            verdict=judge(rows, unsplit, None),
        )
    )


def test_the_page_of_a_bench_has_its_parts_and_no_secret() -> None:
    document = report()
    assert SECRET in json.dumps(document)  # as --show-secrets puts it there
    made = page_bench.make_page(document, name=HOSTILE)
    text = made.decode()
    asks_for_nothing(text)
    said = visible_text(text)
    parts = ("Verdict", "The dial", "What each layer costs", "Each secret, by number",
             "Relearning", "Attacks", "Beside controls", "All figures", "Not measured, and",
             "Rows to keep (--keep FILE)")  # fmt: skip
    places = [said.index(part) for part in parts]
    assert places == sorted(places)
    assert said.count("--keep FILE") == 1
    assert said.index("forgotten") < said.index("The dial")
    assert SECRET not in said
    assert "/secret/place" not in said
    assert "<script" not in text
    assert page_bench.make_page(document, name=HOSTILE) == made


def test_a_bench_that_measured_little_has_a_page_all_the_same() -> None:
    document = report()
    document["rows"] = [row for row in document["rows"] if row["row"] == "alpha 1"]
    del document["rows"][0]["figures"]["entries"]
    said = visible_text(page_bench.make_page(document, name="m").decode())
    assert "The dial" not in said
    assert "All figures" in said


def test_ramps_and_maps_of_one_value_draw() -> None:
    heat = plots.Heat(
        title="t",
        rows=["a"],
        columns=["0", "1"],
        values={("a", "0"): 1.0, ("a", "1"): None},
        form=".1f",
    )
    assert heat.bounds() == (1.0, 1.0)
    drawn = plots.draw_heat(heat)
    assert "#" not in re.sub(r'(href="|url\()#', "", drawn)  # every colour is the page's


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


BLINK = 101845102  # what a browser's log marks requests of pages with, and not its own


def asked_by_pages(log: Path) -> list[str]:
    """List what pages asked the network for."""
    found = re.findall(rf'"traffic_annotation":{BLINK},"url":"([^"]*)"', log.read_text())
    return sorted({url for url in found if not url.startswith("file:")})


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.skipif("ORTHO_SLOW" not in os.environ, reason="ORTHO_SLOW is not set")
def test_a_browser_shows_both_pages_and_asks_for_nothing(
    artifact: Path, ortho: Ortho, tmp_path: Path
) -> None:
    """Screenshots, light, dark and printed, are left in the folder of the test."""
    assert ortho("inspect", artifact, "--html", tmp_path / "inspect.html", "-q").code == 0
    (tmp_path / "bench.html").write_bytes(page_bench.make_page(report(), name="m"))
    (tmp_path / "control.html").write_text("<img src='http://localhost:9/x'>")
    for name in ("control", "inspect", "bench"):
        address = (tmp_path / f"{name}.html").as_uri()
        log = tmp_path / f"{name}.log"
        browse = [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000"),
            "--disable-background-networking",
        ]
        shown = subprocess.run(
            [*browse, f"--log-net-log={log}", "--dump-dom", address],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        assert asked_by_pages(log) == (["http://localhost:9/x"] if name == "control" else [])
        if name == "control":
            continue
        assert "Verdict" in visible_text(shown)
        for scheme, more in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
            picture = tmp_path / f"{name}-{scheme}.png"
            subprocess.run(
                [*browse, *more, f"--screenshot={picture}", address],
                capture_output=True,
                check=True,
                timeout=120,
            )
            assert picture.stat().st_size > 20_000
        printed = tmp_path / f"{name}.pdf"
        subprocess.run(
            [*browse, f"--print-to-pdf={printed}", "--no-pdf-header-footer", address],
            capture_output=True,
            check=True,
            timeout=120,
        )
        assert printed.read_bytes()[:5] == b"%PDF-"
    light, dark = ((tmp_path / f"inspect-{s}.png").read_bytes() for s in ("light", "dark"))
    assert light != dark
