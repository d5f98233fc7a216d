"""A trained encoder with a linear head: the model that fine-tuning trains, its files, and its use.

In: normalised log-mel spectrograms of one length, labels. Out: loss and logits; parameter groups whose learning rate
falls layer by layer; a folder of files that `Tagger` reads, and `Encoder` too. Fails with CheckpointError on files that
can't be loaded, with ConfigError on a classifier that can't be.

    export/model.safetensors, config.json     the encoder, beside the decoder that it had: Encoder.load
    export/head.safetensors, head.json        the head; labels, pooling, length of a clip: Tagger.load
    export/classifier/...                     the four of them instead, where the position table is an interpolated
                                              one: Tagger.load, which Encoder.load refuses

Legend: B clips, S samples, F mel bands, T frames, P prefix tokens, L patches, K of them kept, D width, C classes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate, pad

from msm_dist.config import Features, Model
from msm_dist.data.audio import resample
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate.checks import checked_batch, checked_finite
from msm_dist.features import LogMel, normalize
from msm_dist.files import check_regular, read_small, write_atomically
from msm_dist.model import weights
from msm_dist.model.mae import Encoder
from msm_dist.model.patches import PatchGrid, PositionTable, sincos_2d
from msm_dist.model.tensors import differences
from msm_dist.plain import MAX_JSON, parse_json
from msm_kernels.patch_masking import masking_from_keep

FORMAT, VERSION = "msm-dist classifier", 1
HEAD_FILE, HEAD_CONFIG_FILE = "head.safetensors", "head.json"
HEAD_STD = 2e-5
"""Of the head's initial weights, as in the masked autoencoders' fine-tuning: it begins without an opinion."""


@dataclass(frozen=True)
class Head:
    """What a classifier is beside the weights of its encoder."""

    labels: tuple[str, ...]
    multilabel: bool
    pooling: str
    """mean (over patches) or cls."""
    positions: str
    """computed or interpolated."""
    num_samples: int
    """Length of a clip in samples."""
    table_frames: int
    """Frames of the table that `interpolated` stretches: those of the weights' crops."""


class Output(NamedTuple):
    """What a forward pass returns."""

    loss: Tensor  # scalar, float32
    logits: Tensor  # [B, C], float32


class Classifier(nn.Module):
    """Encoder, pooling, linear head and loss. The encoder's parameters are uninitialised until they are loaded."""

    def __init__(self, model: Model, features: Features, head: Head, seed: int = 0):
        super().__init__()
        self.multilabel, self.pooling = head.multilabel, head.pooling
        self.grid = clip_grid(model, features, head.num_samples)
        self.encoder = Encoder(model, self.grid)
        width = model.geometry.embed_dim
        if head.pooling == "cls" and not model.cls_token:
            raise ConfigError("model.pooling = cls: the weights' encoder has no CLS token; take model.pooling=mean")
        if head.positions == "interpolated":
            before = PatchGrid(features.n_mels, head.table_frames, model.patch)
            self.encoder.positions = PositionTable(
                interpolated_positions(before, self.grid, width, self.encoder.num_prefix)
            )
        self.head = nn.Linear(width, len(head.labels))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.normal_(std=HEAD_STD, generator=generator)
            self.head.bias.zero_()

    def forward(self, spectrogram: Tensor, targets: Tensor, ids_keep: Tensor | None = None) -> Output:
        """Loss and logits of normalised log-mels [B, 1, F, T] against targets [B, C] of shares 0 to 1.

        ids_keep int64 [B, K], ascending: the patches that the encoder sees; none: all.
        """
        logits = self.logits(spectrogram, ids_keep)
        return Output(loss_of(logits, targets, self.multilabel), logits)

    def logits(self, spectrogram: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """float32 [B, C]."""
        masking = None if ids_keep is None else masking_from_keep(ids_keep, self.grid.num_patches)
        tokens = self.encoder(spectrogram, masking)  # [B, P + K, D]
        if self.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, self.encoder.num_prefix :].float().mean(dim=1).to(tokens.dtype)
        return self.head(pooled).float()


def clip_grid(model: Model, features: Features, num_samples: int) -> PatchGrid:
    """The patches of a clip of so many samples: as many as the encoder of embeddings gives it, the last one padded."""
    width = model.patch[1]
    return PatchGrid(features.n_mels, -(-num_samples // (features.hop * width)) * width, model.patch)


def clip_spectrogram(front_end: LogMel, waveform: Tensor, grid: PatchGrid) -> Tensor:
    """Normalised log-mel [B, 1, F, T] of clips [B, S], floating or int16, zeros filling up the last patch."""
    features = front_end.features
    missing = max(0, features.hop * (grid.frames - 1) - waveform.shape[1])
    logmel = front_end(pad(waveform, (0, missing)), centred=True)[..., : grid.frames]
    return normalize(logmel, features.mean, features.std)


def fit_length(waveform: np.ndarray, num_samples: int, start: int | None = None) -> np.ndarray:
    """A clip [S] cut to `num_samples` from `start` on (none: its middle), or padded with zeros at its end."""
    if start is None:
        start = max(0, len(waveform) - num_samples) // 2
    cut = waveform[start : start + num_samples]
    return np.pad(cut, (0, num_samples - len(cut)))


def interpolated_positions(before: PatchGrid, after: PatchGrid, width: int, num_prefix: int) -> Tensor:
    """The table [P + L, D] of a grid, stretched in time to another one (bicubic, as for images: Dosovitskiy 2021)."""
    table = sincos_2d(before, width).double().T.reshape(1, width, *before.shape)
    stretched = interpolate(table, size=after.shape, mode="bicubic", align_corners=False)
    table = stretched.reshape(width, -1).T.float()
    return torch.cat([table.new_zeros(num_prefix, width), table])


def layer_groups(classifier: nn.Module, depth: int, weight_decay: float, layer_decay: float) -> list[dict[str, object]]:
    """Parameter groups with `lr_scale` = layer_decay ** (depth + 1 - layer); no weight decay on 1-D tensors.

    Layer 0 is the patch embedding with the CLS token, layer i + 1 is block i, layer depth + 1 the last norm and the
    head (Bao et al. 2022, BEiT; Huang et al. 2022, Audio-MAE).
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        groups.setdefault((layer_of(name, depth), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if is_decayed else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        for (layer, is_decayed), parameters in groups.items()
    ]


def layer_of(name: str, depth: int) -> int:
    """The layer of a classifier's parameter, 0 to depth + 1."""
    part, _, rest = name.partition(".")
    if part != "encoder" or rest.startswith("norm."):
        return depth + 1
    return int(rest.split(".")[1]) + 1 if rest.startswith("blocks.") else 0


def loss_of(logits: Tensor, targets: Tensor, multilabel: bool) -> Tensor:
    """Cross-entropy, of each label by itself (mean over clips and labels) or of one among all (mean over clips)."""
    return binary_cross_entropy_with_logits(logits, targets) if multilabel else cross_entropy(logits, targets)


def probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    """[B, C]: of each label by itself, or of one among all."""
    return logits.sigmoid() if multilabel else logits.softmax(dim=-1)


def save(
    path: Path, state: Mapping[str, Tensor], decoder: Mapping[str, Tensor], info: weights.WeightsInfo, head: Head
) -> Path:
    """Write a classifier (its parameters by name) below `path`; returns the folder. Raises CheckpointError.

    `info` is that of the encoder's weights; `decoder` are the tensors that stood beside it.
    """
    grid = clip_grid(info.model, info.features, head.num_samples)
    is_other_table = head.positions == "interpolated" and grid.frames != head.table_frames
    folder = path / "classifier" if is_other_table else path
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
    origin = info.origin | ({"positions": head.positions} if is_other_table else {})
    own = weights.WeightsInfo(info.model, info.features, grid.frames, origin)
    # The head first: whoever finds the weights finds all.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: state[f"head.{name}"].float().contiguous() for name in ("weight", "bias")}
        write_atomically(folder / HEAD_FILE, safetensors_bytes(tensors))
        description = {"format": FORMAT, "version": VERSION, **asdict(head)}
        write_atomically(folder / HEAD_CONFIG_FILE, json.dumps(description, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"{folder}: can't write the head ({error}); check space and permissions") from None
    return weights.save(folder, {**encoder, **decoder}, own)


class Tagger:
    """A fine-tuned classifier with its front end: waveforms to the probabilities of labels."""

    def __init__(self, model: Classifier, features: Features, head: Head, device: str | torch.device = "cpu"):
        self.labels = head.labels
        self.multilabel = head.multilabel
        self.sample_rate = features.sample_rate
        self.num_samples = head.num_samples
        """Length of a clip: longer ones are cut to their middle, shorter ones are padded with silence."""
        self.device = torch.device(device)
        self._model = model.to(self.device).eval()
        self._front_end = LogMel(features).to(self.device)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Tagger":
        """Read a fine-tuning run's folder, or what it exported. Raises CheckpointError."""
        folder = _classifier_folder(Path(path))
        head = _read_head(folder / HEAD_CONFIG_FILE)
        state, info = weights.read(folder, any_positions=True)
        try:
            check_regular(folder / HEAD_FILE)
            state |= {f"head.{name}": tensor for name, tensor in load_file(folder / HEAD_FILE).items()}
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{folder / HEAD_FILE}: not a readable head ({reason})") from None
        model = Classifier(info.model, info.features, head)
        wanted = {name: value for name, value in state.items() if not name.startswith("decoder.")}
        if found := differences(wanted, model.state_dict()):
            raise CheckpointError(f"{folder}: its tensors are not those of its configuration; {found}")
        model.load_state_dict(wanted)
        return cls(model, info.features, head, device)

    @torch.no_grad()
    def predict(self, waveform: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        """Probabilities float32 [B, C], in the order of `labels`, of floating [B, S] in [-1, 1]. Raises DataError."""
        waveform, sample_rate = checked_batch(waveform, sample_rate)
        clips = [
            resample(clip, sample_rate, self.sample_rate) for clip in checked_finite(waveform).float().cpu().numpy()
        ]
        batch = torch.from_numpy(np.stack([fit_length(clip, self.num_samples) for clip in clips])).to(self.device)
        logits = self._model.logits(clip_spectrogram(self._front_end, batch, self._model.grid))
        return probabilities(logits, self.multilabel)


def _classifier_folder(path: Path) -> Path:
    for folder in (path, path / "export", path / "classifier", path / "export" / "classifier"):
        if (folder / HEAD_CONFIG_FILE).is_file():
            return folder
    raise CheckpointError(
        f"{path}: no fine-tuned classifier ({HEAD_CONFIG_FILE}) in it or its export; `msm-dist finetune` makes one"
    )


def _read_head(path: Path) -> Head:
    try:
        values: dict[str, Any] = parse_json(read_small(path, MAX_JSON))
        if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"must be {FORMAT} version {VERSION}")
        head = Head(**values | {"labels": tuple(map(str, values["labels"]))})
        if head.num_samples < 1 or head.table_frames < 1 or not head.labels:
            raise ValueError("a length or the labels are missing")
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the description of a classifier ({error})") from None
    return head
