"""Predicted against measured: memory of a rank and bytes of its collectives, for every ZeRO stage.

    python -m benchmarks.memory [--world 2] [--json FILE]

starts so many gloo processes (or NCCL ones, where there are GPUs, of which each takes one) that train a small model for
a few steps per case, and prints a table of what `msm_dist.memory` predicts beside what was measured. With GPUs every
case has processes of its own: a ZeRO-3 engine does not give its memory back at its end. On a CPU the measure is torch's
profiler, which reports every allocation and release of the CPU allocator, also those inside an operator; on a GPU it is
torch.cuda.max_memory_allocated. Bytes of collectives are DeepSpeed's own communication log.
"""

import argparse
import bisect
import functools
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msm_configs
import torch

from msm_dist import costs
from msm_dist.config import Config, batch_layout, parse_config
from msm_dist.memory import memory_of

MODEL = {
    "embed_dim": 384,
    "depth": 6,
    "num_heads": 6,
    "decoder_embed_dim": 192,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}
BUCKETS = {"reduce_bucket_size": 2_000_000, "stage3_prefetch_bucket_size": 1_000_000}
"""Elements: small beside the model's 11.8 million, so that states and not buckets decide."""
LOGGED = {
    "all_reduce": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
}
MEASURED_STEPS = 3
SETTLE_SECONDS = 5.0
LAST_WORDS = 4000
"""Characters of a failed rank's output that are shown."""
SMALLEST_MESSAGE = 1024
"""Bytes: below are norms and flags, which no formula counts."""


@dataclass(frozen=True)
class Case:
    """One way to train the small model."""

    stage: int
    precision: str
    offload: str = "none"
    checkpointing: bool = False
    accumulation: int = 2
    micro_batch: int = 8
    zero: Mapping[str, Any] = field(default_factory=lambda: BUCKETS)
    """Settings of `zero_optimization` over those of configs/deepspeed."""
    model: Mapping[str, Any] = field(default_factory=lambda: MODEL)

    @property
    def name(self) -> str:
        words = [self.model.get("size", ""), f"ZeRO {self.stage}", self.precision]
        words += [f"offload {self.offload}"] * (self.offload != "none")
        words += ["checkpointing"] * self.checkpointing
        words += [f"micro-batch {self.micro_batch} x {self.accumulation}"]
        words += [label for label, zero in (("shipped buckets", {}), ("short lives", SHORT_LIVES)) if self.zero == zero]
        return ", ".join(filter(None, words))


SHORT_LIVES = BUCKETS | {"stage3_max_live_parameters": 3_000_000, "stage3_max_reuse_distance": 3_000_000}
CASES = (
    Case(0, "fp32"),
    *(Case(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")),
    *(Case(stage, "bf16", "optimizer") for stage in (1, 2, 3)),
    Case(3, "bf16", "parameters"),
    Case(2, "bf16", zero={}),
    # Activations decide the peak.
    Case(1, "fp32", accumulation=1, micro_batch=32),
    Case(2, "bf16", accumulation=1, micro_batch=32),
    Case(3, "bf16", accumulation=1, micro_batch=32),
    Case(3, "fp32", accumulation=1, micro_batch=32, zero=SHORT_LIVES),
    Case(1, "bf16", accumulation=1, micro_batch=64, checkpointing=True),
    Case(3, "fp32", accumulation=1, micro_batch=64, checkpointing=True, zero=SHORT_LIVES),
)

BASE = {"model": {"size": "base"}, "micro_batch": 256, "zero": {}}
GPU_CASES = (
    *(Case(stage, "bf16", **BASE) for stage in (1, 2, 3)),
    Case(1, "fp32", **BASE),
    Case(2, "bf16", accumulation=1, **BASE),
    Case(2, "bf16", "optimizer", **BASE),
    Case(3, "bf16", "parameters", **BASE),
    Case(1, "bf16", checkpointing=True, accumulation=1, **BASE | {"micro_batch": 1024}),
    Case(3, "bf16", checkpointing=True, accumulation=1, **BASE | {"micro_batch": 1024}),
)
"""Large enough for cuBLAS' workspaces not to count."""
ALL_CASES = CASES + GPU_CASES


def configuration(case: Case, world_size: int, folder: Path) -> Config:
    """The run of a case; its DeepSpeed file is written to `folder`."""
    offload = "" if case.offload == "none" else f"_offload_{case.offload}"
    shipped = Path(msm_configs.__path__[0]) / "deepspeed" / f"zero{case.stage}{offload}.json"
    values = json.loads(shipped.read_text())
    values["zero_optimization"] |= case.zero
    path = folder / f"{os.getpid()}.json"
    path.write_text(json.dumps(values))
    return parse_config(
        {
            "data": {"block": case.micro_batch},
            "model": case.model | {"activation_checkpointing": case.checkpointing},
            "optim": {"lr": 1e-4, "clip_norm": 1.0},
            "train": {
                "steps": 3,
                "precision": case.precision,
                "micro_batch": case.micro_batch,
                "global_batch": case.micro_batch * case.accumulation * world_size,
            },
            "engine": {"deepspeed": str(path)},
        },
        "benchmarks.memory",
    )


def predict(case: Case, cfg: Config, world_size: int, gpu: bool) -> dict[str, float]:
    """What is predicted of a case. On a CPU, host and device are one memory."""
    from msm_dist.planning import parameter_shapes, tensor_bytes

    values = json.loads(Path(cfg.engine.deepspeed).read_text())["zero_optimization"]
    zero = costs.zero_settings(values)
    spread = costs.Spread(world_size, case.accumulation, case.precision, case.checkpointing, gpu)
    model = costs.parts(cfg, parameter_shapes(cfg), gpu)
    memory = memory_of(model, zero, spread, tensor_bytes(cfg))
    host = 0 if gpu else memory.offloaded
    traffic = costs.traffic(model, zero, spread)
    return {
        "steady": memory.steady + host,
        "accumulating": (memory.accumulating if case.accumulation > 1 else memory.steady) + host,
        "peak": memory.peak + host,
        "all_reduce": traffic.all_reduce,
        "reduce_scatter": traffic.reduce_scatter,
        "all_gather": traffic.all_gather,
    }


def measure(cfg: Config, device: torch.device, world_size: int) -> dict[str, float]:
    """Train a few steps; bytes of this rank between steps, between micro-batches and at most in a step."""
    from deepspeed import comm

    from msm_dist.engine import zero
    from msm_dist.model.mae import MaskedSpectrogramModel

    layout = batch_layout(cfg, world_size)
    meter = CudaMeter(device) if device.type == "cuda" else CpuMeter()
    with meter.running():
        model = MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, cfg.data.crop_frames, cfg.seed)
        engine = zero.build_engine(model, cfg, layout, device)
        shape = (cfg.train.micro_batch, 1, cfg.features.n_mels, cfg.data.crop_frames)
        spectrogram = torch.randn(shape, device=device)
        sample_ids = torch.zeros(cfg.train.micro_batch, 3, dtype=torch.int64, device=device)
        # The first update makes the moments; stage 3 learns the order of the modules in its first two micro-batches.
        for _ in range(2 if layout.accumulation == 1 else 1):
            step_of(engine, layout.accumulation, spectrogram, sample_ids)
        gc.collect()
        for number in range(MEASURED_STEPS):
            meter.mark(f"first {number}")
            step_of(engine, layout.accumulation - 1, spectrogram, sample_ids)
            meter.mark(f"last {number}")
            step_of(engine, 1, spectrogram, sample_ids)
            meter.mark(f"end {number}")
    # In a step of its own: on a GPU the log waits for every collective, which changes what is held meanwhile.
    comm.configure(enabled=True, prof_all=True, verbose=False)
    comm.comm.comms_logger.comms_dict.clear()
    step_of(engine, layout.accumulation, spectrogram, sample_ids)
    messages = logged(comm.comm.comms_logger.comms_dict)
    comm.configure(enabled=False)
    engine.destroy()
    live, peaks = meter.live, meter.peaks
    numbers = range(MEASURED_STEPS)
    # What a meter does not see released it counts on: the least of several steps is nearest to what is held.
    return {
        "steady": min(live[f"end {number}"] for number in numbers),
        "accumulating": min(live[f"last {number}"] for number in numbers),
        "peak": min(max(peaks[f"first {number}"], peaks[f"last {number}"]) for number in numbers),
        **messages,
    }


def step_of(engine: Any, num_micro_batches: int, spectrogram: torch.Tensor, sample_ids: torch.Tensor) -> None:
    """Forward, backward and step of so many micro-batches."""
    for _ in range(num_micro_batches):
        engine.backward(engine(spectrogram, sample_ids=sample_ids).loss)
        engine.step()


def logged(comms: Mapping[str, Mapping[int, Sequence[Any]]]) -> dict[str, float]:
    """Bytes by collective in DeepSpeed's log: {operation: {message bytes: [calls, ...]}}. Raises on an unknown one."""
    totals = dict.fromkeys(LOGGED.values(), 0.0)
    for operation, messages in comms.items():
        for size, (calls, *_) in messages.items():
            if size >= SMALLEST_MESSAGE:
                totals[LOGGED[operation]] += size * calls
    return totals


class CudaMeter:
    """Bytes of tensors on a GPU, over those at the start."""

    def __init__(self, device: torch.device):
        self.device = device
        self.live: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._name: str | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        self._base = torch.cuda.memory_allocated(self.device)
        yield

    def mark(self, name: str) -> None:
        """End the phase before and begin one."""
        if self._name:
            self.peaks[self._name] = torch.cuda.max_memory_allocated(self.device) - self._base
        torch.cuda.reset_peak_memory_stats(self.device)
        self.live[name], self._name = torch.cuda.memory_allocated(self.device) - self._base, name


class CpuMeter:
    """Bytes of the CPU allocator, from the profiler's record of allocations.

    The profiler does not see what gloo's threads release. So a collective is waited for until they have let go of its
    tensors (`_settled`); what it made for itself is dropped then, and anything of which the address is given out again.
    """

    MARK = "meter: "
    SETTLED = f"{MARK}settled"

    def __init__(self):
        self.live: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        with _settled(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            torch.empty(1)
            yield
        self._replay(profiler.profiler.kineto_results.experimental_event_tree())

    def mark(self, name: str) -> None:
        """End the phase before and begin one."""
        with torch.profiler.record_function(self.MARK + name):
            pass

    def _replay(self, tree: Sequence[Any]) -> None:
        total, phase = 0, ""
        sizes: dict[int, int] = {}
        addresses: list[int] = []
        own: set[int] = set()  # made by a collective for itself

        def drop(address: int) -> int:
            addresses.pop(bisect.bisect_left(addresses, address))
            own.discard(address)
            return sizes.pop(address)

        for event in sorted(_events(tree), key=lambda event: event[0]):
            _, name, address, size, in_collective = event
            if name is not None:
                total -= sum(drop(temporary) for temporary in list(own))
                if name != self.SETTLED:
                    phase = name.removeprefix(self.MARK)
                    self.live[phase] = self.peaks[phase] = total
            elif size < 0:
                total -= drop(address) if address in sizes else 0
            else:
                first = bisect.bisect_left(addresses, address)
                if first and addresses[first - 1] + sizes[addresses[first - 1]] > address:
                    first -= 1
                while first < len(addresses) and addresses[first] < address + size:
                    total -= drop(addresses[first])
                addresses.insert(first, address)
                sizes[address] = size
                total += size
                if in_collective:
                    own.add(address)
                self.peaks[phase] = max(self.peaks.get(phase, 0), total)


@contextmanager
def _settled() -> Iterator[None]:
    """Let every collective of DeepSpeed return only when gloo's threads hold its tensors no more."""
    from deepspeed.comm.comm import cdb

    originals = {name: getattr(cdb, name) for name in ("all_reduce", "all_gather_function", "reduce_scatter_function")}
    for name, collective in originals.items():
        setattr(cdb, name, functools.partial(_settle, collective))
    try:
        yield
    finally:
        for name, collective in originals.items():
            setattr(cdb, name, collective)


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


def _settle(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
    before = [tensor._use_count() for tensor in tensors]
    work = collective(*arguments, **options)
    if work is not None:
        work.wait()
        work = _Done()  # the work itself holds the tensors too
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(tensor._use_count() > count for tensor, count in zip(tensors, before, strict=True)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"gloo still holds the tensors of {collective} after {SETTLE_SECONDS} s")
        time.sleep(0.0002)
    with torch.profiler.record_function(CpuMeter.SETTLED):
        return work


def _events(tree: Sequence[Any]) -> Iterator[tuple[int, str | None, int, int, bool]]:
    """Time, mark, address, bytes (negative: released) and whether a collective asked for it."""
    from torch._C._profiler import _EventType

    waiting = [(event, False) for event in tree]
    while waiting:
        event, in_collective = waiting.pop()
        kind, details = event.typed
        if kind == _EventType.Allocation:
            yield event.start_time_ns, None, details.ptr, details.alloc_size, in_collective
            continue
        if event.name.startswith(CpuMeter.MARK):
            yield event.start_time_ns, event.name, 0, 0, False
        inside = in_collective or event.name.startswith("c10d::")
        waiting += [(child, inside) for child in event.children]


def as_rank(cases: Sequence[Case], output: Path) -> None:
    """Measure all cases as one rank of several; rank 0 writes predicted and measured values to `output`."""
    from msm_dist.engine.world import join_world, leave_world

    world = join_world(timeout_minutes=5)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            cfg = configuration(case, world.size, Path(folder))
            predicted = predict(case, cfg, world.size, world.device.type == "cuda")
            rows.append({"case": case.name, "predicted": predicted, "measured": measure(cfg, world.device, world.size)})
    if world.is_main:
        output.write_text(json.dumps(rows))
    leave_world()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: MB predicted, measured, and how far the first is off."""
    lines = ["| case | steady | between micro-batches | peak | messages |", "| --- | --- | --- | --- | --- |"]

    def both(row: Mapping[str, Any], name: str) -> str:
        predicted, measured = row["predicted"][name], row["measured"][name]
        return f"{predicted / 1e6:.1f} / {measured / 1e6:.1f} ({predicted / measured - 1:+.1%})"

    for row in rows:
        messages = [f"{name} {both(row, name)}" for name in LOGGED.values() if row["measured"][name]]
        cells = [row["case"], *(both(row, name) for name in ("steady", "accumulating", "peak")), "; ".join(messages)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def wrong(rows: Sequence[Mapping[str, Any]], bounds: Mapping[str, float]) -> list[str]:
    """What is predicted worse than its bound, relative to what was measured."""
    return [
        f"{row['case']}: {name}"
        for row in rows
        for name, bound in bounds.items()
        if abs(row["predicted"][name] - row["measured"][name]) > bound * row["measured"][name]
    ]


def run(cases: Sequence[Case], world_size: int, output: Path) -> None:
    """Measure the cases, with GPUs each in processes of its own. Raises CalledProcessError when one fails."""
    groups = [[case] for case in cases] if torch.cuda.is_available() else [cases]
    rows = []
    for group in groups:
        _run_together(group, world_size, output)
        rows += json.loads(output.read_text())
    output.write_text(json.dumps(rows))


def _run_together(cases: Sequence[Case], world_size: int, output: Path) -> None:
    """Start the ranks and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    numbers = ",".join(str(ALL_CASES.index(case)) for case in cases)
    command = [sys.executable, "-m", "benchmarks.memory", "--as-rank", numbers, "--json", str(output)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(world_size)]
        ranks = []
        for rank, path in enumerate(said):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
            environment = os.environ | {name: str(value) for name, value in place.items()}
            with path.open("wb") as file:
                ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            time.sleep(0.1)
        for rank, path in zip(ranks, said, strict=True):
            # One that waits for one that failed would wait for minutes.
            rank.kill()
            rank.wait()
            if rank.returncode:
                sys.stderr.write(path.read_text(errors="replace")[-LAST_WORDS:])
    if failed := [rank.returncode for rank in ranks if rank.returncode]:
        raise subprocess.CalledProcessError(failed[0], command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or act as one rank of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = min(2, torch.cuda.device_count() or 2)
    parser.add_argument("--world", type=int, default=default, help="number of processes; a GPU each")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.as_rank:
        as_rank([ALL_CASES[int(number)] for number in given.as_rank.split(",")], given.json)
        return
    with tempfile.TemporaryDirectory() as folder:
        output = given.json or Path(folder) / "memory.json"
        run(GPU_CASES if torch.cuda.is_available() else CASES, given.world, output)
        print(table(json.loads(output.read_text())))


if __name__ == "__main__":
    main()
