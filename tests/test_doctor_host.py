"""The checks of `msm-dist doctor` of what a machine offers: each finding is made to happen; good ones are ok."""

import errno
import os
import time
from collections import namedtuple
from pathlib import Path

import pytest

from msm_dist.config import Config
from msm_dist.data.stream import PREFETCHED_BATCHES
from msm_dist.doctor import findings as doctor_findings
from msm_dist.doctor import host as doctor_host
from msm_dist.doctor.findings import Finding

Usage = namedtuple("Usage", "total used free")
HOUR = 3600.0


def statuses(findings) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Sets the room that every file system seems to have."""
    monkeypatch.setattr(doctor_host, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor_host, "NVIDIA_GPUS", tmp_path / "gpus")
    return lambda free: monkeypatch.setattr(doctor_host.shutil, "disk_usage", lambda path: Usage(2**41, 0, free))


@pytest.mark.parametrize(
    ("free", "shared", "disk"), [(2**26, "warn", "fail"), (2**32, "ok", "warn"), (2**40, "ok", "ok")]
)
def test_little_space_is_reported(room, tmp_path, free: int, shared: str, disk: str) -> None:
    room(free)
    found = [*doctor_host.check_shared_memory(), *doctor_host.check_disk(tmp_path)]
    assert statuses(found) == {"shared mem": shared, "disk": disk}
    assert all(bool(finding.remedy) == (finding.status != "ok") for finding in found)


def test_shared_memory_is_wanted_for_each_gpu(room, tmp_path) -> None:
    for number in range(8):
        (tmp_path / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
    room(512 * 2**20)
    (finding,) = doctor_host.check_shared_memory()
    assert finding.status == "warn" and "640 wanted for 8 loading ranks" in finding.detail
    assert finding.remedy.startswith("docker run --shm-size=2g")


def test_no_shared_memory_at_all_is_reported(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor_host, "SHARED_MEMORY", tmp_path / "none")
    (finding,) = doctor_host.check_shared_memory()
    assert finding.status == "warn" and "data.num_workers=0" in finding.remedy


def test_a_ranks_shared_memory_holds_what_its_loaders_prefetch() -> None:
    cfg = Config()
    batch = cfg.train.micro_batch * cfg.features.crop_samples(cfg.data.crop_frames) * 2  # int16
    held = max(1, cfg.data.num_workers) * (PREFETCHED_BATCHES + 1) * batch
    assert 0.5 * doctor_host.RANK_SHM_BYTES < held < doctor_host.RANK_SHM_BYTES


@pytest.mark.parametrize(
    ("limit", "most", "status", "remedy"),
    [
        (256, 4096, "warn", "ulimit -n 4096"),
        (256, 512, "warn", "limits.conf"),
        (1024, 4096, "ok", ""),
        (-1, -1, "ok", ""),
    ],
)
def test_few_open_files_are_reported(monkeypatch, limit: int, most: int, status: str, remedy: str) -> None:
    monkeypatch.setattr(doctor_host.resource, "getrlimit", lambda kind: (limit, most))
    (finding,) = doctor_host.check_open_files()
    assert finding.status == status and remedy in finding.remedy


def test_locked_memory_matters_beside_infiniband_only(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor_host, "INFINIBAND", tmp_path / "infiniband")
    monkeypatch.setattr(doctor_host.resource, "getrlimit", lambda kind: (2**23, 2**23))
    assert list(doctor_host.check_locked_memory()) == []
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    (finding,) = doctor_host.check_locked_memory()
    assert finding.status == "warn" and "8192 KiB" in finding.detail and "mlx5_0" in finding.detail
    assert "ulimit -l unlimited" in finding.remedy
    monkeypatch.setattr(doctor_host.resource, "getrlimit", lambda kind: (doctor_host.resource.RLIM_INFINITY,) * 2)
    assert statuses(doctor_host.check_locked_memory()) == {"locked mem": "ok"}


def test_a_disk_without_inodes_is_full(monkeypatch, tmp_path) -> None:
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([*real[:5], 1000, 0, 0, *real[8:]])
    monkeypatch.setattr(doctor_host.os, "statvfs", lambda path: full)
    (finding,) = doctor_host.check_disk(tmp_path)
    assert finding.status == "fail" and "no inodes" in finding.detail


def test_a_file_system_for_runs_has_hard_links(monkeypatch, tmp_path) -> None:
    assert statuses(doctor_host.check_file_system(tmp_path)) == {"file system": "ok"}

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(doctor_host.os, "link", refuse)
    (finding,) = doctor_host.check_file_system(tmp_path)
    assert finding.status == "fail" and "hard links fail (Operation not permitted)" in finding.detail
    assert "run.dir=FOLDER" in finding.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_a_warning(tmp_path) -> None:
    (finding,) = doctor_host.check_file_system(tmp_path / "gone")
    assert finding.status == "warn" and "No such file" in finding.detail and "run.dir=" in finding.remedy


def test_mounts_are_told_apart(monkeypatch, tmp_path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "28 27 0:40 / /home rw,relatime shared:2 - nfs4 server:/home rw,local_lock=none\n"
        "29 28 0:41 / /home/a\\040b rw - tmpfs tmpfs rw\n"
        "broken line\n"
    )
    monkeypatch.setattr(doctor_host, "MOUNTS", mounts)
    assert doctor_host.mounted_at(Path("/var")) == ("ext4", "/")
    assert doctor_host.mounted_at(Path("/home/user/runs")) == ("nfs4", "/home")
    assert doctor_host.mounted_at(Path("/homeless")) == ("ext4", "/")
    assert doctor_host.mounted_at(Path("/home/a b/c")) == ("tmpfs", "/home/a b")
    assert doctor_host.is_shared("nfs4") and doctor_host.is_shared("fuse.sshfs") and not doctor_host.is_shared("ext4")
    monkeypatch.setattr(doctor_host, "MOUNTS", tmp_path / "none")
    assert doctor_host.mounted_at(Path("/home")) == ("", "")


def clock(monkeypatch, folder, offset: float = 0.0, error: int | str = 1000) -> list[Finding]:
    """The findings of a clock that is `offset` seconds off and whose error the kernel tells so."""
    now = time.time
    monkeypatch.setattr(doctor_host.time, "time", lambda: now() + offset)
    monkeypatch.setattr(doctor_host, "ntp_error", lambda: error)
    return list(doctor_host.check_clock(folder))


def test_a_good_clock_is_ok(monkeypatch, tmp_path) -> None:
    assert [finding.status for finding in clock(monkeypatch, tmp_path)] == ["ok"] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_clock_of_another_time_than_the_file_systems_is_named(monkeypatch, tmp_path) -> None:
    found = clock(monkeypatch, tmp_path, offset=HOUR)
    assert [finding.status for finding in found] == ["ok", "warn", "ok"]
    assert "60 minutes before this machine's" in found[1].detail and "NTP" in found[1].remedy


def test_a_clock_before_the_newest_file_is_named(monkeypatch, tmp_path) -> None:
    found = clock(monkeypatch, tmp_path, offset=-30 * 365 * 24 * HOUR)
    assert [finding.status for finding in found] == ["warn", "warn", "ok"]
    assert "but files of msm_dist are of" in found[0].detail and "days late" in found[0].detail
    assert "after this machine's" in found[1].detail


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (16_000_000, "warn", "not set by NTP"),
        (3_000, "ok", "to 3 ms"),
        ("adjtimex: EPERM", "note", "can't be found out (adjtimex: EPERM)"),
    ],
)
def test_what_the_kernel_knows_of_ntp_is_told(monkeypatch, tmp_path, error: int | str, status: str, says: str) -> None:
    found = clock(monkeypatch, tmp_path, error=error)[-1]
    assert found.status == status and says in found.detail


def test_the_kernel_answers_without_being_changed() -> None:
    assert isinstance(doctor_host.ntp_error(), int | str)


def test_a_clock_is_not_compared_where_nothing_can_be_written(monkeypatch, tmp_path) -> None:
    found = clock(monkeypatch, tmp_path / "gone")
    assert found[1].status == "note" and "can't be found out" in found[1].detail


def test_text_of_strangers_does_not_steer_the_terminal(capsys) -> None:
    assert doctor_findings.show([Finding("run", "fail", "a\x1b[2Jb\nsecond", "rm \x07")]) == 2
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\\x1b[2J" in out
    assert [line.strip() for line in out.splitlines()] == ["fail  run           a\\x1b[2Jb", "second", "-> rm \\x07"]


def test_of_many_the_first_are_named() -> None:
    assert doctor_findings.some(["a", "b", "c"], limit=2) == "a, b and 1 more"
    assert doctor_findings.some(["a", "b"], limit=2) == "a, b"
