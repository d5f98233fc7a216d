"""The text of index.json: which keys it has, of which types, and what must agree among them.

In: the plain values of the file, which may come from strangers. Out: an `IndexFile`. Fails with pydantic's
ValidationError; what no type can tell, `contradictions` names.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator

from msm_dist.config import Features

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_CHECKED = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
_NOT_IN_A_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]")  # other folders, and what steers the terminal


class ShardEntry(BaseModel):
    """A shard in the list; what they mean is at `index.Shard`."""

    model_config = _CHECKED
    name: str = Field(max_length=1024)
    clips: int = Field(ge=1, lt=2**40)
    bytes: int = Field(ge=1, lt=2**60)
    sha256: Digest
    members_sha256: Digest

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not name.endswith(".tar") or name.startswith(".") or _NOT_IN_A_NAME.search(name):
            raise ValueError("a shard is a .tar file in the folder of the index")
        return name


class OfficialEntry(BaseModel):
    """How much of a published collection it is; see `index.Official`."""

    model_config = _CHECKED
    tables: Annotated[list[str], FailFast()]
    clips: int = Field(ge=0)
    found: int = Field(ge=0)
    manifest: Digest


class IndexFile(BaseModel):
    """All of the file; see `index.Index`."""

    model_config = _CHECKED
    version: Literal[1]
    kind: Literal["audio", "logmel"]
    sample_rate: int | None = Field(gt=0)
    shards: Annotated[list[ShardEntry], FailFast(), Field(min_length=1)]
    clips: int
    seconds: float = Field(ge=0)
    mean: float | None
    std: float | None = Field(ge=1e-3)
    mel_mean: list[float] | None = Field(max_length=4096)
    features: Annotated[Features | None, Field(strict=False)]
    """The front end alone: no mean, no std."""
    official: OfficialEntry | None = None
    made_from: Digest | None = None

    @field_validator("features", mode="before")
    @classmethod
    def _front_end(cls, features: Any) -> Any:
        names = Features().front_end().keys()
        # In one message: of a stranger's names there may be millions, of any length.
        if features is not None and not (
            isinstance(features, dict)
            and features.keys() == names
            and all(type(value) in (int, float) for value in features.values())
        ):
            raise ValueError(f"must be null, or give a number to each of {', '.join(names)}, and to nothing else")
        return features


def contradictions(entry: IndexFile) -> Iterator[str]:
    """What does not agree, a sentence each."""
    names = [shard.name for shard in entry.shards]
    if len(set(names)) < len(names):
        yield f"shards: {Counter(names).most_common(1)[0][0]} is listed twice"
    for shard in entry.shards:
        if shard.clips * tarfile.BLOCKSIZE > shard.bytes:
            yield f"shards: {shard.name} has {shard.clips} clips in {shard.bytes} bytes: each takes a header and more"
            break
    if entry.clips != (total := sum(shard.clips for shard in entry.shards)):
        yield f"clips = {entry.clips}: the shards have {total}"
    measured = [value is not None for value in (entry.mean, entry.std, entry.mel_mean, entry.features)]
    if any(measured) and not all(measured):
        yield "mean, std, mel_mean and features go together: all of them, or null"
    if all(measured) and len(entry.mel_mean) != entry.features.n_mels:
        yield f"mel_mean has {len(entry.mel_mean)} bands, features.n_mels = {entry.features.n_mels}"
