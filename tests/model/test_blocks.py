"""The blocks of a model, called one by one: the same as the model, and what depends on them."""

from __future__ import annotations

from typing import Any

import memorised as tiny
import pytest
import torch
from torch import Tensor, nn

from ortho_cli.errors import CalibrationError, NumericalError
from ortho_cli.model.blocks import Blocks

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

LENGTH = 12


@pytest.fixture
def model() -> Any:
    return tiny.tiny_llama(48).train(False).requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(48, (4, LENGTH), generator=torch.Generator().manual_seed(3))


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith("_proj")
    }


def blocks_of(model: nn.Module, tokens: Tensor) -> Blocks:
    return Blocks(model, linears_of(model), tokens[:2])


def test_blocks_in_turn_are_the_model(model: Any, tokens: Tensor) -> None:
    blocks = blocks_of(model, tokens)
    assert len(blocks) == 2
    assert [len(names) for names in blocks.names] == [7, 7]
    assert all(name.startswith("model.layers.1.") for name in blocks.names[1])
    hidden = blocks.embed(tokens[2:])  # not what it was made with
    assert torch.equal(hidden, model.model.embed_tokens(tokens[2:]))
    for number in range(2):
        hidden = blocks(number, hidden)
    expected = model.model(input_ids=tokens[2:]).last_hidden_state
    assert torch.allclose(model.model.norm(hidden), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "GPTNeoX", "Bloom", "OPT"])
def test_blocks_of_other_families_follow_one_another(kind: str, tokens: Tensor) -> None:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 48}
    more = {"intermediate_size": 128, "max_position_embeddings": 64}
    windows = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4}
    options = {
        "Qwen3": {**sizes, **more, "num_key_value_heads": 2, "head_dim": 16},
        "Gemma2": {**sizes, **more, **windows},  # every other block sees a few tokens only
        "GPTNeoX": {**sizes, **more},
        "Bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 48},
        "OPT": {**sizes, "ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**options)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).train(False).requires_grad_(False)
    linears = {
        f"{name}.weight": module
        for name, module in made.named_modules()
        if isinstance(module, nn.Linear) and "layers." in f".{name}".replace(".h.", ".layers.")
    }
    blocks = Blocks(made, linears, tokens[:2])
    assert sum(map(len, blocks.names)) == len(linears) >= 12
    token, channel = blocks.gradients(tokens, seed=0, on_batch=lambda *now: None)
    assert token.shape == (3, 4, LENGTH)
    assert bool((token[:, :, :-1] > 0).all())
    assert channel.shape == (3, 64)


def test_gradients_are_those_of_labels_that_the_model_drew(model: Any, tokens: Tensor) -> None:
    blocks = blocks_of(model, tokens)
    told: list[int] = []
    token, channel = blocks.gradients(tokens, seed=5, on_batch=lambda done, *now: told.append(done))
    assert told == [2, 4]
    assert token.shape == (2, 4, LENGTH)
    assert channel.shape == (2, 128)
    for number in range(2):
        squares = []
        for i, row in enumerate(tokens):
            hidden = blocks.embed(row.expand(2, -1))
            for k in range(2):
                hidden = blocks(k, hidden)
                if k == number:
                    at = hidden = hidden.detach().requires_grad_(True)
            logits = model.lm_head(model.model.norm(hidden))[0, :-1]
            drawn = torch.Generator().manual_seed(5 + i)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn).squeeze(1)
            nll = nn.functional.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(nll, at)
            squares.append(gradient[0].square())
        expected = torch.stack(squares)
        assert torch.allclose(token[number], expected.mean(-1), rtol=1e-3, atol=1e-9)
        assert torch.allclose(channel[number], expected.mean((0, 1)), rtol=1e-3, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_not_finite_is_refused(model: Any, tokens: Tensor) -> None:
    blocks = blocks_of(model, tokens)
    weight = model.lm_head.weight
    weight *= 1e22  # the square of a gradient is beyond float32
    with pytest.raises(NumericalError, match="output is NaN or infinite"):
        blocks.gradients(tokens, seed=0, on_batch=lambda *now: None)
    weight[7, 3] = torch.nan
    with pytest.raises(NumericalError, match="logits are NaN or infinite"):
        blocks.gradients(tokens, seed=0, on_batch=lambda *now: None)


def test_blocks_that_do_not_follow_one_another_are_refused(model: Any, tokens: Tensor) -> None:
    first, second = model.model.layers
    second.forward = lambda hidden, **options: hidden + second.input_layernorm(hidden)
    blocks_of(model, tokens)  # strange, but they follow one another
    whole, calls = first.forward, []

    def changing(hidden: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        return len(calls) * whole(hidden, **options)  # type: ignore[no-any-return]

    first.forward = changing  # alone it gives something else than it gave in the model
    with pytest.raises(CalibrationError, match="LlamaForCausalLM do not simply follow"):
        blocks_of(model, tokens)
    first.forward = whole
    second.register_forward_pre_hook(lambda module, args: (2 * args[0],))  # something between
    with pytest.raises(CalibrationError, match="LlamaForCausalLM do not simply follow"):
        blocks_of(model, tokens)


def test_a_model_without_blocks_is_refused(model: Any, tokens: Tensor) -> None:
    with pytest.raises(CalibrationError, match="has no blocks with a Linear"):
        Blocks(model, {"lm_head.weight": model.lm_head}, tokens[:2])
    first = model.model.layers[0]
    first.forward = lambda hidden, more, **options: hidden
    first.register_forward_pre_hook(
        lambda module, args, options: ((*args, None), options), with_kwargs=True
    )
    with pytest.raises(CalibrationError, match="2 positional arguments"):
        blocks_of(model, tokens)
