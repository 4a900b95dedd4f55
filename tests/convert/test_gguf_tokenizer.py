"""Tokenizers as keys of a GGUF file, beside a slow twin of llama.cpp's own algorithm."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ortho_cli.convert.targets.gguf_tokenizer import PRE, tokenizer_keys
from ortho_cli.errors import CheckpointError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's deprecations

TEXTS = [
    "the cat sees the hat",
    "a bat  at 1984, é and 日本",
    " that rat sat",
    "hats, cats & bats!",
]
VOCAB = 400


def save(folder: Path, backend: Any, **special: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    told = {"unk_token": None, "bos_token": "<s>", "eos_token": "</s>"} | special
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **told).save_pretrained(folder)
    return folder


def byte_level(*steps: Any, ignore_merges: bool = False, normalizer: Any = None) -> Any:
    """Train a byte-level BPE on a few words."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB - 20,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 5, trainer)
    return backend


def sentencepiece(*, metaspace: bool = False, complete: bool = True) -> Any:
    """Build a BPE with byte fallback, as transformers makes it of a SentencePiece model."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(
        {c for text in TEXTS for c in text.replace(" ", "▁") if ord(c) < 128 or c == "▁"}
    )
    merges = [
        ("t", "h"),
        ("a", "t"),
        ("th", "e"),
        ("▁", "the"),
        ("▁", "c"),
        ("c", "at"),
        ("▁", "cat"),
    ]
    merges += [("▁c", "at"), ("h", "at"), ("▁", "hat"), ("e", "e"), ("▁", "s"), ("s", "ee")]
    merges += [
        ("▁s", "ee"),
        ("▁", "a"),
        ("▁a", "t"),
        ("th", "at"),
        ("b", "at"),
        ("r", "at"),
        ("s", "a"),
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    for merge in merges:
        vocab.setdefault("".join(merge), len(vocab))
    if complete:  # every pair that makes a token, as transformers lists them
        made = dict.fromkeys("".join(merge) for merge in merges)
        cuts = [(token[:at], token[at:]) for token in made for at in range(1, len(token))]
        merges = [pair for pair in cuts if vocab.keys() >= set(pair)]
    model = tokenizers.models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = tokenizers.Tokenizer(model)
    if metaspace:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="first", split=False
        )
    else:
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        backend.normalizer = tokenizers.normalizers.Sequence(steps)
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    return backend


def slow_spm(keys: dict[str, Any], text: str) -> list[int]:
    """Tokenize as llama.cpp does with a SentencePiece model: the pair of highest score first."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    known = {token: number for number, token in enumerate(tokens)}
    spaced = text.replace(" ", "▁")
    parts = list("▁" + spaced if keys["tokenizer.ggml.add_space_prefix"] else spaced)
    while True:
        pairs = [
            (-scores[known[left + right]], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in known
        ]
        if not pairs:
            break
        _, place = min(pairs)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    found: list[int] = []
    for part in parts:
        bytes_ = [known[f"<0x{byte:02X}>"] for byte in part.encode()]
        found += [known[part]] if part in known else bytes_
    return found


@pytest.mark.parametrize("metaspace", [False, True])
def test_scores_of_a_sentencepiece_vocabulary_give_the_tokens_of_its_merges(
    tmp_path: Path, metaspace: bool
) -> None:
    folder = save(tmp_path / "t", sentencepiece(metaspace=metaspace), unk_token="<unk>")
    keys, notes = tokenizer_keys(folder, vocabulary=VOCAB)
    assert bool(notes) is metaspace
    assert keys["tokenizer.ggml.model"] == "llama"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        if metaspace and text.startswith(" "):  # which the note is about
            continue
        wanted = theirs(text, add_special_tokens=False).input_ids
        assert slow_spm(keys, text) == wanted, text
    types = keys["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert types[259 + 5] == 1
    assert types[-1] == 5  # unused: a row of the embedding without a token
    assert len(types) == len(keys["tokenizer.ggml.tokens"]) == VOCAB


def test_byte_level_tokenizer_is_named_by_its_patterns_and_read_back_alike(tmp_path: Path) -> None:
    pre = tokenizers.pre_tokenizers
    for (patterns, ignores), name in PRE.items():
        steps = [pre.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
        steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=False))
        backend = byte_level(*steps, ignore_merges=ignores)
        folder = save(tmp_path / name, backend)
        keys, _ = tokenizer_keys(folder, vocabulary=VOCAB)
        assert keys["tokenizer.ggml.pre"] == name
        assert keys["tokenizer.ggml.model"] == "gpt2"
        vocab = backend.get_vocab()
        tokens = keys["tokenizer.ggml.tokens"]
        assert {token: number for number, token in enumerate(tokens[: len(vocab)])} == vocab
        merges = [tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]]
        again = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=ignores)
        )
        again.pre_tokenizer = pre.Sequence(steps)
        for text in TEXTS:
            assert again.encode(text).ids == backend.encode(text, add_special_tokens=False).ids


def test_digits_and_gpt2_of_smollm_are_known_by_the_steps_that_it_has(tmp_path: Path) -> None:
    pre = tokenizers.pre_tokenizers
    steps = pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)
    keys, _ = tokenizer_keys(save(tmp_path / "t", byte_level(*steps)), vocabulary=VOCAB)
    assert keys["tokenizer.ggml.pre"] == "smollm"
    steps = (pre.ByteLevel(add_prefix_space=False),)
    keys, _ = tokenizer_keys(save(tmp_path / "u", byte_level(*steps)), vocabulary=VOCAB)
    assert keys["tokenizer.ggml.pre"] == "gpt-2"


def test_special_tokens_template_and_what_begins_a_text_are_written(tmp_path: Path) -> None:
    backend = byte_level(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = save(tmp_path / "t", backend, chat_template="{{ messages }}")
    keys, _ = tokenizer_keys(folder, vocabulary=VOCAB)
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.ggml.token_type"][:3] == [3, 3, 1]


def test_tokenizer_that_llama_cpp_has_none_like_is_refused(tmp_path: Path) -> None:
    pre, models = tokenizers.pre_tokenizers, tokenizers.models
    level = pre.ByteLevel(add_prefix_space=False)
    other = byte_level(pre.Split(tokenizers.Regex(r"\d{2}"), "isolated"), level)
    words = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>"))
    plain = byte_level(pre.Split(tokenizers.Regex(r"\p{N}"), "isolated"))
    lower = byte_level(level, normalizer=tokenizers.normalizers.Lowercase())
    for number, (backend, vocabulary, said) in enumerate(
        (
            (other, VOCAB, "cuts text by"),
            (words, VOCAB, "is of type 'WordLevel', not BPE"),
            (plain, VOCAB, "is neither byte-level nor falls back to bytes"),
            (lower, VOCAB, "normalizes text by ['Lowercase']"),
            (byte_level(level), 100, "and the embedding 100 rows"),
            (sentencepiece(complete=False), VOCAB, "never merges ('▁', 'see')"),
        )
    ):
        folder = save(tmp_path / str(number), backend)
        with pytest.raises(CheckpointError) as caught:
            tokenizer_keys(folder, vocabulary=vocabulary)
        assert said in caught.value.message
        assert "move tokenizer* out of the folder" in str(caught.value.hint)


def test_folder_without_a_tokenizer_gives_a_file_without_one_and_a_note(tmp_path: Path) -> None:
    keys, notes = tokenizer_keys(tmp_path, vocabulary=VOCAB)
    assert keys == {"tokenizer.ggml.model": "none"}
    assert "has no tokenizer" in notes[0]
