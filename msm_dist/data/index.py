"""The shard index: which tar shards make a corpus, what each holds, and whether that is still so.

In: a folder with index.json, that file, or tar shards beside it, here or behind a URL. Out: an `Index`, and per
shard a table of its clips (`members`), so that a reader can start anywhere by offset. index.json and the
sidecars may come from strangers: everything in them is checked. Fails with DataError, which names the file and the
remedy.

    index.json                      version, kind, sample_rate, shards, clips, seconds, statistics, front end
    <shard>.tar                     an ordinary webdataset tar
    <shard>.members.npy             one row of MEMBER_FIELDS + key per clip, in tar order
"""

import hashlib
import io
import json
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from msm_dist.data.index_file import IndexFile, ShardEntry, contradictions
from msm_dist.data.storage import UNKNOWN_SIZE, Access, Span, Store, check_location, is_remote, join, open_store, split
from msm_dist.errors import DataError
from msm_dist.files import write_atomically
from msm_dist.plain import parse_json

INDEX_NAME = "index.json"
REPORT_NAME = "report.json"
UNFINISHED_NAME = ".pack"
MEMBERS_SUFFIX = ".members.npy"
REPORTED_AT_ONCE = 20
PIECE_BYTES, PIECES_AT_ONCE = 4 * 2**20, 8  # of a remote shard while its digest is taken
READ_AGAIN = 2  # small remote files that arrive as others than they are
ACCESS = Access()
MOST_SAMPLES = 2**40

log = logging.getLogger(__name__)

MEMBER_FIELDS = [("offset", "<i8"), ("size", "<i8"), ("samples", "<i8"), ("rate", "<i4"), ("format", "|S8")]
"""Place and bytes of a clip in its tar, samples per channel at its own rate (Hz), codec; then the key.

The member of a log-mel is a .npy file of uint8 [frames, bands]; samples and rate are those of the audio it was made
from, and the codec is "logmel".
"""

_TABLE_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': \["
    + re.escape(", ".join(map(repr, MEMBER_FIELDS))).encode()
    + rb", \('key', '\|S(?P<width>\d{1,5})'\)\], 'fortran_order': False, "
    + rb"'shape': \((?P<rows>\d{1,12}),\), \} *\n",
    re.DOTALL,
)


@dataclass(frozen=True)
class Shard:
    """One tar: clips (good ones), bytes and sha256 of the tar, sha256 of its sidecar."""

    name: str
    clips: int
    bytes: int
    sha256: str
    members_sha256: str
    location: str
    """Its path or URL."""

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""
        return Path(self.location)

    @property
    def members_location(self) -> str:
        """The sidecar's path or URL."""
        return self.location.removesuffix(".tar") + MEMBERS_SUFFIX

    @property
    def members_path(self) -> Path:
        """The sidecar on this machine."""
        return Path(self.members_location)


@dataclass(frozen=True)
class Official:
    """How much of a published collection a corpus has: its tables by name, their clips, those found.

    `manifest` is the sha256 of the identifiers of the clips found, sorted, a line each.
    """

    tables: tuple[str, ...]
    clips: int
    found: int
    manifest: str


@dataclass(frozen=True)
class Index:
    """A corpus. mean, std: over every log-mel value; mel_mean: per band; None where they were not measured.

    `sample_rate` is None for shards of mixed rates. `features` is the front end behind the statistics.
    """

    location: str
    """The folder's path or URL."""
    kind: str
    """What the clips are: audio, or logmel (features.quantize)."""
    sample_rate: int | None
    shards: tuple[Shard, ...]
    seconds: float
    mean: float | None = None
    std: float | None = None
    mel_mean: tuple[float, ...] | None = None
    features: dict[str, Any] | None = None
    official: Official | None = None
    made_from: str | None = None
    """Digest of the audio corpus behind stored log-mels."""

    @property
    def root(self) -> Path:
        """The folder on this machine."""
        return Path(self.location)

    @property
    def num_clips(self) -> int:
        """Clips in all shards."""
        return sum(shard.clips for shard in self.shards)

    @property
    def digest(self) -> str:
        """The identity of the corpus: sha256 over its shards' names, clip counts and digests, in order."""
        lines = [f"{shard.name} {shard.clips} {shard.sha256}\n" for shard in self.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_index(shards: str | Sequence[str], access: Access = ACCESS) -> Index:
    """The corpus that `data.shards` names: a folder, its index.json, a tar, a brace pattern, a list of tars.

    Each may be a path or a URL. Tars must lie in one folder beside their index.json; they select from it, in its
    order. Raises DataError.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    for text in given:
        check_location(str(text))
    names = [name for text in given for name in _expand(str(text))]
    if not names:
        raise DataError("the list of shards is empty: name a folder made by `msm-dist data pack`")
    store = open_store(names[0], access)
    if len(names) == 1 and not is_tar(names[0]):
        folder, name = split(names[0])
        return _read_index(folder if name == INDEX_NAME else names[0], store)
    return _select(names, store)


def is_tar(location: str) -> bool:
    """Whether a location is meant as a shard: a folder may be called so too, a local one that is there is none."""
    return location.endswith(".tar") and (is_remote(location) or not Path(location).is_dir())


def write_index(index: Index) -> None:
    """Write index.json into the index's folder, whole or not at all."""
    shards = [{name: getattr(shard, name) for name in ShardEntry.model_fields} for shard in index.shards]
    content = {
        "version": 1,
        "kind": index.kind,
        "sample_rate": index.sample_rate,
        "shards": shards,
        "clips": index.num_clips,
        "seconds": index.seconds,
        "mean": index.mean,
        "std": index.std,
        "mel_mean": index.mel_mean,
        "features": index.features,
        "official": index.official and asdict(index.official),
        "made_from": index.made_from,
    }
    write_atomically(index.root / INDEX_NAME, (json.dumps(content, indent=1) + "\n").encode())


def check_shards(
    index: Index,
    verify: Literal["size", "digest"],
    allow_missing: bool | None = None,
    access: Access = ACCESS,
    begins: Callable[[], object] = lambda: None,
) -> set[int]:
    """Compare the shards with the index: their size, or their sha256 too (reads everything).

    Returns the numbers of missing shards; with `allow_missing` those of another size, cut off or half copied, count
    as missing too. Raises DataError naming every damaged shard, and every missing one unless `allow_missing`; False
    is for runs, whose setting it is and is named, None for commands without it. Shards whose size only reading would
    tell (pipe:) count as there. `begins` is called before each shard that is read.
    """
    store = open_store(index.location, access)
    sizes = store.sizes([shard.location for shard in index.shards])
    missing = {number for number, size in enumerate(sizes) if size is None}
    if allow_missing:
        for number, shard in enumerate(index.shards):
            if number not in missing and (fault := _size_fault(shard, sizes[number])):
                log.warning("%s: counts as missing", fault)
                missing.add(number)
    faults = [] if allow_missing else [f"{index.shards[number].location}: missing" for number in sorted(missing)]
    for number, shard in enumerate(index.shards):
        if number in missing:
            continue
        begins()
        if fault := _size_fault(shard, sizes[number]) or _digest_fault(shard, verify, store):
            faults.append(fault)
    if faults:
        remedy = "copy the shards again, or pack them again"
        if missing and allow_missing is False:
            remedy += "; data.allow_missing_shards=true starts without the missing ones"
        raise DataError(
            f"{index.location}: {len(faults)} of {len(index.shards)} shards are not what {INDEX_NAME} says; "
            f"{remedy}:\n{listed(faults)}"
        )
    return missing


def shard_fault(shard: Shard, verify: Literal["size", "digest"]) -> str | None:
    """What is wrong with a shard that is on this machine, with the value found and the one expected; None: nothing."""
    return _size_fault(shard, shard.path.stat().st_size) or _digest_fault(shard, verify)


def members(shard: Shard, store: Store | None = None) -> np.ndarray:
    """The shard's clips: a structured array [clips] of MEMBER_FIELDS and key. Raises DataError."""
    return tables([shard], store)[0]


def tables(shards: Sequence[Shard], store: Store | None = None) -> list[np.ndarray]:
    """The clips of shards, as of `members`; remote sidecars are read several at once. Raises DataError."""
    if not shards:
        return []
    try:
        contents = _read_tables(shards, store or open_store(shards[0].location, ACCESS))
    except OSError as error:
        fault = f"the table of a shard's clips can't be read ({error.strerror})"
        raise DataError(f"{error.filename}: {fault}; {_sidecar_remedy(error.filename)}") from None
    return [_checked_table(shard, content) for shard, content in zip(shards, contents, strict=True)]


def member_table(rows: Iterable[tuple[int, int, int, int, str, bytes]]) -> np.ndarray:
    """Rows of (offset, size, samples, rate, format, key) as a sidecar's structured array."""
    rows = list(rows)
    width = max((len(row[-1]) for row in rows), default=1)
    return np.array(rows, dtype=[*MEMBER_FIELDS, ("key", f"S{width}")])


def write_members(path: Path, table: np.ndarray) -> str:
    """Write a sidecar; returns its sha256."""
    file = io.BytesIO()
    np.lib.format.write_array(file, table, version=(1, 0), allow_pickle=False)
    write_atomically(path, file.getvalue())
    return hashlib.sha256(file.getvalue()).hexdigest()


def index_command(folder: str | Path) -> str:
    """What a user types to index every tar of a folder: its name may be anything."""
    return f"msm-dist data index {shlex.quote(str(folder))}/*.tar"


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(faults: Sequence[str]) -> str:
    """Faults one per line, indented, the first few of many."""
    shown = [f"  {fault}" for fault in faults[:REPORTED_AT_ONCE]]
    more = len(faults) - len(shown)
    return "\n".join([*shown, *([f"  and {more} more"] if more else [])])


def _expand(text: str) -> list[str]:
    """A brace pattern's names."""
    if "{" not in text:
        return [text]
    try:
        import braceexpand
    except ImportError:
        raise DataError(f"{text}: brace patterns need braceexpand; pip install 'msm-dist[train]'") from None
    try:
        return list(braceexpand.braceexpand(text))
    except braceexpand.UnbalancedBracesError:
        raise DataError(f"{text}: unbalanced braces; write name-{{000000..000009}}.tar") from None


def _read_index(root: str, store: Store) -> Index:
    root = root.rstrip("/") if is_remote(root) else str(Path(root))
    path = join(root, INDEX_NAME)
    try:
        entry = _parse_index(path, store)
    except FileNotFoundError:
        raise DataError(_absent(root)) from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, f['loc'])) or 'file'}: {f['msg']}" for f in error.errors(include_input=False)]
        raise DataError(_invalid(root, faults)) from None
    except ValueError as error:
        raise DataError(_invalid(root, [f"file: {error}"])) from None
    if faults := list(contradictions(entry)):
        raise DataError(_invalid(root, faults))
    shards = tuple(Shard(**shard.model_dump(), location=join(root, shard.name)) for shard in entry.shards)
    mel_mean = None if entry.mel_mean is None else tuple(entry.mel_mean)
    official = None
    if entry.official is not None:
        official = Official(**entry.official.model_dump() | {"tables": tuple(entry.official.tables)})
    features = None if entry.features is None else entry.features.front_end()
    rest = entry.model_dump(include={"kind", "sample_rate", "seconds", "mean", "std", "made_from"})
    return Index(location=root, shards=shards, mel_mean=mel_mean, features=features, official=official, **rest)


def _parse_index(path: str, store: Store) -> IndexFile:
    """What index.json says; a remote one that came to harm on the way is read again. Raises ValueError, OSError."""
    for _ in range(READ_AGAIN if is_remote(path) else 0):
        with suppress(ValueError):
            return IndexFile.model_validate(parse_json(store.read([path])[0]))
    # Of JSON pydantic would keep a copy for every fault in it.
    return IndexFile.model_validate(parse_json(store.read([path])[0]))


def _select(names: Sequence[str], store: Store) -> Index:
    """The named tars of the one folder they lie in."""
    if other := [name for name in names if not is_tar(name)]:
        raise DataError(f"a corpus names {other[0]} among tars: give one folder, or .tar files only")
    folders = sorted({split(name)[0] for name in names})
    if len(folders) > 1:
        raise DataError(f"a corpus names tars in {folders[0]} and {folders[1]}: one corpus lies in one folder")
    index = _read_index(folders[0], store)
    wanted = {split(name)[1] for name in names}
    if unknown := sorted(wanted - {shard.name for shard in index.shards}):
        raise DataError(
            f"{join(index.location, INDEX_NAME)} lacks {unknown[0]} ({len(unknown)} of the {len(wanted)} tars that "
            "are named); index them with `msm-dist data index FOLDER/*.tar`"
        )
    shards = tuple(shard for shard in index.shards if shard.name in wanted)
    seconds = sum((table["samples"] / table["rate"]).sum() for table in tables(shards, store))
    return replace(index, shards=shards, seconds=float(seconds))


def _size_fault(shard: Shard, size: int) -> str | None:
    if size in (shard.bytes, UNKNOWN_SIZE):
        return None
    return f"{shard.location}: {size} bytes, {INDEX_NAME} says {shard.bytes}"


def _digest_fault(shard: Shard, verify: Literal["size", "digest"], store: Store | None = None) -> str | None:
    if verify == "size":
        return None
    digest = _streamed_sha256(shard, store) if is_remote(shard.location) else file_sha256(shard.path)
    return None if digest == shard.sha256 else f"{shard.location}: sha256 {digest}, {INDEX_NAME} says {shard.sha256}"


def _streamed_sha256(shard: Shard, store: Store) -> str:
    """sha256 of a remote shard, PIECES_AT_ONCE pieces in memory at a time."""
    digest = hashlib.sha256()
    pieces = [
        Span(shard.location, shard.bytes, start, min(start + PIECE_BYTES, shard.bytes))
        for start in range(0, shard.bytes, PIECE_BYTES)
    ]
    for group in (pieces[i : i + PIECES_AT_ONCE] for i in range(0, len(pieces), PIECES_AT_ONCE)):
        for content in store.fetch(group):
            digest.update(content)
    return digest.hexdigest()


def _read_tables(shards: Sequence[Shard], store: Store) -> list[bytes]:
    """Sidecars, unchecked; remote ones that came to harm on the way are read again."""
    paths = [shard.members_location for shard in shards]
    contents = store.read(paths)
    for _ in range(READ_AGAIN):
        harmed = [i for i, shard in enumerate(shards) if is_remote(paths[i]) and _harmed(contents[i], shard)]
        if not harmed:
            break
        for i, content in zip(harmed, store.read([paths[i] for i in harmed]), strict=True):
            contents[i] = content
    return contents


def _harmed(sidecar: bytes, shard: Shard) -> bool:
    return hashlib.sha256(sidecar).hexdigest() != shard.members_sha256


def _checked_table(shard: Shard, content: bytes) -> np.ndarray:
    path = shard.members_location
    remedy = _sidecar_remedy(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != shard.members_sha256:
        raise DataError(f"{path}: sha256 {digest}, {INDEX_NAME} says {shard.members_sha256}; {remedy}")
    table = _parse_table(content)
    if table is None or len(table) != shard.clips:
        found = "another format" if table is None else f"{len(table)} clips"
        raise DataError(f"{path}: holds {found}, {INDEX_NAME} says {shard.clips} clips; {remedy}")
    inside = (table["offset"] >= 0) & (table["size"] > 0) & (table["offset"] <= shard.bytes - table["size"])
    # More samples than that would overflow where they are counted at another rate.
    lengths = (table["samples"] > 0) & (table["samples"] < MOST_SAMPLES)
    # The name of a codec ends that of a file that `inspect` writes.
    codecs_known = all(name.isalnum() for name in np.unique(table["format"]).tolist())
    if not codecs_known or not (inside & lengths & (table["rate"] > 0)).all():
        raise DataError(
            f"{path}: names clips outside {shard.name}, without samples, or of impossible lengths or codecs; {remedy}"
        )
    return table


def _sidecar_remedy(path: str) -> str:
    folder, name = split(path)
    if is_remote(path):
        return f"upload {name} and {INDEX_NAME} again, from the same `msm-dist data pack`"
    return f"write it again with `{index_command(folder)}`"


def _parse_table(content: bytes) -> np.ndarray | None:
    """A sidecar's array, if its header is the one that write_members writes; no other header is parsed."""
    header = _TABLE_HEADER.match(content)
    if header is None:
        return None
    dtype = np.dtype([*MEMBER_FIELDS, ("key", f"S{int(header['width'])}")])
    rows = int(header["rows"])
    if len(content) - header.end() != rows * dtype.itemsize:
        return None
    return np.frombuffer(content, dtype, count=rows, offset=header.end())


def _absent(root: str) -> str:
    """What to do where there is no index.json."""
    if is_remote(root):
        return f"{root}: no {INDEX_NAME} there; give the URL of a folder with the files of `msm-dist data pack`"
    if (Path(root) / UNFINISHED_NAME).is_dir():
        return f"{root}: an unfinished pack; the same `msm-dist data pack` command again finishes it"
    if Path(root).is_dir() and any(Path(root).glob("*.tar")):
        return f"{root}: has tar shards but no {INDEX_NAME}; write it with\n  {index_command(root)}"
    return (
        f"{root}: no {INDEX_NAME} there; make shards from a folder of audio with\n"
        f"  msm-dist data pack YOUR_AUDIO_FOLDER {shlex.quote(root)}\n"
        "and for AudioSet add  --csv unbalanced_train_segments.csv --labels class_labels_indices.csv"
    )


def _invalid(root: str, faults: Sequence[str]) -> str:
    remedy = "upload it again" if is_remote(root) else f"write it again with `{index_command(root)}`"
    return f"{join(root, INDEX_NAME)}: not a valid shard index; {remedy}:\n{listed(faults)}"
