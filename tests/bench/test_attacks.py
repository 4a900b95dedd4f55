"""Attacks on a tiny model: they teach what they should and leave the model as it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn

from ortho_cli.bench import attacks, baselines
from ortho_cli.bench.public import Public
from ortho_cli.errors import ArtifactError, NumericalError, UsageError
from ortho_cli.model import scoring
from ortho_cli.model.secrets import TokenSecret
from ortho_cli.model.self_written import answers
from ortho_cli.runtime.engine import Engine, densify, write_dense
from ortho_cli.runtime.ortho_linear import OrthoLinear
from ortho_cli.split import quantize
from tests.model.test_scoring import VOCAB, llama

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations


def secrets(count: int = 6, seed: int = 0) -> list[TokenSecret]:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    return [
        TokenSecret(
            prompt=draw(4),
            secret=draw(3),
            alternatives=tuple(draw(3) for _ in range(16)),
            drawn="given",
            where=f"line {number}",
            paraphrases=(draw(5), draw(6)),
        )
        for number in range(count)
    ]


def split(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    model = llama(dtype)
    engine = Engine(model)
    engine.convert()
    engine.decompose(**{"density": 0.05, **settings})
    return model


def layers(model: nn.Module) -> dict[str, OrthoLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, OrthoLinear)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Words:
    """A tokenizer of one token per character."""

    eos_token_id, bos_token_id = 2, None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(c) % VOCAB for c in text]})()

    def decode(self, tokens: tuple[int, ...], **_: Any) -> str:
        return "".join(chr(65 + token % 26) for token in tokens)


def target(model: nn.Module, listed: list[TokenSecret], **changes: Any) -> attacks.Target:
    return attacks.Target(model=model, secrets=listed, tokenizer=Words(), **changes)  # type: ignore[arg-type]


def teach(goal: attacks.Target, taught: list[TokenSecret]) -> Any:
    """Tune on secrets and measure all of the target's."""
    batch = [(*one.prompt, *one.secret, 2) for one in taught]
    return attacks.tune(goal, lambda: batch, goal.secrets)


def test_recall_equals_scores_one_by_one() -> None:
    model, listed = llama(), secrets()
    found = attacks.recall(model, listed)
    scores = [scoring.score(model, one) for one in listed]
    assert found.exposure == pytest.approx(sum(scoring.exposures(scores)) / 6)
    assert found.token_accuracy == pytest.approx(sum(sum(s.hits) for s in scores) / 18)


def test_halves_are_seeded_disjoint_and_whole() -> None:
    listed = secrets(7)
    taught, measured = attacks.halves(listed, 3)
    assert (len(taught), len(measured)) == (3, 4)
    assert sorted(one.where for one in [*taught, *measured]) == [one.where for one in listed]
    assert attacks.halves(listed, 3) == (taught, measured)
    assert attacks.halves(listed, 4) != (taught, measured)
    with pytest.raises(UsageError, match="needs 2 secrets"):
        attacks.halves(listed[:1], 0)


def test_relearning_teaches_the_taught_and_puts_everything_back() -> None:
    model, listed = llama(), secrets()
    model.requires_grad_(False)
    before = state(model)
    found = teach(target(model, listed, steps=(1, 30), learning_rate=3e-3), listed)
    assert list(found) == ["1", "30"]
    assert found["30"].loss < found["1"].loss
    assert found["30"].token_accuracy == 1.0
    assert found["30"].extraction == 1.0
    assert found["30"].exposure == pytest.approx(math.log2(17))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_relearning_is_adamw_on_the_mean_over_all_tokens() -> None:
    model, (one, two) = llama(), secrets(2)
    twin = llama()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(2):
        losses = []
        for secret in (one, two):
            tokens = torch.tensor([[*secret.prompt, *secret.secret, 2]])
            logits = twin(tokens).logits[0, :-1]
            losses.append(nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        optimizer.zero_grad()
        (sum(losses) / 14).backward()  # type: ignore[union-attr]
        optimizer.step()
    found = teach(target(model, [one], steps=(2,), learning_rate=1e-3), [one, two])
    assert found["2"].exposure == pytest.approx(attacks.recall(twin, [one]).exposure)


def test_relearning_teaches_one_half_and_measures_the_other() -> None:
    model, listed = llama(), secrets()
    goal = target(model, listed, steps=(3,), learning_rate=1e-3, seed=4)
    taught, others = attacks.halves(listed, 4)
    assert attacks.relearn(goal) == teach(dataclasses.replace(goal, secrets=others), taught)


def projections(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n]


def absmax_scales(weight: Tensor) -> Tensor:
    return quantize.absmax_scales(weight.detach(), group_size=32, dtype=torch.float32)


def test_lora_begins_at_the_model_learns_and_leaves_nothing_behind() -> None:
    model, listed = llama(), secrets()
    tokens = torch.arange(12)[None]
    before, plain = state(model), model(tokens).logits
    goal = target(model, listed, linears=projections(model), steps=(5, 10, 20, 40))
    with attacks.adapted(goal) as matrices:
        assert len(matrices) == 2 * len(goal.linears)
        assert torch.equal(model(tokens).logits, plain)
        nn.init.normal_(matrices[1], generator=torch.Generator().manual_seed(2))
        tuned = model(tokens).logits
        assert not torch.equal(tuned, plain)
        with attacks.restored(model.parameters()):
            weight = model.get_submodule(goal.linears[0]).get_parameter("weight")
            with torch.no_grad():
                weight += matrices[1] @ matrices[0]
                matrices[1].zero_()
            torch.testing.assert_close(model(tokens).logits, tuned, atol=1e-4, rtol=1e-4)
    found = attacks.relearn_lora(goal)
    assert list(found) == ["10", "20", "40"]
    assert found["40"].loss < found["10"].loss
    assert found == attacks.relearn_lora(goal)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert attacks.relearn_lora(dataclasses.replace(goal, linears=())) == {}


def test_small_batches_are_fours_of_the_taught_half_drawn_by_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, listed = llama(), secrets(12)
    goal = target(model, listed, steps=(1, 2, 3, 4))
    taught = {(*one.prompt, *one.secret, 2) for one in attacks.halves(listed, 0)[0]}
    drawn: list[list[tuple[int, ...]]] = []
    rates: list[float] = []

    def tune(goal: attacks.Target, draw: Any, measured: Any) -> Any:
        rates.append(goal.learning_rate)
        drawn.extend(draw() for _ in goal.steps)
        return {str(step): measured for step in goal.steps}

    monkeypatch.setattr(attacks, "tune", tune)
    found = attacks.relearn_minibatch(goal)
    assert found == {step: attacks.halves(listed, 0)[1] for step in "234"}
    assert [len(set(batch)) for batch in drawn] == [4, 4, 4]
    assert set().union(*drawn) <= taught
    assert drawn[0] != drawn[1]
    attacks.relearn_minibatch(goal)
    assert drawn[:3] == drawn[3:]
    attacks.relearn_minibatch(dataclasses.replace(goal, learning_rate=1e-3))
    assert rates == [2e-4, 2e-4, 1e-3]


def test_recall_has_rouge_of_long_secrets_alone() -> None:
    model, listed = llama(), secrets()
    assert attacks.recall(model, listed, Words()).rouge_l is None  # type: ignore[arg-type]
    long = dataclasses.replace(listed[0], secret=tuple(answers(model, [listed[0].prompt], [9])[0]))
    other = dataclasses.replace(long, secret=long.secret[::-1])
    assert attacks.recall(model, [long]).rouge_l is None
    found = attacks.recall(model, [*listed, long, other], Words())  # type: ignore[arg-type]
    alone = attacks.recall(model, [long], Words())  # type: ignore[arg-type]
    assert alone.rouge_l == alone.extraction == 1.0
    assert found.rouge_l == 0.5


def test_finetuning_is_seeded_and_restores_after_an_error() -> None:
    model, listed = llama(), secrets()
    windows = torch.randint(0, VOCAB, (20, 16), generator=torch.Generator().manual_seed(1))
    before = state(model)

    goal = target(model, listed, windows=windows, steps=(2,), learning_rate=1e-3)

    def run(**changes: Any) -> Any:
        return attacks.finetune(dataclasses.replace(goal, **changes))

    assert run() == run()
    assert run()["2"].loss != run(seed=1)["2"].loss
    assert run(windows=None) == {}
    with pytest.raises(NumericalError):
        run(steps=(40,), learning_rate=math.inf)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_training_refuses_half_precision() -> None:
    listed = secrets(2)
    with pytest.raises(UsageError, match="small steps are lost"):
        attacks.relearn(target(llama(torch.bfloat16), listed))


def test_paraphrases_are_each_asked_with_the_secrets_own_answer() -> None:
    model, listed = llama(), secrets(2)
    asked = [dataclasses.replace(one, prompt=p) for one in listed for p in one.paraphrases]
    goal = target(model, [*listed, dataclasses.replace(listed[0], paraphrases=())])
    found = attacks.paraphrase(goal)["all"]
    assert found == attacks.recall(model, asked)
    assert found.secrets == 4
    assert found != attacks.recall(model, listed)
    assert attacks.paraphrase(dataclasses.replace(goal, secrets=goal.secrets[2:])) == {}


def halvable(count: int = 4, seed: int = 5, more: int = 0) -> list[TokenSecret]:
    """Secrets of 6 tokens, with alternatives of up to so many more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (tokens,), generator=generator).tolist())

    return [
        dataclasses.replace(
            one,
            secret=draw(6),
            alternatives=tuple(draw(6 + i % (more + 1)) for i in range(16)),
        )
        for one in secrets(count)
    ]


def test_half_of_a_secret_is_given_and_alternatives_are_cut_at_their_middle() -> None:
    (one,) = halvable(1, more=2)
    found = attacks.second_half(one)
    assert found is not None
    assert found.prompt == (*one.prompt, *one.secret[:3])
    assert found.secret == one.secret[3:]
    assert found.alternatives == tuple(other[len(other) // 2 :] for other in one.alternatives)
    twice = dataclasses.replace(
        one, alternatives=((9, 9, 9, 8, 8, 8), (7, 7, 7, 8, 8, 8), (9, 9, 9, *one.secret[3:]))
    )
    halved = attacks.second_half(twice)
    assert halved is not None
    assert halved.alternatives == ((8, 8, 8),)
    assert attacks.second_half(dataclasses.replace(one, secret=one.secret[:3])) is None
    only = dataclasses.replace(twice, alternatives=twice.alternatives[2:])
    assert attacks.second_half(only) is None


def test_halves_of_unknown_secrets_have_exposure_by_chance_and_short_ones_are_left_out() -> None:
    """Means of 200 secrets: 1.03 to 1.34 bits over 8 seeds, 1.24 on average, as by chance."""
    model, found = llama(), []
    for seed in range(3):
        goal = target(model, [*halvable(200, seed), *secrets(3)])
        curve = attacks.complete(goal)
        assert curve["half"].secrets == 200
        found.append(curve["half"].exposure)
    assert abs(sum(found) / 3 - scoring.chance_exposure(16)) < 0.25
    assert attacks.complete(target(model, secrets(3))) == {}


def test_rewording_changes_prompts_only() -> None:
    listed = secrets()
    found = attacks.rewordings(listed, Words())  # type: ignore[arg-type]
    assert found.keys() == {"shorter", "longer", "lower"}
    for kind in found.values():
        for old, new in zip(listed, kind, strict=True):
            assert (new.secret, new.alternatives) == (old.secret, old.alternatives)
            assert new.prompt
            assert new.prompt != old.prompt
    assert found["shorter"][0].prompt == listed[0].prompt[2:]
    assert found["longer"][0].prompt[-4:] == listed[0].prompt


def test_requantizing_measures_another_grid_and_restores() -> None:
    model, listed = llama(), secrets()
    before = state(model)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n]
    found = attacks.requantize(target(model, listed, linears=names))
    assert list(found) == ["group_64", "group_32"]
    assert attacks.recall(model, listed) not in found.values()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_attack_is_registered_once_and_leaves_the_model_as_it_was() -> None:
    model, listed = llama(), [*secrets(), *halvable()]
    windows = torch.randint(0, VOCAB, (4, 16))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "proj" in n]
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    beside = {
        name: Public(-weight.detach(), absmax_scales(weight), 4) for name, weight in weights.items()
    }
    goal = target(model, listed, linears=names, windows=windows, public=beside, steps=(1,))
    assert len({attack.name for attack in attacks.ATTACKS}) == len(attacks.ATTACKS)
    before = state(model)
    for attack in attacks.ATTACKS:
        assert attack.run(goal), attack.name
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_twin_gives_the_logits_of_the_live_model(dtype: torch.dtype, alpha: float) -> None:
    model = split(dtype).float()
    tokens = torch.arange(24).view(2, 12)
    for layer in layers(model).values():
        layer.alpha = alpha
    with torch.no_grad():
        live = model(tokens).logits
        replaced = densify(model)
        twin = model(tokens).logits
    assert not layers(model)
    assert {type(model.get_submodule(name)) for name in replaced} == {nn.Linear}
    torch.testing.assert_close(twin, live, atol=1e-4, rtol=1e-4)
    write_dense(model, replaced, 0.0)
    for name, layer in replaced.items():
        codes = baselines.base_codes(layer)
        expected = reference.dequantize(codes, layer.weight_scale)
        assert torch.equal(model.get_submodule(name).weight, expected)


def test_dense_twin_needs_an_alpha_and_replaces_nothing_without() -> None:
    model = split()
    with pytest.raises(UsageError, match="alpha is not set"):
        densify(model)
    assert layers(model)


def edit(layer: OrthoLinear, count: int = 5) -> None:
    """Move codes where ortho keeps the source, as forgetting does."""
    codes = baselines.base_codes(layer)
    rows = torch.repeat_interleave(
        torch.arange(layer.out_features), layer.crow_indices.long().diff()
    )
    at = (rows[:count], layer.col_indices.long()[:count])
    codes[at] = torch.where(codes[at] > 0, codes[at] - 1, codes[at] + 1)
    layer.weight_packed.copy_(quantize.pack_int4(codes))


def test_int4_row_undoes_every_moved_code_bit_for_bit() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for layer in layers(split(dtype)).values():
            before = baselines.base_codes(layer)
            assert torch.equal(baselines.int4_codes(layer), before)
            assert baselines.count_moved(layer) == 0
            edit(layer)
            assert baselines.count_moved(layer) == 5
            assert torch.equal(baselines.int4_codes(layer), before)


def test_int4_row_needs_ortho() -> None:
    layer = OrthoLinear(64, 8, group_size=64, dtype=torch.float32)
    with pytest.raises(ArtifactError, match="not known from base alone"):
        baselines.int4_codes(layer)


Weigh = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("kind", ["random", "magnitude"])
@pytest.mark.parametrize("count", [0, 1, 7, 100, 10_000])
def test_controls_move_exactly_as_many_codes(kind: Any, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8, generator=generator)
    scales = torch.rand(6, 2, generator=generator) + 0.1
    found = baselines.control_codes(codes, scales, count=count, kind=kind, seed=1)
    there = int(codes.count_nonzero())
    changed = found != codes
    assert int(changed.sum()) == min(count, there)
    assert not found[changed].any()
    again = baselines.control_codes(codes, scales, count=count, kind=kind, seed=1)
    assert torch.equal(found, again)
    if kind == "magnitude" and 0 < count < there:
        size = reference.dequantize(codes, scales).abs()
        assert size[changed].min() >= size[~changed].max()
