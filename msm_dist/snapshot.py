"""The code of a run, kept: a queued or requeued job runs what was there when it was submitted.

In: the installed packages msm_dist, msm_kernels and msm_configs, wherever they are. Out: a folder with copies of them
that PYTHONPATH may name, called by the digest of their content: what a job runs from is never written to again.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from msm_dist.errors import ConfigError

PACKAGES = ("msm_dist", "msm_kernels", "msm_configs")
SUFFIXES = {".py", ".json", ".yaml"}
DIGEST_LETTERS = 12


def take_snapshot(folder: Path) -> Path:
    """Copy the packages to `folder`/<digest>, unless they are there already; that path. Raises ConfigError, OSError."""
    content = read_packages()
    target = folder / digest(content)
    if target.exists():
        if digest({name: (target / name).read_bytes() for name in _names(target)}) != target.name:
            raise ConfigError(f"{target}: is no longer what its name says; remove it unless a job runs from it")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial."))
    try:
        for name, data in content.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(data)
        partial.chmod(0o755)  # mkdtemp keeps others out, who may read the rest of the run folder
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():
                raise  # else another submission was quicker to write the same
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def read_packages() -> dict[str, bytes]:
    """The packages' files by their names in a snapshot. Raises ConfigError."""
    # A folder without __init__.py gives way to a package of that name anywhere on the path, however late.
    content = {f"{name}/__init__.py": b"" for name in PACKAGES}
    for name, root in locate():
        content |= {f"{name}/{path.relative_to(root)}": path.read_bytes() for path in files(root)}
    return content


def locate() -> Iterator[tuple[str, Path]]:
    """The packages with their folders, without importing them. Raises ConfigError."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if not places:
            raise ConfigError(f"{name} is not importable: run `make setup`")
        yield name, Path(places[0])


def files(root: Path) -> Iterator[Path]:
    """The files of a package that belong to it, in no order."""
    for path in root.rglob("*"):
        if path.suffix in SUFFIXES and path.is_file() and "__pycache__" not in path.parts:
            yield path


def digest(content: dict[str, bytes]) -> str:
    """A name for files: the beginning of a sha256 over their names and contents."""
    total = hashlib.sha256()
    for name, data in sorted(content.items()):
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()[:DIGEST_LETTERS]


def git_commit() -> str | None:
    """The commit of the sources, with -dirty where tracked files differ from it; None outside of a repository."""
    root = dict(locate())["msm_dist"].parent
    if not (root / ".git").exists():  # a parent folder's repository is another project's
        return None
    command = ["git", "-C", os.fspath(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _names(folder: Path) -> list[str]:
    return [f"{name}/{path.relative_to(folder / name)}" for name in PACKAGES for path in files(folder / name)]
