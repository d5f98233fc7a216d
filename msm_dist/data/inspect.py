"""What is in a corpus, a shard or a clip: as text, and a clip as a picture and a sound.

In: an index, one of its shards, or the key of a clip. Out: lines for the terminal; for a clip also files in a folder:
its log-mel as the model gets it (<key>.png), the sound as training hears it (<key>.wav, mono at the front end's rate)
and, if asked for, the member as it is stored. No file is replaced unless that is asked for. Fails with DataError on a
clip that can't be read, with ConfigError on a key that is not there and on files in the way. Needs matplotlib.
"""

import difflib
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, decode, num_target_samples, probe, to_int16
from msm_dist.data.audioset import USUAL_MEAN, USUAL_STD
from msm_dist.data.contents import front_end_of, printable, stored_clips
from msm_dist.data.index import ACCESS, Index, Shard, members
from msm_dist.data.logmel import SUFFIX, stored_codes
from msm_dist.data.storage import UNKNOWN_SIZE, Span, is_remote, open_store
from msm_dist.errors import ConfigError, DataError
from msm_dist.features import LogMel, mel_filters
from msm_dist.files import write_atomically

SUGGESTIONS = 5
SEARCHED = 200_000  # keys that a misspelt one is compared with
MAX_NAME = 150
NOT_IN_A_NAME = r"[^A-Za-z0-9._-]"
FRAMES_PER_INCH = 100


class Place(NamedTuple):
    """A clip: its shard and its row of the sidecar."""

    shard: Shard
    row: np.void


def summarize(index: Index) -> Iterator[str]:
    """What a corpus is, a line each; reads the sidecars of all shards. Raises DataError."""
    tables = [members(shard) for shard in index.shards]
    seconds = np.concatenate([table["samples"] / table["rate"] for table in tables])
    sizes = np.array([shard.clips for shard in index.shards])
    yield f"kind       {'stored log-mels' if index.kind == 'logmel' else index.kind}"
    yield f"digest     {index.digest}"
    if index.made_from:
        yield f"made from  the audio with digest {index.made_from}"
    yield from _absent(index)
    yield f"shards     {sizes.min()} to {sizes.max()} clips, the largest {sizes.max() / sizes.mean():.2f} x the mean"
    yield f"rates      {_counted(f'{rate} Hz' for table in tables for rate in table['rate'].tolist())}"
    yield f"codecs     {_counted(name.decode() for table in tables for name in table['format'].tolist())}"
    yield f"seconds    {seconds.min():.2f} to {seconds.max():.2f}, median {np.median(seconds):.2f}"
    if official := index.official:
        yield f"official   {official.found:,} of {official.clips:,} clips of {', '.join(official.tables)}"
        yield f"manifest   {official.manifest}"
    if index.mean is None:
        yield f"statistics not measured; `msm-dist data stats {index.location}` does it"
    else:
        yield (
            f"statistics mean {index.mean:.4f}, std {index.std:.4f} (AudioSet with the recipe's front end: about "
            f"{USUAL_MEAN} and {USUAL_STD})"
        )
    if index.features is not None:
        yield "front end  " + ", ".join(f"{name} {value}" for name, value in index.features.items())


def list_clips(shard: Shard) -> Iterator[str]:
    """A shard's clips in its order, a line each. Raises DataError."""
    yield f"{'seconds':>9} {'rate':>7} {'codec':<7} {'bytes':>9}  key"
    for row in members(shard):
        yield (
            f"{row['samples'] / row['rate']:9.3f} {row['rate']:7d} {row['format'].decode():<7} {row['size']:9d}  "
            f"{printable(row['key'])}"
        )


def find_clip(index: Index, key: str) -> Place:
    """The clip with this key, or the only one whose key begins so or has it in it as a word, such as a YTID.

    Raises ConfigError that names similar keys.
    """
    wanted, keys, starting, inside, shown = key.encode(errors="surrogateescape"), [], [], [], []
    # A packed key has the folders before the file's name, which may have a Y before the YTID, and a start behind it.
    word = re.compile(rb"(?:^|[^A-Za-z0-9]Y?|^Y)" + re.escape(wanted) + rb"(?![A-Za-z0-9])")
    for shard in index.shards:
        table = members(shard)
        exact = np.flatnonzero(table["key"] == wanted)
        if len(exact):
            return Place(shard, table[exact[0]])
        starting += [Place(shard, table[i]) for i in np.flatnonzero(np.char.startswith(table["key"], wanted))]
        holding = np.flatnonzero(np.char.find(table["key"], wanted) >= 0)
        inside += [Place(shard, table[i]) for i in holding if word.search(table["key"][i])]
        if "\\" in key:  # as this module shows keys that can't be typed
            shown += [Place(shard, row) for row in table if printable(row["key"]) == key]
        keys += [printable(name) for name in table["key"][: max(0, SEARCHED - len(keys))]]
    if len(shown) == 1:
        return shown[0]
    if len(starting) == 1:
        return starting[0]
    if not starting and len(inside) == 1:
        return inside[0]
    if several := starting or inside:
        some = ", ".join(printable(place.row["key"]) for place in several[:SUGGESTIONS])
        how = "begin so" if starting else "have it in them"
        raise ConfigError(
            f"{printable(key)}: {len(several)} keys in {index.location} {how} ({some}, ...); give one of them"
        )
    similar = difflib.get_close_matches(key, keys, SUGGESTIONS)
    remedy = f"did you mean {', '.join(similar)}?" if similar else f"such as {keys[0]}"
    what = "no such option, and no clip" if key.startswith("-") else "no clip"
    raise ConfigError(f"{printable(key)}: {what} of {index.location} has this key, {remedy}")


def inspect_clip(index: Index, place: Place, out: Path, original: bool = False, overwrite: bool = False) -> list[str]:
    """Write a clip's picture and sound into `out`; returns what it is and what was written, a line each.

    Raises DataError on a clip that does not decode and ConfigError where a file would be replaced.
    """
    shard, row = place
    features = front_end_of(index) or Features()
    span = Span(shard.location, shard.bytes, int(row["offset"]), int(row["offset"] + row["size"]))
    content = bytes(open_store(shard.location, ACCESS).fetch([span])[0])
    seconds = row["samples"] / row["rate"]
    lines = [f"{shard.location}: {printable(row['key'])}", *_about(shard, row)]
    lines.append(f"stored     {row['format'].decode()}, {row['size']} bytes from byte {row['offset']} of its tar")
    lines.append(f"sound      {seconds:.3f} s, {row['samples']} samples at {row['rate']} Hz")
    files = {}
    try:
        if index.kind == "logmel":
            logmel = _stored_logmel(content, row, features)
            lines.append("level      not known: stored log-mels hold no sound, and no .wav is written")
        else:
            about = probe(content)
            samples = to_int16(decode(content, features.sample_rate))
            logmel = LogMel(features)(torch.from_numpy(samples[None]), centred=True)[0, 0].numpy()
            lines += [
                f"channels   {about.channels}{', heard as their mean' if about.channels > 1 else ''}",
                f"level      {_level(samples)}",
            ]
            files[".wav"] = _wav(samples, features.sample_rate)
    except BadClip as fault:
        raise DataError(f"{shard.location}: {printable(row['key'])}: {fault}; see `msm-dist data verify`") from None
    bands, frames = logmel.shape
    lines.append(f"log-mel    {frames} frames of {bands} bands, mean {logmel.mean():.3f}, std {logmel.std():.3f}")
    files[".png"] = picture(logmel, features, printable(row["key"]))
    if original:
        files[SUFFIX if index.kind == "logmel" else f".original.{row['format'].decode()}"] = content
    return [*lines, *(f"wrote      {path}" for path in _write(files, row["key"], out, overwrite))]


def picture(logmel: np.ndarray, features: Features, title: str) -> bytes:
    """A PNG of a log-mel [F, T] with its axes in seconds and Hz. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a picture needs matplotlib; install it with  pip install 'msm-dist[train]'") from None
    bands, frames = logmel.shape
    figure = Figure(figsize=(min(40.0, max(6.0, frames / FRAMES_PER_INCH)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    hop_seconds = features.hop / features.sample_rate
    # A frame is centred on its sample: the picture of T frames is T hops wide and begins half a hop early.
    extent = (-hop_seconds / 2, (frames - 0.5) * hop_seconds, -0.5, bands - 0.5)
    image = axes.imshow(logmel, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    shown = np.unique(np.linspace(0, bands - 1, min(bands, 9)).round().astype(int))
    axes.set_yticks(shown, [f"{band_centres(features)[band]:.0f}" for band in shown])
    axes.set(xlabel="s", ylabel="Hz (centre of the mel band)")
    axes.set_title(title, parse_math=False)
    figure.colorbar(image, label="log-mel")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def band_centres(features: Features) -> np.ndarray:
    """Centre of each mel band in Hz, the mean frequency under its filter: float64 [F]."""
    filters = mel_filters(features).numpy()
    frequencies = np.linspace(0, features.sample_rate / 2, len(filters))
    return (frequencies @ filters) / np.maximum(filters.sum(axis=0), 1e-30)


def _absent(index: Index) -> Iterator[str]:
    """The shards that are missing or of another size; only reading tells the size of some (pipe:)."""
    sizes = open_store(index.location, ACCESS).sizes([shard.location for shard in index.shards])
    pairs = list(zip(index.shards, sizes, strict=True))
    missing = [shard.name for shard, size in pairs if size is None]
    other = [shard.name for shard, size in pairs if size not in (None, UNKNOWN_SIZE, shard.bytes)]
    if missing or other:
        named = ", ".join([*missing, *other][:SUGGESTIONS]) + (", ..." if len(missing + other) > SUGGESTIONS else "")
        yield (
            f"faults     {len(missing)} of {len(pairs)} shards missing, {len(other)} of another size ({named}); all "
            f"below is what the index says: see `msm-dist data verify {index.location}`"
        )


def _counted(values: Iterator[str]) -> str:
    return ", ".join(f"{value}: {count:,}" for value, count in Counter(values).most_common())


def _about(shard: Shard, row: np.void) -> list[str]:
    """Labels and origin, by the clip's json."""
    if is_remote(shard.location):
        return ["labels     in the json beside the clip, which is looked up in shards on this machine only"]
    stored = next(clip for clip in stored_clips(shard) if clip.row["offset"] == row["offset"])
    if not stored.description:
        return ["labels     none: there is no json beside the clip"]
    shown = {"labels": stored.description.get("labels"), "names": stored.description.get("names")}
    lines = [f"{name:<10} {', '.join(map(str, value))}" for name, value in shown.items() if isinstance(value, list)]
    lines.append("origin     " + ", ".join(f"{name} {value}" for name, value in stored.origin.items()))
    return [printable(line) for line in lines]


def _level(samples: np.ndarray) -> str:
    """Peak and root mean square in dB of full scale."""
    waveform = samples / 32768.0
    values = {"peak": np.abs(waveform).max(), "rms": np.sqrt(np.mean(waveform**2))}
    return ", ".join(
        f"{name} {20 * np.log10(value):.1f} dBFS" if value else f"{name} silent" for name, value in values.items()
    )


def _stored_logmel(content: bytes, row: np.void, features: Features) -> np.ndarray:
    """The clip's own frames, float32 [F, T]. Raises BadClip."""
    frames = features.num_frames(num_target_samples(int(row["samples"]), int(row["rate"]), features.sample_rate))
    try:
        codes = stored_codes(content)
    except ValueError as error:
        raise BadClip("undecodable", str(error)) from None
    if codes.shape[1] != features.n_mels or len(codes) < frames:
        raise BadClip("changed", f"{codes.dtype} {list(codes.shape)}, not {frames} frames of {features.n_mels} bands")
    return LogMel(features)(torch.from_numpy(codes[None, :frames].copy()))[0, 0].numpy()


def _wav(samples: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _write(files: dict[str, bytes], key: bytes, out: Path, overwrite: bool) -> list[Path]:
    """Write all files or, where one is there already, none. Raises ConfigError."""
    name = re.sub(NOT_IN_A_NAME, "_", printable(key)).lstrip(".")[-MAX_NAME:] or "clip"
    paths = {out / f"{name}{suffix}": content for suffix, content in files.items()}
    if there := [path for path in paths if path.exists() and not overwrite]:
        raise ConfigError(f"{there[0]}: is there already; choose another folder with --out, or --overwrite it")
    out.mkdir(parents=True, exist_ok=True)
    for path, content in paths.items():
        write_atomically(path, content)
    return list(paths)
