"""How fast crops are read: `python -m benchmarks.data`, on CPUs.

Makes the same clips in every form (data_corpora.py), checks that every reader hands over the crop that it should, else
nothing is timed and the exit code is 1, and prints crops per second: by stage and codec in one process; of the loaders
(data_readers.py), in turns, with 0, 1 and 2 workers, from a warm and a cold page cache, with what a worker weighs; over
HTTP from a server on loopback. Writes benchmarks/results/data-<device>.json. `--quick` takes under a minute and shows
that it works; its numbers mean little.

Wall: crops that arrive per second. CPU: crops per second of processor time of training process and workers together,
which other programs on the machine disturb less. Cold is after posix_fadvise(DONTNEED): what the kernel keeps
nevertheless is not cold, and a disk of a virtual machine may be cached below it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.data_checks import check_all
from benchmarks.data_corpora import CODECS, forget, make_corpora
from benchmarks.data_readers import ours, reader_of, with_files, with_webdataset
from benchmarks.data_timing import Rate, Size, bytes_read, loader_rate, quiet_decoders, serving, stage_times
from benchmarks.measure import RESULTS, ROOT, Target, table, targets_table, write_results

TURNS = 3
BATCH = 256
PACKAGES = ("numpy", "soundfile", "torchaudio", "webdataset")
GPU_CROPS = 37_000  # that one GPU of the reference eats in a second (docs/data.md)
FULL, QUICK = Size(256, 1.5, TURNS, BATCH), Size(32, 0.15, 1, 32)


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 where a reader hands over something else than it should."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few clips and a moment each")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark", help="folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size = QUICK if options.quick else FULL
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        root = Path(folder)
        make_corpora(root, size.clips)
        with quiet_decoders():
            wrong = check_all(root)
        if wrong:
            print("\n".join(["wrong, so nothing is timed:", *wrong]))
            return 1
        print(f"{size.clips} clips of 10 s at 16 kHz in each form; every reader's crops are as they should be\n")
        content = measure(root, size)
    about = {"processor": processor(), "cores": os.cpu_count(), "versions": {name: version(name) for name in PACKAGES}}
    path = write_results(options.out, "data", {**about, "size": size._asdict(), **content})
    print(f"\nwritten: {path}")
    return 0


def processor() -> str:
    """Its name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def measure(root: Path, size: Size) -> dict[str, Any]:
    """All tables, printed as they come."""
    with quiet_decoders():
        stages = {name: stage_times(reader_of(root / name), size) for name in (*CODECS, "logmel")}
        economy = {name: bytes_read(root / name) for name in CODECS}
    print("microseconds of processor time per crop, by stage (one process; local, warm)")
    print(table(("", *next(iter(stages.values()))), [(name, *row.values()) for name, row in stages.items()]))
    print("\nbytes that the decoder reads, of those that hold the crop (no sample is decoded that was not read)")
    print(table(("", "of the crop", "of the clip"), [(name, *row) for name, row in economy.items()]))
    shared = {str(n): stage_times(reader_of(root / "flac", n), size)["crops/s"] for n in (1, 2, 4, 8)}
    print("\ncrops/s of one processor from FLAC with data.crops_per_clip = n")
    print(table(list(shared), [list(shared.values())]))
    loaders = {name: compare(root, name, size) for name in ("0", "1", "2")}
    for workers, rates in loaders.items():
        print(f"\n{workers} workers, warm: crops/s")
        print_rates(rates)
    cold = {name: cold_rate(root, name, size) for name in LOADERS}
    print("\n1 worker, cold: crops/s over one pass")
    print_rates(cold)
    remote = over_http(root, size)
    print("\n1 worker, HTTP from a Python server on loopback: crops/s")
    print_rates(remote)
    reached = targets(loaders["1"], economy)
    print(f"\n{targets_table(reached)}\n")
    print_share(loaders["1"])
    return {
        "stage_microseconds": stages,
        "bytes_read": economy,
        "flac_crops_per_clip": shared,
        "loaders_warm": {workers: as_records(rates) for workers, rates in loaders.items()},
        "loaders_cold": as_records(cold),
        "http": as_records(remote),
        "targets": [target.record() for target in reached],
    }


LOADERS: dict[str, Callable[[Path, int, int], Any]] = {
    "ours: log-mel": lambda root, workers, batch: ours(root / "logmel", workers, batch),
    "ours: FLAC": lambda root, workers, batch: ours(root / "flac", workers, batch),
    "ours: FLAC, 4 crops per clip": lambda root, workers, batch: ours(root / "flac", workers, batch, 4),
    "ours: WAV": lambda root, workers, batch: ours(root / "wav", workers, batch),
    "webdataset: FLAC": lambda root, workers, batch: with_webdataset(root / "flac", workers, min(batch, 64)),
    "webdataset: WAV": lambda root, workers, batch: with_webdataset(root / "wav", workers, min(batch, 64)),
    ".npy per clip": lambda root, workers, batch: with_files(root / "npy", workers, batch),
}


def compare(root: Path, workers: str, size: Size) -> dict[str, Rate]:
    """Every loader again and again in turn: the median of each."""
    found: dict[str, list[Rate]] = {name: [] for name in LOADERS}
    for _ in range(size.turns):
        for name, start in LOADERS.items():
            found[name].append(loader_rate(lambda start=start: start(root, int(workers), size.batch), size.seconds))
    return {name: summary(rates) for name, rates in found.items()}


def summary(rates: Sequence[Rate]) -> Rate:
    """The median of each number."""
    columns = zip(*rates, strict=True)
    return Rate(*(None if None in column else median(column) for column in columns))


def cold_rate(root: Path, name: str, size: Size) -> Rate:
    """One pass over a corpus whose pages were dropped."""
    for folder in root.iterdir():
        forget(folder)
    rate = loader_rate(lambda: LOADERS[name](root, 1, min(size.batch, size.clips // 4)), 0.0, num_crops=size.clips)
    return rate._replace(cpu=None)


def over_http(root: Path, size: Size) -> dict[str, Rate]:
    """Log-mel and FLAC from a server of its own process."""
    found = {}
    for name in ("logmel", "flac"):
        with serving(root / name) as url:
            found[f"ours: {name}, HTTP"] = loader_rate(lambda url=url: ours(url, 1, min(64, size.batch)), size.seconds)
    return found


def print_rates(rates: dict[str, Rate]) -> None:
    """A table of loaders."""
    header = ("", "wall", "CPU", "first batch, s", "PSS/worker, MB", "USS/worker, MB")
    print(table(header, [(name, *(rounded(value) for value in rate)) for name, rate in rates.items()]))


def rounded(value: float | None) -> float | int | None:
    return value if value is None or value < 10 else round(value)


def as_records(rates: dict[str, Rate]) -> dict[str, dict[str, Any]]:
    return {name: rate._asdict() for name, rate in rates.items()}


def targets(rates: dict[str, Rate], economy: dict[str, tuple[float, float]]) -> list[Target]:
    """What PERFORMANCE promises, by one worker."""
    ratio = rates["ours: FLAC"].wall / rates["webdataset: FLAC"].wall
    return [
        Target("stored log-mels, 1 worker: crops/s", 20_000, rates["ours: log-mel"].wall),
        Target("FLAC against webdataset, 1 worker: times", 4.0, ratio),
        Target("FLAC: bytes read of the crop's", 2.5, economy["flac"][0], at_most=True),
        Target("WAV: bytes read of the crop's", 1.1, economy["wav"][0], at_most=True),
    ]


def print_share(rates: dict[str, Rate]) -> None:
    """What part of a GPU's appetite 16 workers would still, if they scale."""
    rows = [(name, f"{16 * rate.wall / GPU_CROPS:.0%}") for name, rate in rates.items()]
    print(f"of {GPU_CROPS} crops/s, which one H200 eats, 16 such workers give (if the machine lets them)")
    print(table(("", "share"), rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
