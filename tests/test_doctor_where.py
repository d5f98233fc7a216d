"""`msm-dist doctor WHERE`: what is given is told apart by looking at it; what is none of it gets one message."""

from pathlib import Path

import pytest

from msm_dist.doctor import machine as doctor
from msm_dist.doctor import where as doctor_where
from msm_dist.doctor.findings import Finding
from msm_dist.errors import ConfigError
from tests.test_cli import msm_dist


def filled(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["config.yaml"], "run"),
        (["config.yaml", "index.json"], "run"),
        (["metrics.jsonl", "checkpoints/step-00000001/complete"], "run"),
        (["index.json", "a.tar"], "corpus"),
        (["a.tar"], "corpus"),
        ([".pack/x"], "corpus"),
    ],
)
def test_folders_are_told_apart_by_what_is_in_them(tmp_path, names, kind):
    assert doctor_where.kind_of(str(filled(tmp_path, *names))) == kind


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("env", "env"),
        ("ENV", "env"),
        ("https://host/shards", "corpus"),
        ("s3://bucket/shards", "corpus"),
        ("pipe:cat {}", "corpus"),
        ("nowhere/a-{000..009}.tar", "corpus"),
        ("nowhere/a.tar", "corpus"),
    ],
)
def test_what_need_not_be_a_file_is_told_apart_by_its_form(where, kind):
    assert doctor_where.kind_of(where) == kind


def test_a_folder_called_env_is_given_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "env", "config.yaml")
    assert doctor_where.kind_of("env") == "env" and doctor_where.kind_of("./env") == "run"


@pytest.mark.parametrize(
    ("names", "where", "says"),
    [
        ([], "gone", "not there"),
        (["x/.keep"], "x", "a folder that is neither"),
        (["a/config.yaml", "b/config.yaml"], ".", "a folder of runs (a, b), which `msm-dist runs"),
        (["a/config.yaml", "a/checkpoints/step-00000001/complete"], "a/checkpoints", "a folder in the run folder"),
        (["a/config.yaml"], "a/config.yaml", "a file of the run folder"),
        (["notes.txt"], "notes.txt", "a file"),
        (["w/config.json", "w/model.safetensors"], "w", "weights, which `msm-dist weights inspect"),
    ],
)
def test_what_is_none_of_it_gets_one_message(tmp_path, names, where, says):
    filled(tmp_path, *names)
    with pytest.raises(ConfigError, match="give a run folder .* or env for this machine") as caught:
        doctor_where.kind_of(str(tmp_path / where))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder_is_called_so(tmp_path):
    with pytest.raises(ConfigError, match="an empty folder; give"):
        doctor_where.kind_of(str(tmp_path))


def test_packages_are_repaired_for_the_machine_only(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--fix repairs this machine's packages only"):
        doctor_where.examine(str(filled(tmp_path, "config.yaml")), fix=True, quick=False)
    fixed = []
    monkeypatch.setattr(doctor, "findings", lambda fix: fixed.append(fix) or iter([Finding("x", "ok", "")]))
    assert doctor_where.examine("env", fix=True, quick=False) == 0 and fixed == [True]


def test_the_command_takes_what_the_page_says(tmp_path):
    done = msm_dist("doctor", str(tmp_path / "gone"))
    assert done.returncode == 2 and "gone: not there; give a run folder" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
