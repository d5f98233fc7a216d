"""Validation on fixed crops and masks of held-out clips, beside three references that need no model.

In: `data.valid_shards`. The first `train.valid_clips` clips of their index are used, each with one crop and
one mask, both functions of (seed, clip number): the same at every step, in every run of a seed and at any
world size. A rank decodes its share (clips rank, rank + size, ...) once, into memory: 67 kB a clip at 208
frames. Out: the mean loss over clips, references in the units of the loss, pictures. A clip that can't be
decoded is left out and reported. Fails with DataError: shards missing or damaged, no clip decodes, no
statistics.

A model is judged by what its Output says: its own masks, and as target the spectrogram, or `target`
[B, 1, F, T] where the Output of a model of yours has one. References stand beside the mean squared error to the
target's masked patches only: to any other loss they are no measure, and pictures need its patches.

Legend: B clips, F mel bands, T frames, L patches, K visible, M masked, ph x pw a patch, S samples.
"""

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from msm_dist.config import Config, Features
from msm_dist.corpus import Corpus, check_digests
from msm_dist.data.crops import CropReader, Source, no_crop
from msm_dist.data.index import check_shards, load_index
from msm_dist.data.plan import make_plan
from msm_dist.data.storage import access_of
from msm_dist.engine.world import World
from msm_dist.errors import DataError
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import Output
from msm_dist.pictures import Picture, make_picture
from msm_dist.references import mel_mean_patches, nearest_patches, normalized_patches, visible_mean_patches
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import Masking

log = logging.getLogger(__name__)

NUM_PICTURES = 4
REFERENCE_CLIPS = 16  # at once: distances take B * M * L numbers
REFERENCES = ("reference_mel_mean", "reference_visible_mean", "reference_nearest_patch")
SAME_LOSS = 1e-3  # relative: between two orders of one sum, not between two losses

Forward = Callable[[Tensor, Tensor], Output]
"""(normalised spectrogram [B, 1, F, T], sample_ids int64 [B, 3]) -> Output, without gradients."""


class Validation:
    """One rank's share of the validation set. loss, references and pictures are collectives."""

    def __init__(
        self,
        cfg: Config,
        features: Features,
        mel_mean: Tensor,
        front_end: LogMel,
        world: World,
        crops: Tensor,
        sample_ids: Tensor,
        most_clips: int,
    ):
        """Use given crops, as in a Batch, and their int64 [n, 3]; `mel_mean` [F] is not normalised.

        No rank has more than `most_clips` of them.
        """
        self.cfg = cfg
        self.features = features
        self.mel_mean = normalize(mel_mean.double(), features.mean, features.std)
        self.front_end = front_end
        self.world = world
        self.crops = crops
        self.sample_ids = sample_ids
        self.most_clips = most_clips
        self._references: dict[str, float] | None = None

    @classmethod
    def open(cls, cfg: Config, corpus: Corpus, front_end: LogMel, world: World) -> "Validation | None":
        """Decode this rank's share; None without data.valid_shards. No collective. Raises DataError."""
        if cfg.data.valid_shards is None:
            return None
        for lacking in (source.location for source in corpus.sources if source.mel_mean is None):
            raise DataError(
                f"{lacking}: its index has no mean per mel band, which validation compares with; "
                f"run `msm-dist data stats {lacking}`"
            )
        try:
            access = access_of(cfg.data)
            index = load_index(cfg.data.valid_shards, access)
            missing = check_shards(index, "size", cfg.data.allow_missing_shards, access)
            if cfg.data.verify == "digest":
                check_digests(index, world.rank, world.size, access)
        except DataError as error:
            raise DataError(f"data.valid_shards = {cfg.data.valid_shards}: {error}") from None
        clips = [shard.clips for shard in index.shards]
        plan = make_plan(clips, cfg.seed, lanes=1, block=1, shuffle_window=1, crops_per_clip=1)
        source = Source(plan, index, corpus.features, cfg.data.crop_frames, frozenset(missing), access)
        num_clips = min(cfg.train.valid_clips, index.num_clips)
        sample_ids = _sample_ids(num_clips)[world.rank :: world.size]
        crops = CropReader(source).read(sample_ids)
        good = [number for number, crop in enumerate(crops) if crop is not None]
        if len(good) < len(crops):
            log.warning("%s: %d of %d clips left out of validation", index.location, len(crops) - len(good), len(crops))
        empty = no_crop(index.kind, corpus.features, cfg.data.crop_frames)
        values = np.stack([crops[number].values for number in good]) if good else empty[None][:0]
        mel_mean = torch.tensor(corpus.index.mel_mean)
        return cls(
            cfg,
            corpus.features,
            mel_mean,
            front_end,
            world,
            torch.from_numpy(values),
            torch.from_numpy(sample_ids[good]),
            math.ceil(num_clips / world.size),
        )

    def loss(self, forward: Forward) -> dict[str, float]:
        """valid_loss: the mean over all clips, whatever the world size and the micro-batch."""
        total = 0.0
        for spectrogram, sample_ids, num_clips in self._batches(self.cfg.train.micro_batch):
            loss = forward(spectrogram, sample_ids).loss.item()
            total += loss * num_clips if num_clips else 0.0
        return {"valid_loss": self._mean([total])[0]}

    def references(self, forward: Forward) -> dict[str, float]:
        """What three predictors without a model reach on the patches that the model masks; computed once.

        reference_mel_mean: the training corpus' mean per mel band. reference_visible_mean: the mean per band
        of the clip's visible patches. reference_nearest_patch: the nearest visible patch. Without the first where
        the target is not the spectrogram; none, with a warning, where the loss is not the error to the target.
        """
        if self._references is None:
            totals = dict.fromkeys((*REFERENCES, "other_target", "other_loss"), 0.0)
            for spectrogram, sample_ids, num_clips in self._batches(REFERENCE_CLIPS):
                output = forward(spectrogram, sample_ids)
                if not num_clips:
                    continue
                errors = self._reference_errors(spectrogram, output)
                for name, error in errors.items():
                    totals[name] += error * num_clips
            means = dict(zip(totals, self._mean(list(totals.values())), strict=True))
            kept = REFERENCES[1:] if means["other_target"] else REFERENCES
            if means["other_loss"]:
                kept = ()
                if self.world.is_main:
                    log.warning(
                        "the model's loss is not the mean squared error of its prediction to its target's masked "
                        "patches: validation has no references that could stand beside it"
                    )
            self._references = {name: means[name] for name in kept}
        return dict(self._references)

    def pictures(self, forward: Forward) -> list[Picture]:
        """Pictures of rank 0's first clips; empty on the other ranks, and for a prediction that is not of patches."""
        batch = next(self._batches(NUM_PICTURES), None)
        if batch is None:
            return []
        spectrogram, sample_ids, num_clips = batch
        output = forward(spectrogram, sample_ids)
        if not (self.world.is_main and num_clips and self._predicts_patches(output)):
            return []
        target, prediction = _target(output, spectrogram).float().cpu(), output.prediction.float().cpu()
        ids = [rows.cpu() for rows in output.masking]
        return [
            make_picture(
                target[number],
                Masking(*(rows[number : number + 1] for rows in ids)),
                prediction[number],
                self.cfg.model.patch,
                self.cfg.model.normalize_targets,
                self.features,
            )
            for number in range(num_clips)
        ]

    def _batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Normalised spectrograms [B, 1, F, T] and sample_ids [B, 3], on the device, and how many clips they are.

        As many batches on all ranks, as ZeRO 3 gathers weights in every forward pass: a rank that has run out
        yields one clip of silence that counts as none.
        """
        device = self.world.device
        for start in range(0, self.most_clips, size):
            crops, sample_ids = self.crops[start : start + size], self.sample_ids[start : start + size]
            num_clips = len(sample_ids)
            if not num_clips:
                crops, sample_ids = self.crops.new_zeros(1, *self.crops.shape[1:]), sample_ids.new_zeros(1, 3)
            spectrogram = self.front_end(crops.to(device))
            normalized = normalize(spectrogram, self.features.mean, self.features.std)
            yield normalized, sample_ids.to(device), num_clips

    def _mean(self, sums: list[float]) -> list[float]:
        """Sums over this rank's clips -> means over all clips."""
        *totals, num_clips = self.world.sum([*sums, len(self.sample_ids)])
        if not num_clips:
            error = DataError(
                f"data.valid_shards = {self.cfg.data.valid_shards}: none of the first "
                f"{self.cfg.train.valid_clips} clips can be decoded; check them with `msm-dist data verify "
                "--decode`, or go without validation: data.valid_shards=null"
            )
            error.on_all_ranks = True
            raise error
        return [total / num_clips for total in totals]

    def _predicts_patches(self, output: Output) -> bool:
        height, width = self.cfg.model.patch
        return tuple(output.prediction.shape) == (*output.masking.ids_masked.shape, height * width)

    def _reference_errors(self, spectrogram: Tensor, output: Output) -> dict[str, float]:
        """Errors of the predictors, and whether the model has another target or another loss than they stand for."""
        model, masking = self.cfg.model, output.masking
        target = _target(output, spectrogram)
        other_target = target is not spectrogram
        if not self._predicts_patches(output):
            return {"other_loss": 1.0}

        def error_of(patches: Tensor, target: Tensor) -> Tensor:
            return masked_patch_loss(patches, target, masking, model.patch, model.normalize_targets, model.backend)

        error = error_of(output.prediction, target)
        is_loss = torch.isclose(output.loss.float(), error.float(), rtol=SAME_LOSS, equal_nan=True)
        target = target.double()
        mel_mean = torch.zeros_like(self.mel_mean) if other_target else self.mel_mean
        mel_mean = mel_mean.to(target.device)
        predictions = {
            "reference_mel_mean": mel_mean_patches(target, masking, model.patch, mel_mean),
            "reference_visible_mean": visible_mean_patches(target, masking, model.patch, mel_mean),
            "reference_nearest_patch": nearest_patches(target, masking, model.patch),
        }
        if model.normalize_targets:
            predictions = {name: normalized_patches(patches) for name, patches in predictions.items()}
        errors = {name: error_of(patches, target).item() for name, patches in predictions.items()}
        return errors | {"other_target": float(other_target), "other_loss": float(not is_loss)}


def _target(output: Output, spectrogram: Tensor) -> Tensor:
    """What the model predicts patches of: [B, 1, F, T]."""
    target = getattr(output, "target", None)
    return spectrogram if target is None else target


def _sample_ids(num_clips: int) -> np.ndarray:
    """(epoch 0, clip, crop 0) of each clip: int64 [num_clips, 3]."""
    clips = np.arange(num_clips)
    return np.stack([np.zeros_like(clips), clips, np.zeros_like(clips)], axis=1)
