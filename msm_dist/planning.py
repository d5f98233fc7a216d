"""`msm-dist plan`: what a configuration means on a number of processes, without starting it.

In: a configuration file, overrides, a world size. Out: a table as text. Raises ConfigError, DataError as the
run itself would; where the corpus is not there yet, the lines that need it say so instead.
"""

from collections.abc import Iterable, Sequence

import torch

from msm_dist.config import batch_layout, load_config
from msm_dist.corpus import open_corpus
from msm_dist.errors import DataError
from msm_dist.model.mae import Decoder, Encoder
from msm_dist.model.patches import PatchGrid


def describe(path: str, overrides: Sequence[str], world_size: int) -> str:
    """Batch layout, parameters, learning rate, steps per epoch."""
    cfg = load_config(path, overrides)
    layout = batch_layout(cfg, world_size)
    grid = PatchGrid(cfg.features.n_mels, cfg.data.crop_frames, cfg.model.patch)
    with torch.device("meta"):  # counted, not allocated
        encoder, decoder = Encoder(cfg.model, grid), Decoder(cfg.model, grid)
    in_encoder, in_decoder = _numel(encoder.parameters()), _numel(decoder.parameters())
    tables = _numel(encoder.buffers()) + _numel(decoder.buffers())
    lr_rule = f"optim.lr = {cfg.optim.lr}"
    if cfg.optim.lr is None:
        lr_rule = f"{cfg.optim.base_lr or 3e-4:g} per 256 clips x {cfg.train.global_batch} / 256"
    rows = [
        ("run folder", str(cfg.run.folder)),
        (
            "batch",
            f"{cfg.train.global_batch} crops = {world_size} processes x micro-batch {layout.micro_batch} x "
            f"{layout.accumulation} accumulated",
        ),
        ("blocks", f"{layout.blocks_per_step} of {cfg.data.block} crops a step"),
        (
            "parameters",
            f"{(in_encoder + in_decoder) / 1e6:.2f} M, of them {in_encoder / 1e6:.2f} M in the encoder "
            f"({(in_encoder + in_decoder + tables) / 1e6:.2f} M with the fixed position tables)",
        ),
        (
            "patches",
            f"{cfg.num_patches} of {cfg.model.patch_size} ({cfg.features.n_mels} x {cfg.data.crop_frames} frames), "
            f"{cfg.num_keep} visible",
        ),
        ("precision", f"{cfg.train.precision}, ZeRO {cfg.engine.zero_stage}"),
        ("peak lr", f"{cfg.peak_lr:.6g} ({lr_rule})"),
    ]
    try:
        corpus = open_corpus(cfg, layout)
    except DataError as error:
        rows.append(("corpus", f"not here: {error}"))
    else:
        plan = corpus.plan
        crops = plan.clips_per_epoch * cfg.data.crops_per_clip
        rows += [
            ("corpus", f"{plan.num_clips} clips in {len(corpus.index.shards)} shards, {plan.lanes} lanes"),
            ("epoch", f"{plan.clips_per_epoch} clips = {crops / cfg.train.global_batch:.2f} steps"),
            ("length", f"{corpus.total_steps} steps, {corpus.warmup_steps:.0f} of warm-up"),
        ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _numel(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
