"""Validation on fixed crops and masks of held-out clips, beside three references that need no model.

In: `data.valid_shards`. The first `train.valid_clips` clips of their index are used, each with one crop and
one mask, both functions of (seed, clip number): the same at every step, in every run of a seed and at any
world size. A rank decodes its share (clips rank, rank + size, ...) once, into memory: 67 kB a clip at 208
frames. Out: the mean loss over clips, references in the units of the loss, pictures. A clip that can't be
decoded is left out and reported. Fails with DataError: shards missing or damaged, no clip decodes, no
statistics.

Legend: B clips, F mel bands, T frames, L patches, K visible, M masked, ph x pw a patch, S samples.
"""

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from msm_dist.config import Config, Features
from msm_dist.corpus import Corpus, check_digests
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import check_shards, load_index
from msm_dist.data.plan import make_plan
from msm_dist.engine.world import World
from msm_dist.errors import DataError
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import Output
from msm_dist.model.patches import PatchGrid, patchify, unpatchify
from msm_dist.pictures import Picture, make_picture
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import Masking, random_masking
from msm_kernels.reference import select_rows

log = logging.getLogger(__name__)

NUM_PICTURES = 4
REFERENCE_CLIPS = 16  # at once: distances take B * M * L numbers

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
        waveforms: Tensor,
        sample_ids: Tensor,
    ):
        """Use given crops: int16 [n, S] and their int64 [n, 3]; `mel_mean` [F] is not normalised."""
        self.cfg = cfg
        self.features = features
        self.mel_mean = normalize(mel_mean.double(), features.mean, features.std)
        self.front_end = front_end
        self.world = world
        self.waveforms = waveforms
        self.sample_ids = sample_ids
        self._references: dict[str, float] = {}

    @classmethod
    def open(cls, cfg: Config, corpus: Corpus, front_end: LogMel, world: World) -> "Validation | None":
        """Decode this rank's share; None without data.valid_shards. No collective. Raises DataError."""
        if cfg.data.valid_shards is None:
            return None
        if corpus.index.mel_mean is None:
            raise DataError(
                f"{corpus.index.root}: its index has no mean per mel band, which validation compares with; "
                f"run `msm-dist data stats {corpus.index.root}`"
            )
        try:
            index = load_index(cfg.data.valid_shards)
            missing = check_shards(index, "size", cfg.data.allow_missing_shards)
            if cfg.data.verify == "digest":
                check_digests(index, world.rank, world.size)
        except DataError as error:
            raise DataError(f"data.valid_shards = {cfg.data.valid_shards}: {error}") from None
        clips = [shard.clips for shard in index.shards]
        plan = make_plan(clips, cfg.seed, lanes=1, block=1, shuffle_window=1, crops_per_clip=1)
        source = Source(plan, index, corpus.features, cfg.data.crop_frames, frozenset(missing))
        sample_ids = _sample_ids(min(cfg.train.valid_clips, index.num_clips))[world.rank :: world.size]
        crops = CropReader(source).read(sample_ids)
        good = [number for number, crop in enumerate(crops) if crop is not None]
        if len(good) < len(crops):
            log.warning("%s: %d of %d clips left out of validation", index.root, len(crops) - len(good), len(crops))
        waveforms = np.zeros((len(good), corpus.features.crop_samples(cfg.data.crop_frames)), np.int16)
        for row, number in enumerate(good):
            waveforms[row] = crops[number].waveform
        mel_mean = torch.tensor(corpus.index.mel_mean)
        return cls(
            cfg,
            corpus.features,
            mel_mean,
            front_end,
            world,
            torch.from_numpy(waveforms),
            torch.from_numpy(sample_ids[good]),
        )

    def loss(self, forward: Forward) -> dict[str, float]:
        """valid_loss: the mean over all clips, whatever the world size and the micro-batch."""
        total = 0.0
        for spectrogram, sample_ids in self._batches(self.cfg.train.micro_batch):
            total += forward(spectrogram, sample_ids).loss.item() * len(sample_ids)
        return {"valid_loss": self._mean([total])[0]}

    def references(self) -> dict[str, float]:
        """What three predictors without a model reach on the same masked patches; computed once.

        reference_mel_mean: the training corpus' mean per mel band. reference_visible_mean: the mean per band
        of the clip's visible patches. reference_nearest_patch: the nearest visible patch.
        """
        if not self._references:
            totals = dict.fromkeys(("reference_mel_mean", "reference_visible_mean", "reference_nearest_patch"), 0.0)
            for spectrogram, sample_ids in self._batches(REFERENCE_CLIPS):
                for name, error in self._reference_errors(spectrogram.double(), sample_ids).items():
                    totals[name] += error * len(sample_ids)
            self._references = dict(zip(totals, self._mean(list(totals.values())), strict=True))
        return dict(self._references)

    def pictures(self, forward: Forward) -> list[Picture]:
        """Pictures of rank 0's first clips; empty on the other ranks."""
        batch = next(self._batches(NUM_PICTURES), None)
        if batch is None:
            return []
        output = forward(*batch)
        if not self.world.is_main:
            return []
        spectrogram, prediction = batch[0].cpu(), output.prediction.float().cpu()
        ids = [rows.cpu() for rows in output.masking]
        return [
            make_picture(
                spectrogram[number],
                Masking(*(rows[number : number + 1] for rows in ids)),
                prediction[number],
                self.cfg.model.patch,
                self.cfg.model.normalize_targets,
                self.features,
            )
            for number in range(len(spectrogram))
        ]

    def _batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised spectrograms [B, 1, F, T] and sample_ids [B, 3], on the device."""
        device = self.world.device
        for start in range(0, len(self.sample_ids), size):
            spectrogram = self.front_end(self.waveforms[start : start + size].to(device))
            sample_ids = self.sample_ids[start : start + size].to(device)
            yield normalize(spectrogram, self.features.mean, self.features.std), sample_ids

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

    def _reference_errors(self, spectrogram: Tensor, sample_ids: Tensor) -> dict[str, float]:
        model = self.cfg.model
        masking = random_masking(self.cfg.seed, sample_ids, self.cfg.num_patches, self.cfg.num_keep, model.backend)
        mel_mean = self.mel_mean.to(spectrogram.device)
        predictions = {
            "reference_mel_mean": mel_mean_patches(spectrogram, masking, model.patch, mel_mean),
            "reference_visible_mean": visible_mean_patches(spectrogram, masking, model.patch, mel_mean),
            "reference_nearest_patch": nearest_patches(spectrogram, masking, model.patch),
        }
        if model.normalize_targets:
            predictions = {name: _normalized(patches) for name, patches in predictions.items()}
        return {
            name: masked_patch_loss(
                patches, spectrogram, masking, model.patch, model.normalize_targets, model.backend
            ).item()
            for name, patches in predictions.items()
        }


def mel_mean_patches(spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int], mel_mean: Tensor) -> Tensor:
    """Predict `mel_mean` [F], normalised like the spectrogram [B, 1, F, T], everywhere: [B, M, ph * pw]."""
    predicted = mel_mean.to(spectrogram.dtype)[None, None, :, None].expand_as(spectrogram)
    return select_rows(patchify(predicted, patch_size), masking.ids_masked)


def visible_mean_patches(
    spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int], mel_mean: Tensor
) -> Tensor:
    """Predict a band's mean over visible patches of the clip, else `mel_mean` [F]: [B, M, ph * pw]."""
    batch, num_patches = masking.ids_restore.shape
    seen = spectrogram.new_zeros(batch, num_patches).scatter(1, masking.ids_keep, 1.0)
    grid = PatchGrid(*spectrogram.shape[2:], patch_size)
    seen = unpatchify(seen.unsqueeze(-1).expand(-1, -1, grid.patch_pixels), grid)  # [B, 1, F, T]
    count = seen.sum(dim=-1, keepdim=True)
    mean = (spectrogram * seen).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    predicted = mean.where(count > 0, mel_mean.to(spectrogram.dtype)[None, None, :, None])
    return select_rows(patchify(predicted.expand_as(spectrogram), patch_size), masking.ids_masked)


def nearest_patches(spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int]) -> Tensor:
    """Predict the nearest visible patch on the grid, ties to the lower index: [B, M, ph * pw]."""
    rows, columns = PatchGrid(*spectrogram.shape[2:], patch_size).shape
    index = torch.arange(rows * columns, device=spectrogram.device)
    row, column = index // columns, index % columns
    distance = (row[:, None] - row).square() + (column[:, None] - column).square()  # [L, L], squared
    # argmin promises nothing about ties: every candidate gets a rank of its own.
    rank = distance * len(index) + index
    to_visible = rank[masking.ids_masked[:, :, None], masking.ids_keep[:, None, :]]  # [B, M, K]
    nearest = masking.ids_keep.gather(1, to_visible.argmin(dim=-1))
    return select_rows(patchify(spectrogram, patch_size), nearest)


def _normalized(patches: Tensor) -> Tensor:
    variance, mean = torch.var_mean(patches, dim=-1, correction=1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _sample_ids(num_clips: int) -> np.ndarray:
    """(epoch 0, clip, crop 0) of each clip: int64 [num_clips, 3]."""
    clips = np.arange(num_clips)
    return np.stack([np.zeros_like(clips), clips, np.zeros_like(clips)], axis=1)
