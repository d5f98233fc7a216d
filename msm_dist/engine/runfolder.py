"""The run folder: a run's identity. Its lock, its settings, its plan and its environment.

    runs/<name>/lock.json         who is writing: host, job, pid; its modification time is the heartbeat
    runs/<name>/config.yaml       the resolved configuration, compared at every start
    runs/<name>/plan.json         what order and input are functions of, compared at every start
    runs/<name>/environment.json  machine and versions of the latest start

A second start of a running run is refused with a ConfigError that names the owner; a dead owner's lock is
taken over. Files are replaced atomically.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from msm_dist.config import dump_config, flat_settings
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.files import write_atomically

HEARTBEAT_SECONDS = 15.0
HEART_STOPS_SECONDS = 1.0
DEAD_AFTER_SECONDS = 120.0
ENDING_SECONDS = 20.0
TAKEN_EXIT_CODE = 1

# What may differ between two starts of one run: none of it changes what is computed at a step, but that a
# longer run's learning rate follows its own, longer cosine, and that another precision rounds otherwise.
MAY_CHANGE = (
    "run.dir",
    "data.shards",
    "data.valid_shards",
    "data.num_workers",
    "data.read_timeout_seconds",
    "data.read_retries",
    "data.connections",
    "data.allow_pipe",
    "data.max_bad_fraction",
    "data.allow_missing_shards",
    "data.verify",
    "model.backend",
    "model.activation_checkpointing",
    "optim.max_skipped_updates",
    "train.steps",
    "train.epochs",
    "train.micro_batch",
    "train.precision",
    "train.log_every",
    "train.valid_every",
    "train.valid_clips",
    "train.pictures_every",
    "train.trace",
    "train.profile",
    "checkpoint.",
    "engine.",
    "probe.",
)
WORTH_A_WORD = ("train.precision",)


@contextlib.contextmanager
def locked(folder: Path, wait_seconds: float = ENDING_SECONDS) -> Iterator[None]:
    """Own the run folder for the time of the block. Raises ConfigError when another process does.

    An owner that is alive on this machine gets `wait_seconds` to end, for a run that is just being stopped.
    """
    path = folder / "lock.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(path, wait_seconds)
    except OSError as error:
        raise ConfigError(
            f"{folder}: can't be written ({error.strerror}); choose another run.dir or give write access"
        ) from None
    mine = _read_owner(path)
    stopped = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, mine, stopped), daemon=True)
    heart.start()
    try:
        yield
    finally:
        stopped.set()
        heart.join(HEART_STOPS_SECONDS)  # a file system that hangs may hold it
        if _read_owner(path) == mine:
            path.unlink(missing_ok=True)


def refuse_if_taken(folder: Path) -> None:
    """Raise CheckpointError when another process owns the folder by now; to be called before something is saved."""
    owner = _read_owner(folder / "lock.json")
    if owner and (owner.get("host"), owner.get("pid")) != (socket.gethostname(), os.getpid()):
        raise CheckpointError(_taken(folder, owner))


def compare_config(folder: Path, cfg: BaseModel, may_change: Sequence[str] = MAY_CHANGE) -> list[str]:
    """Raise ConfigError for a configuration that differs from the recorded one where it may not; what to say else.

    A setting that the recorded one lacks, as the run began with an earlier version, has its default; `may_change` are
    settings, or beginnings of their names. Of two mixes the weights are left to `compare_plan`, which knows what they
    come to. A length below the one reached is refused where the step is known.
    """
    path, notes = folder / "config.yaml", []
    if path.exists():
        try:
            defaults = flat_settings(type(cfg).model_construct().model_dump(mode="json"))
            recorded = defaults | flat_settings(dict(yaml.safe_load(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError, yaml.YAMLError):
            raise ConfigError(f"{path}: can't be read as settings; restore it, or choose another run.name=") from None
        wanted = flat_settings(cfg.model_dump(mode="json"))
        differences = [
            f"  {name}: {recorded.get(name)!r} in {path}, {wanted.get(name)!r} now"
            for name in dict.fromkeys([*recorded, *wanted])
            if recorded.get(name) != wanted.get(name) and not name.startswith(tuple(may_change))
            if not (name == "data.mix" and recorded[name] and wanted[name])
        ]
        if differences:
            raise ConfigError(
                "\n".join(
                    [
                        f"{folder} holds a run with other settings:",
                        *differences,
                        f"Start a new run with run.name=NAME, or give the recorded values to continue {folder.name}.",
                    ]
                )
            )
        notes = [
            f"{name}: {recorded[name]} until now, {wanted[name]} from here on"
            for name in WORTH_A_WORD
            if name in wanted and recorded.get(name) != wanted[name]
        ]
    return notes


def compare_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Raise ConfigError when what the order is a function of has changed since it was recorded."""
    path = folder / "plan.json"
    if not path.exists():
        return
    try:
        recorded = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); remove it if the corpus is unchanged") from None
    for name in dict.fromkeys([*recorded, *plan]):
        if recorded.get(name) != plan.get(name):
            if name == "mix_places" and recorded.get(name) and plan.get(name):
                raise ConfigError(
                    f"{path}: this run began with a mix of {recorded[name]} blocks in {sum(plan[name])}, data.mix now "
                    f"gives {plan[name]}; give the weights in {folder / 'config.yaml'}, or others of their ratio, or "
                    "start a new run with run.name=NAME"
                )
            raise ConfigError(
                f"{path}: this run began with {name} = {recorded.get(name)}, the corpus now gives {plan.get(name)}; "
                "restore the corpus it began with, or start a new run with run.name=NAME"
            )


def record_start(folder: Path, cfg: BaseModel, plan: dict[str, Any]) -> None:
    """Write what `compare_config` and `compare_plan` compare with; to be called once the run is known to work."""
    write_atomically(folder / "config.yaml", dump_config(cfg))
    write_atomically(folder / "plan.json", json.dumps(plan, indent=1))


def _acquire(path: Path, wait_seconds: float) -> None:
    deadline, told = time.monotonic() + wait_seconds, False
    while not _create(path):
        owner = _read_owner(path)
        if owner is None:
            continue
        if _is_dead(path, owner):
            _remove_stale(path, owner)
            continue
        if not told:
            told = True
            print(f"{path.parent} is in use; waiting {wait_seconds:.0f} s for its owner to end", flush=True)
        if time.monotonic() >= deadline:
            if not owner:
                raise ConfigError(f"{path}: not a lock of ours; remove it if no run writes to {path.parent}")
            job = f", job {owner['job']}" if owner.get("job") else ""
            raise ConfigError(
                f"{path.parent} is being written by process {owner.get('pid')} on {owner.get('host')}{job}: stop that "
                "run, or choose another run.name="
            )
        time.sleep(0.25)


def _create(path: Path) -> bool:
    """Make the lock with its content in one step; False when there is one."""
    owner = {
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".lock.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(owner, file)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def _read_owner(path: Path) -> dict[str, Any] | None:
    """The owner, {} when the lock is damaged, None when it is gone."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(path: Path, owner: dict[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname():
        pid = owner.get("pid")
        return not isinstance(pid, int) or _start_time(pid) != owner.get("started")
    job = os.environ.get("SLURM_JOB_ID")
    if job and job == owner.get("job") and os.environ.get("SLURM_RESTART_COUNT") != owner.get("restart"):
        return True  # Slurm never runs one job twice at a time.
    return _age(path) > DEAD_AFTER_SECONDS


def _remove_stale(path: Path, owner: dict[str, Any]) -> None:
    """Take a dead owner's lock away, and put it back if another start was quicker to replace it."""
    taken = path.with_name(f".lock.{os.getpid()}.stale")
    try:
        os.rename(path, taken)
    except FileNotFoundError:
        return
    if _read_owner(taken) != owner:
        with contextlib.suppress(FileExistsError):
            os.link(taken, path)
    taken.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system that holds the lock."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock.") as probe:
        try:
            return os.stat(probe.name).st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0


def _beat(path: Path, mine: dict[str, Any] | None, stopped: threading.Event) -> None:
    """Keep the lock fresh; end this process when another one has taken the folder over, taking it for dead.

    At once: what it saved would lie between the checkpoints of the new owner.
    """
    while not stopped.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            # A lock that can't be read now, or was deleted, says nothing of another owner.
            if (owner := _read_owner(path)) and owner != mine:
                print(f"msm-dist: {_taken(path.parent, owner)}", file=sys.stderr, flush=True)
                os._exit(TAKEN_EXIT_CODE)
            os.utime(path)


def _taken(folder: Path, owner: dict[str, Any]) -> str:
    return (
        f"{folder} was taken over by process {owner.get('pid')} on {owner.get('host')}, which took this one for dead "
        "(cut off from Slurm?); nothing more is saved here, the run goes on there"
    )


def _start_time(pid: int) -> str | None:
    """A process' start in clock ticks since boot: with the pid, its identity. None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
