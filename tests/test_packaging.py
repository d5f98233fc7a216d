"""What an installation holds, and how the Makefile finds an interpreter."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from msm_dist.doctor import machine as doctor

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"msm_dist": "msm_dist", "kernels": "msm_kernels", "configs": "msm_configs"}


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of what the build and the Makefile read, so that they leave nothing behind here."""
    return copy_tree(tmp_path / "clone")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built without isolation, as it is where there is no network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = f"import setuptools.build_meta as backend; backend.build_wheel({str(folder)!r})"
    build = run_in(copy_tree(folder / "clone"), sys.executable, "-c", source)
    assert build.returncode == 0, build.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_and_configuration(wheel) -> None:
    expected = {
        (Path(package) / path.relative_to(ROOT / folder)).as_posix()
        for folder, package in MAPPED.items()
        for suffix in ("*.py", "*.yaml", "*.json")
        for path in (ROOT / folder).rglob(suffix)
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "msm_configs/deepspeed/zero1.json" in packed


def test_wheel_works_outside_the_clone(wheel, tmp_path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    source = (
        "import msm_configs, msm_dist.config, msm_kernels.reference as reference\n"
        "folder = msm_configs.__path__[0]\n"
        "print(msm_dist.config.load_config(folder + '/quickstart.yaml').run.name, folder, reference.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    name, *paths = child.stdout.split()
    assert name == "quickstart"
    assert all(Path(path).is_relative_to(tmp_path) for path in paths)


def test_every_requirement_has_a_tested_version_at_or_above_its_floor() -> None:
    tested = doctor.tested_versions()
    required = {requirement.name: requirement.floor for requirement in doctor.requirements()}
    assert {"torch", "deepspeed", "pytest"} <= required.keys()
    assert required.keys() - tested.keys() == {"triton"}, "triton comes with a CUDA torch, the rest is pinned"
    pairs = {name: (required[name], tested[name]) for name in required.keys() & tested.keys()}
    assert not {name for name, (floor, pin) in pairs.items() if doctor.release(pin) < doctor.release(floor)}


def test_constraints_are_exact_versions_in_order() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    names = [line.partition("==")[0].lower() for line in lines]
    assert names == sorted(set(names))


def test_given_interpreter_without_packages_is_told_what_it_lacks(clone) -> None:
    child = run_in(clone, sys.executable, "-S", "-m", "tools.setup_env", "--venv", "0")
    assert child.returncode == 2
    assert "torch >= 2.11: none is here" in child.stderr
    assert not (clone / "build" / "importable").exists()


def test_given_interpreter_is_asked_only_for_what_a_target_needs(clone) -> None:
    command = [sys.executable, "-S", "-m", "tools.setup_env", "--venv", "0", "--needs", "numpy"]
    child = run_in(clone, *command)
    assert "numpy" in child.stderr and "torch" not in child.stderr


def test_given_interpreter_finds_our_packages_without_installation(clone) -> None:
    makefile = clone / "Makefile"
    show = "\nshow: ready\n\t@$(PY) -c 'import msm_configs, msm_kernels.reference as r; print(r.__file__)'\n"
    makefile.write_text(makefile.read_text() + show)
    for _ in range(2):
        child = run_in(clone, "make", "-s", "show", "VENV=0", f"PYTHON={sys.executable}")
        assert child.returncode == 0, child.stderr
        assert Path(child.stdout.strip()).is_relative_to(clone)


def test_given_interpreter_means_no_environment_and_no_pip(clone) -> None:
    plan = run_in(clone, "make", "-n", "test", "lint", "pretrain", "VENV=0", f"PYTHON={sys.executable}").stdout
    assert "-m pytest" in plan and "msm_dist.pretrain" in plan
    assert ".venv/" not in plan.replace(sys.executable, "") and "pip" not in plan


def test_set_up_asks_for_a_newer_python(clone) -> None:
    child = run_in(clone, "make", "setup", "PYTHON=false")
    assert child.returncode != 0
    assert "Python 3.11 or newer is needed" in child.stdout
    assert not (clone / ".venv").exists()


def run_in(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder, without the settings of the `make` that runs these tests."""
    own = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHONPATH", "VENV", "PYTHON"}
    environment = {key: value for key, value in os.environ.items() if key not in own}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def copy_tree(folder: Path) -> Path:
    for name in (*MAPPED, "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder
