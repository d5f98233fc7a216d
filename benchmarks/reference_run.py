"""The reference run on a GPU: `python -m benchmarks.reference_run` (make gpu-reference).

Makes and packs the corpus of configs/base_gpu_reference.yaml, trains its 2,000 steps and keeps the run's config.yaml,
metrics.jsonl and environment.json under docs/reference/base_gpu_2000_steps/, with a README of the medians of clips/s,
MFU and data wait. The same command again continues a run that was stopped; a record that is there is not replaced.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.measure import ROOT, say_no_gpu
from msm_dist.config import load_config
from msm_dist.monitor import read_metrics

CONFIG = ROOT / "configs" / "base_gpu_reference.yaml"
TRAIN_CLIPS, VALID_CLIPS = 8192, 256
KEPT = ("config.yaml", "metrics.jsonl", "environment.json")


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 also where there is no GPU, 1 when the run fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference_run", description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT, help="folder for data/ and runs/")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reference", help="folder for the record")
    options = parser.parse_args(arguments)
    if say_no_gpu("benchmarks.reference_run"):
        return 0
    return record(options.work.resolve(), options.out.resolve(), (TRAIN_CLIPS, VALID_CLIPS), [])


def record(work: Path, out: Path, clips: tuple[int, int], overrides: Sequence[str]) -> int:
    """Make the corpus, run the configuration with `overrides` and write the record to a folder in `out`."""
    cfg = load_config(CONFIG, overrides)
    target = out / cfg.run.name
    if target.exists():
        print(f"benchmarks.reference_run: {target} is there; move it away to make another")
        return 1
    train, valid = (work / str(shards) for shards in (cfg.data.shards, cfg.data.valid_shards))
    raw = work / "data" / "gpu_reference" / "audio"
    commands = [
        ["data", "synth", str(raw), "--clips", str(clips[0]), "--valid-clips", str(clips[1])],
        ["data", "pack", str(raw / "train"), str(train)],
        ["data", "pack", str(raw / "valid"), str(valid)],
    ]
    run = [f"data.shards={train}", f"data.valid_shards={valid}", f"run.dir={work / 'runs'}"]
    commands = [] if (valid / "index.json").exists() else commands
    for command in [*commands, ["pretrain", str(CONFIG), *overrides, *run]]:
        if code := subprocess.run([sys.executable, "-m", "msm_dist", *command], cwd=work).returncode:
            return code
    folder = work / "runs" / cfg.run.name
    target.mkdir(parents=True)
    for name in KEPT:
        shutil.copy(folder / name, target / name)
    # Where the corpus and the runs lay says nothing of the run.
    text = (target / "config.yaml").read_text(encoding="utf-8")
    (target / "config.yaml").write_text(text.replace(f"{work}/", ""), encoding="utf-8")
    (target / "README.md").write_text(summary(folder, cfg.run.name), encoding="utf-8")
    print((target / "README.md").read_text(encoding="utf-8"))
    return 0


def summary(folder: Path, name: str) -> str:
    """A few lines of Markdown on a finished run: medians of the second half's log points, and the held-out loss."""
    lines = read_metrics(folder / "metrics.jsonl")
    points = [line for line in lines if "loss" in line]
    late = points[len(points) // 2 :]
    rows = [
        ("clips/s", f"{median(line['clips_per_second'] for line in late):,.0f}"),
        ("MFU", f"{median(line['mfu'] for line in late):.1%}"),
        ("waiting for data", f"{median(line['data_wait_share'] for line in late):.1%}"),
        ("last training loss", f"{points[-1]['loss']:.4f}"),
    ]
    held_out = [line for line in lines if "valid_loss" in line]
    rows += [(key, f"{held_out[-1][key]:.4f}") for key in held_out[-1] if key.startswith(("valid", "reference"))]
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {left} | {right} |" for left, right in rows)])
    return (
        f"# {name}\n\n`make gpu-reference` made this from configs/{CONFIG.name} on the device that environment.json "
        f"names; rates are medians of the second half of the log points.\n\n{table}\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
