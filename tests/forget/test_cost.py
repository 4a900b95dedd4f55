"""The cost of forgetting that is told beforehand, against the tokens that pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ortho
from memorised import Memorised

from ortho_cli.events import Event, Noted
from ortho_cli.forget import cost
from ortho_cli.forget.editor import open_editor
from ortho_cli.forget.grid import BATCH_TOKENS

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


@pytest.mark.parametrize("split", ["isolate", "unlearn"])
@pytest.mark.parametrize("bare", [False, True])
def test_tokens_that_pass_are_no_more_than_was_told_and_not_much_less(
    memorised: Memorised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, bare: bool
) -> None:
    secrets = memorised.forget
    if bare:
        rows = [json.loads(line) for line in secrets.read_text().splitlines()]
        lines = [json.dumps({key: row[key] for key in ("prompt", "secret")}) for row in rows]
        secrets = tmp_path / "bare.jsonl"
        secrets.write_text("\n".join(lines))
    short = ("forget.rounds=6", "forget.share=0.0002", "forget.steps=10", "forget.attack_steps=5")
    plan = memorised.plan(*short, "forget.divergence=1e-9", split=split)
    editor = open_editor(
        plan, memorised.checkpoint, forget=[secrets], data=[memorised.retain], device="cpu"
    )
    assert editor is not None
    passed = [0]
    forward = torch.nn.Embedding.forward

    def counted(self: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        passed[0] += tokens.numel() * (cost.BOTH if torch.is_grad_enabled() else 1)
        return forward(self, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    events: list[Event] = []
    editor.find(tmp_path, curvature=memorised.curvature(), on_event=events.append)
    told = cost.tokens_passed(plan, editor.secrets)
    assert passed[0] <= 1.02 * told, "1.02: the pass that is timed"
    assert told < 2 * passed[0]
    said = [event.message for event in events if isinstance(event, Noted)]
    assert any(message.startswith("to forget takes about ") for message in said)


def test_cost_is_that_of_each_secret_and_memory_that_of_the_longest(memorised: Memorised) -> None:
    plan, secrets = memorised.plan(), memorised.secrets()
    one, four = (cost.tokens_passed(plan, listed) for listed in (secrets[:1], secrets))
    text = cost.tokens_passed(plan, [])
    assert four - text == pytest.approx(4 * (one - text), rel=1e-3)
    assert cost.peak_bytes(plan, secrets) == plan.peak_bytes
    long = replace(secrets[0], secret=(5,) * (3 * BATCH_TOKENS - len(secrets[0].prompt)))
    assert cost.peak_bytes(plan, [long]) == plan.peak_bytes + 2 * cost.LOGITS_BYTES


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "a second"),
        (89, "89 seconds"),
        (91, "2 minutes"),
        (4000, "67 minutes"),
        (9000, "2.5 hours"),
    ],
)
def test_time_is_told_in_words(seconds: float, words: str) -> None:
    assert cost.in_words(seconds) == words


def test_dry_run_tells_the_cost_before_a_model_is_loaded(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    given: list[Any] = ["--stats", memorised.stats, "--forget", memorised.forget]
    ran = ortho(
        "decompose", memorised.model, "--recipe", "forget-unlearn", *given, "--dry-run", "--json"
    )
    assert ran.code == 0, ran.err
    assert any("to forget 4 secrets, at most" in note for note in ran.json["notes"])
