"""Pre-training: build the parts, resume, loop, finish. `train` is the whole loop, read top to bottom.

In: a Config. Out: a run folder with metrics, checkpoints and, at the end, the exported weights; an exit code
(0: finished; 75: saved, asks for a requeue; 128 + signal: saved and stopped). Started as
`deepspeed --module msm_dist.pretrain CONFIG [a.b=c ...]`, by torchrun, by srun, or as one plain process. A model of
yours takes the place of the configuration's through `build_model`, the one extension point (docs/extend.md).
"""

import contextlib
import json
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch

from msm_dist import extension, monitor
from msm_dist.changed import check_restored, recording_changed
from msm_dist.config import BatchLayout, Config, batch_layout, load_config
from msm_dist.corpus import Corpus, check_digests, corpus_identity, open_corpus, plan_identity, stamp
from msm_dist.data.storage import access_of, is_remote
from msm_dist.data.stream import Batch
from msm_dist.engine import checkpoint, preempt, state
from msm_dist.engine.console import outliving_readers
from msm_dist.engine.divergence import UpdateGuard
from msm_dist.engine.hang import Progress, watching
from msm_dist.engine.meta import PretrainingMeta
from msm_dist.engine.optim import lr_at
from msm_dist.engine.resume import newest_of_run
from msm_dist.engine.runfolder import compare_config, compare_plan, locked, record_start, refuse_if_taken
from msm_dist.engine.saving import Saver
from msm_dist.engine.world import World, join_world, leave_world, noticing_lost_peers
from msm_dist.engine.zero import build_engine, describe_engine, dry_run, fitting_memory, set_lr
from msm_dist.environment import environment
from msm_dist.errors import CheckpointError, ConfigError, DataError, reporting
from msm_dist.evaluate.online import OnlineProbe
from msm_dist.evaluate.weights_card import write_card
from msm_dist.extension import BuildModel, configured_model
from msm_dist.features import LogMel, normalize
from msm_dist.feed import feeding, tracing
from msm_dist.files import write_atomically
from msm_dist.initial import load_initial
from msm_dist.model.mae import Output
from msm_dist.model.origin import INITIAL_FILE, of_run
from msm_dist.model.weights import WeightsInfo
from msm_dist.model.weights import save as save_weights
from msm_dist.profiling import Part, part, profiling
from msm_dist.summary import announcement, summary
from msm_dist.validate import Forward, Validation
from msm_kernels.patch_masking import Masking


@dataclass
class Training:
    """The parts of a run in progress."""

    cfg: Config
    world: World
    layout: BatchLayout
    corpus: Corpus
    engine: deepspeed.DeepSpeedEngine
    front_end: LogMel
    validation: Validation | None
    probe: OnlineProbe | None
    monitor: monitor.Monitor
    saver: Saver
    guard: UpdateGuard
    progress: Progress
    interruption: preempt.Interruption
    matrix_rate: float
    """FLOP/s that this rank's device reaches in a matrix product: what MFU is a share of."""
    is_configured: bool
    """Whether the model has the parameters that the configuration describes: MFU counts no others."""
    step: int
    """Updates done."""
    bad_samples: int
    """Samples filled on this rank for clips that could not be decoded; rank 0 carries on the earlier starts' count."""
    missing_samples: int
    """Samples filled for clips of missing shards, likewise."""


def pretrain(cfg: Config, build_model: BuildModel = configured_model) -> int:
    """Run or continue a run; the exit code. Raises MsmError kinds."""
    world = join_world(cfg.engine.timeout_minutes)
    interruption = preempt.Interruption(world.control)
    with contextlib.ExitStack() as stack:
        stack.enter_context(noticing_lost_peers(world.rank))
        stack.callback(leave_world)
        stack.enter_context(preempt.listening(interruption))
        # Whoever read what is printed has started the run: their end is the launcher's.
        stack.enter_context(outliving_readers(lambda: interruption.hear(preempt.STOP, signal.SIGTERM)))
        progress = Progress()
        watch = stack.enter_context(watching(progress, world, cfg.engine.timeout_minutes))
        layout = batch_layout(cfg, world.size)
        progress.at(0, "corpus")
        corpus = world.on_main(lambda: open_corpus(cfg, layout))
        world.on_main(lambda: stack.enter_context(locked(cfg.run.folder)))
        watch.record_in(cfg.run.folder / "hang")
        corpus = stamp(corpus)
        stack.enter_context(recording_changed(cfg.run.folder, corpus, world.is_main))
        run = build(cfg, world, layout, corpus, interruption, build_model, progress)
        stack.callback(run.monitor.close)
        stack.callback(run.saver.close)
        if run.step < corpus.total_steps and (reason := train(run)):
            return interruption.exit_code(reason)
        finish(run)
    return 0


def train(run: Training) -> int:
    """Train to the last step, or until all ranks agree to stop; the reason to stop, or 0. Ends saved."""
    cfg, engine, total_steps = run.cfg, run.engine, run.corpus.total_steps
    watch = monitor.Stopwatch()
    reason, logged_step = preempt.NONE, run.step
    trace_folder = cfg.run.folder / "trace" if cfg.train.trace else None
    with (
        feeding(cfg.data, run.corpus, run.layout, run.world, run.interruption, run.step) as feed,
        tracing(trace_folder, run.world, run.step) as trace,
        profiling(cfg.profiled_steps, cfg.run.folder / "profile", run.world, run.step, total_steps) as step_done,
    ):
        engine.train()
        while run.step < total_steps:
            with watch.waiting(), doing(run, "data"):
                batches = feed.next_step()
            if reason := run.interruption.agreed():
                break
            lr = lr_at(run.step, cfg.peak_lr, run.corpus.warmup_steps, total_steps)
            set_lr(engine, lr)
            loss = torch.zeros((), device=run.world.device)
            for batch in batches:
                output = forward(run, batch)
                loss += output.loss.detach() / len(batches)
                with doing(run, "backward"):
                    engine.backward(run.guard.judged(output.loss, loss, is_last=batch is batches[-1]))
                with doing(run, "update"):
                    engine.step()
                run.bad_samples += batch.num_bad
                run.missing_samples += batch.num_missing
                trace(run.step + 1, batch, output)
            run.step += 1
            stop_if_skipped(run, lr, loss, batches)

            last = run.step == total_steps
            if last or run.step % cfg.train.log_every == 0:
                log_training(run, loss, lr, watch, run.step - logged_step, output.masking)
                logged_step = run.step
            with watch.paused(), part("outside"):
                if last or run.step % cfg.train.valid_every == 0:
                    validate(run)
                if last or (cfg.probe.every and run.step % cfg.probe.every == 0):
                    probe(run)
                if last or (cfg.train.pictures_every and run.step % cfg.train.pictures_every == 0):
                    draw(run)
                if last or run.step % cfg.checkpoint.every == 0:
                    save(run, complete=last)
            if last or run.step % cfg.train.log_every == 0:
                run.saver.check()
                stop_if_too_much_is_bad(run)
            with watch.paused():
                step_done(run.step)
    if reason:
        save(run, complete=True)
        if run.world.is_main:
            print(f"stopped and saved at step {run.step} of {total_steps}; the same command continues", flush=True)
        run.world.together(feed.raise_fault, DataError)
    return reason


def forward(run: Training, batch: Batch) -> Output:
    """Audio or stored log-mel to loss, for one micro-batch."""
    crops = batch.crops.to(run.world.device, non_blocking=True)
    sample_ids = batch.sample_ids.to(run.world.device, non_blocking=True)
    features = run.corpus.features
    with doing(run, "log-mel"):
        spectrogram = normalize(run.front_end(crops), features.mean, features.std)
    with doing(run, "forward"):
        return run.engine(spectrogram, sample_ids=sample_ids)


def doing(run: Training, name: Part) -> contextlib.AbstractContextManager[object]:
    """Begin a part of the next step, for a profiler and for those who look whether the run gets on."""
    run.progress.at(run.step + 1, name)
    return part(name)


def stop_if_skipped(run: Training, lr: float, loss: torch.Tensor, batches: Sequence[Batch]) -> None:
    """Record an update that was left out; raise Diverged on all ranks when it is one too many."""
    run.guard.note(run.step, lr, loss, [key for batch in batches for key in batch.keys])


def log_training(
    run: Training, loss: torch.Tensor, lr: float, watch: monitor.Stopwatch, steps: int, masking: Masking
) -> None:
    """Record the step just done and the rates of the last `steps`; the only wait for the device in the loop."""
    cfg, world = run.cfg, run.world
    run.progress.at(run.step, "records")
    loss_sum, bad_samples, missing_samples = world.sum([loss.item(), run.bad_samples, run.missing_samples])
    clip_seconds = cfg.data.crop_frames * cfg.features.hop / cfg.features.sample_rate
    rates = watch.lap(steps, steps * cfg.train.global_batch, clip_seconds)
    rate = rates["clips_per_second"] / world.size
    norm, scale = float(run.engine.get_global_grad_norm()), state.loss_scale(run.engine)
    values = {
        # Where an update was left out, neither need be finite.
        **({"loss": loss_sum / world.size} if math.isfinite(loss_sum) else {}),
        "lr": lr,
        **({"grad_norm": norm} if math.isfinite(norm) else {}),
        **run.guard.counts,
        **rates,
        **({"mfu": flops_per_clip(cfg, masking) * rate / run.matrix_rate} if run.is_configured else {}),
        **({"loss_scale": scale["cur_scale"]} if scale else {}),
        "device_memory_gib": monitor.device_memory_gib(world.device),
        "bad_clips": bad_samples / cfg.data.crops_per_clip,
        "missing_clips": missing_samples / cfg.data.crops_per_clip,
        **run.saver.lap(),
    }
    run.monitor.train(run.step, values)


def flops_per_clip(cfg: Config, masking: Masking) -> float:
    """Matrix FLOPs of one clip in the configuration's model, of whose patches `masking` shows some to the encoder."""
    num_keep, num_masked = masking.ids_keep.shape[1], masking.ids_masked.shape[1]
    height, width = cfg.model.patch
    return monitor.flops_per_clip(
        cfg.model.geometry, num_keep + num_masked, num_keep, num_masked, height * width, cfg.model.cls_token
    )


def stop_if_too_much_is_bad(run: Training) -> None:
    """Raise DataError on all ranks, saved, past data.max_bad_fraction of what was served, or of an epoch at least."""
    cfg = run.cfg
    bad_samples = run.world.sum([run.bad_samples])[0]
    served = run.step * cfg.train.global_batch
    epoch = run.corpus.plan.clips_per_epoch * cfg.data.crops_per_clip
    if bad_samples <= cfg.data.max_bad_fraction * max(served, epoch):
        return
    save(run, complete=True)
    # Clips behind a URL are not decoded by that command.
    checks = " and ".join(
        f"`msm-dist data verify {source.location}{'' if is_remote(source.location) else ' --decode'}`"
        for source in run.corpus.sources
    )
    error = DataError(
        f"data.max_bad_fraction = {cfg.data.max_bad_fraction}: {bad_samples:.0f} of {served} samples by step "
        f"{run.step} could not be decoded (an epoch has {epoch}); the log names the clips. Check with "
        f"{checks}, or raise the limit; the run is saved and continues with the same command"
    )
    error.on_all_ranks = True
    raise error


def validate(run: Training) -> None:
    """Loss on the fixed crops and masks of the held-out clips, beside the three references. A collective."""
    if run.validation is None:
        return
    with evaluating(run, "validation") as forward:
        values = run.validation.loss(forward) | run.validation.references(forward)
    run.monitor.valid(run.step, values)


def probe(run: Training) -> None:
    """Scores of the encoder on labelled clips, beside the two baselines. A collective."""
    run.progress.at(run.step, "probe")
    if run.probe is not None:
        run.monitor.probe(run.step, run.probe.scores(state.full_weights(run.engine)))


def draw(run: Training) -> None:
    """Pictures and sounds of a few held-out clips. A collective."""
    if run.validation is None:
        return
    with evaluating(run, "pictures") as forward:
        pictures = run.validation.pictures(forward)
    run.monitor.pictures(run.step, pictures)


@contextlib.contextmanager
def evaluating(run: Training, place: str) -> Iterator[Forward]:
    """The model as a function of (spectrogram, sample_ids), without gradients."""

    def forward(spectrogram: torch.Tensor, sample_ids: torch.Tensor) -> Output:
        run.progress.at(run.step, place)
        return run.engine(spectrogram, sample_ids=sample_ids)

    run.engine.eval()
    with torch.no_grad():
        yield forward
    run.engine.train()


def save(run: Training, complete: bool = False) -> None:
    """Begin to write a checkpoint, or wait until it is complete. A collective."""
    run.progress.at(run.step, "checkpoint")
    run.world.on_main(lambda: refuse_if_taken(run.cfg.run.folder))
    bad_samples, missing_samples = run.world.sum([run.bad_samples, run.missing_samples])
    extra = {
        "cursor": run.step * run.layout.blocks_per_step,
        "bad_samples": int(bad_samples),
        "missing_samples": int(missing_samples),
        "mean": run.corpus.features.mean,
        "std": run.corpus.features.std,
        "corpus": corpus_identity(run.corpus),
        "skipped_updates": run.guard.skipped,
    }
    run.saver.begin(run.engine, run.step, extra, run.monitor.sync)
    if complete:
        run.saver.finish()


def finish(run: Training) -> None:
    """Export the weights and say what came out and where it is. A collective."""
    cfg, folder = run.cfg, run.cfg.run.folder
    run.progress.at(run.step, "export")
    # Every rank takes part; one keeps them.
    weights = {name: value for name, value in state.full_weights(run.engine) if run.world.is_main}
    origin = of_run(folder, cfg.run.name, run.step, run.corpus.index.digest, corpus_identity(run.corpus))
    # How they were trained is no property of the weights.
    model = cfg.model.model_copy(update={"backend": "auto", "activation_checkpointing": False})
    info = WeightsInfo(model, run.corpus.features, cfg.data.crop_frames, origin)
    exported = run.world.on_main(lambda: save_weights(folder / "export", weights, info))
    run.world.on_main(lambda: write_card(exported, weights, info, folder))
    if run.world.is_main:
        print(summary(cfg, run.step, exported), flush=True)


def build(
    cfg: Config,
    world: World,
    layout: BatchLayout,
    corpus: Corpus,
    interruption: preempt.Interruption,
    build_model: BuildModel,
    progress: Progress,
) -> Training:
    """Model, engine, validation and monitor, at the newest checkpoint or at step 0. A collective."""
    folder, identity = cfg.run.folder, plan_identity(corpus)
    changes = world.on_main(lambda: compare_config(folder, cfg))
    change = world.on_main(lambda: extension.compare_builder(folder, build_model))
    world.on_main(lambda: compare_plan(folder, identity))
    progress.at(0, "checkpoint")
    saved = newest_of_run(folder / "checkpoints", corpus.total_steps, layout, world, PretrainingMeta)
    access = access_of(cfg.data)
    verifying = partial(progress.at, 0, "digests")
    restored = check_restored(folder, corpus.index, access, world, verifying)
    if cfg.data.verify == "digest":
        world.together(lambda: check_digests(corpus.index, world.rank, world.size, access, verifying), DataError)
    progress.at(0, "model")
    model = extension.build_seeded(build_model, cfg)
    is_configured = extension.has_configured_parameters(model, cfg)
    notes = [*changes, *([change] if change else []), *restored]
    if not is_configured:
        notes.append("no mfu, and no Encoder.load of the export: the parameters are not those that model.* describes")
    initial = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in model.named_parameters()}
    reads_initial = saved is None and cfg.train.init_from is not None
    report = load_initial(cfg, corpus.features, initial, world) if reads_initial else None
    shape = (cfg.train.micro_batch, 1, cfg.features.n_mels, cfg.data.crop_frames)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sample_ids = torch.zeros(cfg.train.micro_batch, 3, dtype=torch.int64)
    start = time.monotonic()
    with fitting_memory(world.device, cfg.train.micro_batch):
        engine = build_engine(model, cfg, layout, world.device)
        with extension.held_to_contract(model, cfg, world.device, build_model):
            dry_run(engine, noise.to(world.device), sample_ids.to(world.device))
    if cfg.model.activation_checkpointing:
        notes.append("model.activation_checkpointing: blocks are computed again in the backward")
    if cfg.engine.compile:
        notes.append(f"engine.compile: engine and first step took {time.monotonic() - start:.1f} s")
    progress.at(0, "state")
    if saved:
        checkpoint.load(engine, saved, world)
    else:
        state.reset(engine, initial)
    step = saved.step if saved else 0
    guard = UpdateGuard(engine, cfg.optim, world, folder, step, saved.skipped_updates if saved else ())
    front_end = LogMel(corpus.features).to(world.device)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cfg.train.precision]
    rate = monitor.matrix_rate(world.device, precision)
    validation = world.together(lambda: Validation.open(cfg, corpus, front_end, world), DataError)
    if cfg.probe.every and not is_configured:
        error = ConfigError("probe.every: the probe needs the model that model.* describes; probe.every=0 goes without")
        error.on_all_ranks = True
        raise error
    about = WeightsInfo(cfg.model, corpus.features, cfg.data.crop_frames)
    online = world.together(lambda: OnlineProbe.open(cfg.probe, about, cfg.seed, world), DataError)
    notes += [online.describe()] if online else []
    metrics = world.together(lambda: monitor.Monitor(folder, step, corpus.total_steps, world.is_main), CheckpointError)
    saver = Saver(folder / "checkpoints", cfg.checkpoint, world, cfg.engine.timeout_minutes)
    world.on_main(lambda: extension.record_builder(folder, build_model))
    world.on_main(lambda: record_start(folder, cfg, identity))
    if report:
        world.on_main(lambda: write_atomically(folder / INITIAL_FILE, report.json()))
    world.on_main(lambda: write_atomically(folder / "environment.json", json.dumps(environment(world), indent=1)))
    if world.is_main:
        num_parameters = sum(value.numel() for value in initial.values())  # ZeRO 3 has emptied the model's own
        model_line = extension.describe(build_model, cfg, num_parameters)
        print(announcement(cfg, world, corpus, describe_engine(engine), model_line, saved, notes), flush=True)
        if report:
            print(report.text(), flush=True)
    progress.at(step, "start")
    return Training(
        cfg,
        world,
        layout,
        corpus,
        engine,
        front_end,
        validation,
        online,
        metrics,
        saver,
        guard,
        progress,
        interruption,
        rate,
        is_configured,
        step,
        saved.bad_samples if saved and world.is_main else 0,
        saved.missing_samples if saved and world.is_main else 0,
    )


def main(arguments: Sequence[str], build_model: BuildModel = configured_model) -> int:
    """`python -m msm_dist.pretrain CONFIG [a.b=c ...]`, or a program with a model of its own; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed calls collectives by names that torch renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # The share of time spent waiting for data tells whether there are too many workers, or too few.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    # The deepspeed launcher adds --local_rank=N; the environment says the same.
    words = [word for word in arguments if not word.startswith("--local_rank")]

    def action() -> int:
        try:
            if not words or words[0].startswith("-") or "=" in words[0]:
                raise ConfigError("usage: python -m msm_dist.pretrain CONFIG.yaml [section.key=value ...]")
            cfg = load_config(words[0], words[1:])
        except ConfigError as error:
            error.on_all_ranks = True
            raise
        return pretrain(cfg, build_model)

    return reporting(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
