"""What a search of group scales tries, and how it adds."""

from __future__ import annotations

# Sums that the squared errors of a group are added into, one after another.
LANES = 16


def scale_factors(bits: int) -> tuple[float, ...]:
    """List what absmax's scale is multiplied by in a search, in the order of trial.

    For 4 bits 7.5/7 and 7.5/8 put the largest magnitude exactly on code 7 or -8, for 3 bits 3.5/3
    and 3.5/4 on 3 or -4. Fewer codes are worth more clipping: to 0.5, and with 3 bits to 0.3.
    """
    half, codes = (2**bits - 1) / 2, 2 ** (bits - 1)
    steps = range(25 if bits == 4 else 35)
    descent = (round(0.98 - 0.02 * step, 2) for step in steps)
    return (1.0, half / (codes - 1), half / codes, 1.04, 1.02, *descent)
