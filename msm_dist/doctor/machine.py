"""What this machine offers and lacks for msm_dist: the checks behind `msm-dist doctor` and `make setup`.

In: the interpreter and the machine it runs on. Out: findings, each with what was found and what to do.
Here: interpreter and packages; the rest is in gpu.py and host.py. Needs the standard library only, so that it also
runs where nothing is installed yet: `python -m msm_dist.doctor`. Repairs on request what can go wrong between good
packages: torchaudio's compiled extensions beside another torch.
"""

import ast
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from msm_dist.doctor.findings import Finding, show
from msm_dist.doctor.gpu import check_gpu, check_variables
from msm_dist.doctor.host import (
    check_clock,
    check_disk,
    check_file_system,
    check_locked_memory,
    check_open_files,
    check_shared_memory,
    runs_folder,
)

REPOSITORY = Path(__file__).resolve().parent.parent.parent
OWN_VENV_MARK = "made-by-msm-dist"
"""File in a virtual environment that set-up made: only there may a package's files be removed."""
TESTED_PYTHONS = ((3, 11), (3, 12))


@dataclass(frozen=True)
class Requirement:
    """A package that msm_dist needs: its lowest version, and the extra that asks for it ("" is the base)."""

    name: str
    floor: str
    extra: str


def run_doctor(fix: bool) -> int:
    """Run every check and print its findings as they come; with `fix`, repair what can be repaired.

    Returns the exit code: 2 if a check failed, else 0.
    """
    return show(findings(fix))


def findings(fix: bool) -> Iterator[Finding]:
    """The findings of all checks, one after the other."""
    folder = runs_folder()
    checks: list[Callable[[], Iterable[Finding]]] = [
        check_python,
        lambda: check_packages(requirements()),
        lambda: check_torchaudio(fix),
        check_compiler,
        check_gpu,
        check_variables,
        check_shared_memory,
        check_open_files,
        check_locked_memory,
        lambda: check_disk(folder),
        lambda: check_file_system(folder),
        lambda: check_clock(folder),
    ]
    for check in checks:
        yield from check()


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    found = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] < TESTED_PYTHONS[0]:
        yield Finding("python", "fail", f"{found}; 3.11 or newer is needed", "make setup PYTHON=python3.11")
    elif sys.version_info[:2] > TESTED_PYTHONS[-1]:
        yield Finding("python", "warn", f"{found}; tested are 3.11 and 3.12")
    else:
        yield Finding("python", "ok", found)


def check_packages(required: Iterable[Requirement]) -> Iterator[Finding]:
    """Installed versions against the floors of setup.py and the tested versions of constraints.txt."""
    required, tested = list(required), tested_versions()
    faults = unmet(required)
    for extra in sorted({requirement.extra for requirement, _ in faults}):
        here = [(r, found) for r, found in faults if r.extra == extra]
        wrong = ", ".join(f"{r.name} >= {r.floor} ({found or 'none'} is here)" for r, found in here)
        install = f"pip install 'msm-dist[{extra}]'" if extra else "pip install msm-dist"
        optional = extra and all(found is None for _, found in here)
        yield Finding("packages", "warn" if optional else "fail", f"needed: {wrong}", f"make setup, or {install}")
    others = [
        f"{name} {found} (tested: {tested[name]})"
        for name in sorted({r.name for r in required} & tested.keys())
        if (found := installed_version(name)) and release(found) != release(tested[name])
    ]
    if others:
        yield Finding("packages", "warn", f"not the tested versions: {', '.join(others)}")
    elif not faults:
        yield Finding("packages", "ok", f"{len(required)} packages at or above their floors")


def unmet(required: Iterable[Requirement]) -> list[tuple[Requirement, str | None]]:
    """The requirements that are missing or too old, each with the version found."""
    pairs = [(requirement, installed_version(requirement.name)) for requirement in required]
    return [(r, found) for r, found in pairs if found is None or release(found) < release(r.floor)]


def requirements() -> list[Requirement]:
    """What setup.py asks for: read from it in a clone, from the installed metadata elsewhere."""
    setup = REPOSITORY / "setup.py"
    if setup.is_file():
        lists = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(setup.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        named = {"BASE": "", "TRAIN": "train", "VIDEO": "video", "PARQUET": "parquet", "DEV": "dev"}
        return [_parse(line, extra) for name, extra in named.items() for line in lists[name]]
    lines = metadata.requires("msm-dist") or []
    extras = [re.search(r"extra == ['\"](\w+)", line) for line in lines]
    return [_parse(line, extra[1] if extra else "") for line, extra in zip(lines, extras, strict=True)]


def tested_versions() -> dict[str, str]:
    """The pins of constraints.txt; none outside a clone."""
    path = REPOSITORY / "constraints.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pins = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name.lower(): version for name, _, version in pins}


def installed_version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version without trailing zeros: 2.13.0+cpu and 2.13.0a0 are both (2, 13)."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_torchaudio(fix: bool) -> Iterator[Finding]:
    """Whether torchaudio imports.

    Its published wheel is linked against one CUDA version and fails beside a CPU torch or another CUDA;
    without its compiled extensions it runs as pure Python.
    """
    spec = util.find_spec("torchaudio")
    if spec is None or spec.origin is None:
        return
    fault = _import_fault("torchaudio")
    if fault is None:
        yield Finding("torchaudio", "ok", "imports")
        return
    extensions = sorted((Path(spec.origin).parent / "lib").glob("*.so"))
    names = ", ".join(path.name for path in extensions)
    if not extensions or "_extension" not in fault:
        yield Finding("torchaudio", "fail", f"can't be imported: {_last_line(fault)}", "make setup")
        return
    detail = f"its compiled extensions don't load: {_last_line(fault)}"
    if not (Path(sys.prefix) / OWN_VENV_MARK).is_file():
        remedy = f"remove {names} in {extensions[0].parent}, or install the torchaudio build for this torch"
        yield Finding("torchaudio", "fail", detail, remedy)
    elif not fix:
        yield Finding("torchaudio", "fail", detail, "msm-dist doctor --fix")
    else:
        for path in extensions:
            path.unlink()
        again = _import_fault("torchaudio")
        outcome = "it runs as pure Python" if again is None else f"and still: {_last_line(again)}"
        removed = f"removed {names}, linked against a CUDA that this torch does not have; {outcome}"
        yield Finding("torchaudio", "ok" if again is None else "fail", removed)


def check_compiler() -> Iterator[Finding]:
    """What torch.compile on CPUs and Triton on GPUs build with (our use of DeepSpeed compiles nothing)."""
    missing = [] if any(shutil.which(tool) for tool in ("c++", "g++", "clang++")) else ["a C++ compiler"]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python.h")
    if missing:
        detail = f"{' and '.join(missing)} missing: engine.compile and Triton kernels can't be built"
        yield Finding("compiler", "warn", detail, "apt-get install g++ python3-dev")
    else:
        yield Finding("compiler", "ok", "C++ compiler and Python.h are here")


def _parse(line: str, extra: str) -> Requirement:
    name, floor = re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line).groups()
    return Requirement(name.lower(), floor, extra)


def _import_fault(module: str) -> str | None:
    """The traceback of importing `module` in a fresh interpreter, or None."""
    child = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    return child.stderr if child.returncode else None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]
