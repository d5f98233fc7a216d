"""Whether a long run grows: `python -m benchmarks.soak`, 10,000 steps of a tiny model with all that a run does beside.

Two ranks under torchrun, a loader process each, on the embedded corpus; checkpoints, TensorBoard with pictures and
sounds, validation and the online probe are on, many times more often than a long run has them, so that 10,000 steps
hold as many of each as weeks would. Beside it every process of the run is looked at once a second through /proc:
memory of its own, shared memory, open files, threads; and how many processes there are. Out: a line per thousand steps,
benchmarks/results/soak-cpu.json, and exit code 1 where something has grown between the second tenth of the run and the
last one by more than `BOUNDS` allow. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import RESULTS, ROOT, table, write_results

STEPS, RANKS, TENTHS = 10_000, 2, 10
PERIOD_SECONDS = 1.0
SETTLED = 1
"""The tenth that the last one is compared with: by the end of the first all parts of a run have been at work."""
MIB = 2**20
BOUNDS = {"memory_mib": 8.0, "shared_mib": 1.0, "files": 4, "threads": 0, "processes": 0}
"""What the sum over all processes may grow by in nine tenths of the run. Of memory: less than a KiB a step, which would
be 100 MiB for the 100,000 steps of base. Of files: batches on their way between two processes."""
SETTINGS = {
    "extends": "quickstart.yaml",
    "train": {
        "global_batch": 16,
        "micro_batch": 8,
        "log_every": 20,
        "valid_every": 200,
        "valid_clips": 16,
        "pictures_every": 500,
    },
    "checkpoint": {"every": 100, "keep": 2},
    "data": {"num_workers": 1, "crop_frames": 96, "block": 4, "shuffle_window": 16},
    "model": {
        "size": None,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "decoder_embed_dim": 16,
        "decoder_depth": 1,
        "decoder_num_heads": 2,
    },
    "optim": {"base_lr": None, "lr": 1e-3, "warmup_steps": 100, "warmup_epochs": None},
    "probe": {"every": 500, "clips": 24},
}


class Sample(NamedTuple):
    """All processes of a run at one moment, by sum."""

    step: int
    seconds: float
    memory_mib: float  # anonymous pages, each process its share
    largest_mib: float  # those of the process that has most of them
    shared_mib: float  # what loaders hand over in /dev/shm
    files: int
    threads: int
    processes: int


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 where the run fails or grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run ({STEPS})")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak", help="folder for clips and run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        config = prepare(Path(folder), options.steps)
        code, samples = watch(config, Path(folder) / "runs" / "soak", options.steps)
    if code:
        print(f"benchmarks.soak: the run ended with exit code {code}; its last lines are above")
        return 1
    tenths = by_tenth(samples, options.steps)
    grown = growth(tenths)
    too_much = {name: value for name, value in grown.items() if value > BOUNDS[name]}
    content = {
        "device": "CPU",
        "steps": options.steps,
        "ranks": RANKS,
        "settings": SETTINGS,
        "samples": len(samples),
        "tenths": [sample._asdict() for sample in tenths],
        "growth": grown,
        "bounds": BOUNDS,
        "flat": not too_much,
    }
    path = write_results(options.out, "soak", content)
    said = ", ".join(f"{name} {value:+g} (bound {BOUNDS[name]:g})" for name, value in grown.items())
    print(f"{lines(tenths)}\nfrom the second tenth to the last: {said}\nwritten: {path}")
    if too_much:
        print(f"benchmarks.soak: grows: {', '.join(too_much)}")
    return int(bool(too_much))


def prepare(folder: Path, steps: int) -> Path:
    """Clips, shards, a labelled task and the configuration of the run."""
    command = [sys.executable, "-m", "msm_dist", "data"]
    for words in (
        ["synth", "clips", "--clips", "200", "--valid-clips", "40"],
        ["pack", "clips/train", "train"],
        ["pack", "clips/valid", "valid"],
        ["tasks", "tasks", "--task", "glide", "--clips", "8", "4", "8"],
    ):
        subprocess.run(command + words, cwd=folder, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    settings = {name: dict(value) if isinstance(value, dict) else value for name, value in SETTINGS.items()}
    settings["extends"] = str(ROOT / "configs" / SETTINGS["extends"])
    settings["run"] = {"name": "soak", "dir": str(folder / "runs")}
    settings["data"] |= {"shards": str(folder / "train"), "valid_shards": str(folder / "valid")}
    settings["probe"] |= {"data": str(folder / "tasks" / "glide")}
    settings["train"] |= {"steps": steps}
    path = folder / "soak.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def watch(config: Path, run: Path, steps: int) -> tuple[int, list[Sample]]:
    """Train, and look at the processes meanwhile: the exit code and the samples."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    words = [sys.executable, *launcher, "--module", "msm_dist.pretrain", str(config)]
    log, samples, start = config.with_suffix(".log"), [], time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(PERIOD_SECONDS)
                step = newest_step(run / "metrics.jsonl")
                # The start and the end of a run, with its export, are not its steady state.
                if 0 < step < steps:
                    samples.append(look(process.pid, step, time.monotonic() - start))
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        print("\n".join(log.read_text().splitlines()[-60:]))
    return process.returncode, samples


def newest_step(metrics: Path) -> int:
    """The step of the last whole line; 0 where there is none yet."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            found = file.read().split(b"\n")[:-1]
        return json.loads(found[-1])["step"] if found else 0
    except (OSError, ValueError, KeyError):
        return 0


def look(launcher: int, step: int, seconds: float) -> Sample:
    """The descendants of the launcher, which is not one of the run's own processes."""
    memory = largest = shared = 0.0
    files = threads = processes = 0
    for pid in descendants(launcher):
        try:
            pages = _fields(Path(f"/proc/{pid}/smaps_rollup"))
            status = _fields(Path(f"/proc/{pid}/status"))
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile
        if "Threads" not in status or "Pss_Anon" not in pages:
            continue  # ended, not yet waited for
        own = pages["Pss_Anon"] / 1024
        memory, largest, shared = memory + own, max(largest, own), shared + pages["Pss_Shmem"] / 1024
        threads, processes = threads + status["Threads"], processes + 1
    return Sample(step, seconds, memory, largest, shared, files, threads, processes)


def descendants(ancestor: int) -> Iterable[int]:
    """Processes below one, by the parents that /proc names."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    waiting = [ancestor]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child)
            yield child


def by_tenth(samples: Sequence[Sample], steps: int) -> list[Sample]:
    """The medians of each tenth of the run. Raises ValueError where one has no sample: the run was too short."""
    found = []
    for tenth in range(TENTHS):
        mine = [sample for sample in samples if tenth * steps <= TENTHS * sample.step < (tenth + 1) * steps]
        found.append(Sample(*(statistics.median(values) for values in zip(*mine, strict=True))))
    return found


def growth(tenths: Sequence[Sample]) -> dict[str, float]:
    """By how much the last tenth is above the second."""
    before, after = tenths[SETTLED]._asdict(), tenths[-1]._asdict()
    return {name: round(after[name] - before[name], 3) for name in BOUNDS}


def lines(tenths: Sequence[Sample]) -> str:
    """A line per tenth."""
    headings = ["step", "seconds", "memory MiB", "largest MiB", "shared MiB", "open files", "threads", "processes"]
    rows: list[list[Any]] = [
        [f"{one.step:.0f}", f"{one.seconds:.0f}"]
        + [f"{value:.1f}" for value in (one.memory_mib, one.largest_mib, one.shared_mib)]
        + [f"{value:g}" for value in (one.files, one.threads, one.processes)]
        for one in tenths
    ]
    return table(headings, rows)


def _fields(path: Path) -> Mapping[str, int]:
    """The numbers of a file of /proc with a name before each."""
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return {name: int(value.split()[0]) for name, value in pairs if value.split() and value.split()[0].isdigit()}


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
