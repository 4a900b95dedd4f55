"""Every fault we could think of, at random moments of real processes, and what is left after it.

python tests/faults.py [--only FAULT ...] [--command COMMAND ...] [--runs N] [--seed S]

Each run is made in a folder of its own, every other one with --force over an older output. After
it the source must be what it was, the older output whole or replaced by the whole new one, nothing
may look final that is not, and the same command, given again, must end in the reference's bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# The server imports what is heavy once; each process then starts in milliseconds.
SERVER = multiprocessing.get_context("forkserver")
HEAVY = [
    "torch",
    *("ortho_cli.cli.app", "ortho_cli.decompose.job", "ortho_cli.split.torch_kernel"),
    *("ortho_cli.decompose.repack", "ortho_cli.convert.job"),
    *("ortho_cli.calibrate.job", "ortho_cli.cli.show.progress", "ortho_cli.split.numba_loops"),
]
TRANSFORMERS = [
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
]

COMMANDS = {
    "decompose": ("decompose model -o disk/out", "--set ortho.density=0.03"),
    "compact": ("decompose model -o disk/out --set ortho.layout=compact", "--set base.scale=mse"),
    "convert": ("convert model -o disk/out --shard-size 100KB", "--dtype float32"),
    "calibrate": (
        "calibrate model --data text.txt -o disk/out.safetensors --set calibrate.length=16 "
        "--set calibrate.samples=12 --set calibrate.batch=1",
        "--set calibrate.seed=1",
    ),
}
Hurt = Callable[[], None]
Digests = dict[str, str]


def digests(path: Path) -> Digests:
    """SHA-256 of a file, or of every file in a folder; nothing where nothing is."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def child(said: Path, words: Sequence[str], ready: Any, hurts: Sequence[Hurt]) -> None:
    """Be an `ortho` command, hurt beforehand, that writes down what it finishes at once."""
    import torch

    from ortho_cli.calibrate import job as calibrate
    from ortho_cli.cli import app, boundary
    from ortho_cli.storage import job, parts

    os.chdir(said.parent)
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    job.COMMIT_SECONDS = 0.0
    calibrate.CHUNK_SECONDS = parts.SAVE_SECONDS = 0.0
    torch.set_num_threads(1)

    def command() -> int:
        ready.set()
        for hurt in hurts:
            hurt()
        return app.run(list(words))

    boundary.enter(command)


@dataclass
class Kind:
    """One command, in a folder that its runs are copied from."""

    name: str
    template: Path
    reference: Digests = field(default_factory=dict)
    older: Digests = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def words(self) -> list[str]:
        return COMMANDS[self.name][0].split()

    @property
    def out(self) -> str:
        return next(word for word in self.words if word.startswith("disk/"))


@dataclass
class Scene:
    """A folder in which one command meets one fault."""

    kind: Kind
    folder: Path
    draw: random.Random
    forced: bool
    runs: int = 0

    def __post_init__(self) -> None:
        shutil.copytree(self.kind.template, self.folder)
        self.source = digests(self.folder / "model")
        self.put_out_back()

    @property
    def out(self) -> Path:
        return self.folder / self.kind.out

    @property
    def hidden(self) -> Path:
        return self.out.with_name(f".{self.out.name}.ortho")

    @property
    def weights(self) -> Path:
        return self.folder / "model" / "model.safetensors"

    @property
    def said(self) -> str:
        """What the last run that was started had to say."""
        return (self.folder / f"said-{self.runs}").read_text()

    def put_out_back(self) -> None:
        """Let there be the older output, or none."""
        shutil.rmtree(self.folder / "disk")
        (self.folder / "disk").mkdir()
        if self.forced:
            shutil.copytree(self.kind.template / "disk", self.folder / "disk", dirs_exist_ok=True)

    def start(self, *hurts: Hurt, words: Sequence[str] = ()) -> Any:
        """Start the command, and wait until it has begun."""
        ready = SERVER.Event()
        chosen = [*(words or self.kind.words), *(["--force"] if self.forced else [])]
        self.runs += 1
        said = self.folder / f"said-{self.runs}"
        process = SERVER.Process(target=child, args=(said, chosen, ready, hurts))
        process.start()
        assert ready.wait(60)
        return process

    def wait(self) -> None:
        """Let a random part of the time that the command takes pass."""
        time.sleep(self.draw.uniform(0.0, self.kind.seconds))


def ended(process: Any) -> str:
    """Say how a process ended: its exit code, or the signal that it died of."""
    process.join(120)
    code = process.exitcode
    assert code is not None, "it hangs"
    return str(code) if code >= 0 else signal.Signals(-code).name


# Faults: each is given a scene, and says how the run that met it ended.


def kill(scene: Scene, *, times: int = 1) -> str:
    """Send SIGKILL, and again to the run that goes on."""
    for _ in range(times):
        process = scene.start()
        scene.wait()
        process.kill()
        code = ended(process)
    return code


def ask(scene: Scene, number: int, *, times: int = 1) -> str:
    """Send a signal that asks for an end."""
    process = scene.start()
    scene.wait()
    for _ in range(times):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        time.sleep(0.01 * (times > 1))
    code = ended(process)
    told = code == "0" or "interrupted" in scene.said
    # Asked behind its last word, it ends as asked, and its work is done.
    assert times > 1 or told or digests(scene.out) == scene.kind.reference, scene.said
    return code


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limited(scene: Scene, *, later: bool) -> str:
    """Let no file grow beyond a random size, from the start or from some moment on."""
    files = (scene.kind.template / "disk").rglob("*")
    largest = max(path.stat().st_size for path in files)
    size = int(2 ** scene.draw.uniform(12, largest.bit_length()))
    process = scene.start(*([] if later else [partial(_limit, size)]))
    if later:
        scene.wait()
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return ended(process)


@contextlib.contextmanager
def disk(scene: Scene) -> Iterator[Path]:
    """Let the output lie on a disk of its own of 16 MB."""
    place = scene.folder / "disk"
    shutil.move(place, scene.folder / "kept")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], check=True)
    try:
        shutil.copytree(scene.folder / "kept", place, dirs_exist_ok=True)
        yield place
        shutil.copytree(place, scene.folder / "left", symlinks=True)
    finally:
        subprocess.run(["umount", place], check=True)
    place.rmdir()
    shutil.rmtree(scene.folder / "kept")
    shutil.move(scene.folder / "left", place)


def full(scene: Scene) -> str:
    """Let another program take what is left of the disk at some moment, and free it in the end."""
    with disk(scene) as place:
        process = scene.start()
        scene.wait()
        with contextlib.suppress(OSError), (place / "hog").open("wb", buffering=0) as hog:
            while True:
                hog.write(bytes(1 << 16))
        code = ended(process)
        (place / "hog").unlink()
        return code


def read_only(scene: Scene) -> str:
    """Let the output's disk take no writes."""
    with disk(scene) as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        code = ended(scene.start())
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)
    return code


CALLS = {  # os.NAME -> what it fails with
    "preadv": errno.EIO,
    "pwrite": errno.ENOSPC,
    "write": errno.ENOSPC,
    "posix_fallocate": errno.ENOSPC,
    "fdatasync": errno.EIO,
    "fsync": errno.EIO,
    "rename": errno.EIO,
    "open": errno.EMFILE,
}


def _fail(name: str, after: int) -> None:
    """Let the calls of one kind fail, from the one after so many on."""
    real, count = getattr(os, name), itertools.count()

    def failing(*given: Any, **named: Any) -> Any:
        if next(count) >= after:
            raise OSError(CALLS[name], os.strerror(CALLS[name]))
        return real(*given, **named)

    setattr(os, name, failing)


def call_fails(scene: Scene) -> str:
    """Let a system call fail from some moment on."""
    name = scene.draw.choice(sorted(CALLS))
    return ended(scene.start(partial(_fail, name, scene.draw.choice((0, 1, 2, 3, 5, 9, 20, 60)))))


def damage_source(scene: Scene, how: str) -> str:
    """Cut the weights, write into them or put others in their place; undo it afterwards."""
    path, kept = scene.weights, scene.folder / "kept"
    shutil.copy2(path, kept)
    size, content = path.stat().st_size, bytearray(path.read_bytes())
    content[scene.draw.randrange(size // 2, size)] ^= 1
    process = scene.start()
    scene.wait()
    if how == "cut":
        os.truncate(path, scene.draw.randrange(size))
    elif how == "written":
        with path.open("r+b") as file:
            file.write(content)
    else:
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").replace(path)
    code = ended(process)
    found = digests(scene.out)
    if code == "0" and found != scene.kind.reference:  # then it is all of the damaged source
        scene.put_out_back()
        assert ended(scene.start()) == "0", scene.said
        assert digests(scene.out) == found, "neither of the source before nor of that after"
        scene.put_out_back()
    with path.open("r+b") as file:  # the file that is there, whichever it is
        file.write(kept.read_bytes())
    shutil.copystat(kept, path)
    kept.unlink()
    return code


def two_at_once(scene: Scene, *, first_dies: bool = False) -> str:
    """Start a second run while the first one works; that one may be killed at the same time."""
    first = scene.start()
    scene.wait()
    second = scene.start()
    if first_dies:
        first.kill()
    codes = ended(first), ended(second)
    if codes == ("0", "8") and not scene.forced:
        told = (f"process {first.pid} is writing", "exists", "has appeared")
        assert any(text in scene.said for text in told), scene.said
    return " ".join(codes)


def over_source(scene: Scene) -> str:
    """Ask for the output where the source is."""
    words = scene.kind.words
    words[words.index("-o") + 1] = scene.draw.choice(["model", "model/out", ".", "model/../model"])
    return ended(scene.start(words=words))


def _jumping_clock(seed: int) -> None:
    draw = random.Random(seed)
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, lambda: draw.uniform(-1e9, 1e10))


def clock(scene: Scene) -> str:
    """Let the clock jump at each look, and files be of 1901 to 2200."""
    for path in (scene.folder / "model").iterdir():
        os.utime(path, times=(scene.draw.uniform(-2e9, 7e9),) * 2)
    return ended(scene.start(partial(_jumping_clock, scene.draw.randrange(1000))))


@dataclass(frozen=True)
class Fault:
    """What is done to a run, how often, and how the run may end."""

    do: Callable[[Scene], str]
    runs: int
    may: str
    root: bool = False  # mounts
    mapped: str = ""  # how calibrate may end, too: transformers maps the weights into memory


FAULTS = {
    "kill -9": Fault(kill, 100, "SIGKILL 0"),
    "kill -9, and again": Fault(partial(kill, times=2), 20, "SIGKILL 0 8"),
    "SIGTERM": Fault(partial(ask, number=signal.SIGTERM), 20, "143 0"),
    "SIGINT twice": Fault(partial(ask, number=signal.SIGINT, times=2), 20, "130 0"),
    "SIGHUP": Fault(partial(ask, number=signal.SIGHUP), 20, "129 0"),
    "file size limit": Fault(partial(limited, later=False), 20, "9 0"),
    "file size limit, later": Fault(partial(limited, later=True), 20, "9 0"),
    "disk full": Fault(full, 20, "9 0", root=True),
    "system call fails": Fault(call_fails, 40, "9 0"),
    "source cut": Fault(partial(damage_source, how="cut"), 20, "4 0", mapped="SIGBUS"),
    "source written to": Fault(partial(damage_source, how="written"), 20, "4 0"),
    "source replaced": Fault(partial(damage_source, how="replaced"), 20, "4 0"),
    "two at once": Fault(two_at_once, 20, "0/8 0/0 8/0"),
    "two, the first killed": Fault(
        partial(two_at_once, first_dies=True), 20, "SIGKILL/8 SIGKILL/0 0/8 0/0"
    ),
    "read-only disk": Fault(read_only, 2, "9", root=True),
    "output over source": Fault(over_source, 4, "2"),
    "clock jumps": Fault(clock, 10, "0"),
}


def aftermath(scene: Scene) -> list[str]:
    """Say what is lost, half done or other than it would be without the fault."""
    kind, wrong = scene.kind, []
    there, previous = digests(scene.out), digests(scene.hidden / "previous")
    whole = [kind.reference, kind.older] if scene.forced else [kind.reference]
    if digests(scene.folder / "model") != scene.source:
        wrong.append("the source is not what it was")
    if scene.forced and kind.older not in (there, previous) and there != kind.reference:
        wrong.append("the older output is lost")
    if there and there not in whole:
        wrong.append("a half output")
    final = {digest for known in (kind.reference, kind.older) for digest in known.values()}
    for path in (scene.folder / "disk").rglob("*.safetensors"):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() not in final:
            wrong.append(f"{path.name} looks final")
    if "Traceback" in scene.said:
        wrong.append(f"a traceback: {scene.said.splitlines()[-1]}")
    code = ended(scene.start())
    if code != "0" and not (code == "8" and there == kind.reference):
        wrong.append(f"the same command again ends with {code}: {scene.said}")
    if digests(scene.out) != kind.reference:
        wrong.append("the same command again gives other bytes")
    if scene.hidden.exists():
        left = sorted(str(path.relative_to(scene.hidden)) for path in scene.hidden.rglob("*"))
        wrong.append(f"work is left behind: {left}")
    return wrong


def meet(fault: Fault, scene: Scene) -> tuple[str, list[str]]:
    """Let a run meet a fault; say how it ended, and what is wrong."""
    try:
        code = fault.do(scene)
    except AssertionError as error:
        return "?", [str(error)]
    said = scene.said
    found = aftermath(scene)
    may = [*fault.may.split(), *(fault.mapped.split() if scene.kind.name == "calibrate" else ())]
    if code.replace(" ", "/") not in may:
        found.append(f"ended with {code}: {said}")
    return code, found


def prepare(name: str, folder: Path) -> Kind:
    """Make what a command reads, its reference, and an older output of another recipe."""
    import checkpoints

    size = {"hidden": 64, "mlp": 192, "vocab": 96, "layers": 8}
    model = folder / "model"
    checkpoints.save(model, checkpoints.weights(**size, kv=32))
    told = checkpoints.config(**size, kv=32, heads=4)
    (model / "config.json").write_text(json.dumps(told))
    checkpoints.save_tokenizer(model, vocab=96)
    (folder / "text.txt").write_text("A cat, and 2 more of them. " * 300)
    (folder / "disk").mkdir()
    kind = Kind(name, folder)
    took = []
    draw = random.Random(0)
    for number in range(4):
        scene = Scene(kind, folder.with_name(f"{folder.name}-{number}"), draw, forced=False)
        began = time.perf_counter()
        code = ended(
            scene.start(words=[*kind.words, *([] if number else COMMANDS[name][1].split())])
        )
        took.append(time.perf_counter() - began)
        assert code == "0", scene.said
        if number:
            assert kind.reference in ({}, digests(scene.out))
            kind.reference = digests(scene.out)
        else:
            kind.older, older = digests(scene.out), scene.folder
    shutil.copytree(older / "disk", folder / "disk", dirs_exist_ok=True)
    kind.seconds = statistics.median(took)
    return kind


def main() -> None:
    """Run the matrix, print its table, and fail if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--command", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--runs", type=int, help="of each fault and command, instead of its own")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    SERVER.set_forkserver_preload(HEAVY + TRANSFORMERS)
    lost = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        kinds = [prepare(name, folder / name) for name in chosen.command]
        print("| fault | command | runs | ended as | lost |\n|---|---|---|---|---|")
        for name, kind in itertools.product(chosen.only, kinds):
            fault = FAULTS[name]
            if fault.root and os.geteuid():
                print(f"| {name} | {kind.name} | 0 | needs root to mount | |")
                continue
            codes: Counter[str] = Counter()
            wrong: list[str] = []
            for number in range(chosen.runs or fault.runs):
                # Each run's own seed: one of them can be had again with --seed.
                draw = random.Random(f"{chosen.seed} {name} {kind.name} {number}")
                scene = Scene(kind, folder / "scene", draw, forced=number % 2 == 1)
                code, found = meet(fault, scene)
                codes[code] += 1
                wrong += [f"{name}, {kind.name}, run {number}: {each}" for each in found]
                shutil.rmtree(scene.folder)
            told = ", ".join(f"{code}: {count}" for code, count in codes.most_common())
            print(f"| {name} | {kind.name} | {sum(codes.values())} | {told} | {len(wrong)} |")
            for each in wrong:
                print(each, file=sys.stderr)
            sys.stdout.flush()
            lost += len(wrong)
    sys.exit(lost > 0)


if __name__ == "__main__":
    main()
