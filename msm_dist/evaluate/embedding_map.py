"""`msm-dist map`: the scene embeddings of labelled recordings on their first two principal components.

In: weights and labelled recordings: a folder whose subfolders are labels, a task as `read_task` reads it, or shards
with labels. Out: a PNG with a colour per label and the share of variance that each axis holds, and the coordinates as a
CSV beside it. No random number is drawn. Recordings that can't be read are left out and counted. Fails with DataError,
CheckpointError, ConfigError.

Legend: N recordings, E numbers of an embedding, K components.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from msm_dist.data.clips import find_audio
from msm_dist.data.contents import stored_clips
from msm_dist.data.index import INDEX_NAME, load_index
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.hear_folder import METADATA_NAME
from msm_dist.evaluate.pictures import check_matplotlib, new_figure, write_png
from msm_dist.evaluate.recordings import read_audio
from msm_dist.evaluate.tasks import TaskClip, clip_waveform, read_task
from msm_dist.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS, MARKERS = 20, "osD^vPX*"
LEGEND_ROWS = 24
NO_LABEL = "(none)"
FORMS = (
    "must be a folder with a subfolder for each label, a .csv of file,label,split, a HEAR task folder, RECIPE:FOLDER, "
    "or a folder of shards with labels"
)


@dataclass(frozen=True)
class Recording:
    """A labelled recording: its name, its label, and how its samples are got."""

    name: str
    label: str
    read: Callable[[], np.ndarray]


def draw_map(run: Path, data: str, out: Path, device: str = "cpu", audio: Path | None = None) -> str:
    """Write the map of `data` to `out` and its coordinates to the same name with .csv; a summary as text.

    `audio` is the folder that a CSV's files are relative to, else the CSV's own.
    """
    check_matplotlib()
    if out.suffix != ".png":
        raise ConfigError(f"--out {out}: must end in .png; the coordinates go beside it as .csv")
    encoder = Encoder.load(run, device=device)
    recordings = find_recordings(data, encoder.features.sample_rate, audio)
    kept, vectors, faults = embed_all(encoder, recordings)
    points, shares = principal_components(vectors)
    labels = [recording.label for recording in kept]
    table = out.with_suffix(".csv")
    write_png(draw(points, labels, shares, f"{Path(data).name}: {len(kept)} recordings"), out)
    write_atomically(table, _csv(kept, points))
    lines = [
        f"{out}: {len(kept)} recordings, {len(set(labels))} labels; the axes hold {shares[0]:.1%} and {shares[1]:.1%} "
        f"of the variance of {encoder.embedding_size} numbers",
        f"  coordinates  {table}",
    ]
    if faults:
        lines.append(f"  left out     {len(faults)}, such as {faults[0]}")
    return "\n".join(lines)


def find_recordings(data: str, sample_rate: int, audio: Path | None = None) -> list[Recording]:
    """The labelled recordings of a task, of shards, or of a folder with a subfolder per label. Raises DataError."""
    folder = Path(data)
    is_csv = folder.suffix == ".csv" and folder.is_file()
    if not folder.is_dir() and not is_csv and ":" not in data:
        raise DataError(f"{data}: {'another kind of file' if folder.is_file() else 'no such folder'}; {FORMS}")
    if audio is not None and not is_csv:
        raise DataError(f"--audio {audio}: is for the files of a .csv; {data} says itself where its recordings are")
    if folder.is_dir() and not any((folder / name).is_file() for name in (METADATA_NAME, INDEX_NAME)):
        files = [Path(file) for file in find_audio(folder)]
        if loose := [file for file in files if len(file.parts) == 1]:
            raise DataError(
                f"{folder}: {len(loose)} recordings, such as {loose[0]}, lie in no subfolder; a subfolder's name is "
                "the label of what is in it"
            )
        return [Recording(str(f), f.parts[0], partial(_read, folder / f, sample_rate)) for f in files]
    if (folder / INDEX_NAME).is_file():
        return _in_shards(folder, sample_rate)
    task = read_task(data, audio, sample_rate)
    return [
        Recording(
            clip.key or str(clip.path),
            " + ".join(task.labels[number] for number in clip.labels) or NO_LABEL,
            partial(clip_waveform, clip, sample_rate),
        )
        for clip in task.clips
    ]


def embed_all(encoder: Encoder, recordings: Sequence[Recording]) -> tuple[list[Recording], torch.Tensor, list[str]]:
    """Those that can be read, their scene embeddings float32 [N, E], and what was wrong with the others.

    Raises DataError where fewer than two are left: they have no components.
    """
    kept, vectors, faults = [], [], []
    for recording in recordings:
        try:
            waveform = torch.from_numpy(recording.read())[None]
            vectors.append(encoder.embed(waveform, encoder.features.sample_rate)[0].cpu())
            kept.append(recording)
        except DataError as error:
            faults.append(str(error))
    if len(kept) < 2:
        reason = f"; such as {faults[0]}" if faults else ""
        raise DataError(f"{len(kept)} of {len(recordings)} recordings can be read: a map needs two or more{reason}")
    return kept, torch.stack(vectors), faults


def principal_components(vectors: torch.Tensor, num_components: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates float64 [N, K] of embeddings [N, E] on their components, and the share of the variance of each.

    The sign of a component is such that its largest loading is positive.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    left, values, loadings = torch.linalg.svd(centred, full_matrices=False)
    largest = loadings.gather(1, loadings.abs().argmax(dim=1, keepdim=True))[:, 0]
    points = (left * values * largest.sign())[:, :num_components]
    shares = values.square() / values.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return points.numpy(), shares[:num_components].numpy()


def draw(points: np.ndarray, labels: Sequence[str], shares: np.ndarray, title: str) -> "Figure":
    """A point for each recording, a colour and marker for each label, in the order of their names."""
    from matplotlib import colormaps

    names = sorted(set(labels))
    columns = -(-len(names) // LEGEND_ROWS)
    figure = new_figure(7.0 + 1.8 * columns, 6.0)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    colors = colormaps["tab20"].colors
    for number, name in enumerate(names):
        chosen = points[[label == name for label in labels]]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=18,
            color=colors[number % COLORS],
            marker=MARKERS[number // COLORS % len(MARKERS)],
            label=name[:30],
        )
    axes.set_xlabel(f"first component, {shares[0]:.1%} of the variance")
    axes.set_ylabel(f"second component, {shares[1]:.1%} of the variance")
    figure.legend(loc="outside right upper", ncols=columns, fontsize=7)
    return figure


def _in_shards(folder: Path, sample_rate: int) -> list[Recording]:
    """The clips of indexed shards that have labels in their json. Raises DataError where none has."""
    index = load_index(str(folder))
    if index.kind != "audio":
        raise DataError(f"{folder}: holds stored log-mels; a map needs shards of audio")
    found = []
    for shard in index.shards:
        for stored in stored_clips(shard):
            labels = stored.description.get("labels")
            if isinstance(labels, list) and labels:
                member = int(stored.row["offset"]), int(stored.row["size"])
                clip = TaskClip(shard.path, (), "", stored.key, member)
                found.append(
                    Recording(stored.key, " + ".join(map(str, labels)), partial(clip_waveform, clip, sample_rate))
                )
    if not found:
        raise DataError(
            f"{folder}: none of its {index.num_clips:,} clips has labels in its json; pack them with a table of labels "
            "(msm-dist data pack --csv)"
        )
    return found


def _read(path: Path, sample_rate: int) -> np.ndarray:
    return read_audio(path, sample_rate)[0]


def _csv(recordings: Sequence[Recording], points: np.ndarray) -> str:
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["file", "label", "component_1", "component_2"])
    for recording, (x, y) in zip(recordings, points, strict=True):
        writer.writerow([recording.name, recording.label, f"{x:.6g}", f"{y:.6g}"])
    return content.getvalue()
