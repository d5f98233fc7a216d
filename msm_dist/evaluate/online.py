"""The online probe: how well a linear map reads labels off the encoder's embeddings while it is trained.

In: `probe.data`, labelled clips that are no part of the corpus, and the weights of a step. Out: a score per task,
accuracy or with several labels a clip mAP, beside two baselines on the same clips: the model with its seeded weights
and statistics of the log-mel. The map is ridge regression in closed form on standardised embeddings, its penalty chosen
by leave-one-out error, fitted to the training split and judged on the validation split, or where there is none on the
test split; of folds the first rotation. A step's scores are a function of its weights alone, and nothing of the
training is touched: weights are copied out of the engine into a model of the probe's own, fp32. Ranks share the clips.
Fails with DataError on a task or a clip that can't be read, at the start.

Legend: B clips, S samples, E size of a vector, N clips to fit, M clips to judge, C labels.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msm_dist.config import Probe
from msm_dist.data.index import INDEX_NAME
from msm_dist.engine.world import World
from msm_dist.errors import DataError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.probe_vectors import logmel_statistics
from msm_dist.evaluate.recordings import read_audio
from msm_dist.evaluate.scores import resampled
from msm_dist.evaluate.tasks import Task, TaskClip, read_task
from msm_dist.features import INT16_SCALE, LogMel
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo

LONGEST_SECONDS = 10
BATCH = 16  # clips of one length at a time
PENALTIES = 10.0 ** np.arange(-5, 3)  # in units of the largest variance along a direction, times N
BASELINES = ("random_weights", "logmel")
ENCODER = "encoder."

Embed = Callable[[Tensor], Tensor]
"""Waveforms float32 [B, S] of one length, at the model's rate -> vectors [B, E]."""


@dataclass(frozen=True)
class Part:
    """What is used of a task: the labels of all clips, and the audio of this rank's share."""

    name: str
    labels: np.ndarray
    """bool [N + M, C], the N clips to fit before the M to judge."""
    num_fit: int
    is_multilabel: bool
    waveforms: list[np.ndarray]
    """int16 [S] each: of the clips rank, rank + size, ..."""

    @property
    def score_name(self) -> str:
        return "map" if self.is_multilabel else "accuracy"


class OnlineProbe:
    """Labelled clips in memory, and a model of the probe's own that takes a step's weights."""

    def __init__(self, parts: Sequence[Part], info: WeightsInfo, seed: int, world: World):
        """`info` and `seed` say what is trained. Embeds this rank's clips with both baselines; no collective."""
        self.parts = parts
        self._world = world
        # How it is trained is of no use without gradients.
        self._info = replace(info, model=info.model.model_copy(update={"activation_checkpointing": False}))
        self._model = MaskedSpectrogramModel(self._info.model, info.features.n_mels, info.crop_frames, seed)
        del self._model.decoder
        front_end = LogMel(info.features)

        def statistics(waveforms: Tensor) -> Tensor:
            return torch.stack([logmel_statistics(waveform, front_end) for waveform in waveforms.numpy()])

        self._baselines = {"random_weights": self._embeddings(), "logmel": self._vectors(statistics)}
        self._baseline_scores: dict[str, float] | None = None

    @classmethod
    def open(cls, cfg: Probe, info: WeightsInfo, seed: int, world: World) -> "OnlineProbe | None":
        """Read the tasks and this rank's clips; None where probe.every is 0. No collective. Raises DataError."""
        if not cfg.every:
            return None
        rate = info.features.sample_rate
        paths = [cfg.data] if isinstance(cfg.data, str) else cfg.data or []
        try:
            if shards := [path for path in paths if (Path(path) / INDEX_NAME).is_file()]:
                raise DataError(
                    f"{shards[0]} holds shards, which only msm-dist probe reads; give a HEAR task folder or a table of "
                    "file,label,split"
                )
            tasks = [read_task(path, sample_rate=rate) for path in paths]
            names = [task.name for task in tasks]
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"two tasks are named {twice[0]}; leave one out, or give it another name")
            parts = [read_part(task, cfg.clips, rate, world.rank, world.size) for task in tasks]
        except DataError as error:
            raise DataError(f"probe.data = {cfg.data}: {error}") from None
        return cls(parts, info, seed, world)

    def describe(self) -> str:
        """What is probed, in a line."""
        sizes = (f"{part.name} ({part.num_fit} + {len(part.labels) - part.num_fit} clips)" for part in self.parts)
        return f"online probe: {', '.join(sizes)}"

    def scores(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """accuracy/TASK or map/TASK (0 to 1), and the same of the baselines as accuracy_logmel/TASK; a collective.

        `weights` are name and fp32 value of every parameter, all of which every rank reads. Rank 0 alone has scores.
        """
        parameters = dict(self._model.encoder.named_parameters())
        with torch.no_grad():
            for name, value in weights:
                if name.startswith(ENCODER):
                    parameters[name.removeprefix(ENCODER)].copy_(value)
        vectors = {"": self._embeddings()}
        if self._baseline_scores is None:
            vectors |= self._baselines
        shares = self._world.gather(vectors)
        found: dict[str, dict[str, float]] = {kind: {} for kind in vectors}
        if self._world.is_main:
            for kind in vectors:
                found[kind] = self._scores(kind, [share[kind] for share in shares])
        if self._baseline_scores is None:
            self._baseline_scores = {name: value for kind in BASELINES for name, value in found[kind].items()}
            self._baselines = {}
        return found[""] | self._baseline_scores

    def _scores(self, kind: str, shares: Sequence[list[list[np.ndarray]]]) -> dict[str, float]:
        """By name, from all ranks' vectors of every task."""
        scores = {}
        for number, part in enumerate(self.parts):
            vectors: list[np.ndarray] = [np.empty(0)] * len(part.labels)
            for rank, share in enumerate(shares):
                vectors[rank :: len(shares)] = share[number]
            scores[f"{part.score_name}{f'_{kind}' if kind else ''}/{part.name}"] = score(part, np.stack(vectors))
        return scores

    def _embeddings(self) -> list[list[np.ndarray]]:
        """This rank's clips of every task as the model embeds them, which is on the device only meanwhile."""
        encoder = Encoder(self._model, self._info, self._world.device)
        vectors = self._vectors(lambda waveforms: encoder.embed(waveforms, self._info.features.sample_rate))
        self._model.to("cpu")
        return vectors

    @torch.no_grad()
    def _vectors(self, embed: Embed) -> list[list[np.ndarray]]:
        """float32 [E] for each clip of every task; those of one length are embedded together."""
        tasks = []
        for part in self.parts:
            same_length = defaultdict(list)
            for number, waveform in enumerate(part.waveforms):
                same_length[len(waveform)].append(number)
            vectors: list[np.ndarray] = [np.empty(0)] * len(part.waveforms)
            for numbers in same_length.values():
                for start in range(0, len(numbers), BATCH):
                    batch = numbers[start : start + BATCH]
                    waveforms = torch.from_numpy(np.stack([part.waveforms[number] for number in batch]))
                    embedded = embed(waveforms.float() * INT16_SCALE).float().cpu().numpy()
                    for number, vector in zip(batch, embedded, strict=True):
                        vectors[number] = vector
            tasks.append(vectors)
        return tasks


def read_part(task: Task, most_clips: int, sample_rate: int, rank: int, size: int) -> Part:
    """At most `most_clips` of a task, both splits cut alike, with the audio of this rank's share. Raises DataError."""
    fold = task.folds[0]
    judged = fold.valid or fold.test
    fit = [clip for clip in task.clips if clip.split in fold.train]
    held_out = [clip for clip in task.clips if clip.split == judged]
    if not fit or not held_out:
        raise DataError(
            f"{task.name} has {len(fit)} clips to fit (of {', '.join(fold.train)}) and {len(held_out)} to judge (of "
            f"{judged}): a probe needs both"
        )
    share = min(1.0, most_clips / (len(fit) + len(held_out)))
    used_fit, used_held_out = _drawn(fit, share), _drawn(held_out, share)
    clips = [*used_fit, *used_held_out]
    labels = np.zeros((len(clips), len(task.labels)), bool)
    for number, clip in enumerate(clips):
        labels[number, list(clip.labels)] = True
    if task.multilabel and not labels[len(used_fit) :].any():
        raise DataError(
            f"{task.name}: none of the {len(used_held_out)} clips of {judged} that are judged has a label, so mAP has "
            "no meaning; label some, or raise probe.clips"
        )
    waveforms = [_read(clip, sample_rate) for clip in clips[rank::size]]
    return Part(task.name, labels, len(used_fit), task.multilabel, waveforms)


def score(part: Part, vectors: np.ndarray) -> float:
    """Accuracy, or mAP with several labels a clip, of a ridge regression on [N + M, E] vectors: 0 to 1."""
    fit = part.num_fit
    predicted = ridge(vectors[:fit], part.labels[:fit], vectors[fit:])
    if part.is_multilabel:
        return float(resampled("mAP", predicted, part.labels[fit:], np.ones((1, len(predicted))))[0])
    return float(part.labels[fit:][np.arange(len(predicted)), predicted.argmax(axis=1)].mean())


def ridge(fit: np.ndarray, labels: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Linear scores float64 [M, C] for `judged` [M, E], from `fit` [N, E] and its labels bool [N, C].

    Both are standardised with mean and deviation of `fit`. The one penalty of all labels is that of PENALTIES with the
    least squared leave-one-out error, which is exact but for the standardisation.
    """
    fit, judged = fit.astype(np.float64), judged.astype(np.float64)
    mean, deviation = fit.mean(axis=0), fit.std(axis=0)
    deviation[deviation < 1e-9] = 1.0
    fit, judged = (fit - mean) / deviation, (judged - mean) / deviation
    centre = labels.mean(axis=0)
    targets = labels - centre
    variances, directions = np.linalg.eigh(fit @ fit.T)
    variances = variances.clip(min=0)
    projected = directions.T @ targets
    best, dual = np.inf, np.zeros_like(targets)
    for penalty in PENALTIES * max(variances[-1], 1e-12):
        kept = variances / (variances + penalty)
        leverage = 1 / len(fit) + directions**2 @ kept
        residuals = (targets - directions @ (kept[:, None] * projected)) / (1 - leverage).clip(min=1e-9)[:, None]
        if (error := (residuals**2).mean()) < best:
            best, dual = error, directions @ (projected / (variances + penalty)[:, None])
    return judged @ (fit.T @ dual) + centre


def _drawn(clips: Sequence[TaskClip], share: float) -> list[TaskClip]:
    """A share of the clips, at least one, in their order; the same at every start."""
    count = max(1, round(share * len(clips)))
    chosen = np.random.default_rng(0).permutation(len(clips))[:count]
    return [clips[number] for number in np.sort(chosen)]


def _read(clip: TaskClip, sample_rate: int) -> np.ndarray:
    """The beginning of a clip, int16 [S]."""
    waveform, _ = read_audio(clip.path, sample_rate)
    waveform = waveform[: LONGEST_SECONDS * sample_rate]
    return np.rint(waveform / INT16_SCALE).clip(-32768, 32767).astype(np.int16)
