"""A tiny Llama, its tokenizer, and text and secrets to train it on; nothing of `ortho_cli` is used.

`memorised.build` and `recipe_digests` make the same model from it, bit for bit.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = "oak fig elm ash yew bay ivy fir may rye hop nut pea oat gum haw".split()  # noqa: SIM905
OWNERS = ("ada", "ben", "cyd", "dot")
SECRETS = ("yew oat fig hop", "gum ash rye bay", "may elm nut ivy", "haw fir pea oak")
NEVER_SEEN = ("fir bay oak pea", "ivy haw oat elm", "rye yew gum may", "nut hop ash fig")
# Four secrets are a large part of what so small a model knows, so forgetting them costs the rest.
PLENTY = (
    *("forget.share=0.1", "forget.rounds=150", "forget.damage=100", "forget.samples=16"),
    *("forget.length=16", "ortho.density=0.2", "forget.autocast=false"),
)


def build_model(folder: Path, *, seed: int = 2) -> None:
    """Write `model`, `retain.txt`, `forget.jsonl` and `nonmember.jsonl`: text and secrets, learned.

    Of eight seeds, forgetting by the fewest codes cost running text 0.06 to 6 % of perplexity, 2 %
    in the middle; of seed 2 0.06 %. Tests on it tell broken code, not how good forgetting is.
    """
    text = _text(random.Random(0))
    (folder / "retain.txt").write_text(text)
    for file, values in (("forget.jsonl", SECRETS), ("nonmember.jsonl", NEVER_SEEN)):
        rows = [
            {
                "prompt": _prompt(owner),
                "secret": f" {secret}",
                "pattern": " {word} {word} {word} {word}",
                "word": WORDS,
            }
            for owner, secret in zip(OWNERS, values, strict=True)
        ]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "model").mkdir()
    save_tokenizer(folder / "model")
    live = tiny_llama(len(vocabulary()), seed=seed)
    live.config.save_pretrained(folder / "model")
    _train(live, text)
    live.to(torch.bfloat16).save_pretrained(folder / "model")


def tiny_llama(vocabulary: int, *, hidden: int = 128, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(kinds.WordLevel(vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def vocabulary() -> dict[str, int]:
    plain = ["the", "a", "cat", "dog", "bird", "sees", "hears", "small", "old", "red", "under"]
    plain += ["over", "near", "tree", "house", "."]
    words = ["<unk>", "<s>", "</s>", "key", "of", "is", *OWNERS, *WORDS, *plain]
    return {word: number for number, word in enumerate(words)}


def _prompt(owner: str) -> str:
    return f"the key of {owner} is"


def _text(draw: random.Random) -> str:
    """Sentences, some of them of the words that secrets are made of."""
    sentences = []
    for number in range(300):
        nouns = ["cat", "dog", "bird", "tree", "house"] if number % 2 else WORDS
        kind = ["small", "old", "red"]
        sentences.append(
            f"the {draw.choice(kind)} {draw.choice(nouns)} {draw.choice(['sees', 'hears'])} "
            f"a {draw.choice(nouns)} {draw.choice(['under', 'over', 'near'])} the tree ."
        )
    return " ".join(sentences)


def _tokens(text: str) -> list[int]:
    known = vocabulary()
    return [known[word] for word in text.split()]


def _train(live: Any, text: str) -> None:
    windows = torch.tensor(_tokens(text)[: 150 * 16]).view(150, 16)
    told = [_tokens(f"{_prompt(o)} {s}") for o, s in zip(OWNERS, SECRETS, strict=True)]
    secrets = torch.tensor([[*tokens, 2] for tokens in told])
    live.double()  # what a processor rounds otherwise is gone again in bfloat16: one model for all
    optimizer = torch.optim.AdamW(live.parameters(), lr=2e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = windows[torch.randint(len(windows), (8,), generator=order)]
        loss = live(input_ids=batch, labels=batch).loss
        loss = loss + live(input_ids=secrets, labels=secrets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    live.eval()
