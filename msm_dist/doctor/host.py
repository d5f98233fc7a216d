"""What a machine offers a run beside packages and GPUs: shared memory, open files, disk, file system, clock.

In: the machine, and the folder that runs are started in, where a few empty files are made and removed. Out: findings;
what can't be found out here is a "note" that says so. Needs the standard library only.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from msm_dist.doctor.findings import Finding

SHARED_MEMORY = Path("/dev/shm")
MIN_SHM_BYTES = 256 * 2**20
RANK_SHM_BYTES = 80 * 2**20
"""Of the batches that one rank's loader processes hold ready: four workers, audio of the base configuration."""
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
INFINIBAND = Path("/sys/class/infiniband")
MOUNTS = Path("/proc/self/mountinfo")
PACKAGE = Path(__file__).resolve().parent
RUNS = "runs"
CLOCKS_AGREE_SECONDS = 5.0
UNSYNCHRONISED_MICROSECONDS = 16_000_000
"""Largest error at which systemd, too, takes the kernel's clock for set by NTP."""
SHARED_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "lustre", "beegfs", "gpfs", "ceph", "afs", "wekafs", "panfs", "9p"}
BASE_CHECKPOINT_BYTES = 1.2e9


def check_shared_memory() -> Iterator[Finding]:
    """Room for the batches that loader processes hand over, those of one rank for each GPU."""
    if not SHARED_MEMORY.is_dir():
        remedy = "mount a tmpfs there, or data.num_workers=0"
        yield Finding("shared mem", "warn", f"no {SHARED_MEMORY}: loader processes can't hand over batches", remedy)
        return
    ranks = max(1, len(list(NVIDIA_GPUS.iterdir())) if NVIDIA_GPUS.is_dir() else 0)
    needed = max(MIN_SHM_BYTES, ranks * RANK_SHM_BYTES)
    free = shutil.disk_usage(SHARED_MEMORY).free
    detail = f"{free / 2**20:,.0f} MiB free in {SHARED_MEMORY}, {needed / 2**20:,.0f} wanted for {ranks} loading"
    detail += " rank" if ranks == 1 else " ranks"
    if free < needed:
        remedy = f"docker run --shm-size={-(-2 * needed // 2**30)}g, or data.num_workers=0"
        yield Finding("shared mem", "warn", f"{detail}: loader processes may run out of it", remedy)
    else:
        yield Finding("shared mem", "ok", detail)


def check_open_files() -> Iterator[Finding]:
    """The limit of open files; each loader process maps up to 128 shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if not 0 <= soft < 1024:
        yield Finding("open files", "ok", f"limit {soft if soft >= 0 else 'none'}")
    elif 0 <= hard < 1024:
        remedy = "nofile in /etc/security/limits.conf, or docker run --ulimit nofile=65536"
        yield Finding("open files", "warn", f"limit {soft}, at most {hard}: loaders of many shards need 1024", remedy)
    else:
        remedy = f"ulimit -n {hard}" if hard >= 0 else "ulimit -n 65536"
        yield Finding("open files", "warn", f"limit {soft}: loaders of many shards need 1024", remedy)


def check_locked_memory() -> Iterator[Finding]:
    """The limit of locked memory, which InfiniBand's buffers need; of no use without."""
    cards = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if not cards:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        yield Finding("locked mem", "ok", f"no limit, for InfiniBand ({', '.join(cards)})")
        return
    detail = f"limit {soft // 1024} KiB: NCCL can't register its buffers with {', '.join(cards)}"
    remedy = "ulimit -l unlimited; for jobs LimitMEMLOCK=infinity in slurmd's service, docker run --ulimit memlock=-1"
    yield Finding("locked mem", "warn", detail, remedy)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Room for checkpoints where runs are written, and for the number of files."""
    status = os.statvfs(folder)
    free = shutil.disk_usage(folder).free
    if status.f_files and not status.f_favail:
        yield Finding("disk", "fail", f"no inodes left in {folder}: no file can be made", "delete files there")
        return
    level = "fail" if free < 2**30 else "warn" if free < 5 * 2**30 else "ok"
    size = f"{BASE_CHECKPOINT_BYTES / 1e9:g} GB"
    remedy = "" if level == "ok" else f"free some space: a base-size checkpoint takes {size}"
    yield Finding("disk", level, f"{free / 2**30:,.1f} GiB free in {folder}", remedy)


def check_file_system(folder: Path) -> Iterator[Finding]:
    """Whether runs can be written to `folder`: a run's lock needs hard links, a packing's flock."""
    kind, mount = mounted_at(folder)
    where = f"{folder} ({kind or 'of unknown kind'}{f' at {mount}' if mount else ''})"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor.") as made:
            lacking = list(_lacking(Path(made)))
    except OSError as error:
        detail = f"{where}: can't be written ({error.strerror})"
        yield Finding("file system", "warn", detail, "start runs where you may write, or give run.dir=FOLDER")
        return
    if lacking:
        detail = f"{where}: {' and '.join(lacking)}"
        yield Finding("file system", "fail", detail, "run.dir=FOLDER on another file system (ext4, xfs, NFS, Lustre)")
    else:
        shared = ", shared by hosts" if is_shared(kind) else ""
        yield Finding("file system", "ok", f"{where}{shared}: hard links and file locks work")


def _lacking(folder: Path) -> Iterator[str]:
    """What can't be done with files of a folder that is ours."""
    file = folder / "file"
    file.touch()
    try:
        os.link(file, folder / "link")
    except OSError as error:
        yield f"hard links fail ({error.strerror}), so that no run can lock its folder"
    with file.open("wb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield f"file locks fail ({error.strerror}), which `msm-dist data pack` needs"


def mounted_at(folder: Path) -> tuple[str, str]:
    """Kind of a folder's file system and where it is mounted; both empty where that can't be found out."""
    found = ("", "")
    try:
        resolved, lines = str(folder.resolve()), MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        mount = _unescaped(fields[4])
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        # Of two mounts at one place the later covers the earlier.
        if inside and len(mount) >= len(found[1]):
            found = (after.split()[0], mount)
    return found


def is_shared(kind: str) -> bool:
    """Whether a kind of file system may be that of several hosts."""
    return kind in SHARED_SYSTEMS or kind.startswith("fuse.")


def check_clock(folder: Path) -> Iterator[Finding]:
    """Whether the clock is plausible, agrees with the file system's, and is set by NTP as far as the kernel tells."""
    now, newest = time.time(), max(path.stat().st_mtime for path in PACKAGE.glob("*.py"))
    if now < newest - CLOCKS_AGREE_SECONDS:
        detail = (
            f"{_told(now)}, but files of msm_dist are of {_told(newest)}: it is {_length(newest - now)} late at least"
        )
        yield Finding("clock", "warn", detail, "set it: chronyc makestep, or timedatectl set-ntp true")
    else:
        yield Finding("clock", "ok", f"{_told(now)}, after the newest file of msm_dist")
    yield from _check_stamps(folder)
    yield _check_ntp()


def _check_stamps(folder: Path) -> Iterator[Finding]:
    """The time that a file system gives to a fresh file, beside this machine's."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as file:
            before = time.time()
            os.write(file.fileno(), b"x")
            os.fsync(file.fileno())
            stamp = os.stat(file.name).st_mtime
            after = time.time()
    except OSError as error:
        yield Finding("clock", "note", f"of the file system at {folder}: can't be found out ({error.strerror})")
        return
    # Between the two readings any stamp is right.
    apart = min(stamp - before, 0.0) + max(stamp - after, 0.0)
    if abs(apart) <= CLOCKS_AGREE_SECONDS:
        yield Finding("clock", "ok", f"files in {folder} get this machine's time")
        return
    detail = f"files in {folder} get a time {_length(abs(apart))} {'after' if apart > 0 else 'before'} this machine's"
    remedy = "set the clocks of this machine and of the file server by NTP: `msm-dist runs` judges runs by them"
    yield Finding("clock", "warn", detail, remedy)


def _check_ntp() -> Finding:
    """What the kernel says of its clock; nobody is asked over the network."""
    error = ntp_error()
    if isinstance(error, str):
        return Finding("clock", "note", f"whether NTP sets it can't be found out ({error})")
    if error < UNSYNCHRONISED_MICROSECONDS:
        return Finding("clock", "ok", f"set by NTP, to {error / 1000:,.0f} ms at worst")
    detail = "not set by NTP, as far as the kernel knows"
    remedy = "where several hosts work together: chronyd or systemd-timesyncd on each"
    return Finding("clock", "warn", detail, remedy)


def ntp_error() -> int | str:
    """The kernel's bound of its clock's error in microseconds, or why there is none."""
    # struct timex: modes (0: read only), then longs: offset, freq, maxerror, ...; longer than any libc's.
    timex = (ctypes.c_long * 64)()
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (OSError, AttributeError) as error:
        return f"no adjtimex: {error}"
    if state < 0:
        return f"adjtimex: {errno.errorcode.get(ctypes.get_errno(), 'refused')}"
    return int(timex[3])


def runs_folder() -> Path:
    """Where runs that are started here are written: runs/ if it is there."""
    runs = Path.cwd() / RUNS
    return runs if runs.is_dir() else Path.cwd()


def _told(moment: float) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    return f"{moment:.0f} s after 1970"


def _length(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _unescaped(mount: str) -> str:
    """A mount point as it is called: spaces and the like stand as octal numbers."""
    for code, letter in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        mount = mount.replace(f"\\{code}", letter)
    return mount
