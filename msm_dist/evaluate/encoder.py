"""Audio of any length to embeddings, with a trained encoder and nothing that only training needs.

In: mono waveforms of torch or numpy at any rate, whole or as they come, and the weights of a run. Out: a vector per
time step, or one per clip; a clip's vectors do not depend on the other clips of its batch. The log-mel is cut in chunks
as long as the model's crops; the last one runs at its own length, with its own columns of the position table (RECIPE of
the method: features for downstream use). Chunks of one length run together, so that nothing is padded and no mask is
needed: a clip among longer ones goes through the very operations that it goes through alone. Memory follows the
results, not the audio. Fails with CheckpointError on weights that can't be loaded, with DataError on a waveform that
can't be embedded, with ConfigError on a wrong setting.

Legend: B clips, S samples, F mel bands, T time steps, K chunks at once, L = Fg * Tg patches of a chunk, D width of the
encoder, E = Fg * D.
"""

import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from msm_dist import __version__
from msm_dist.data.audio import num_target_samples, resample, resample_blocks
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate import hub
from msm_dist.evaluate.checks import (
    Layer,
    check_layer,
    checked_batch,
    checked_clip,
    checked_device,
    checked_finite,
    checked_lengths,
    checked_mean_and_std,
    checked_statistics,
)
from msm_dist.evaluate.chunks import Chunk, Clip, Sound, chunks_of, whole_frames, window_begin
from msm_dist.evaluate.normalization import Normalization, Statistics, measured
from msm_dist.evaluate.recordings import checked_rate
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, load

Samples = Tensor | np.ndarray
CHUNKS_AT_ONCE = 32


class Encoder:
    """A trained encoder with its front end and the statistics that normalise its input.

    `normalization` says whose: the training corpus' (checkpoint), those of a data set of yours (dataset, made by
    `for_dataset`), or those of the clips of each call (batch: as the published code does it, for comparison with that
    only, since a clip's vectors then depend on its neighbours). `chunk_batch` chunks run at once; with 1 a clip's
    vectors are the same to the bit whatever its batch, with more to rounding.
    """

    def __init__(
        self,
        model: MaskedSpectrogramModel,
        info: WeightsInfo,
        device: str | torch.device = "cpu",
        normalization: Normalization = "checkpoint",
        statistics: Statistics | None = None,
        chunk_batch: int = CHUNKS_AT_ONCE,
    ):
        self.info = info
        """What the weights say beside themselves: geometry, front end, crop and origin."""
        self.features = info.features
        self.device = checked_device(device)
        self.normalization = normalization
        """Whose mean and deviation the input is normalised with; name it with every result."""
        self.statistics = checked_statistics(normalization, statistics, info)
        """Mean and deviation of the log-mel; None where every batch has its own."""
        self.chunk_batch = max(1, chunk_batch)
        self._grid = model.grid
        self._encoder = model.encoder.to(self.device).eval()
        self._front_end = LogMel(info.features).to(self.device)
        self.embedding_size = self._grid.shape[0] * info.model.geometry.embed_dim
        """E: the patches of a time step side by side, low frequencies first."""
        self.depth = info.model.geometry.depth
        """Blocks: layers are numbered from 0, what enters the first, to this."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        normalization: Normalization = "checkpoint",
        statistics: Statistics | None = None,
        chunk_batch: int = CHUNKS_AT_ONCE,
    ) -> "Encoder":
        """Read the weights of a run folder, of a folder that holds weights, or of "hf://owner/name[@revision]".

        Raises CheckpointError; ConfigError where a Hub is named and huggingface_hub is not installed.
        """
        if str(path).startswith(hub.SCHEME):
            path = hub.download(str(path))
        return cls(*load(path), device, normalization, statistics, chunk_batch)

    def for_dataset(self, clips: Iterable[Samples], sample_rate: int) -> "Encoder":
        """This encoder, its weights shared, with the statistics of a data set: floating [S] each, measured once here.

        The log-mel of the clips themselves counts, no padding, as in training. Raises DataError where all is silence.
        """
        rate = checked_rate(sample_rate)
        sounds = (self._at_own_rate(checked_clip(clip), rate).numpy(force=True) for clip in clips)
        return self.with_statistics(measured(sounds, self.features).checked())

    def with_statistics(self, statistics: Statistics, normalization: Normalization = "dataset") -> "Encoder":
        """This encoder, its weights shared, with the mean and deviation given. Raises ConfigError."""
        other = copy.copy(self)
        other.normalization, other.statistics = normalization, checked_mean_and_std(statistics)
        return other

    def to(self, device: str | torch.device) -> "Encoder":
        """This encoder on another device, with a copy of its weights there; itself where it is there already.

        Raises ConfigError.
        """
        place = checked_device(device)
        if place == self.device:
            return self
        other = copy.copy(self)
        other.device = place
        other._encoder = copy.deepcopy(self._encoder).to(place)
        other._front_end = copy.deepcopy(self._front_end).to(place)
        return other

    def encode(
        self, waveform: Samples, sample_rate: int, lengths: Samples | None = None, layer: Layer = None
    ) -> Tensor:
        """Vectors over time: floating [B, S] in [-1, 1] at `sample_rate` Hz -> float32 [B, T, E].

        One per patch width (160 ms at 16 frames), zeros filling up the last. With `lengths` int64 [B], the samples of
        each clip that are its own, each clip is encoded as it is alone, what follows is not looked at, and the steps
        that it lacks (`padding_mask`) are zero. `layer` k is what leaves block k (0: what enters the first), before
        the final norm; "all" gives [B, T, 1 + depth, E]; None is the encoder's result. Raises DataError, ConfigError.
        """
        clips = self._clips(waveform, sample_rate, lengths)
        return pad_sequence(self.encode_clips(clips, layer), batch_first=True)

    def embed(self, waveform: Samples, sample_rate: int, lengths: Samples | None = None, layer: Layer = None) -> Tensor:
        """One vector per clip, the mean of its `encode` over time: [B, S] -> float32 [B, E], or [B, 1 + depth, E]."""
        clips = self._clips(waveform, sample_rate, lengths)
        return torch.stack([frames.mean(dim=0) for frames in self.encode_clips(clips, layer)])

    @torch.no_grad()
    def encode_clips(self, clips: Sequence[Clip], layer: Layer = None) -> list[Tensor]:
        """The vectors of clips cut by `chunks`, each float32 [T, E], or [T, 1 + depth, E]."""
        check_layer(layer, self.depth)
        statistics = self.statistics or measured((clip.whole() for clip in clips), self.features)
        width = self._grid.patch[1]
        shape = (1 + self.depth, self.embedding_size) if layer == "all" else (self.embedding_size,)
        found = [torch.empty(clip.num_frames // width, *shape, device=self.device) for clip in clips]
        groups: dict[tuple[int, type], list[tuple[int, Chunk]]] = defaultdict(list)
        for number, clip in enumerate(clips):
            for chunk in chunks_of(clip.num_frames, self._grid.frames):
                groups[chunk.frames, type(clip)].append((number, chunk))
        for places in groups.values():
            for some in (places[i : i + self.chunk_batch] for i in range(0, len(places), self.chunk_batch)):
                windows = [clips[number].window(chunk) for number, chunk in some]
                for (number, chunk), vectors in zip(some, self._encode(windows, layer, statistics), strict=True):
                    first = chunk.first // width
                    found[number][first : first + len(vectors)] = vectors
        return found

    def stream(self, blocks: Iterable[Samples], sample_rate: int, layer: Layer = None) -> Iterator[Tensor]:
        """The vectors of one recording of any length that comes in blocks, floating [S] each: float32 [T, E] pieces.

        Joined they are those of `encode`; a piece comes when `chunk_batch` chunks are complete, and memory
        holds no more than these. Raises DataError, ConfigError.
        """
        check_layer(layer, self.depth)
        sample_rate = checked_rate(sample_rate)
        if self.statistics is None:
            raise ConfigError("normalization = batch: a stream has no batch; use checkpoint, or dataset")
        longest, ahead = self._grid.frames, self.features.crop_samples(self._grid.frames)
        own = (checked_clip(block).cpu().float().numpy() for block in blocks)
        held, first, length, frame = [], 0, 0, 0
        for block in resample_blocks(own, sample_rate, self.features.sample_rate):
            held.append(torch.tensor(block))  # a copy: the caller may fill the same buffer again
            length += len(block)
            ready = (length - window_begin(frame, self.features) - ahead) // (self.features.hop * longest) + 1
            ready -= ready % self.chunk_batch  # as `encode` groups them, so that results are its very bits
            if ready > 0:
                sound = self._sound(torch.cat(held), length, first)
                chunks = list(chunks_of(frame + ready * longest, longest, frame))
                yield from self._encoded(sound, chunks, layer)
                frame += ready * longest
                begin = max(0, window_begin(frame, self.features))
                held, first = [sound.samples[begin - first :].clone()], begin
        if not length:
            raise DataError("the stream holds no samples: must be at least one")
        sound = self._sound(torch.cat(held), length, first)
        yield from self._encoded(sound, list(chunks_of(sound.num_frames, longest, frame)), layer)

    def num_steps(self, num_samples: int | Tensor, sample_rate: int) -> int | Tensor:
        """T of a clip of so many samples at `sample_rate` Hz, or of several, int64 [B]."""
        own = num_target_samples(num_samples, checked_rate(sample_rate), self.features.sample_rate)
        return whole_frames(own, self.features, self._grid.patch[1]) // self._grid.patch[1]

    def padding_mask(self, lengths: Tensor, sample_rate: int) -> Tensor:
        """Which steps of `encode(..., lengths)` a clip is too short for: bool [B, T], True where there is nothing."""
        steps = self.num_steps(torch.as_tensor(lengths).long(), sample_rate)
        return torch.arange(int(steps.max()), device=steps.device) >= steps[:, None]

    def timestamps_ms(self, num_steps: int) -> Tensor:
        """Centres of the first `num_steps` time steps in ms: float32 [num_steps], such as 75, 235, 395."""
        return self.centres_ms(num_steps).float()

    def centres_ms(self, num_steps: int) -> Tensor:
        """`timestamps_ms` in float64: exact for hours."""
        width = self._grid.patch[1]
        frames = torch.arange(num_steps, dtype=torch.float64) * width + (width - 1) / 2
        return frames * (1000 * self.features.hop / self.features.sample_rate)

    def describe(self) -> dict[str, Any]:
        """What a result should carry to be told apart and made again: plain values, for JSON."""
        mean, std = self.statistics or (None, None)
        return {
            "program": f"msm_dist {__version__}",
            "encoder_sha256": self.digest(),
            "origin": self.info.origin,
            "model": self.info.model.model_dump(mode="json") | self.info.model.geometry._asdict(),
            "crop_frames": self.info.crop_frames,
            "features": self.features.front_end(),
            "sample_rate": self.features.sample_rate,
            "embedding_size": self.embedding_size,
            "normalization": self.normalization,
            "mean": mean,
            "std": std,
        }

    def digest(self) -> str:
        """sha256 over the encoder's parameters, names and float32 values: the same wherever they were stored."""
        digest = hashlib.sha256()
        for name, value in sorted(self._encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.float().cpu().contiguous().numpy().astype("<f4", copy=False).data)
        return digest.hexdigest()

    def sound(self, waveform: Samples) -> Sound:
        """A clip for `encode_clips`: floating [S] at the encoder's own rate, `features.sample_rate`."""
        return self._sound(checked_clip(waveform).float())

    def _sound(self, samples: Tensor, length: int | None = None, first: int = 0) -> Sound:
        return Sound(samples, length or len(samples), self.features, self._grid.patch[1], first)

    def _clips(self, waveform: Samples, sample_rate: int, lengths: Samples | None) -> list[Sound]:
        waveform, sample_rate = checked_batch(waveform, sample_rate)
        own = [waveform.shape[1]] * len(waveform) if lengths is None else checked_lengths(lengths, waveform)
        clips = [checked_finite(clip[:length]) for clip, length in zip(waveform, own, strict=True)]
        return [self._sound(self._at_own_rate(clip, sample_rate)) for clip in clips]

    def _at_own_rate(self, clip: Tensor, sample_rate: int) -> Tensor:
        """float32 [S], resampled as the clips were that it was trained on."""
        if sample_rate == self.features.sample_rate:
            return clip.float()
        return torch.from_numpy(resample(clip.float().cpu().numpy(), sample_rate, self.features.sample_rate))

    def _encoded(self, clip: Clip, chunks: Sequence[Chunk], layer: Layer) -> Iterator[Tensor]:
        """The vectors [T, E] of a clip's chunks, one after another."""
        full = sum(chunk.frames == self._grid.frames for chunk in chunks)
        groups = [chunks[i : min(i + self.chunk_batch, full)] for i in range(0, full, self.chunk_batch)]
        for some in [*groups, chunks[full:]]:
            if some:
                windows = [clip.window(chunk) for chunk in some]
                yield self._encode(windows, layer, self.statistics).flatten(0, 1)

    @torch.no_grad()
    def _encode(self, windows: Sequence[Tensor], layer: Layer, statistics: Statistics) -> Tensor:
        """Windows of equal chunks -> [K, Tg, E], or [K, Tg, 1 + depth, E]."""
        logmel = self._front_end(torch.stack(list(windows)).to(self.device))  # [K, 1, F, Tg * pw]
        spectrogram = normalize(logmel, *statistics)
        if layer is None:
            return self._over_time(self._encoder.features(spectrogram))
        layers = self._encoder.layers(spectrogram)
        if layer == "all":
            return torch.stack([self._over_time(tokens) for tokens in layers], dim=2)
        return self._over_time(next(islice(layers, layer, None)))

    def _over_time(self, tokens: Tensor) -> Tensor:
        """[K, L, D], frequency-major -> [K, Tg, E]."""
        return tokens.unflatten(1, (self._grid.shape[0], -1)).transpose(1, 2).flatten(2)
