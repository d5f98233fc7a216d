"""What a checkpoint costs a run: `python -m benchmarks.checkpoint`, on a GPU or on CPUs.

Trains on made-up spectrograms, under the engine that `msm_dist.pretrain` builds (DeepSpeed, ZeRO-1, bfloat16), and
saves in two ways in turn, A B A B: at once (`checkpoint.save`: the step waits for all of it) and beside training
(`engine.saving`: the step waits for the copy to host memory, and the steps during the write may be slower). Both must
leave the same bytes, else nothing is timed and the exit code is 1. Writes benchmarks/results/checkpoint-<device>.json.
Checkpoints go to a folder under `--work`, on the disk to be measured, and are deleted.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import RESULTS, ROOT, table, write_results
from msm_dist.config import Checkpoint, Config, batch_layout, parse_config
from msm_dist.engine import checkpoint
from msm_dist.engine.saving import Saver
from msm_dist.engine.world import World, join_world, leave_world
from msm_dist.engine.zero import build_engine, dry_run
from msm_dist.model.mae import MaskedSpectrogramModel

SIZE, TURNS, QUIET_STEPS, TIMEOUT_MINUTES = "base", 3, 3, 30.0
CLIPS_CPU, CLIPS_GPU = 8, 256
MIB = 2**20


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 where the two ways leave different bytes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default=SIZE, help=f"of the model ({SIZE})")
    parser.add_argument("--turns", type=int, default=TURNS, help=f"of each way ({TURNS})")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "benchmark", help="folder on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    world = join_world(TIMEOUT_MINUTES)
    try:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            root = world.on_main(lambda: Path(folder))
            found = measure(options.size, options.turns, root, world)
    finally:
        leave_world()
    if found is None:
        print("benchmarks.checkpoint: WRONG: the two ways leave different bytes: nothing is timed")
        return 1
    if world.is_main:
        path = write_results(options.out, "checkpoint", found)
        print(f"{summary_table(found)}\nwritten: {path}")
    return 0


def measure(size: str, turns: int, root: Path, world: World) -> dict[str, Any] | None:
    """Seconds of both ways and of the steps around them; none where they leave different bytes."""
    cfg = settings(size, world)
    engine, step = trainer(cfg, world)
    saver = Saver(root / "beside", Checkpoint(keep=1), world, TIMEOUT_MINUTES)

    def at_once(number: int) -> float:
        return timed(lambda: checkpoint.save(engine, root / "at_once", number, {}, world), world)

    def beside(number: int) -> float:
        return timed(lambda: saver.begin(engine, number, {}, lambda: None), world)

    at_once(0)
    first = beside(0)
    saver.finish()
    written = [checkpoint.newest_complete(root / way) for way in ("at_once", "beside")]
    if written[0].meta["files"] != written[1].meta["files"]:
        return None
    found: dict[str, list[float]] = {name: [] for name in ("quiet", "at_once", "beside", "during", "write")}
    for number in range(1, turns + 1):
        found["quiet"] += [timed(step, world) for _ in range(QUIET_STEPS)]
        found["at_once"].append(at_once(number))
        if world.is_main:
            checkpoint.rotate(root / "at_once", 1, 0)
        found["quiet"] += [timed(step, world) for _ in range(QUIET_STEPS)]
        found["beside"].append(beside(number))
        marker = root / "beside" / checkpoint.checkpoint_name(number) / checkpoint.COMPLETE
        begun = time.time()
        while not world.agree_any(marker.exists()):
            found["during"].append(timed(step, world))
        found["write"].append(marker.stat().st_mtime - begun)
        saver.finish()
    saver.close()
    return {
        "size": size,
        "world": world.size,
        "threads": torch.get_num_threads(),
        "micro_batch": cfg.train.micro_batch,
        "state_bytes": sum(entry["bytes"] for entry in written[0].meta["files"].values()),
        "first_beside": first,
        "seconds": found,
    }


def settings(size: str, world: World) -> Config:
    """Base as in configs/base_audioset.yaml, but for the micro-batch."""
    clips = CLIPS_GPU if world.device.type == "cuda" else CLIPS_CPU
    train = {"steps": 1000, "global_batch": clips * world.size, "micro_batch": clips}
    return parse_config({"model": {"size": size}, "train": train, "optim": {"lr": 1e-4}}, "benchmarks.checkpoint")


def trainer(cfg: Config, world: World) -> tuple[Any, Callable[[], None]]:
    """The engine, and a whole step of it on made-up input."""
    model = MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, cfg.data.crop_frames, cfg.seed)
    engine = build_engine(model, cfg, batch_layout(cfg, world.size), world.device)
    generator = torch.Generator().manual_seed(world.rank)
    clips = cfg.train.micro_batch
    spectrogram = torch.randn(clips, 1, cfg.features.n_mels, cfg.data.crop_frames, generator=generator)
    spectrogram, sample_ids = spectrogram.to(world.device), torch.zeros(clips, 3, dtype=torch.int64).to(world.device)
    dry_run(engine, spectrogram, sample_ids)

    def step() -> None:
        engine.backward(engine(spectrogram, sample_ids=sample_ids).loss)
        engine.step()

    return engine, step


def timed(action: Callable[[], Any], world: World) -> float:
    """Seconds of a call, with what it leaves the device to do."""
    wait = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


def summary_table(found: Mapping[str, Any]) -> str:
    """Medians, and what a checkpoint costs each way: the stall, and what the steps of the write take longer."""
    seconds = found["seconds"]
    middle = {name: median(values) if values else None for name, values in seconds.items()}
    turns = len(seconds["beside"])
    slower = sum(value - middle["quiet"] for value in seconds["during"]) / turns
    rows = [
        (f"state of {found['size']}, MiB", found["state_bytes"] / MIB),
        ("step, nothing written, s", middle["quiet"]),
        ("saved at once: stall, s", middle["at_once"]),
        ("saved beside training: stall, s", middle["beside"]),
        ("    the first one, which allocates the memory, s", found["first_beside"]),
        ("    stall at once / stall beside training", middle["at_once"] / middle["beside"]),
        ("    write, s", middle["write"]),
        ("    steps during the write, each turn", len(seconds["during"]) / turns),
        ("    step during the write, s", middle["during"]),
        (
            "    step during the write / step otherwise",
            middle["during"] and middle["during"] / middle["quiet"],
        ),
        ("    cost, stall and slower steps, s", middle["beside"] + slower),
        ("    cost at once / cost beside training", middle["at_once"] / (middle["beside"] + slower)),
    ]
    where = f"{found['world']} processes x {found['threads']} threads, {found['micro_batch']} clips each, {turns} turns"
    return table((where, "median"), rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
