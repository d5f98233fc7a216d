"""What a fine-tuning run says of itself: at its start what it is, at its end its scores and where things are."""

import math
from pathlib import Path
from typing import Any

import torch

from msm_dist.engine.checkpoint import Saved, checkpoint_name
from msm_dist.engine.world import World
from msm_dist.environment import device_name
from msm_dist.evaluate.classifier import clip_grid
from msm_dist.evaluate.finetune_config import FinetuneConfig
from msm_dist.evaluate.finetune_data import LabelledTask
from msm_dist.evaluate.finetune_start import Start
from msm_dist.evaluate.tasks import untrained_classes
from msm_kernels.backend import describe

RESULTS = "results.json"


def announcement(
    cfg: FinetuneConfig,
    world: World,
    labelled: LabelledTask,
    start: Start,
    engine: str,
    saved: Saved | None,
    total_steps: int,
) -> str:
    """What is about to run, and from where."""
    task, parts, info = labelled.task, labelled.parts, start.info
    kind = "multi-label" if task.multilabel else "one label a clip"
    grid = clip_grid(info.model, info.features, labelled.num_samples)
    lines = [
        f"run        {cfg.run.folder}, {'continued from ' + str(saved.folder) if saved else 'from step 0'}, to step "
        f"{total_steps}",
        f"machine    {world.size} x {device_name(world.device)}, {cfg.train.precision}, {engine}, "
        f"{describe(cfg.model.backend, world.device)}",
        f"weights    {cfg.weights}, sha256 {start.digest[:12]}; trained on {info.crop_frames} frames, positions "
        f"{cfg.model.positions} for {grid.frames}",
        f"task       {task.name}: {len(task.labels)} classes, {kind}, judged by {task.scores[0]}"
        + (f", fold {cfg.data.fold}" if cfg.data.fold is not None else ""),
        f"clips      {len(parts.train)} to train on, {len(parts.valid) or 'none'} to validate on, {len(parts.test)} to "
        f"be judged on, {labelled.num_samples / labelled.sample_rate:.2f} s each",
    ]
    lacking, judged = untrained_classes(task, parts)
    if lacking:
        lines.append(f"note       {lacking} of {judged} test classes have no training clip")
    if world.size == 1 and torch.cuda.device_count() > 1:
        lines.append(
            f"note       1 of {torch.cuda.device_count()} GPUs is used; for all of them: "
            "deepspeed --module msm_dist.evaluate.finetune RUN DATA"
        )
    return "\n".join(lines)


def results_of(
    cfg: FinetuneConfig, labelled: LabelledTask, start: Start, step: int, values: dict[str, float]
) -> dict[str, Any]:
    """What results.json holds: the scores on the test clips, and what they are scores of."""
    task, parts = labelled.task, labelled.parts
    clips = labelled.clips(parts.test)
    split_clips = {name: labelled.clips(getattr(parts, name)) for name in ("train", "valid", "test")}
    results = {
        "task": task.name,
        "fold": cfg.data.fold,
        "step": step,
        "splits": {name: sorted({clip.split for clip in found}) for name, found in split_clips.items()},
        "train_clips": len(parts.train),
        "valid_clips": len(parts.valid),
        "test_clips": len(clips),
        "classes": len(task.labels),
        "classes_judged": len({label for clip in clips for label in clip.labels}),
        "weights": {"origin": start.info.origin, "sha256": start.digest},
        **{f"test_{name}": value if math.isfinite(value) else None for name, value in values.items()},
    }
    if task.official is not None:
        tables = ", ".join(task.official.tables)
        results["official"] = f"{len(clips):,} of {task.official.clips:,} clips of {tables}"
    return results


def summary(cfg: FinetuneConfig, results: dict[str, Any], exported: Path) -> str:
    """The scores on the test clips, and where things are."""
    folder = cfg.run.folder
    scores = [
        f"{name.removeprefix('test_')} {'not finite' if value is None else format(value, '.4f')}"
        for name, value in results.items()
        if name.startswith("test_") and name != "test_clips"
    ]
    places = {
        "test": f"{'  '.join(scores)}  ({results.get('official') or str(results['test_clips']) + ' clips'})",
        "results": folder / RESULTS,
        "classifier": exported,
        "checkpoint": folder / "checkpoints" / checkpoint_name(results["step"]),
        "TensorBoard": f"tensorboard --logdir {cfg.run.dir}",
    }
    head = f"\n{folder} is finished: {results['step']} steps are done (more with train.steps=N)"
    return "\n".join([head, *(f"  {name:<12} {place}" for name, place in places.items())])
