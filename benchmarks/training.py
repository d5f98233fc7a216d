"""A short real run of the base model from packed audio: `python -m benchmarks.training` on a GPU.

Makes and packs an embedded corpus, then starts `msm-dist pretrain configs/base_audioset.yaml` twice, with the Triton
kernels and with the reference: same samples, same masks. Shows both loss curves, clips/s, MFU and the share of the time
spent waiting for data, all as the run's own metrics.jsonl has them. Writes benchmarks/results/training-<device>.json;
the run folders and their logs are left under `--work`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import RESULTS, ROOT, Target, say_no_gpu, table, targets_table, write_results
from msm_dist.monitor import read_metrics

STEPS, BATCH, CLIPS, LOG_EVERY = 100, 512, 512, 5
BACKENDS = ("triton", "reference")
LARGEST_DIFFERENCE = 0.02
"""Between the loss curves, relative: bfloat16 rounds differently under other kernels."""
RATES = ("clips_per_second", "mfu", "data_wait_share", "device_memory_gib")


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 also where there is no GPU, 1 when a run fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run ({STEPS})")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark", help="folder for corpus and runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if say_no_gpu("benchmarks.training"):
        return 0
    shards = make_corpus(options.work, CLIPS)
    runs = {backend: train(options.work, shards, backend, options.steps) for backend in BACKENDS}
    if not all(runs.values()):
        return 1
    compared = compare(runs["triton"], runs["reference"])
    target = Target("largest relative difference of the losses", LARGEST_DIFFERENCE, compared["largest"], at_most=True)
    content = {"steps": options.steps, "global_batch": BATCH, "targets": [target.record()], **compared}
    path = write_results(options.out, "training", content)
    print(f"\n{curves_table(compared)}\n\n{rates_table(compared)}\n\n{targets_table([target])}\nwritten: {path}")
    return 0


def make_corpus(work: Path, clips: int) -> Path:
    """The folder of the shards; what is there already stays."""
    raw, shards = work / "audio", work / "shards"
    if not (shards / "index.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        _msm_dist(["data", "synth", str(raw), "--clips", str(clips), "--valid-clips", "8"], work / "corpus.log")
        _msm_dist(["data", "pack", str(raw / "train"), str(shards)], work / "corpus.log")
    return shards


def train(work: Path, shards: Path, backend: str, steps: int) -> list[dict[str, Any]]:
    """The metrics of one run, from its beginning; none when it failed, which is said."""
    name = f"{backend}-{os.getpid()}"
    settings = {
        "data.shards": shards,
        "data.num_workers": 8 if (os.cpu_count() or 1) > 8 else 1,
        "run.dir": work / "runs",
        "run.name": name,
        "features.mean": "null",
        "features.std": "null",
        "model.backend": backend,
        "optim.warmup_epochs": "null",
        "optim.warmup_steps": steps // 5,
        "train.epochs": "null",
        "train.steps": steps,
        "train.global_batch": BATCH,
        "train.micro_batch": BATCH,
        "train.log_every": LOG_EVERY,
        "train.pictures_every": 0,
        "checkpoint.every": steps,
    }
    command = ["pretrain", "configs/base_audioset.yaml", *(f"{key}={value}" for key, value in settings.items())]
    log = work / f"{name}.log"
    if _msm_dist(command, log):
        print(f"benchmarks.training: the run with backend {backend} failed:\n{log.read_text()[-2000:]}", flush=True)
        return []
    return read_metrics(work / "runs" / name / "metrics.jsonl")


def compare(ours: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Both curves, their largest relative difference, and the median rates after the first log point."""
    curves = {
        backend: {line["step"]: line["loss"] for line in lines if "loss" in line}
        for backend, lines in (("triton", ours), ("reference", reference))
    }
    pairs = [(loss, curves["reference"][step]) for step, loss in curves["triton"].items()]
    rates = {
        backend: {name: median(line[name] for line in lines[1:] if name in line) for name in RATES}
        for backend, lines in (("triton", ours), ("reference", reference))
    }
    return {"largest": max(abs(one - other) / other for one, other in pairs), "curves": curves, "rates": rates}


def curves_table(compared: Mapping[str, Any]) -> str:
    """Loss by step."""
    ours, reference = compared["curves"]["triton"], compared["curves"]["reference"]
    rows = [(step, f"{loss:.4f}", f"{reference[step]:.4f}") for step, loss in ours.items()]
    return table(("step", "triton", "reference"), rows)


def rates_table(compared: Mapping[str, Any]) -> str:
    """Medians of the log points."""
    rows = [(backend, *(found[name] for name in RATES)) for backend, found in compared["rates"].items()]
    return table(("median", *RATES), rows)


def _msm_dist(arguments: Sequence[str], log: Path) -> int:
    """Run one of our commands from the repository's root; its exit code."""
    with log.open("a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "msm_dist", *arguments]
        return subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
