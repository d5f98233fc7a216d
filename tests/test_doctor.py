"""The checks of interpreter and packages by `msm-dist doctor`: what they find, and what they may repair."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msm_dist.doctor import machine as doctor
from msm_dist.doctor.machine import Finding, Requirement


def statuses(findings) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


@pytest.mark.parametrize(
    ("version", "floor", "enough"),
    [
        ("2.13.0+cpu", "2.11", True),
        ("2.11.0a0+git1234", "2.11", True),
        ("2.9.1", "2.11", False),
        ("10", "9.9", True),
        ("1.0", "1", True),
        ("0.4.2", "0.4.3", False),
    ],
)
def test_versions_compare_as_numbers(version: str, floor: str, enough: bool) -> None:
    assert (doctor.release(version) >= doctor.release(floor)) is enough


def test_requirements_outside_a_clone_come_from_the_metadata(monkeypatch, tmp_path) -> None:
    lines = ["torch>=2.11", 'triton>=3.6; platform_system == "Linux" and extra == "train"']
    monkeypatch.setattr(doctor, "REPOSITORY", tmp_path)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor.requirements() == [Requirement("torch", "2.11", ""), Requirement("triton", "3.6", "train")]


def test_packages_below_the_floor_fail_and_missing_extras_warn(monkeypatch) -> None:
    required = [
        Requirement("base", "2", ""),
        Requirement("old", "2", "train"),
        Requirement("gone", "1", "dev"),
    ]
    versions = {"base": None, "old": "1.9", "gone": None}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    found = {f.detail: f.status for f in doctor.check_packages(required)}
    assert found == {
        "needed: base >= 2 (none is here)": "fail",
        "needed: old >= 2 (1.9 is here)": "fail",
        "needed: gone >= 1 (none is here)": "warn",
    }


def test_untested_version_is_named_beside_the_tested_one(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: "3.0")
    monkeypatch.setattr(doctor, "tested_versions", lambda: {"one": "2.0", "same": "3.0.0"})
    (finding,) = doctor.check_packages([Requirement("one", "1", ""), Requirement("same", "1", "")])
    assert (finding.status, finding.detail) == ("warn", "not the tested versions: one 3.0 (tested: 2.0)")


@pytest.fixture
def broken_torchaudio(monkeypatch, tmp_path) -> Path:
    """A torchaudio in a folder of its own, whose import fails in its extensions as long as they are there."""
    package = tmp_path / "torchaudio"
    (package / "lib").mkdir(parents=True)
    (package / "_extension.py").write_text(
        "from pathlib import Path\n"
        "if list((Path(__file__).parent / 'lib').glob('*.so')):\n"
        "    raise OSError('libc10_cuda.so: cannot open shared object file')\n"
    )
    (package / "__init__.py").write_text("from torchaudio import _extension\n")
    (package / "lib" / "libtorchaudio.so").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
    return package


def test_torchaudio_is_repaired_in_our_own_environment(broken_torchaudio, tmp_path) -> None:
    (tmp_path / doctor.OWN_VENV_MARK).touch()
    (before,) = doctor.check_torchaudio(fix=False)
    assert before.status == "fail"
    assert "libc10_cuda.so" in before.detail and "--fix" in before.remedy
    (repaired,) = doctor.check_torchaudio(fix=True)
    assert repaired.status == "ok" and "removed libtorchaudio.so" in repaired.detail
    assert statuses(doctor.check_torchaudio(fix=False)) == {"torchaudio": "ok"}
    assert (broken_torchaudio / "__init__.py").is_file()


def test_torchaudio_of_others_is_left_alone(broken_torchaudio) -> None:
    (finding,) = doctor.check_torchaudio(fix=True)
    assert finding.status == "fail" and "libtorchaudio.so" in finding.remedy
    assert (broken_torchaudio / "lib" / "libtorchaudio.so").exists()


def test_torchaudio_broken_for_another_reason_is_left_alone(broken_torchaudio, tmp_path) -> None:
    (tmp_path / doctor.OWN_VENV_MARK).touch()
    (broken_torchaudio / "__init__.py").write_text("raise ImportError('something else')\n")
    (finding,) = doctor.check_torchaudio(fix=True)
    assert finding.status == "fail" and "something else" in finding.detail
    assert (broken_torchaudio / "lib" / "libtorchaudio.so").exists()


def test_missing_compiler_is_a_warning_with_the_packages_to_install(monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (finding,) = doctor.check_compiler()
    assert finding.status == "warn" and "apt-get install g++" in finding.remedy


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 2)])
def test_only_a_failed_check_fails_the_command(monkeypatch, capsys, status: str, code: int) -> None:
    monkeypatch.setattr(doctor, "findings", lambda fix: iter([Finding("disk", status, "full", "empty it")]))
    assert doctor.run_doctor(fix=False) == code
    printed = capsys.readouterr().out
    assert all(word in printed for word in (status, "disk", "full", "empty it"))


@pytest.mark.distributed
def test_several_processes_start_where_nothing_can_be_compiled(tmp_path) -> None:
    """DeepSpeed would compile an op of its own at the first start: minutes of silence, or no start at all."""
    script = tmp_path / "start.py"
    script.write_text(
        "from msm_dist.engine.world import join_world, leave_world\n"
        "world = join_world(timeout_minutes=10)\n"
        "total = world.sum([1.0])\n"
        "print('ranks together:', total) if world.is_main else None\n"
        "leave_world()\n"
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    environment = {**os.environ, "PATH": str(tools), "TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled")}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "ranks together: [2.0]" in child.stdout
    assert not list((tmp_path / "compiled").rglob("*.so"))


def test_doctor_runs_where_nothing_is_installed() -> None:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-m", "msm_dist.doctor"]
    child = subprocess.run(command, cwd=doctor.REPOSITORY, env=own, capture_output=True, text=True)
    assert child.returncode == 2, child.stderr
    assert "torch >= 2.11 (none is here)" in child.stdout
    assert "open files" in child.stdout and "clock" in child.stdout
