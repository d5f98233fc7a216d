"""Fine-tuning: a trained encoder with a linear head learns labels. `train` is the whole loop, read top to bottom.

In: weights, a task, a FinetuneConfig. Out: a run folder as of pre-training, with the scores on the test clips in
results.json and the classifier in export/; an exit code (0: finished; 75: saved, asks for a requeue; 128 + signal:
saved and stopped). Started as `msm-dist finetune RUN DATA [CONFIG.yaml] [a.b=c ...]`, as
`deepspeed --module msm_dist.evaluate.finetune` with the same words, by torchrun or by srun.

Engine, checkpoints, signals and records are those of pre-training, and so are their promises: killed and started again,
a run gives the same weights, bit for bit; at another world size it learns from the same clips.
"""

import contextlib
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from signal import SIGTERM

import numpy as np
import torch

from msm_dist import monitor
from msm_dist.data.stream import Loader, start_loader
from msm_dist.engine import preempt, state
from msm_dist.engine.console import outliving_readers
from msm_dist.engine.hang import Progress, watching
from msm_dist.engine.optim import lr_at
from msm_dist.engine.runfolder import locked, refuse_if_taken
from msm_dist.engine.world import join_world, leave_world, noticing_lost_peers
from msm_dist.engine.zero import set_lr
from msm_dist.errors import CheckpointError, ConfigError, DataError, reporting
from msm_dist.evaluate import classifier
from msm_dist.evaluate.augment import Order, clip_weights, mask_spectrogram, num_kept
from msm_dist.evaluate.classifier import clip_spectrogram
from msm_dist.evaluate.finetune_config import FinetuneConfig, batch_layout, read_config
from msm_dist.evaluate.finetune_data import JudgedClips, LabelledBatch, TrainingClips, num_batches, open_task
from msm_dist.evaluate.finetune_judging import Stopping, finite, giving_up, next_batch, scores_of
from msm_dist.evaluate.finetune_report import RESULTS, results_of, summary
from msm_dist.evaluate.finetune_run import Finetuning, build
from msm_dist.evaluate.finetune_start import read_start
from msm_dist.evaluate.weights_card import write_card
from msm_dist.feed import Feed
from msm_dist.files import write_atomically
from msm_dist.model.weights import WeightsInfo, read
from msm_dist.profiling import Part, part


def finetune(cfg: FinetuneConfig) -> int:
    """Run or continue a run; the exit code. Raises MsmError kinds."""
    world = join_world(cfg.engine.timeout_minutes)
    interruption = preempt.Interruption(world.control)
    with contextlib.ExitStack() as stack:
        stack.enter_context(noticing_lost_peers(world.rank))
        stack.callback(leave_world)
        stack.enter_context(preempt.listening(interruption))
        stack.enter_context(outliving_readers(lambda: interruption.hear(preempt.STOP, SIGTERM)))
        progress = Progress()
        watch = stack.enter_context(watching(progress, world, cfg.engine.timeout_minutes))
        try:
            layout = batch_layout(cfg.train, world.size)
            start = world.together(lambda: read_start(cfg), CheckpointError)
            progress.at(0, "task")
            labelled = world.on_main(lambda: open_task(cfg.data, start.info.features.sample_rate))
            world.on_main(lambda: stack.enter_context(locked(cfg.run.folder)))
            watch.record_in(cfg.run.folder / "hang")
            run = build(cfg, world, layout, start, labelled, interruption, progress)
            stack.callback(run.monitor.close)
            stack.callback(run.saver.close)
            if run.valid is not None:
                stack.callback(run.valid.close)
            validate_if_cut_short(run)
            if run.step < run.total_steps and (reason := train(run)):
                return interruption.exit_code(reason)
            finish(run)
        except Stopping as stopping:
            if world.is_main:
                print("stopped between steps; what was done is saved, and the same command continues", flush=True)
            return interruption.exit_code(stopping.reason)
    return 0


def train(run: Finetuning) -> int:
    """Train to the last step, or until all ranks agree to stop; the reason to stop, or 0. Ends saved."""
    cfg, engine, total_steps = run.cfg, run.engine, run.total_steps
    watch = monitor.Stopwatch()
    reason, logged_step = preempt.NONE, run.step
    with feeding(run) as feed:
        engine.train()
        while run.step < total_steps:
            with watch.waiting(), doing(run, "data"):
                batches = feed.next_step()
            if reason := run.interruption.agreed():
                break
            lr = lr_at(run.step, cfg.peak_lr, run.warmup_steps, total_steps)
            set_lr(engine, lr)
            loss = torch.zeros((), device=run.world.device)
            for batch in batches:
                output = forward(run, batch)
                loss += output.loss.detach() / len(batches)
                with doing(run, "backward"):
                    engine.backward(run.guard.judged(output.loss, loss, is_last=batch is batches[-1]))
                with doing(run, "update"):
                    engine.step()
            run.step += 1
            stop_if_skipped(run, lr, loss, batches)

            last = run.step == total_steps
            if last or run.step % cfg.train.log_every == 0:
                log_training(run, loss, lr, watch, run.step - logged_step)
                logged_step = run.step
            with watch.paused(), part("outside"):
                if last or run.step % cfg.train.valid_every == 0:
                    validate(run)
                if last or run.step % cfg.checkpoint.every == 0:
                    save(run, complete=last)
            if last or run.step % cfg.train.log_every == 0:
                run.saver.check()
    if reason:
        save(run, complete=True)
        if run.world.is_main:
            print(f"stopped and saved at step {run.step} of {total_steps}; the same command continues", flush=True)
        run.world.together(feed.raise_fault, DataError)
    return reason


@contextlib.contextmanager
def feeding(run: Finetuning) -> Iterator[Feed]:
    """This rank's training batches from the run's step on; the processes that read them end with the block."""
    labelled, cfg = run.labelled, run.cfg
    clips = labelled.clips(labelled.parts.train)
    rarity = clip_weights([clip.labels for clip in clips], len(labelled.task.labels)) if cfg.data.weighted else None
    order = Order(len(clips), cfg.seed, rarity)

    batches = TrainingClips(clips, order, run.cut, cfg.augment, run.layout, run.world.rank, run.step)
    with contextlib.closing(start_loader(batches, cfg.data.num_workers, giving_up(run.interruption))) as loader:
        feed = Feed(loader, run.layout.accumulation, run.total_steps - run.step, run.interruption)
        # Without data for its first step a rank can't wait for an agreement that comes a step late, see feed.feeding.
        run.world.together(feed.raise_fault, DataError)
        run.interruption.agreed()
        yield feed


def forward(run: Finetuning, batch: LabelledBatch) -> classifier.Output:
    """Audio to loss and logits, for one micro-batch."""
    batch = batch.to(run.world.device)
    with doing(run, "log-mel"):
        spectrogram = clip_spectrogram(run.front_end, batch.waveforms, run.engine.module.grid)
        spectrogram = mask_spectrogram(spectrogram, batch.masks)
    with doing(run, "forward"):
        return run.engine(spectrogram, batch.targets, batch.ids_keep)


def doing(run: Finetuning, name: Part) -> contextlib.AbstractContextManager[object]:
    """Begin a part of a step, or of judging, for a profiler and for those who look whether the run gets on."""
    run.progress.at(run.step, name)
    return part(name)


def stop_if_skipped(run: Finetuning, lr: float, loss: torch.Tensor, batches: Sequence[LabelledBatch]) -> None:
    """Record an update that was left out; raise Diverged on all ranks when it is one too many."""
    run.guard.note(run.step, lr, loss, [key for batch in batches for key in batch.keys])


def log_training(run: Finetuning, loss: torch.Tensor, lr: float, watch: monitor.Stopwatch, steps: int) -> None:
    """Record the step just done and the rates of the last `steps`; the only wait for the device in the loop."""
    cfg, world = run.cfg, run.world
    run.progress.at(run.step, "records")
    loss_sum = world.sum([loss.item()])[0]
    rates = watch.lap(steps, steps * cfg.train.global_batch, run.cut.num_samples / run.cut.sample_rate)
    norm, scale = float(run.engine.get_global_grad_norm()), state.loss_scale(run.engine)
    values = {
        # Where an update was left out, neither need be finite.
        **({"loss": loss_sum / world.size} if math.isfinite(loss_sum) else {}),
        "lr": lr,
        **({"grad_norm": norm} if math.isfinite(norm) else {}),
        **run.guard.counts,
        **rates,
        "mfu": flops_per_clip(run) * rates["clips_per_second"] / world.size / run.matrix_rate,
        **({"loss_scale": scale["cur_scale"]} if scale else {}),
        "device_memory_gib": monitor.device_memory_gib(world.device),
        **run.saver.lap(),
    }
    run.monitor.train(run.step, values)


def flops_per_clip(run: Finetuning) -> float:
    """Matrix FLOPs of one clip in the encoder, which sees what patch drop leaves."""
    model, (height, width) = run.start.info.model, run.start.info.model.patch
    rows, columns = num_kept(run.cfg.augment, run.cut.grid)
    alone = model.geometry._replace(decoder_embed_dim=0, decoder_depth=0)
    return monitor.flops_per_clip(alone, 0, rows * columns, 0, height * width, model.cls_token)


def validate(run: Finetuning) -> None:
    """Loss and scores on the validation clips, where there are any; saved before it is left. A collective."""
    if run.valid is None:
        return
    try:
        values = judge(run, run.valid, run.num_valid, run.scores.valid)
    except (DataError, Stopping):
        save(run, complete=True)
        raise
    run.monitor.valid(run.step, {f"valid_{name}": value for name, value in finite(values).items()})


def validate_if_cut_short(run: Finetuning) -> None:
    """Validate at the checkpoint's step where that was due and is not recorded. A collective."""
    is_due = run.step == run.total_steps or (run.step and run.step % run.cfg.train.valid_every == 0)
    if run.valid is None or not is_due:
        return
    lines = run.world.on_main(lambda: monitor.read_metrics(run.cfg.run.folder / "metrics.jsonl"))
    if not any(line["step"] == run.step and "valid_loss" in line for line in lines):
        validate(run)


def judge(run: Finetuning, loader: Loader, num_clips: int, scores: Sequence[str]) -> dict[str, float]:
    """Loss and scores on clips that are all given once, without augmentation. A collective. Raises Stopping."""
    size = run.cfg.train.micro_batch
    found: list[tuple[np.ndarray, ...]] = []
    run.engine.eval()
    with torch.no_grad():
        for _ in range(num_batches(num_clips, size, run.world.size)):
            batch = next_batch(loader, run.world, run.interruption)
            logits = forward(run, batch).logits.float().cpu()
            found.append((batch.places.numpy(), logits.numpy(), batch.targets.numpy()))
    run.engine.train()
    of_rank = tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
    places, logits, targets = (np.concatenate(parts) for parts in zip(*run.world.gather(of_rank), strict=True))
    order = np.argsort(places)[:num_clips]
    multilabel = run.labelled.task.multilabel
    return run.world.on_main(lambda: scores_of(logits[order], targets[order], multilabel, scores))


def save(run: Finetuning, complete: bool = False) -> None:
    """Begin to write a checkpoint, or wait until it is complete. A collective."""
    run.progress.at(run.step, "checkpoint")
    run.world.on_main(lambda: refuse_if_taken(run.cfg.run.folder))
    extra = {"cursor": run.step * run.cfg.train.global_batch, "skipped_updates": run.guard.skipped}
    run.saver.begin(run.engine, run.step, extra, run.monitor.sync)
    if complete:
        run.saver.finish()


def finish(run: Finetuning) -> None:
    """Judge on the test clips, export the classifier, say what came out and where it is. A collective."""
    cfg, folder, labelled = run.cfg, run.cfg.run.folder, run.labelled
    clips = labelled.clips(labelled.parts.test)
    judged = JudgedClips(clips, run.cut, cfg.train.micro_batch, run.world.rank, run.world.size)
    with contextlib.closing(start_loader(judged, cfg.data.num_workers, giving_up(run.interruption))) as loader:
        values = judge(run, loader, len(clips), run.scores.test)
    results = results_of(cfg, labelled, run.start, run.step, values)
    # Every rank takes part; one keeps them.
    trained = {name: value for name, value in state.full_weights(run.engine) if run.world.is_main}
    origin = {
        "run": cfg.run.name,
        "step": run.step,
        "task": labelled.task.name,
        # It no longer fits the encoder beside it.
        "untrained": ["decoder"],
        "finetuned_from": run.start.info.origin,
    }
    info = WeightsInfo(run.start.info.model, run.start.info.features, run.start.info.crop_frames, origin)
    exported = run.world.on_main(lambda: classifier.save(folder / "export", trained, run.start.decoder, info, run.head))
    run.world.on_main(lambda: write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n"))
    run.world.on_main(lambda: write_card(exported, *read(exported, any_positions=True), folder))
    if run.world.is_main:
        print(summary(cfg, results, exported), flush=True)


def main(arguments: Sequence[str]) -> int:
    """`python -m msm_dist.evaluate.finetune RUN DATA [CONFIG.yaml] [a.b=c ...]`; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed calls collectives by names that torch renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    # The deepspeed launcher adds --local_rank=N; the environment says the same.
    words = [word for word in arguments if not word.startswith("--local_rank")]

    def action() -> int:
        try:
            if len(words) < 2 or any(word.startswith("-") or "=" in word for word in words[:2]):
                raise ConfigError(
                    "usage: python -m msm_dist.evaluate.finetune RUN DATA [CONFIG.yaml] [section.key=value ...]"
                )
            cfg = read_config(words[0], words[1], words[2:])
        except ConfigError as error:
            error.on_all_ranks = True
            raise
        return finetune(cfg)

    return reporting(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
