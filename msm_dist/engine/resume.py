"""Where a run goes on: the newest checkpoint that is whole and whose bytes are those that were saved.

In: a run's folder of checkpoints. Out: a `Saved` whose digests have been compared, the same on all ranks, or None for a
new run. One that was damaged after it was complete is renamed to step-N.damaged, never deleted, and the one before is
tried; links, files and folders of other names are not looked at. Fails with CheckpointError on all ranks where a
checkpoint can't be read, which is no proof of damage; where its meta.json is the one that was completed but breaks a
rule of engine/meta.py, which is none either; and where there are some but no good one.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from msm_dist.config import BatchLayout
from msm_dist.engine.meta import Meta, RunMeta
from msm_dist.engine.stored import COMPLETE, PARTIAL, Saved, Torn, folders, open_checkpoint, put_aside, wrong_files
from msm_dist.engine.world import World
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.plain import shown

log = logging.getLogger(__name__)


def newest_good(root: Path, world: World, kind: type[Meta] = RunMeta) -> Saved | None:
    """The newest checkpoint whose bytes are those that were saved; a collective. None where there is none at all.

    The ranks share the files; a damaged checkpoint is put aside, named in a warning, and the one before is tried.
    Raises CheckpointError on all ranks where one can't be read, where the meta.json of one is not of that kind, and
    where there are some but no good one.
    """
    rejected: list[str] = []
    while saved := world.on_main(lambda: _newest_whole(root, rejected, kind)):
        wrong = _wrong_anywhere(saved, world)
        if not wrong:
            break
        world.on_main(partial(_reject, saved, wrong, rejected))
    if saved is None:
        return None
    if world.is_main and rejected:
        log.warning("%s: taken instead of %s", saved.folder, ", ".join(rejected))
    return replace(saved, verified=True)


def newest_of_run(
    root: Path, total_steps: int, layout: BatchLayout, world: World, kind: type[Meta] = RunMeta
) -> Saved | None:
    """Where the run goes on; a collective. Raises ConfigError when that is past its end, CheckpointError."""
    saved = newest_good(root, world, kind)
    world.on_main(lambda: _check_place(root, saved, total_steps, layout))
    return saved


def _newest_whole(root: Path, rejected: list[str], kind: type[Meta]) -> Saved | None:
    """The newest checkpoint that is whole by its sizes; those that no longer are so are put aside."""
    for folder in reversed(folders(root)):
        try:
            return open_checkpoint(folder, kind)
        except Torn as error:
            if folder.name in rejected:
                continue
            rejected.append(folder.name)
            if (folder / COMPLETE).exists():
                log.warning("%s; this one is kept as %s", error, put_aside(folder).name)
            else:
                # It was being deleted.
                log.warning("skipped %s", error)
    if torn := [path.name for path in root.glob("step-*") if path.suffix != PARTIAL]:
        raise CheckpointError(
            f"{root}: holds {', '.join(sorted(torn))}, but no whole checkpoint; bring one back, or remove the folder "
            "to start the run from step 0"
        )
    return None


def _wrong_anywhere(saved: Saved, world: World) -> list[str]:
    """The files that any rank reads other than they were saved; a collective, in which each reads its share."""
    # Nothing is judged before all have read: what one rank can't read must not be taken for damaged.
    wrong = world.together(lambda: wrong_files(saved, world.rank, world.size), CheckpointError)
    return [name for names in world.gather(wrong) for name in names]


def _reject(saved: Saved, wrong: list[str], rejected: list[str]) -> None:
    """Put a checkpoint with wrong bytes aside. Raises CheckpointError where only other machines read them wrong."""
    files = {name: saved.meta["files"][name] for name in wrong}
    if not wrong_files(replace(saved, meta={"files": files})):
        raise CheckpointError(
            f"{saved.folder / wrong[0]}: another machine reads other bytes than rank 0's, which reads those that were "
            "saved; look at its mount and memory, then start again"
        )
    aside = put_aside(saved.folder)
    log.warning("%s: bytes of %s are not those that were saved; kept as %s", saved.folder, ", ".join(wrong), aside.name)
    rejected.append(saved.folder.name)


def _check_place(root: Path, saved: Saved | None, total_steps: int, layout: BatchLayout) -> None:
    """Raise CheckpointError for a checkpoint of other steps than the run's, ConfigError for one past its end."""
    if saved is None:
        return
    if saved.meta["cursor"] != saved.step * layout.blocks_per_step:
        raise CheckpointError(
            f"{saved.folder}: its cursor {shown(saved.meta['cursor'], 40)} is not that of step {saved.step} with "
            f"{layout.blocks_per_step} blocks a step; remove it to go on from the one before"
        )
    if saved.step > total_steps:
        raise ConfigError(
            f"train.steps: the run is {total_steps} steps long, its checkpoint {saved.folder} is at step {saved.step}; "
            "ask for more steps, or start a new run with run.name=NAME"
        )
