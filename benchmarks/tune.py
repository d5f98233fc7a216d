"""Measure launch configurations and write the table that the kernels read: kernels/configurations.json.

For each kernel that the shapes of the benchmarks use: a bounded list of configurations around its default. They are
compiled by several processes at once into Triton's cache; one that doesn't compile or doesn't fit the chip is skipped,
one whose result is wrong at any length of its shape class too. The fastest few are measured again, in turn with the
default, and the default stays unless another is clearly faster. Before the table replaces the old one, every kernel is
checked with it at full size. Nothing here runs in `make bench`, and nothing is tuned in training.
"""

import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import attention, masking
from benchmarks.measure import Budget, environment, take_turns
from msm_dist.files import write_atomically
from msm_kernels import attention as attention_kernels
from msm_kernels import configurations, reference

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
MOST_CANDIDATES = 48
CHECKED_CLIPS = 24
WORKER_BYTES = 8e9  # of device memory, at most, for a process that compiles: some kernels are others at full size
FINALISTS = 3
WORTH = 0.99
"""A configuration replaces the default if it takes less than this share of the default's time."""
KERNEL_SECONDS = 20.0
WARPS, STAGES, LOOPS, ROWS = (1, 2, 4, 8, 16), (1, 2, 3, 4), (1, 2, 4, 8), (16, 32, 64, 128)
LARGEST_BLOCK = 256


class Case(NamedTuple):
    """One call that is timed: a phase of an op at a shape."""

    shape: attention.Shape | masking.Shape
    op: str
    phase: str  # "forward" or "backward"

    def __str__(self) -> str:
        return f"{self.op} {self.phase}, {getattr(self.shape, 'what', self.shape)}"


class Asked(NamedTuple):
    """What a launcher asked the table for."""

    kernel: str
    shape_class: str
    dtype: torch.dtype
    default: tuple

    @property
    def key(self) -> tuple[str, str, torch.dtype]:
        """An entry of the table."""
        return self.kernel, self.shape_class, self.dtype


class Subject(NamedTuple):
    """A kernel and shape class, and the calls that decide."""

    asked: Asked
    cases: list[Case]


def tune(budget: Budget, path: Path = configurations.TABLE) -> int:
    """Measure, choose, check, write; the exit code."""
    found = subjects()
    print(f"{len(found)} kernels and shape classes", flush=True)
    chosen: dict[tuple[str, str, torch.dtype], tuple] = {}
    memory = torch.cuda.get_device_properties(DEVICE).total_memory
    workers = max(1, min(16, os.cpu_count() or 1, int(0.7 * memory / WORKER_BYTES)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for subject in found:
            asked = subject.asked
            if budget.allows(f"{asked.kernel} {asked.shape_class}", KERNEL_SECONDS):
                chosen[asked.key] = choose(subject, pool)
    capability = configurations.capability(DEVICE)
    about = {name: value for name, value in environment().items() if name not in ("capability", "deepspeed")}
    table = merged(json.loads(path.read_text(encoding="utf-8")), capability, about, chosen)
    from benchmarks.kernels import check_all, report_wrong

    with answering(lambda asked: chosen.get(asked.key, asked.default)):
        if report_wrong(check_all(DEVICE, DTYPE, torch.seed() % 2**31)):
            return 1
    write_table(table, path)
    print(f"written: {path}, {len(chosen)} entries for capability {capability}", flush=True)
    return 0


def subjects() -> list[Subject]:
    """Every kernel that the shapes use, found by listening to what the launchers ask."""
    found: dict[tuple[str, str, torch.dtype], Subject] = {}
    for case in all_cases():
        heard: list[Asked] = []

        def listen(asked: Asked, heard: list[Asked] = heard) -> tuple:
            heard.append(asked)
            return asked.default

        call = prepare(case, CHECKED_CLIPS)
        with answering(listen):
            call()
        for asked in dict.fromkeys(heard):
            found.setdefault(asked.key, Subject(asked, [])).cases.append(case)
    return list(found.values())


def all_cases() -> Iterator[Case]:
    """The phases of every op, those of the base model first."""
    for shape in attention.SHAPES:
        yield Case(shape, "attention", "forward")
        yield Case(shape, "attention", "backward")
    for shape in masking.SHAPES:
        yield Case(shape, "mask", "forward")
        for op in masking.DIFFERENTIABLE:
            yield Case(shape, op, "forward")
            yield Case(shape, op, "backward")


def choose(subject: Subject, pool: ProcessPoolExecutor) -> tuple:
    """The fastest right configuration of one kernel."""
    asked, cases = subject
    least = max((tokens for case in cases for tokens in lengths(case)), default=0)
    tried = candidates(asked.default, least)
    compiled = list(pool.map(partial(compile_configured, asked, cases), tried))
    right = []
    for config, fault in zip(tried, compiled, strict=True):
        fault = fault or wrong(asked, config, cases)
        if fault and config == asked.default:
            raise RuntimeError(f"{asked.kernel} {asked.shape_class}: the default {config}: {fault}")
        if fault:
            print(f"  {asked.kernel} {asked.shape_class}: {tuple(config)} skipped: {fault}", flush=True)
        else:
            right.append(config)
    calls = [prepare(case, case.shape.clips) for case in cases]
    rough = relative_times(asked, calls, right, repeat_ms=12)
    finalists = sorted((config for config in right if config != asked.default), key=rough.__getitem__)[:FINALISTS]
    precise = relative_times(asked, calls, [asked.default, *finalists], repeat_ms=60)
    best = fastest(asked.default, precise)
    if best != asked.default and (fault := wrong(asked, best, cases, full=True)):
        print(f"  {asked.kernel} {asked.shape_class}: {tuple(best)} wrong at full size: {fault}", flush=True)
        best = asked.default
    print(
        f"{asked.kernel} {asked.shape_class}: {best}, {precise[best]:.3f} of the default's time "
        f"({len(right)} of {len(tried)} tried)",
        flush=True,
    )
    del calls
    torch.cuda.empty_cache()
    return best


def fastest(default: tuple, times: Mapping[tuple, float]) -> tuple:
    """The fastest, unless the default is about as fast."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < WORTH * times[default] else default


def relative_times(
    asked: Asked, calls: Sequence[Callable[[], Any]], configs: Sequence[tuple], repeat_ms: float
) -> dict[tuple, float]:
    """Time of each configuration over that of the first, by geometric mean over the calls."""
    ratios: dict[tuple, list[float]] = {config: [] for config in configs}
    for call in calls:
        variants = {config: partial(_under, asked, config, call) for config in configs}
        timings = take_turns(variants, repeat_ms)
        for config in configs:
            ratios[config].append(timings[config].ms / timings[configs[0]].ms)
    return {config: prod(found) ** (1 / len(found)) for config, found in ratios.items()}


def candidates(default: tuple, longest: int) -> list[tuple]:
    """Configurations around a default, the nearest first; `longest`: tokens that a tile of attention must hold."""
    fields = {name: _choices(name, value) for name, value in default._asdict().items()}
    if "tail" in fields:
        del fields["rows"], fields["tail"]
        settings = [{"rows": rows, "tail": tail} for rows, tail in _tiles(default, longest)]
    else:
        settings = [{}]
    every = [
        default._replace(**dict(zip(fields, values, strict=True)), **tile)
        for values in itertools.product(*fields.values())
        for tile in settings
    ]
    # A single pass has nothing to overlap.
    every = [c for c in every if getattr(c, "loops", 2) > 1 or c.num_stages == default.num_stages]
    every.sort(key=lambda config: sum(one != other for one, other in zip(config, default, strict=True)))
    return every[:MOST_CANDIDATES]


def lengths(case: Case) -> list[int]:
    """The shortest and longest sequence of a case's shape class and regime; none outside attention."""
    if not isinstance(case.shape, attention.Shape):
        return []
    tokens, _, head_dim, _ = case.shape
    key = _class_of(tokens, head_dim)
    same = [n for n in range(1, attention_kernels.LONGEST + 1) if _class_of(n, head_dim) == key]
    return [same[0], same[-1]]


def wrong(asked: Asked, config: tuple, cases: Sequence[Case], full: bool = False) -> str | None:
    """Why results under a configuration are wrong, at the shapes and both ends of their class; none if they are right.

    For a few clips or, with `full`, for as many as are timed.
    """
    seed = torch.seed() % 2**31
    with answering(partial(_override, asked, config)):
        try:
            for case in cases:
                for shape in (case.shape, *(case.shape._replace(tokens=n) for n in lengths(case))):
                    module = attention if isinstance(shape, attention.Shape) else masking
                    for check in module.check(shape, case.shape.clips if full else CHECKED_CLIPS, DTYPE, DEVICE, seed):
                        if check.wrong:
                            return f"{check.what}: error {check.error:.1e}"
        except Exception as fault:  # whatever the compiler or the launch raises
            return _first_line(fault)
    return None


def compile_in_parallel(cases: Sequence[Case]) -> None:
    """Put the kernels of some calls into Triton's cache; a fault shows when they are called."""
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for case, fault in zip(cases, pool.map(compile_case, cases), strict=True):
            if fault:
                print(f"{case} can't be compiled: {fault}", flush=True)


def compile_case(case: Case) -> str | None:
    """In a process of its own: put the kernels of a call into Triton's cache; why it can't be, if so."""
    try:
        prepare(case, case.shape.clips)()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as fault:  # whatever the compiler or the launch raises: it is reported
        return _first_line(fault)
    return None


def compile_configured(asked: Asked, cases: Sequence[Case], config: tuple) -> str | None:
    """The same for several calls under a configuration."""
    with answering(partial(_override, asked, config)):
        faults = [compile_case(case) for case in cases]
    return next(filter(None, faults), None)


def prepare(case: Case, clips: int) -> Callable[[], Any]:
    """The call of a case on random inputs; a backward runs on the graph of one forward."""
    if isinstance(case.shape, attention.Shape):
        tensors = attention.inputs(case.shape, clips, DTYPE, DEVICE, seed=0)
        return attention.call(attention.OUR_ATTENTION, case.phase, *tensors, case.shape.heads)
    x = masking.draw(case.shape, clips, DTYPE, DEVICE, seed=0)
    chosen = reference.random_masking(masking.SEED, x.sample_ids, case.shape.num_patches, case.shape.num_keep)
    op = masking.our_ops(case.shape, x, chosen, "triton")[case.op]
    return op.forward if case.phase == "forward" else op.backward()


@contextmanager
def answering(answer: Callable[[Asked], tuple]) -> Iterator[None]:
    """Inside, launchers that ask the table get `answer(asked)`."""

    def configuration(kernel: str, shape_class: str, dtype: torch.dtype, device: torch.device, default: tuple) -> tuple:
        return answer(Asked(kernel, shape_class, dtype, default))

    modules = [module for name, module in sys.modules.items() if name.startswith("msm_kernels.")]
    asking = {module: module.configuration for module in modules if hasattr(module, "configuration")}
    try:
        for module in asking:
            module.configuration = configuration
        yield
    finally:
        for module, original in asking.items():
            module.configuration = original


def merged(
    table: Mapping[str, Any],
    capability: str,
    about: Mapping[str, Any],
    chosen: Mapping[tuple[str, str, torch.dtype], tuple],
) -> dict[str, Any]:
    """The table with new entries for one capability; its others, and what was not measured again, stay."""
    result = json.loads(json.dumps(table))
    mine = result.setdefault(capability, {})
    mine["measured"] = dict(about)
    for (kernel, shape_class, dtype), config in chosen.items():
        mine.setdefault(kernel, {}).setdefault(shape_class, {})[str(dtype).removeprefix("torch.")] = config._asdict()
    return result


def write_table(table: Mapping[str, Any], path: Path) -> None:
    """Replace the table, and forget the one that was read."""
    write_atomically(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
    configurations.table.cache_clear()


def _under(asked: Asked, config: tuple, call: Callable[[], Any]) -> Any:
    with answering(partial(_override, asked, config)):
        return call()


def _override(asked: Asked, config: tuple, question: Asked) -> tuple:
    """`config` for the kernel in question at any default of its type, the default for all others."""
    return config if question.key == asked.key else question.default


def _choices(name: str, value: int) -> list[int]:
    if name == "num_warps":
        return [warps for warps in WARPS if value // 2 <= warps <= 2 * value]
    if name == "num_stages":
        return list(STAGES)
    if name == "loops":
        return list(LOOPS)
    return [size for size in (value // 2, value, 2 * value) if 1 <= size <= max(LARGEST_BLOCK, value)]


def _tiles(default: tuple, longest: int) -> list[tuple[int, int]]:
    """Rows and tail that hold the longest sequence of a class: whole powers of two, or two of them with little room."""
    whole = [(rows, 0) for rows in ROWS if longest <= rows]
    split = [(rows, tail) for rows in ROWS for tail in ROWS if tail <= rows < longest <= rows + tail]
    return sorted({(default.rows, default.tail), *whole, *split})


def _class_of(tokens: int, head_dim: int) -> tuple[str, str]:
    return attention_kernels.shape_class(tokens, head_dim), attention_kernels.regime(tokens, head_dim, DTYPE)


def _first_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0][:120]}"
