"""An output folder that belongs to one command's output: killed, the same command continues; no other may write there.

In: a folder, and as a JSON object what must be equal for its content to be continued. Out: the folder, held by a lock
that ends with the process. Fails with ConfigError where it holds something else, DataError where it was damaged.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from msm_dist.data.index import INDEX_NAME, UNFINISHED_NAME, Index, check_shards, load_index
from msm_dist.errors import ConfigError, DataError
from msm_dist.plain import parse_json

SETTINGS_NAME = "pack.json"


@contextmanager
def claimed(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold `out`, made if need be, for this process alone. Raises ConfigError if it belongs to another output."""
    path = out / SETTINGS_NAME
    if not path.exists() and ((out / INDEX_NAME).exists() or any(out.glob("*.tar"))):
        raise ConfigError(f"{out}: holds shards that were not packed by this command; choose another output folder")
    out.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        _lock(file, out)
        file.seek(0)
        if content := file.read():
            _compare(content, identity, out)
        else:
            file.write(json.dumps(identity, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        yield


def finished(out: Path, command: str) -> Index | None:
    """The index, where all of it is written. Raises DataError if shards were damaged since."""
    if (out / UNFINISHED_NAME).exists() or not (out / INDEX_NAME).exists():
        return None
    index = load_index(str(out))
    try:
        check_shards(index, "size")
    except DataError as error:
        raise DataError(f"{error}\nto {command} again, remove {out} first") from None
    return index


def begun(out: Path) -> Path:
    """The folder for what is unfinished, made if need be; what a killed start left half written is gone."""
    unfinished = out / UNFINISHED_NAME
    unfinished.mkdir(exist_ok=True)
    for leftover in [*out.glob("*.tmp"), *unfinished.glob("*.tmp")]:
        leftover.unlink()
    return unfinished


def _lock(file: TextIO, out: Path) -> None:
    """File systems that know no locks go without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{out}: another pack is writing here; wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def _compare(content: str, identity: dict[str, Any], out: Path) -> None:
    try:
        earlier = parse_json(content)
        different = {name: earlier.get(name) for name in identity if earlier.get(name) != identity[name]}
    except (ValueError, AttributeError):
        raise ConfigError(f"{out / SETTINGS_NAME}: is damaged; remove {out} or choose another output folder") from None
    if different:
        faults = [f"{name} was {was}, is {identity[name]}" for name, was in different.items() if name != "inputs"]
        faults += ["audio files or labels differ"] if "inputs" in different else []
        raise ConfigError(
            f"{out}: was packed from other inputs or settings ({'; '.join(faults)}); choose another output "
            "folder, or remove this one"
        )
