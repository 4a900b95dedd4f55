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

from ortho_cli.forget import cost
from ortho_cli.forget.editor import open_editor
from ortho_cli.forget.grid import BATCH_TOKENS
from ortho_cli.model.cost import BOTH, Part
from ortho_cli.storage.speeds import open_speeds

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
    short = ("forget.rounds=6", "forget.share=0.0001", "forget.steps=10", "forget.attack_steps=5")
    plan = memorised.plan(*short, "forget.divergence=1e-9", split=split)
    editor = open_editor(
        plan, memorised.checkpoint, forget=[secrets], data=[memorised.retain], device="cpu"
    )
    assert editor is not None
    passed = [0]
    forward = torch.nn.Embedding.forward

    def counted(self: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        passed[0] += tokens.numel() * (BOTH if torch.is_grad_enabled() else 1)
        return forward(self, tokens)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    editor.find(tmp_path, curvature=memorised.curvature())
    told = cost.tokens_passed(plan, editor.secrets)
    assert passed[0] <= told
    assert told < 4 * passed[0], "rounds may try several sizes, and use a measurement several times"


def test_cost_is_that_of_each_secret_and_memory_that_of_the_longest(memorised: Memorised) -> None:
    plan, secrets = memorised.plan(), memorised.secrets()
    one, four = (cost.tokens_passed(plan, listed) for listed in (secrets[:1], secrets))
    text = cost.tokens_passed(plan, [])
    assert four - text == pytest.approx(4 * (one - text), rel=1e-3)
    assert cost.peak_bytes(plan, secrets) == plan.peak_bytes
    long = replace(secrets[0], secret=(5,) * (3 * BATCH_TOKENS - len(secrets[0].prompt)))
    assert cost.peak_bytes(plan, [long]) == plan.peak_bytes + 2 * cost.LOGITS_BYTES


def test_each_round_step_and_secret_takes_its_time_up_to_what_usually_is_enough(
    memorised: Memorised,
) -> None:
    secrets, source = memorised.secrets(), memorised.checkpoint.tensors

    def estimated(split: str, *sets: str, listed: int = 4) -> Part:
        plan = memorised.plan(*sets, split=split)
        return cost.estimate(plan, secrets[:listed], source, open_speeds())

    for split, key, usual in (
        ("isolate", "rounds", cost.ROUNDS),
        ("unlearn", "steps", cost.STEPS),
    ):
        none, one, some, many = (
            estimated(split, f"forget.{key}={count}") for count in (1, 2, 100, 200)
        )
        a_round = one.at_most - none.at_most
        assert a_round > 0
        assert many.at_most - some.at_most == pytest.approx(100 * a_round)
        assert one.seconds < one.at_most  # a round may have to try several sizes
        assert many.seconds == some.seconds
        usually = one.seconds - none.seconds
        assert 0 < usually <= a_round
        assert some.seconds - one.seconds == pytest.approx((usual - 2) * usually)
    assert estimated("isolate", listed=4).at_most > estimated("isolate", listed=1).at_most
    samples = [estimated("isolate", f"forget.samples={count}").seconds for count in (100, 200)]
    assert samples[1] > samples[0]


def test_dry_run_tells_the_cost_before_a_model_is_loaded(
    memorised: Memorised, tmp_path: Path, ortho: Ortho
) -> None:
    given: list[Any] = ["--stats", memorised.stats, "--forget", memorised.forget]
    ran = ortho(
        "decompose", memorised.model, "--recipe", "forget-unlearn", *given, "--dry-run", "--json"
    )
    assert ran.code == 0, ran.err
    note = next(note for note in ran.json["notes"] if "to forget 4 secrets, at most" in note)
    assert "on this machine" in note
    assert "if all 60 steps and 40 rounds are needed" in note
    told = ran.json["estimate"]
    assert told["seconds"] < told["at_most_seconds"]
    assert list(told["parts"]) == ["start", "forget", "split"]
