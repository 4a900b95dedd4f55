"""Fuzz for as long as is asked: `make fuzz MINUTES=30`.

    PYTHONPATH=.:tests python tests/fuzz/long.py [--minutes 30] [--seed 0] [--keep DIR] [TARGET ...]

Runs in one process under an address space of its own size plus a gigabyte. What breaks a promise is
kept in `--keep`, with its traceback; the exit code says whether anything did.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import targets


def main() -> int:
    """Fuzz, tell what was done every minute, and keep what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=list(targets.TARGETS))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("demo/fuzz"))
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen.keep.mkdir(parents=True, exist_ok=True)
    starved = Counter[str]()
    draw, found, codes = random.Random(chosen.seed), Counter[str](), Counter[int]()
    with tempfile.TemporaryDirectory() as place:
        work, sound = Path(place) / "work", targets.make(Path(place) / "sound")
        victims = {
            name: (sound[targets.TARGETS[name].made] / targets.TARGETS[name].victim).read_bytes()
            for name in chosen.targets
        }
        targets.warm_up(sound, work)
        targets.bound()
        end, said = time.monotonic() + 60 * chosen.minutes, 0.0
        while time.monotonic() < end:
            name = draw.choice(chosen.targets)
            raw = targets.TARGETS[name].kind(victims[name], draw)
            (chosen.keep / "last").write_bytes(raw)  # what was read when the process died
            try:
                with targets.limited():
                    code, err = targets.attack(targets.TARGETS[name], raw, sound, work)
                codes[code] += 1
                targets.check(code, err)
                if "out of memory" in err:  # refused, but only since this process is bound
                    starved[name] += 1
                    (chosen.keep / f"starved {name}").write_bytes(raw)
            except (Exception, targets.Hang) as error:  # noqa: BLE001 - this is what is looked for
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = (
                    f"{name}: {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
                )
                found[where] += 1
                if found[where] == 1:
                    stem = f"{len(found):03d}"
                    (chosen.keep / f"{stem}.input").write_bytes(raw)
                    (chosen.keep / f"{stem}.txt").write_text(f"{where}\n{traceback.format_exc()}")
                    print(where, f"{error!s:.200}", flush=True)
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"{sum(codes.values()):,} inputs, {end - said:.0f} s left", flush=True)
    print(f"{sum(codes.values()) + sum(found.values()):,} inputs in {chosen.minutes:g} minutes")
    print(f"exit codes {dict(sorted(codes.items()))}; peak memory {targets.peak() / 1e6:.0f} MB")
    for name, times in starved.most_common():
        print(f"{times:6d} x {name}: asked for more memory than there was")
    for where, times in found.most_common():
        print(f"{times:6d} x {where}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
