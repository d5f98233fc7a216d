"""The environment of the HEAR tools: what is asked of pip, and where it refuses before it makes anything."""

import sys

import pytest

from msm_dist.doctor import machine as doctor
from tests.test_packaging import ROOT, run_in
from tools import hear_env


def pins(lines):
    return {hear_env.name_of(line): line.partition("==")[2] for line in lines if "==" in line}


def test_it_holds_the_base_packages_in_tested_versions():
    base = {requirement.name.lower() for requirement in doctor.requirements() if not requirement.extra}
    asked, tested = pins(hear_env.asked_for()), doctor.tested_versions()
    assert {"torch", "soundfile", "safetensors"} <= base <= asked.keys()
    shared = asked.keys() & tested.keys()
    assert {name: asked[name] for name in shared} == {name: tested[name] for name in shared}


def test_other_packages_come_in_tested_versions_but_for_those_the_tools_need_otherwise():
    others = pins(hear_env.constraints())
    assert others.items() <= doctor.tested_versions().items()
    assert not others.keys() & {hear_env.name_of(line) for line in hear_env.asked_for()}
    assert "numba" in others and "setuptools" not in others


def test_another_python_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    with pytest.raises(SystemExit) as end:
        hear_env.install(tmp_path / "venv", None)
    assert end.value.code == 2
    assert "is Python 3.13: the HEAR tools" in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 11, 0))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        hear_env.install(tmp_path, None)
    assert "holds no working Python" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_environment_that_holds_what_is_asked_for_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hear_env", "--venv", str(tmp_path)])
    made = []

    def install(venv, index):
        made.append((venv, index))

    monkeypatch.setattr(hear_env, "install", install)
    for _ in range(2):
        hear_env.main()
    assert made == [(tmp_path, None)]
    assert "already" in capsys.readouterr().out
    (tmp_path / hear_env.DONE).write_text("heareval==2020\n")
    hear_env.main()
    assert len(made) == 2


def test_make_says_which_python_it_misses():
    command = ["make", "test-hear", "VENV=0", f"PYTHON={sys.executable}", "HEAR_PYTHON=no-such-python", "-o", "ready"]
    child = run_in(ROOT, *command)
    assert child.returncode == 2
    assert "no-such-python is not there; the HEAR tools run on Python 3.11: HEAR_PYTHON=" in child.stdout
