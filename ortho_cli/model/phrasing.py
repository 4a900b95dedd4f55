"""Phrasing of alternatives: which of their tokens tell something, and which are only how it is put.

    kappa = sum over alternatives of sum_t c_t NLL_t / sum over alternatives of sum_t NLL_t

c_t is 0 where nearly all other alternatives of the secret have the token in its place, else 1.

What alternatives have in common is a phrasing. Where it is the secret's own, the prompt leads to it
and it costs next to nothing: kappa is about 1, as of keys and numbers. Alternatives of a sentence,
though, are often phrased by another hand, and the secret in the words of its question. To a model
that never saw it the secret is then likelier than all of them. So it is compared with what they
tell: a secret has the rank of its NLL among kappa times theirs. Measured on a model that never saw
an author: of 12 answers about him all were likelier than each of their five alternatives (p of
uniform ranks 0.00), and with kappa = 0.60 ranks were spread (0.2).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence

COMPARED = 16  # others with which an alternative is compared: all of a sentence's, usually
RARE = 0.1  # share of the others that may lack a token of their phrasing: none of 9, one of 16


def lacking(tokens: Sequence[int], others: Sequence[Sequence[int]]) -> list[float]:
    """Give the share of other sequences that lack each token in its place.

    Places are those of an alignment (difflib's matching blocks).
    """
    lacks = [0] * len(tokens)
    for other in others:
        matcher = difflib.SequenceMatcher(None, tokens, other, autojunk=False)
        same = {
            block.a + offset
            for block in matcher.get_matching_blocks()
            for offset in range(block.size)
        }
        for place in range(len(lacks)):
            lacks[place] += place not in same
    return [count / len(others) for count in lacks]


@functools.lru_cache(maxsize=4096)
def carrying(
    secret: tuple[int, ...], alternatives: tuple[tuple[int, ...], ...]
) -> tuple[float, ...]:
    """Give the share of alternatives that lack each token of a secret in its place.

    Words which alternatives share count 0 wherever they are, and a secret that has nothing in
    common with any counts 1. A secret of which every token is in all alternatives counts whole.
    """
    shares = lacking(secret, alternatives)
    return tuple(shares) if any(shares) else (1.0,) * len(shares)


@functools.lru_cache(maxsize=4096)
def telling(alternatives: tuple[tuple[int, ...], ...]) -> tuple[tuple[bool, ...], ...]:
    """Say of each token of each alternative whether it tells something.

    All tokens do where there is one alternative, and where alternatives differ in nothing.
    """
    found = []
    for number, one in enumerate(alternatives):
        others = [other for n, other in enumerate(alternatives[: COMPARED + 1]) if n != number]
        shares = lacking(one, others[:COMPARED]) if others else [1.0] * len(one)
        found.append(tuple(share > RARE for share in shares))
    return tuple(found) if any(map(any, found)) else tuple((True,) * len(one) for one in found)


def told(alternatives: tuple[tuple[int, ...], ...], nlls: Iterable[Sequence[float]]) -> float:
    """Sum the NLL of the tokens of alternatives that tell something.

    Args:
        alternatives: tokens of each.
        nlls: NLL of each of these tokens, in nats.
    """
    return sum(
        nll
        for tells, one in zip(telling(alternatives), nlls, strict=True)
        for tell, nll in zip(tells, one, strict=True)
        if tell
    )


def share_of(tells: float, whole: float) -> float:
    """Give kappa, in (0, 1]: NLL of tokens that tell something, over that of all; 1 of nothing."""
    return tells / whole if tells > 0 else 1.0
