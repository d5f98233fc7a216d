"""What the pictures of a trained model share: crops of recordings, figures without global state, files that are whole.

In: audio files of any length, figures. Out: normalised crops as the model sees them, PNG files of equal bytes for equal
figures. Needs matplotlib (extra [eval]), imported where a figure is made. Fails with DataError for a recording,
ConfigError where the package is missing.

Legend: C crops, F mel bands, T frames.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.recordings import read_blocks
from msm_dist.features import LogMel, normalize
from msm_dist.files import write_atomically
from msm_dist.model.weights import WeightsInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
MISSING = "pictures need matplotlib, which is not installed: pip install 'msm-dist[eval]'"


@dataclass(frozen=True)
class Crops:
    """Consecutive crops of one recording."""

    spectrogram: Tensor
    """float32 [C, 1, F, T], normalised; the last one is filled up with silence."""
    start_seconds: float
    num_frames: int
    """Frames from there to the end of the recording, C * T at most."""


def read_crops(path: Path, info: WeightsInfo, start_seconds: float = 0.0, num_crops: int = 1) -> Crops:
    """As many crops of the model's length from `start_seconds` on as the recording has, `num_crops` at most.

    They are slices of the log-mel of the whole recording, of which memory holds those crops alone. Raises DataError.
    """
    features, frames = info.features, info.crop_frames
    hop, margin = features.hop, 2 * features.n_fft // features.hop + 1
    first = round(start_seconds * features.sample_rate / hop)
    # What lies more than a window away from the crops changes nothing in them.
    before = max(0, first - margin)
    waveform, seen = _span(path, features.sample_rate, before * hop, (first + num_crops * frames + margin) * hop)
    total = -(-seen // hop)
    if first >= total:
        raise DataError(f"--start {start_seconds:g}: {path} ends after {seen / features.sample_rate:.2f} s")
    stop = first + min(num_crops, -(-(total - first) // frames)) * frames
    waveform = waveform[: (stop + margin - before) * hop]
    waveform = pad(waveform, (0, max(0, hop * (stop - before - 1) - len(waveform))))
    logmel = LogMel(features)(waveform[None], centred=True)[0, :, :, first - before : stop - before]
    crops = torch.stack(logmel.split(frames, dim=-1))
    return Crops(
        normalize(crops, features.mean, features.std), first * hop / features.sample_rate, min(total, stop) - first
    )


def _span(path: Path, sample_rate: int, start: int, stop: int) -> tuple[Tensor, int]:
    """Samples [start, stop) at `sample_rate`, as many as there are, and how many were seen: `stop`, or all there are.

    Raises DataError.
    """
    parts, seen = [np.zeros(0, np.float32)], 0
    for block in read_blocks(path, sample_rate):
        parts.append(block[max(0, start - seen) : max(0, stop - seen)].copy())
        seen += len(block)
        if seen >= stop:
            break
    return torch.from_numpy(np.concatenate(parts)), seen


def write_named(out: Path, stem: str, contents: Mapping[str, bytes], taken: set[str]) -> Path:
    """Write a file for every ending to `out`, whole or not at all; the path that they have in common.

    It is the stem's, numbered where that name is `taken`, to which the chosen one is added, or where other content is
    there under it: nothing is replaced, and equal calls write equal files.
    """
    name, number = stem, 1
    while name in taken or any(_is_other(out / f"{name}{ending}", content) for ending, content in contents.items()):
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    out.mkdir(parents=True, exist_ok=True)
    for ending, content in contents.items():
        write_atomically(out / f"{name}{ending}", content)
    return out / name


def _is_other(path: Path, content: bytes) -> bool:
    return path.exists() and not (path.is_file() and path.read_bytes() == content)


def check_matplotlib() -> None:
    """Raise ConfigError before anything is computed where no picture could be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(MISSING) from None


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, with a canvas of its own. Raises ConfigError."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def show(axes: "Axes", values: np.ndarray, info: WeightsInfo, start_seconds: float, frames: int, **options: Any) -> Any:
    """Draw values over `frames` frames and all mel bands, low bands at the bottom; the image."""
    seconds = frames * info.features.hop / info.features.sample_rate
    extent = (start_seconds, start_seconds + seconds, 0, info.features.n_mels)
    return axes.imshow(values, origin="lower", aspect="auto", extent=extent, interpolation="nearest", **options)


def write_png(figure: "Figure", path: Path) -> None:
    """Write a figure, there whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_bytes(figure))


def png_bytes(figure: "Figure") -> bytes:
    """A figure as a PNG file; equal figures give equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
