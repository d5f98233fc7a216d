"""The parts of a fine-tuning run, built and checked before its first step.

In: a FinetuneConfig, the weights, the task. Out: `Finetuning`, at the newest checkpoint or at step 0. Fails with
ConfigError, DataError or CheckpointError, on all ranks, on what would else be found in mid-run: settings or data other
than the run began with, clips that can't be read, scores that can't be computed, too little memory.
"""

import json
from dataclasses import dataclass

import deepspeed
import torch

from msm_dist import monitor
from msm_dist.config import BatchLayout
from msm_dist.data.stream import Loader, start_loader
from msm_dist.engine import checkpoint, preempt, state
from msm_dist.engine.divergence import UpdateGuard
from msm_dist.engine.hang import Progress
from msm_dist.engine.resume import newest_of_run
from msm_dist.engine.runfolder import compare_config, record_start
from msm_dist.engine.saving import Saver
from msm_dist.engine.world import World
from msm_dist.engine.zero import build_engine, describe_engine, fitting_memory, rehearse
from msm_dist.environment import environment
from msm_dist.errors import CheckpointError
from msm_dist.evaluate.classifier import Head, layer_groups
from msm_dist.evaluate.finetune_config import MAY_CHANGE, FinetuneConfig
from msm_dist.evaluate.finetune_data import Cut, JudgedClips, LabelledTask, spread
from msm_dist.evaluate.finetune_judging import Scores, allowed_scores, check_clips, giving_up
from msm_dist.evaluate.finetune_report import announcement
from msm_dist.evaluate.finetune_start import Start, compare_identity, length_of, made_up, new_classifier
from msm_dist.features import LogMel
from msm_dist.files import write_atomically


@dataclass
class Finetuning:
    """The parts of a run in progress."""

    cfg: FinetuneConfig
    world: World
    layout: BatchLayout
    labelled: LabelledTask
    start: Start
    head: Head
    cut: Cut
    total_steps: int
    warmup_steps: float
    engine: deepspeed.DeepSpeedEngine
    front_end: LogMel
    valid: Loader | None
    """The validation clips, over and over; None where the task has none."""
    num_valid: int
    scores: Scores
    monitor: monitor.Monitor
    saver: Saver
    guard: UpdateGuard
    progress: Progress
    interruption: preempt.Interruption
    matrix_rate: float
    """FLOP/s that this rank's device reaches in a matrix product: what MFU is a share of."""
    step: int
    """Updates done."""


def build(
    cfg: FinetuneConfig,
    world: World,
    layout: BatchLayout,
    start: Start,
    labelled: LabelledTask,
    interruption: preempt.Interruption,
    progress: Progress,
) -> Finetuning:
    """Engine, validation and monitor, at the newest checkpoint or at step 0, where all is checked. A collective."""
    folder, task, parts = cfg.run.folder, labelled.task, labelled.parts
    total_steps, warmup_steps = length_of(cfg, len(parts.train))
    identity = {
        "weights_digest": start.identity,
        "task_digest": labelled.digest,
        "num_samples": labelled.num_samples,
        "clips_per_epoch": len(parts.train),
    }
    world.on_main(lambda: compare_config(folder, cfg, MAY_CHANGE))
    world.on_main(lambda: compare_identity(cfg, identity))
    progress.at(0, "checkpoint")
    saved = newest_of_run(folder / "checkpoints", total_steps, layout, world)
    valid_clips, test_clips = labelled.clips(spread(parts.valid, cfg.train.valid_clips)), labelled.clips(parts.test)
    scores = world.on_main(lambda: allowed_scores(labelled, valid_clips, test_clips))
    if saved is None:
        check_clips(labelled, [*valid_clips, *test_clips], cfg.data.num_workers, world, interruption, progress)
    progress.at(0, "model")
    frames = start.info.crop_frames
    head = Head(task.labels, task.multilabel, cfg.model.pooling, cfg.model.positions, labelled.num_samples, frames)
    engine, cut = start_engine(cfg, world, layout, start, head)
    progress.at(0, "state")
    if saved:
        checkpoint.load(engine, saved, world)
    step = saved.step if saved else 0
    guard = UpdateGuard(engine, cfg.optim, world, folder, step, saved.skipped_updates if saved else ())
    valid = JudgedClips(valid_clips, cut, cfg.train.micro_batch, world.rank, world.size)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cfg.train.precision]
    rate = monitor.matrix_rate(world.device, precision)
    metrics = world.together(lambda: monitor.Monitor(folder, step, total_steps, world.is_main), CheckpointError)
    saver = Saver(folder / "checkpoints", cfg.checkpoint, world, cfg.engine.timeout_minutes)
    world.on_main(lambda: record_start(folder, cfg, identity))
    world.on_main(lambda: write_atomically(folder / "environment.json", json.dumps(environment(world), indent=1)))
    if world.is_main:
        told = announcement(cfg, world, labelled, start, describe_engine(engine), saved, total_steps)
        print("\n".join([told, *scores.notes]), flush=True)
    progress.at(step, "start")
    return Finetuning(
        cfg,
        world,
        layout,
        labelled,
        start,
        head,
        cut,
        total_steps,
        warmup_steps,
        engine,
        LogMel(start.info.features).to(world.device),
        start_loader(valid, cfg.data.num_workers, giving_up(interruption)) if valid_clips else None,
        len(valid_clips),
        scores,
        metrics,
        saver,
        guard,
        progress,
        interruption,
        rate,
        step,
    )


def start_engine(
    cfg: FinetuneConfig, world: World, layout: BatchLayout, start: Start, head: Head
) -> tuple[deepspeed.DeepSpeedEngine, Cut]:
    """The engine at step 0, after a step of noise that shows what fits, and how clips are cut for it. A collective."""
    model = new_classifier(cfg, start, head)
    initial = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in model.named_parameters()}
    grid, features = model.grid, start.info.features
    cut = Cut(features.sample_rate, head.num_samples, len(head.labels), (grid.n_mels, grid.frames), grid.shape)
    groups = layer_groups(model, start.info.model.geometry.depth, cfg.optim.weight_decay, cfg.optim.layer_decay)
    with fitting_memory(world.device, cfg.train.micro_batch):
        engine = build_engine(model, cfg, layout, world.device, groups)
        rehearse(engine, lambda: engine(*made_up(cfg, cut, world.device)).loss)
    state.reset(engine, initial)
    return engine, cut
