"""What the benchmarks share: the ceilings of a device, timing, targets, and the file of results.

Time is taken with device events (triton.testing.do_bench: caches cleared before each call, median), every variant
again and again in turn, so that a drift of the clocks meets all of them. A share is the time that the ceilings
measured in the same run allow, over the time taken. Nothing here needs a GPU to be imported.
"""

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from msm_dist.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COPY_BYTES = 4 * 2**30
"""Of the buffer that is copied to find the copy bandwidth: many times any cache."""
MATRIX_SIZE = 8192
WARMUP_MS, REPEAT_MS = 8, 30
"""Of one turn of one variant."""
TURNS = 2


class Ceilings(NamedTuple):
    """What the device reaches in the two things that any kernel consists of."""

    copy: float  # bytes per second, read plus written
    matrix: float  # bfloat16 FLOP per second

    def floor_ms(self, num_bytes: float, flops: float = 0.0) -> float:
        """The least time for so many bytes and FLOPs: the longer of the two."""
        return 1e3 * max(num_bytes / self.copy, flops / self.matrix)


class Timing(NamedTuple):
    """Median of a variant's turns, and how far apart they were: a difference smaller than that is noise."""

    ms: float
    spread: float  # (slowest - fastest turn) / median


class Check(NamedTuple):
    """A kernel compared with the reference."""

    what: str
    error: float
    tolerance: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.tolerance  # also for a NaN


@dataclass(frozen=True)
class Target:
    """A ratio that is promised: `reached` must be at least `wanted`, or at most where `at_most`."""

    what: str
    wanted: float
    reached: float | None  # none: could not be measured
    at_most: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return "not measured"
        # Also for a NaN.
        met = self.reached <= self.wanted if self.at_most else self.reached >= self.wanted
        return "met" if met else "NOT met"

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


class Budget:
    """Minutes that a script may take: what does not begin in time is left out, by name."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._end = clock() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether `what`, which takes about `seconds`, may begin; else it is noted and said."""
        if self._clock() + seconds <= self._end:
            return True
        self.left_out.append(what)
        print(f"left out for lack of time: {what}", flush=True)
        return False


def say_no_gpu(script: str) -> bool:
    """Whether there is no GPU here, which is then said in one line."""
    if torch.cuda.is_available():
        return False
    print(f"{script}: there is no GPU: skipped", flush=True)
    return True


def measure_ceilings() -> Ceilings:
    """Copy bandwidth over a buffer of gigabytes and the rate of a large bfloat16 product of random matrices."""
    return Ceilings(_copy_rate(), _matrix_rate())


def take_turns(variants: Mapping[str, Callable[[], Any]], repeat_ms: float = REPEAT_MS) -> dict[str, Timing]:
    """Time every variant, A B A B. Inputs must not be zeros, and larger than the cache or rotated."""
    from triton.testing import do_bench

    turns: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(TURNS):
        for name, function in variants.items():
            turns[name].append(do_bench(function, warmup=WARMUP_MS, rep=repeat_ms, return_mode="median"))
    return {name: summarize(times) for name, times in turns.items()}


def summarize(times: Sequence[float]) -> Timing:
    """Turns of one variant, in ms."""
    median = statistics.median(times)
    return Timing(median, (max(times) - min(times)) / median)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most device memory that a call, not the first one, takes beyond what is allocated before it."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """||value - exact|| / ||exact|| in float64; infinite where a value is not finite or the shapes differ."""
    if value.shape != exact.shape or not value.isfinite().all():
        return float("inf")
    value, exact = value.detach().double(), exact.detach().double()
    return ((value - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Inside, torch.empty and its kin hand out NaN (integers: their lowest), so that what no kernel writes shows."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

        return filled

    try:
        for name, make in originals.items():
            setattr(torch, name, poisoned(make))
        yield
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)


def write_results(folder: Path, subject: str, content: Mapping[str, Any]) -> Path:
    """Write `content` with the facts about this machine to <folder>/<subject>-<device>.json, all or nothing."""
    about = environment()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{subject}-{slug(about['device'])}.json"
    write_atomically(path, json.dumps({"subject": subject, **about, **content}, indent=1) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Device, driver, versions, commit, date."""
    on_gpu = torch.cuda.is_available()
    commit, dirty = source_state(ROOT)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if on_gpu else None,
        "driver": _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "deepspeed": _version("deepspeed"),
        "commit": commit,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def source_state(root: Path) -> tuple[str, bool | None]:
    """The commit that is measured and whether files differ from it.

    Outside a clone: what MSM_COMMIT says, or "unknown". Results themselves may differ: they are being written.
    """
    if (root / ".git").exists() and (commit := _said(["git", "-C", str(root), "rev-parse", "HEAD"])):
        changes = _said(["git", "-C", str(root), "status", "--porcelain", "--", ".", ":!benchmarks/results"])
        return commit, changes != ""
    return os.environ.get("MSM_COMMIT", "unknown"), None


def slug(device: str) -> str:
    """A device's name as part of a file name: NVIDIA H200 is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as text in columns: the first to the left, the others to the right."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) if number else text.ljust(width) for number, (text, width) in enumerate(line))
        for line in (zip(row, widths, strict=True) for row in cells)
    )


def targets_table(targets: Sequence[Target]) -> str:
    """Target, reached, met or not."""
    rows = [
        (target.what, f"{'<=' if target.at_most else '>='} {target.wanted:g}", target.reached, target.verdict)
        for target in targets
    ]
    return table(("target", "wanted", "reached", "verdict"), rows)


def ceilings_line(ceilings: Ceilings) -> str:
    return (
        f"ceilings of this run: copy {ceilings.copy / 1e12:.2f} TB/s (read + written), "
        f"bf16 matrix product {ceilings.matrix / 1e12:.0f} TFLOP/s"
    )


def _copy_rate() -> float:
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    timing = take_turns({"copy": lambda: target.copy_(source)})["copy"]
    return 2e3 * COPY_BYTES / timing.ms


def _matrix_rate() -> float:
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    timing = take_turns({"product": lambda: torch.mm(left, right, out=product)}, repeat_ms=200)["product"]
    return 2e3 * MATRIX_SIZE**3 / timing.ms


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(command: Sequence[str]) -> str | None:
    """What a command prints; none where it can't run."""
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return child.stdout.strip() if child.returncode == 0 else None
