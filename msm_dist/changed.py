"""Shards that others changed under a run, listed in its folder: it goes on with what it began with or not at all.

    runs/<name>/changed_shards.json   [{"name", "location", "sha256"}, ...]

In: the corpus as it was stamped, and the error that ended a start, if any. Out: the list; at the next start a
comparison of the digests of what is listed with the index, and only when they agree the list is deleted. Fails with
DataError.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from msm_dist.corpus import Corpus, check_digests
from msm_dist.data.index import Index, Shard
from msm_dist.data.storage import Access, stamps
from msm_dist.engine.world import World
from msm_dist.errors import DataError
from msm_dist.files import write_atomically

CHANGED_FILE = "changed_shards.json"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def recording_changed(folder: Path, corpus: Corpus, is_main: bool) -> Iterator[None]:
    """Write the list when the block ends: of the shards that its error names, and of those no longer as stamped.

    However it ends: a shard that is cut short while it is mapped kills the process that reads it, unnamed; and a run
    that was told to stop has not looked yet at what it would have read next.
    """
    named: set[str] = set()
    try:
        yield
    except DataError as error:
        named = {shard.sha256 for shard in error.changed}
        raise
    finally:
        if is_main:
            now = stamps(corpus.stamped)
            differing = {location for location, was in corpus.stamped.items() if now.get(location) != was}
            _record(
                folder / CHANGED_FILE,
                [shard for shard in corpus.index.shards if shard.sha256 in named or shard.location in differing],
            )


def check_restored(
    folder: Path, index: Index, access: Access, world: World, begins: Callable[[], object] = lambda: None
) -> list[str]:
    """Raise DataError on all ranks unless the listed shards are what they were; what to say of it. A collective.

    One rank of each machine reads them, and calls `begins` before each. Those that are missing are left to
    data.allow_missing_shards.
    """
    path = folder / CHANGED_FILE
    listed = world.on_main(lambda: _read(path))
    if not listed:
        return []
    shards = tuple(shard for shard in index.shards if shard.sha256 in listed)

    def compare() -> None:
        try:
            check_digests(replace(index, shards=shards), 0, 1, access, begins)
        except DataError as error:
            raise DataError(
                f"{path}: these shards changed under this run. It goes on from its last checkpoint once they are what "
                f"they were:\n{error}"
            ) from None

    world.together(lambda: compare() if world.local_rank == 0 else None, DataError)
    world.on_main(lambda: path.unlink(missing_ok=True))
    return [f"shards that had changed are what they were again: {', '.join(shard.name for shard in shards)}"]


def _record(path: Path, shards: Sequence[Shard]) -> None:
    if not shards:
        return
    listed = [{"name": shard.name, "location": shard.location, "sha256": shard.sha256} for shard in shards]
    try:
        write_atomically(path, json.dumps(listed, indent=1) + "\n")
    except OSError as error:
        log.warning("%s: can't be written (%s); compare the shards by data.verify=digest", path, error.strerror)
        return
    log.warning("%s: lists what changed; the next start compares it with the index first", path)


def _read(path: Path) -> list[str]:
    """The digests of the shards that are listed."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if not listed or not isinstance(listed, list):
            raise ValueError("not a list of shards")
        return [str(entry["sha256"]) for entry in listed]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: can't be read as a list of shards ({type(error).__name__}); remove it and give "
            "data.verify=digest, which compares all shards"
        ) from None
