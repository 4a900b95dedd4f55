"""A tokenizer as keys of a GGUF file: byte-level BPE, and SentencePiece's with byte fallback.

llama.cpp has no program of a pre-tokenizer, but a name for each that it knows. `PRE` maps the
patterns of tokenizer.json to these names; others are refused, since they would cut text otherwise.
Source: llama.cpp's src/llama-vocab.cpp and conversion/base.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ortho_cli.convert.targets.gguf_layout import Value
from ortho_cli.errors import CheckpointError, shown
from ortho_cli.model.load import load_tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

# Types of a token, as llama.cpp counts them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DIGITS = r"\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The patterns of a pre-tokenizer, one after another, and whether merges are ignored for a word that
# is a token itself -> llama.cpp's name for it.
PRE = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_WORDS + r"\p{N}" + _REST,), False): "qwen2",
    ((_WORDS + r"\p{N}{1,3}" + _REST,), True): "llama-bpe",
    ((_TEKKEN,), True): "tekken",
}
SPACE = "\u2581"  # SentencePiece's mark of a space

Json = Mapping[str, Any]  # Any: parts of tokenizer.json


def tokenizer_keys(folder: Path, *, vocabulary: int) -> tuple[dict[str, Value], list[str]]:
    """Write a model's tokenizer as keys of a GGUF file.

    Args:
        folder: of the model.
        vocabulary: rows of its embedding; tokens beyond the tokenizer's are unused.
    Returns:
        The keys, and notes. Without a tokenizer in the folder: that there is none.
    Raises:
        CheckpointError: a tokenizer that llama.cpp has none like.
    """
    if not any((folder / name).is_file() for name in FILES):
        note = f"`{folder}` has no tokenizer, so the file has none: servers take token ids alone"
        return {"tokenizer.ggml.model": "none"}, [note]
    # Any: `backend_tokenizer` is of fast tokenizers only, which the protocol does not have.
    tokenizer: Any = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(folder, "is no fast one, and has no tokenizer.json")
    told: Json = json.loads(backend.to_str())
    model = told["model"]
    if model.get("type") != "BPE":
        raise _refusal(folder, f"is of type {shown(model.get('type'))}, not BPE")
    numbers = [*model["vocab"].values(), *(one["id"] for one in told.get("added_tokens", ()))]
    if max(numbers, default=0) >= vocabulary:
        raise _refusal(folder, f"has a token {max(numbers)}, and the embedding {vocabulary} rows")
    if model.get("byte_fallback"):
        found = _sentencepiece(folder, told, vocabulary)
    else:
        found = _byte_level(folder, told, vocabulary)
    # tokenizers' Metaspace adds no space to a text that begins with one; llama.cpp always does.
    steps = _steps(told.get("pre_tokenizer"), "pretokenizers")
    spaced = found.get("tokenizer.ggml.add_space_prefix") and any(
        step["type"] == "Metaspace" for step in steps
    )
    note = f"llama.cpp begins a text that begins with a space with one more than `{folder}`'s own"
    return found | _special(tokenizer), [note] if spaced else []


def _refusal(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer of `{folder}` {what}, and llama.cpp has no such tokenizer",
        hint="move tokenizer* out of the folder to write the weights without one, or take "
        "llama.cpp's own converter to what `ortho convert OUT --alpha 0` writes",
    )


def _byte_level(folder: Path, told: Json, vocabulary: int) -> dict[str, Value]:
    patterns = tuple(_patterns(folder, told.get("pre_tokenizer")))
    ignores = bool(told["model"].get("ignore_merges"))
    name = PRE.get((patterns, ignores))
    if name is None:
        raise _refusal(folder, f"cuts text by {shown(list(patterns))}")
    normal = [step["type"] for step in _steps(told.get("normalizer"), "normalizers")]
    if normal not in ([], ["NFC"]):  # NFC changes no text that is in NFC, as nearly all is
        raise _refusal(folder, f"normalizes text by {shown(normal)}")
    tokens, types = _tokens(told, vocabulary)
    merges = [one if isinstance(one, str) else " ".join(one) for one in told["model"]["merges"]]
    if any(merge.count(" ") != 1 for merge in merges):
        raise _refusal(folder, "merges tokens that hold a space")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }


def _steps(part: Json | None, inner: str) -> list[Json]:
    """List the steps of a normalizer or pre-tokenizer, a sequence of them or one."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for one in part[inner] for step in _steps(one, inner)]


def _patterns(folder: Path, pre_tokenizer: Json | None) -> Iterator[str]:
    """Yield the patterns by which text is cut into words, one after another."""
    is_byte_level = False
    for step in _steps(pre_tokenizer, "pretokenizers"):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            is_byte_level = True
            if step.get("use_regex", True):
                yield _GPT2
        elif step["type"] == "Digits" and step.get("individual_digits"):
            yield _DIGITS
        elif step["type"] == "Split" and _is_plain_split(step):
            yield step["pattern"]["Regex"]
        else:
            raise _refusal(folder, f"has a pre-tokenizer {shown(step)}")
    if not is_byte_level:
        raise _refusal(folder, "is neither byte-level nor falls back to bytes")


def _is_plain_split(step: Json) -> bool:
    kept = step.get("behavior") == "Isolated" and not step.get("invert")
    return kept and "Regex" in step["pattern"]


def _sentencepiece(folder: Path, told: Json, vocabulary: int) -> dict[str, Value]:
    """Write a BPE that was made of a SentencePiece model; an earlier merge has a higher score."""
    steps = _steps(told.get("normalizer"), "normalizers")
    steps += _steps(told.get("pre_tokenizer"), "pretokenizers")
    prefixed = False
    for step in steps:
        space = step["type"] == "Replace" and step.get("content") == SPACE
        metaspace = step["type"] == "Metaspace" and step.get("replacement") == SPACE
        prepend = step["type"] == "Prepend" and step.get("prepend") == SPACE
        if not (space or metaspace or prepend):
            raise _refusal(folder, f"falls back to bytes, and has a step {shown(step)}")
        prefixed |= prepend or (metaspace and step.get("prepend_scheme", "always") != "never")
    tokens, types = _tokens(told, vocabulary)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in told["model"]["merges"]]
    _check_merges(folder, [t for t, k in zip(tokens, types, strict=True) if k == NORMAL], merges)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    last = float(len(merges))
    scores = [
        -float(ranks.get(token, last)) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def _check_merges(folder: Path, tokens: list[str], merges: list[tuple[str, ...]]) -> None:
    """Refuse a vocabulary of which llama.cpp would merge more: it merges whatever gives a token."""
    known, listed = set(tokens), set(merges)
    for token in tokens:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if known.issuperset(pair) and pair not in listed:
                raise _refusal(folder, f"never merges {shown(pair)}, which make a token of its own")


def _tokens(told: Json, vocabulary: int) -> tuple[list[str], list[int]]:
    """List every token and its type; rows of the embedding that have none are unused."""
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [UNUSED] * vocabulary
    unknown, bytes_ = told["model"].get("unk_token"), told["model"].get("byte_fallback")
    for token, number in told["model"]["vocab"].items():
        is_byte = bytes_ and len(token) == 6 and token.startswith("<0x")
        tokens[number] = token
        types[number] = BYTE if is_byte else UNKNOWN if token == unknown else NORMAL
    for added in told.get("added_tokens", ()):
        number, token = added["id"], added["content"]
        tokens[number] = token
        if types[number] != UNKNOWN:
            types[number] = CONTROL if added.get("special") else USER_DEFINED
    return tokens, types


def _special(tokenizer: Any) -> dict[str, Value]:
    """Write what begins and ends a text, and the chat template."""
    found: dict[str, Value] = {}
    for ours, its in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{ours}_token_id", None)
        if isinstance(number, int):
            found[f"tokenizer.ggml.{its}_token_id"] = number
    ids: Sequence[int] = tokenizer("a").input_ids
    plain: Sequence[int] = tokenizer("a", add_special_tokens=False).input_ids
    begins = len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id
    ends = len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id
    found |= {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        found["tokenizer.chat_template"] = template
    return found
