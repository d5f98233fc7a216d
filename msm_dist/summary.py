"""What a run says of itself on the console: at its start what it is, at its end what came out and where it is."""

from collections.abc import Sequence
from pathlib import Path

import torch

from msm_dist.config import Config
from msm_dist.corpus import Corpus, overlaps
from msm_dist.data.mix import MixedPlan
from msm_dist.engine.checkpoint import Saved, checkpoint_name
from msm_dist.engine.world import World
from msm_dist.environment import device_name
from msm_dist.monitor import read_metrics
from msm_kernels.attention import sdpa_note
from msm_kernels.backend import describe, resolve


def announcement(
    cfg: Config, world: World, corpus: Corpus, engine: str, model: str, saved: Saved | None, notes: Sequence[str]
) -> str:
    """What is about to run, and from where."""
    lines = [
        f"run        {cfg.run.folder}, {'continued from ' + str(saved.folder) if saved else 'from step 0'}, "
        f"to step {corpus.total_steps}",
        f"machine    {world.size} x {device_name(world.device)}, {cfg.train.precision}, "
        f"{engine}, {describe(cfg.model.backend, world.device)}",
        f"model      {model}",
        f"corpus     {corpus.index.location}: {corpus.plan.num_clips} clips, {corpus.index.seconds / 3600:.2f} h, "
        f"{corpus.plan.lanes} lanes, mean {corpus.features.mean:.3f}, std {corpus.features.std:.3f}",
    ]
    if isinstance(corpus.plan, MixedPlan):
        lines += [
            f"source     {source.location}: {share:.1%} of the crops, {source.num_clips} clips, "
            f"{source.seconds / 3600:.2f} h"
            for source, share in zip(corpus.sources, corpus.plan.shares, strict=True)
        ]
        notes = [*overlaps(corpus.sources), *notes]
    if official := corpus.index.official:
        lines.append(
            f"official   {official.found:,} of {official.clips:,} clips of {', '.join(official.tables)} "
            f"(manifest {official.manifest[:12]})"
        )
    lines += [f"note       {note}" for note in (*attention_notes(cfg, world.device), *notes)]
    if corpus.missing:
        lines.append(f"missing    {len(corpus.missing)} of {len(corpus.index.shards)} shards; their slots are filled")
    if world.size == 1 and torch.cuda.device_count() > 1:
        lines.append(
            f"note       1 of {torch.cuda.device_count()} GPUs is used; for all of them: "
            "deepspeed --module msm_dist.pretrain CONFIG"
        )
    return "\n".join(lines)


def attention_notes(cfg: Config, device: torch.device) -> list[str]:
    """What of the model's attention Triton leaves to torch: said here, as a compiled model says nothing on its way."""
    if resolve(cfg.model.backend, device) == "reference":
        return []
    geometry, prefix = cfg.model.geometry, int(cfg.model.cls_token)
    sequences = (
        (cfg.num_keep + prefix, geometry.embed_dim // geometry.num_heads),
        (cfg.num_patches + prefix, geometry.decoder_embed_dim // geometry.decoder_num_heads),
    )
    return [note for note in dict.fromkeys(sdpa_note(*sequence) for sequence in sequences) if note]


def summary(cfg: Config, step: int, exported: Path) -> str:
    """The latest numbers in the run folder, and where weights, checkpoint, picture and logs are."""
    folder = cfg.run.folder
    latest: dict[str, float] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        latest |= line
    lines = [f"\n{folder} is finished: {step} steps are done (more with train.steps=N)"]
    if "valid_loss" in latest:
        lines.append(f"  held-out loss    {latest['valid_loss']:.4f}")
        references = {name: value for name, value in latest.items() if name.startswith("reference_")}
        for name, value in references.items():
            lines.append(f"    {name:<23} {value:.4f}  (the loss is {latest['valid_loss'] / value:.2f} of it)")
    if "clips_per_second" in latest:
        lines.append(f"  speed            {latest['clips_per_second']:.1f} clips/s")
    pictures = sorted((folder / "pictures").glob("*.png"))
    places = {
        "weights": exported,
        "checkpoint": folder / "checkpoints" / checkpoint_name(step),
        "picture": pictures[-1] if pictures else "none without data.valid_shards",
        "TensorBoard": f"tensorboard --logdir {cfg.run.dir}",
    }
    return "\n".join([*lines, *(f"  {name:<16} {place}" for name, place in places.items())])
