"""Calibration: a model, sets of text, and for each weight how much it matters to each set.

Sums live in files, one float32 per weight, not in memory: each pass reads, adds and writes them
back, one tile at a time. Two files a set take turns, so that one of them always holds the sums
of the last finished chunk of sequences, from which a killed run goes on with the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor, nn

from ortho_cli.calibrate.plan import CalibrationPlan, Set
from ortho_cli.calibrate.sums import Sums
from ortho_cli.errors import CalibrationError
from ortho_cli.events import EventSink, Finishing, Measuring, Noted, SequencesDone, null_sink
from ortho_cli.formats import artifact, statistics
from ortho_cli.formats.artifact import canonical_json, module_of
from ortho_cli.model import load as models
from ortho_cli.model.hooks import (
    TOP_SHARE,
    Capture,
    factor,
    logit_gradient,
    symmetrize,
    top_overlap,
)
from ortho_cli.model.text import TokenSequence
from ortho_cli.split.quantize import as_bytes
from ortho_cli.storage.checkpoint import Checkpoint, ShardReader, TensorInfo, check_in_place
from ortho_cli.storage.data_file import DataFile, TensorStream, plan_layout
from ortho_cli.storage.output import check_output, check_space, files_of, resolve_output
from ortho_cli.storage.work_folder import WorkFolder, interruptible
from ortho_cli.version import __version__

# A kill costs at most this many sequences; each time, sums are synced to disk.
CHUNK_SEQUENCES = 16


def calibrate(
    plan: CalibrationPlan,
    checkpoint: Checkpoint,
    out: Path,
    *,
    device: str = "auto",
    force: bool = False,
    on_event: EventSink = null_sink,
) -> dict[str, Any]:
    """Carry a plan out: load the model, pass the data through it, write the statistics.

    Memory: the model, the activations of one batch, and 16 MB tiles of one layer's sums; while the
    file is written, what it holds of one weight.

    Args:
        plan: made from `checkpoint`.
        checkpoint: a transformers folder.
        out: the file to make; appears only when complete.
        device: auto, cpu, cuda or cuda:N.
        force: replace statistics at `out`, and discard half-done work of another plan.
        on_event: told of progress.
    Returns:
        What was measured, as `ortho calibrate --json` prints it.
    Raises:
        CalibrationError: a weight that no token reached, or that is no Linear of the model.
        NumericalError: a gradient is NaN or infinite.
        Interrupted: Ctrl-C; finished chunks are kept.
    """
    out = resolve_output(out)
    check_output(
        out,
        files_of(checkpoint),
        force=force,
        is_ours=statistics.is_statistics,
        kind="statistics file",
        is_file=True,
    )
    check_space(plan.bytes_written + plan.bytes_scratch, out, kind="statistics with their sums")
    chosen = models.resolve_device(device)
    for note in checkpoint.notes:
        on_event(Noted(message=note))
    on_event(Finishing(step="digest the model"))
    with contextlib.closing(ShardReader(checkpoint.shards)) as reader:
        digests = {tensor.name: reader.digest(tensor) for tensor in checkpoint.tensors}
        reader.check_unchanged()
    source = artifact.source_digest(
        (tensor.name, tensor.dtype, tensor.shape, digests[tensor.name])
        for tensor in checkpoint.tensors
    )
    identity = {
        "plan": blake3(canonical_json(plan.to_json()).encode()).hexdigest(),
        "source": source,
        "version": [__version__, torch.__version__, chosen.type],
        "files": {
            f"{name}.{turn}": plan.sums(name).size for name in plan.sets for turn in range(2)
        },
    }
    with WorkFolder(out, identity=identity, force=force, file=out.name, on_event=on_event) as work:
        job = _Job(plan, checkpoint, work, chosen, on_event)
        with interruptible(work, total=job.chunks, what="chunks of sequences"):
            found = job.run(source, digests)
            work.publish(may_replace=lambda there: force and statistics.is_statistics(there))
    return found


class _Job:
    def __init__(
        self,
        plan: CalibrationPlan,
        checkpoint: Checkpoint,
        work: WorkFolder,
        device: torch.device,
        on_event: EventSink,
    ) -> None:
        self._plan, self._checkpoint, self._work = plan, checkpoint, work
        self._device, self._on_event = device, on_event
        self._sums: dict[Set, Sums] = {}
        self._nll: dict[Set, float] = {}
        self._chunks: dict[Set, list[tuple[TokenSequence, ...]]] = {
            name: [
                data.sequences[start : start + CHUNK_SEQUENCES]
                for start in range(0, len(data.sequences), CHUNK_SEQUENCES)
            ]
            for name, data in plan.sets.items()
        }

    @property
    def chunks(self) -> int:
        """Chunks of all sets."""
        return sum(map(len, self._chunks.values()))

    def run(self, source: str, digests: dict[str, str]) -> dict[str, Any]:
        plan, work = self._plan, self._work
        # What says something of private data is for its owner alone.
        mode = 0o600 if "forget" in plan.sets else 0o644
        pending = 0
        for name, chunks in self._chunks.items():
            layout = plan.sums(name)
            files = tuple(DataFile(work, f"{name}.{turn}", layout, mode=mode) for turn in range(2))
            done = next(i for i in range(len(chunks) + 1) if f"{name} {i}" not in work.done)
            self._sums[name] = Sums((files[0], files[1]), layout, chunks=done)
            nlls = (work.done[f"{name} {i}"]["nll"] for i in range(done))
            self._nll[name] = math.fsum(nll for nll in nlls if isinstance(nll, float))
            pending += len(chunks) - done
        if pending:
            self._measure()
        self._on_event(Finishing(step="write"))
        return self._write(source, digests, mode=mode)

    def _measure(self) -> None:
        settings = self._plan.settings
        # Without autocast everything is float32; with it, weights stay what they are.
        dtype = None if settings.autocast else torch.float32
        model = models.load_model(self._checkpoint.folder, dtype=dtype, device=self._device)
        everything = [s for data in self._plan.sets.values() for s in data.sequences]
        models.check_fits(
            model,
            length=max(len(sequence.tokens) for sequence in everything),
            largest_token=max(max(sequence.tokens) for sequence in everything),
        )
        linears = models.find_linears(model, [tensor.name for tensor in self._plan.tensors])
        resumed = sum(len(self._chunks[name][i]) for name, i in self._finished())
        self._on_event(Measuring(sequences=len(everything), resumed=resumed))
        for name, chunks in self._chunks.items():
            with Capture(
                linears,
                self._sums[name].add,
                kind="gram" if settings.curvature == "gram" else "fisher",
                unit=settings.unit,
                gradient=name == "forget",
                gram="none" if name == "forget" else settings.gram,
                weighting="none" if name == "forget" else settings.weighting,
            ) as capture:
                for number, chunk in enumerate(chunks):
                    if f"{name} {number}" not in self._work.done:
                        self._measure_chunk(name, number, chunk, model, capture)

    def _finished(self) -> Iterator[tuple[Set, int]]:
        for name, chunks in self._chunks.items():
            for number in range(len(chunks)):
                if f"{name} {number}" in self._work.done:
                    yield name, number

    def _measure_chunk(
        self,
        name: Set,
        number: int,
        chunk: tuple[TokenSequence, ...],
        model: nn.Module,
        capture: Capture,
    ) -> None:
        nll, size = 0.0, self._plan.settings.batch
        for start in range(0, len(chunk), size):
            batch = chunk[start : start + size]
            nll += self._pass(batch, number * CHUNK_SEQUENCES + start, model, capture)
            self._on_event(
                SequencesDone(sequences=len(batch), tokens=sum(len(s.tokens) for s in batch))
            )
        # transformers reads the files by their names, after they were digested; nothing that a
        # model of other bytes gave may count.
        check_in_place(self._checkpoint)
        self._sums[name].finish_chunk()
        self._nll[name] += nll
        self._work.commit([{"name": f"{name} {number}", "nll": nll}])

    def _pass(
        self, batch: Sequence[TokenSequence], first: int, model: nn.Module, capture: Capture
    ) -> float:
        """Pass one batch through the model and back; return its NLL."""
        settings = self._plan.settings
        longest = max(len(sequence.tokens) for sequence in batch)
        # Padding stands behind what is read: in a causal model nothing before it can see it.
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        there = torch.zeros(len(batch), longest, dtype=torch.bool)
        counted = torch.zeros(len(batch), longest, dtype=torch.bool)
        for i, sequence in enumerate(batch):
            length = len(sequence.tokens)
            tokens[i, :length] = torch.tensor(sequence.tokens)
            there[i, :length] = True
            counted[i, sequence.counted - 1 : length - 1] = True
        tokens, there, counted = (t.to(self._device) for t in (tokens, there, counted))
        gram = settings.curvature == "gram"
        capture.begin(len(batch), counted if gram else there, counted)
        options = {} if bool(there.all()) else {"attention_mask": there.long()}
        with (
            torch.set_grad_enabled(not gram),
            torch.autocast(self._device.type, torch.bfloat16, enabled=settings.autocast),
        ):
            logits = model(input_ids=tokens, use_cache=False, **options).logits
        nll = 0.0
        gradient = torch.zeros(0) if gram else torch.empty_like(logits)
        for i in range(len(batch)):
            generator = None
            if settings.curvature == "true-fisher":
                generator = torch.Generator().manual_seed(settings.seed + first + i)
            found, lost = logit_gradient(
                logits[i].detach(), tokens[i], counted[i], generator=generator
            )
            nll += lost
            if not gram:
                gradient[i] = found
        if not gram:
            logits.backward(gradient)
        return nll

    def _write(self, source: str, digests: dict[str, str], *, mode: int) -> dict[str, Any]:
        plan = self._plan
        told: dict[str, dict[str, Any]] = {}
        content: dict[str, str] = {}
        for tensor in plan.tensors:
            entry: dict[str, Any] = {"shape": list(tensor.shape)}
            entry["source_blake3"] = digests[tensor.name]
            for key, values in self._stored(tensor, entry):
                content[key] = blake3(as_bytes(values)).hexdigest()
            told[tensor.name] = entry
        metadata = self._metadata(source, told, content)
        layout = plan_layout((s for t in plan.tensors for s in plan.specs(t)), metadata)
        file = DataFile(self._work, self._work.out.name, layout, mode=mode)
        file.write_header(layout.header)
        for tensor in plan.tensors:
            for key, values in self._stored(tensor, {}):
                stream = TensorStream(file, key)
                stream.write(as_bytes(values))
                stream.finish()
        overlaps = [entry["overlap"] for entry in told.values() if entry["overlap"] is not None]
        if overlaps:
            self._on_event(
                Noted(
                    message=f"factored statistics agree with full ones on "
                    f"{sum(overlaps) / len(overlaps):.0%} of the top {TOP_SHARE:.0%} of weights"
                )
            )
        return {
            "output_bytes": layout.size,
            **{key: value for key, value in metadata.items() if key not in _JSON_KEYS},
            **{key: json.loads(metadata[key]) for key in _JSON_KEYS},
            "perplexity": {
                name: round(math.exp(nll / max(1, plan.sets[name].counted)), 4)
                for name, nll in self._nll.items()
            },
        }

    def _metadata(
        self, source: str, told: dict[str, dict[str, Any]], content: dict[str, str]
    ) -> dict[str, str]:
        with models.quiet_transformers() as transformers:
            version = str(transformers.__version__)
        settings = self._plan.settings
        versions = {"ortho": __version__, "torch": torch.__version__, "transformers": version}
        return {
            "format": statistics.FORMAT,
            "kind": settings.curvature,
            "unit": "token" if settings.curvature == "gram" else settings.unit,
            "storage": settings.storage,
            **(
                {"gram": settings.gram, "weighting": settings.weighting}
                if settings.gram == "full"
                else {}
            ),
            "source_digest": source,
            "data": canonical_json({k: v.to_json() for k, v in self._plan.sets.items()}),
            "recipe": canonical_json(settings.canonical()),
            "versions": canonical_json({**versions, "device": self._device.type}),
            "tensors": canonical_json(told),
            "digests": canonical_json(content),
        }

    def _stored(self, tensor: TensorInfo, entry: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield each part of a weight's statistics as it is stored; describe them in `entry`."""
        settings = self._plan.settings
        gram = settings.curvature == "gram"
        stored = torch.float32 if settings.dtype == "float32" else torch.bfloat16
        module = module_of(tensor.name)
        for name, sums in self._sums.items():
            data = self._plan.sets[name]
            count = data.counted if gram else len(data.sequences)
            for part in self._plan.parts(name):
                mean = torch.empty(self._plan.sum_shape(tensor, part))
                sums.current.read_into(f"{tensor.name}/{part}", as_bytes(mean), start=0)
                key = f"{module}.{name}_{part}"
                if part == "gram":
                    mean /= data.counted
                    symmetrize(mean)
                    yield key, mean
                    continue
                mean /= count
                if (name, part) == ("retain", "curvature"):
                    _describe(tensor, mean, entry, gram=gram)
                if gram:
                    yield key, mean.view(-1)
                elif settings.storage == "factored":
                    rows, columns = factor(mean)
                    yield f"{key}_rows", rows
                    yield f"{key}_columns", columns
                else:
                    yield key, mean.to(stored)


_JSON_KEYS = ("data", "recipe", "versions", "tensors", "digests")


def _describe(tensor: TensorInfo, mean: Tensor, entry: dict[str, Any], *, gram: bool) -> None:
    total = float(mean.double().mean())
    if total == 0.0:
        raise CalibrationError(
            f"no token reached `{tensor.name}`: its curvature is zero everywhere",
            hint="give more data or samples, or add it to `ignore`",
        )
    entry["mean"] = float(f"{total:.6e}")
    entry["overlap"] = None
    if not gram:
        rows, columns = factor(mean)
        entry["overlap"] = round(top_overlap(mean, rows.unsqueeze(1) * columns), 4)
