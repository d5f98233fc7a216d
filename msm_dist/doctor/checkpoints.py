"""The checkpoints of a run as `msm-dist doctor` sees them: which are whole, and which one the next start takes.

In: a run's folder of checkpoints. Out: a `Seen` for each, and findings. What the next start does is in
engine/resume.py; here it is foretold, with the same functions, and nothing is renamed. Files are looked at before they
are opened: nothing is followed out of the folder.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from msm_dist.data.clips import Progress
from msm_dist.doctor.files import check_folder, names_in, plain_size
from msm_dist.doctor.findings import Finding, counted, some, word
from msm_dist.engine.meta import Meta, RunMeta
from msm_dist.engine.stored import DAMAGED, PARTIAL, Saved, Torn, open_checkpoint, wrong_files
from msm_dist.errors import CheckpointError, DataError
from msm_dist.plain import shown

NAME = re.compile(r"step-[0-9]{8}")
SET_ASIDE = re.compile(rf"step-[0-9]{{8}}{re.escape(DAMAGED)}(-[0-9]+)?")


class State(Enum):
    """What a checkpoint is."""

    GOOD = "good"
    TORN = "torn"
    """Not whole, or of other bytes than were saved: a start goes on from the one before."""
    BLOCKED = "blocked"
    """Can't be judged, is none of this version's, or has a meta.json that no run saves: a start ends with an error."""
    PARTIAL = "partial"
    ASIDE = "aside"
    """Damaged, and renamed by an earlier start."""


@dataclass(frozen=True)
class Seen:
    """A folder among the checkpoints."""

    folder: Path
    state: State
    detail: str
    size: int = 0
    saved: Saved | None = None

    @property
    def step(self) -> int:
        """Of its name."""
        return int(self.folder.name[5:13])


def look_at(root: Path, quick: bool, progress: Progress, kind: type[Meta] = RunMeta) -> list[Seen]:
    """Every checkpoint of a run, the oldest first; with `quick` digests are not compared. Raises DataError.

    `kind` is what a start of the run holds meta.json to.
    """
    names = [name for name in names_in(root) if name.startswith("step-")]
    seen = []
    for number, name in enumerate(names):
        seen.append(_look(root / name, quick, kind))
        progress("checking checkpoints", number + 1, len(names))
    return [one for one in seen if one is not None]


def _look(folder: Path, quick: bool, kind: type[Meta]) -> Seen | None:
    if folder.name.endswith(PARTIAL) and NAME.fullmatch(folder.name.removesuffix(PARTIAL)):
        return Seen(folder, State.PARTIAL, "", _size(folder))
    if SET_ASIDE.fullmatch(folder.name):
        return Seen(folder, State.ASIDE, _differing(folder, quick, kind), _size(folder))
    if not NAME.fullmatch(folder.name):
        return None
    try:
        saved = _opened(folder, kind)
        wrong = [] if quick else wrong_files(saved)
    except Torn as error:
        return Seen(folder, State.TORN, str(error), _size(folder))
    except (CheckpointError, DataError) as error:
        return Seen(folder, State.BLOCKED, str(error))
    size = _size(folder)
    if wrong:
        detail = f"bytes of {some(wrong)} are not those that were saved"
        return Seen(folder, State.TORN, detail, size, saved)
    compared = "sizes" if quick else "digests"
    files = counted(len(saved.meta["files"]), "file")
    return Seen(folder, State.GOOD, f"whole: {files}, {size / 1e6:,.1f} MB, {compared} as saved", size, saved)


def _opened(folder: Path, kind: type[Meta]) -> Saved:
    """As a start opens it, once all in it is known to be files that lie there. Raises CheckpointError, DataError."""
    check_folder(folder)
    for name in names_in(folder):
        plain_size(folder / name)
    return open_checkpoint(folder, kind)


def _size(folder: Path) -> int:
    try:
        return sum(plain_size(folder / name) for name in names_in(folder))
    except DataError:
        return 0


def _differing(folder: Path, quick: bool, kind: type[Meta]) -> str:
    """What is wrong with a checkpoint that was set aside."""
    try:
        wrong = [] if quick else wrong_files(_opened(folder, kind))
    except (CheckpointError, DataError) as error:
        return str(error)
    if wrong:
        return f"bytes of {some(wrong)} are not those that were saved"
    return "its sizes are those that were saved" if quick else "its bytes are those that were saved, now"


def next_start(seen: Sequence[Seen]) -> Seen | None:
    """The checkpoint that decides the next start: the newest that is good, or on which it ends. None: from step 0."""
    decisive = [one for one in seen if one.state in (State.GOOD, State.BLOCKED)]
    return max(decisive, key=lambda one: one.step, default=None)


def findings(seen: Sequence[Seen], is_alive: bool) -> Iterator[Finding]:
    """What is to say of each checkpoint, the oldest first."""
    good = [one for one in seen if one.state is State.GOOD]
    newest = max((one.step for one in good), default=-1)
    for one in seen:
        name, where = one.folder.name[:13], one.folder
        if one.state is State.GOOD:
            yield Finding(name, "ok", one.detail)
        elif one.state is State.BLOCKED and one.step < newest:
            yield Finding(name, "warn", one.detail, f"nothing: a newer one is good; or rm -r {word(where)}")
        elif one.state is State.BLOCKED:
            remedy = f"mend that, or move {where} away to go on from the one before"
            yield Finding(name, "fail", f"a start ends here: {one.detail}", remedy)
        elif one.state is State.PARTIAL and is_alive:
            yield Finding(name, "ok", f"being written, {one.size / 1e6:,.1f} MB so far")
        elif one.state is State.PARTIAL:
            detail = f"{where.name}: unfinished, left by a start that ended while it wrote ({one.size / 1e6:,.1f} MB)"
            yield Finding(name, "warn", detail, f"nothing: a start's next save deletes it; or rm -r {word(where)}")
        elif one.state is State.ASIDE:
            detail = f"{where.name}: set aside by a start as damaged: {one.detail} ({one.size / 1e6:,.1f} MB)"
            remedy = f"look at the disk it lay on (smartctl, dmesg); when you are done: rm -r {word(where)}"
            yield Finding(name, "warn", detail, remedy)
        elif one.step < newest:
            yield Finding(
                name, "warn", f"damaged: {one.detail}", f"nothing: a newer one is good; or rm -r {word(where)}"
            )
        else:
            remedy = f"a whole copy put back as {where}, if there is one"
            remedy += "; else the next start sets it aside" if good else ""
            yield Finding(name, "warn" if good else "fail", f"damaged: {one.detail}", remedy)
    if seen and not good and not any(one.state is State.BLOCKED for one in seen):
        damaged = [one.folder.name for one in seen if one.state in (State.TORN, State.ASIDE)]
        if damaged:
            root = seen[0].folder.parent
            remedy = (
                f"put back a whole copy of one of them, or start from step 0: mv {word(root)} {word(f'{root}.lost')}"
            )
            yield Finding("checkpoints", "fail", f"none is whole, of {some(damaged)}: a start refuses", remedy)


def place_fault(saved: Saved, blocks_per_step: int) -> str | None:
    """Why a start refuses a checkpoint that is whole: its cursor is not that of its step."""
    cursor = saved.meta["cursor"]
    if cursor == saved.step * blocks_per_step:
        return None
    return f"its cursor {shown(cursor, 40)} is not that of step {saved.step} with {blocks_per_step} blocks a step"
