"""The copy of the code that a job runs from: complete, never written again, and taken before anything installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from msm_dist import snapshot
from msm_dist.errors import ConfigError
from msm_dist.snapshot import PACKAGES, digest, git_commit, read_packages, take_snapshot
from tests.processes import HERE

WHERE = "import sys, msm_dist, msm_configs, msm_kernels.reference as r; print(msm_dist.__file__, r.__file__)"


def test_snapshot_holds_the_packages_and_is_named_by_their_content(tmp_path):
    taken = take_snapshot(tmp_path / "code")
    assert taken == tmp_path / "code" / digest(read_packages())
    assert {path.name for path in taken.iterdir()} == set(PACKAGES)
    for package, source in zip(PACKAGES, ("msm_dist", "kernels", "configs"), strict=True):
        for path in (HERE.parent / source).rglob("*.py"):
            copy = taken / package / path.relative_to(HERE.parent / source)
            assert copy.read_bytes() == path.read_bytes()
    assert (taken / "msm_configs" / "deepspeed" / "zero1.json").exists()
    assert (taken / "msm_kernels" / "configurations.json").exists()
    assert not list(taken.rglob("__pycache__"))


def test_the_same_code_is_kept_once_and_other_code_beside_it(tmp_path, monkeypatch):
    first = take_snapshot(tmp_path)
    written = (first / "msm_dist" / "__init__.py").stat().st_mtime_ns
    assert take_snapshot(tmp_path) == first
    assert (first / "msm_dist" / "__init__.py").stat().st_mtime_ns == written
    content = read_packages() | {"msm_dist/__init__.py": b"# edited\n"}
    monkeypatch.setattr(snapshot, "read_packages", lambda: content)
    second = take_snapshot(tmp_path)
    assert second != first
    assert (second / "msm_dist" / "__init__.py").read_text() == "# edited\n"
    assert (first / "msm_dist" / "__init__.py").read_text() != "# edited\n"
    assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_snapshot_that_was_edited_is_refused(tmp_path):
    taken = take_snapshot(tmp_path)
    with (taken / "msm_dist" / "__init__.py").open("a") as file:
        file.write("# edited\n")
    with pytest.raises(ConfigError, match="no longer what its name says; remove it"):
        take_snapshot(tmp_path)


@pytest.mark.parametrize("folder", [HERE.parent, Path("/")])
def test_python_takes_the_snapshot_before_what_is_installed_or_in_the_folder(tmp_path, folder):
    taken = take_snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WHERE],
        env={"PYTHONPATH": str(taken), "PYTHONSAFEPATH": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [Path(word).parent.parent for word in done.stdout.split()] == [taken, taken]


def test_package_that_comes_later_on_the_path_does_not_hide_the_snapshot(tmp_path):
    taken = take_snapshot(tmp_path / "code")
    for package in PACKAGES:
        (tmp_path / "later" / package).mkdir(parents=True)
        (tmp_path / "later" / package / "__init__.py").write_text("raise SystemExit('hidden')\n")
    path = {"PYTHONPATH": f"{taken}:{tmp_path / 'later'}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", WHERE], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_digest_tells_names_from_contents():
    assert digest({"ab": b"c"}) != digest({"a": b"bc"})
    assert digest({"a": b"1", "b": b"2"}) == digest({"b": b"2", "a": b"1"})
    assert digest({"a": b"1", "b": b"2"}) != digest({"a": b"2", "b": b"1"})


def test_commit_of_another_repository_is_not_ours(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    package = tmp_path / "lib" / "msm_dist"
    package.mkdir(parents=True)
    monkeypatch.setattr(snapshot, "locate", lambda: [("msm_dist", package)])
    assert git_commit() is None
