"""What a tar holds for each of its clips: the clip's member, and the json member with labels and origin.

In: a shard on this machine. Out: one `Stored` per clip, in the order of its sidecar. The json may come from strangers:
what is no object of plain values counts as none. Fails with DataError on a tar that is not what its sidecar says.
"""

import json
import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from msm_dist.config import Features
from msm_dist.data.index import INDEX_NAME, Index, Shard, members
from msm_dist.data.logmel import SUFFIX
from msm_dist.data.tar_members import tar_members
from msm_dist.errors import DataError

MAX_JSON_BYTES = 2**20
MOST_SECONDS = 1e12


class Stored(NamedTuple):
    """A clip in its tar: its row of the sidecar, the suffix of its member (".flac"), its json member ({}: none)."""

    row: np.void
    suffix: str
    description: dict[str, Any]

    @property
    def key(self) -> str:
        """The clip's key, whatever bytes it is of."""
        return self.row["key"].decode(errors="surrogateescape")

    @property
    def origin(self) -> dict[str, Any]:
        """Where the clip comes from, as far as its json says."""
        origin = self.description.get("origin")
        return origin if isinstance(origin, dict) else {}

    @property
    def start_seconds(self) -> float:
        """Where in its file the clip begins, 0.0 where its json does not say so in a finite number."""
        start = self.origin.get("start_seconds")
        if isinstance(start, bool) or not isinstance(start, int | float):
            return 0.0
        # An integer may be beyond what a float can hold.
        return float(start) if abs(start) < MOST_SECONDS else 0.0


def stored_clips(shard: Shard) -> Iterator[Stored]:
    """The clips of a shard in the order of its sidecar. Raises DataError, OSError."""
    suffixes: dict[int, tuple[str, str]] = {}
    places: dict[str, tuple[int, int]] = {}
    for member in tar_members(shard.path):
        stem, suffix = split_name(member.name)
        suffixes[member.offset_data] = stem, suffix
        if suffix == ".json" and member.isreg() and 0 <= member.size <= MAX_JSON_BYTES:
            places[stem] = member.offset_data, member.size
    with open(shard.path, "rb") as file:
        for row in members(shard):
            if int(row["offset"]) not in suffixes:
                raise DataError(
                    f"{shard.path}: {printable(row['key'])} is not where its sidecar says; see `msm-dist data verify`"
                )
            stem, suffix = suffixes[int(row["offset"])]
            content = b""
            if place := places.get(stem):
                file.seek(place[0])
                content = file.read(place[1])
            yield Stored(row, suffix, _parsed(content))


def front_end_of(index: Index) -> Features | None:
    """The front end behind an index's statistics, None where it has none. Raises DataError."""
    if index.features is None:
        return None
    try:
        return Features(**index.features)
    except ValidationError as error:
        fault = error.errors()[0]
        raise DataError(
            f"{index.location}: the front end in {INDEX_NAME} is none of this version ({fault['loc'][0]}: "
            f"{fault['msg']}); measure again with `msm-dist data stats`, or pack stored log-mels again"
        ) from None


def printable(text: str | bytes) -> str:
    """Text of strangers as it may reach a terminal: what is no UTF-8 or steers the terminal is escaped."""
    text = text.decode(errors="backslashreplace") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def split_name(name: str) -> tuple[str, str]:
    """A member's name without its suffix, and the suffix."""
    if name.endswith(SUFFIX):
        return name.removesuffix(SUFFIX), SUFFIX
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix), suffix


def _finite(text: str) -> float | None:
    """A number; NaN and infinities, which JSON has not, count as null."""
    return number if math.isfinite(number := float(text)) else None


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        description = json.loads(content, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}
