"""`msm-dist doctor [RUN|SHARDS|ENV]`: what is given, told apart by looking at it, and the checks of that.

In: a run folder, a corpus, or "env" for the machine. Out: findings on the terminal and an exit code: 2 if something
must be done, else 0. Raises ConfigError for what is none of the three.
"""

import os
from pathlib import Path
from typing import Literal

from msm_dist.doctor.findings import show, word
from msm_dist.doctor.machine import run_doctor
from msm_dist.errors import ConfigError

ENVIRONMENT = "env"
RUN_FILES = ("config.yaml", "checkpoints", "metrics.jsonl", "plan.json", "lock.json")
"""Any two of them make a folder a run's, also where the others are lost."""


def examine(where: str, fix: bool, quick: bool) -> int:
    """Check what `where` is and print the findings; the exit code. Raises ConfigError."""
    kind = kind_of(where)
    if kind != "env" and fix:
        raise ConfigError(f"{where}: --fix repairs this machine's packages only; what to do for a {kind} is printed")
    if kind == "env":
        return run_doctor(fix)
    # Imported here: they need torch, which `--help` and a bare machine go without.
    from msm_dist.data.commands import ALL_CORES, show_progress

    with show_progress() as progress:
        if kind == "run":
            from msm_dist.doctor.run import examine_run

            return show(examine_run(Path(where), quick, progress))
        from msm_dist.doctor.shards import examine_shards

        return show(examine_shards(where, quick, ALL_CORES, progress))


def kind_of(where: str) -> Literal["env", "run", "corpus"]:
    """Whether something is the machine, a run folder or a corpus. Raises ConfigError."""
    if where in (ENVIRONMENT, ENVIRONMENT.upper()):
        return "env"
    path = Path(where)
    if "://" in where or where.startswith("pipe:"):
        return "corpus"
    if not path.is_dir():
        # A pattern of tars need not be a file.
        if (
            where.endswith(".tar")
            or ("{" in where and ".tar" in where)
            or (path.is_file() and path.name == "index.json")
        ):
            return "corpus"
        raise ConfigError(f"{where}: {_what(path)}; {_WANTED}")
    names = _names(path)
    if "config.yaml" in names or sum(name in names for name in RUN_FILES) >= 2:
        return "run"
    if "index.json" in names or ".pack" in names or any(name.endswith(".tar") for name in names):
        return "corpus"
    raise ConfigError(f"{where}: {_what(path)}; {_WANTED}")


_WANTED = (
    "give a run folder (with config.yaml), shards (a folder with index.json or .tar files, a brace pattern, a URL), or "
    "env for this machine"
)


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"{folder}: can't be read ({error.strerror}); give access, then call doctor again") from None


def _what(path: Path) -> str:
    """What is there in place of what is wanted."""
    if not path.exists():
        return "not there"
    if path.is_file():
        return f"a file of the run folder {path.parent}" if (path.parent / "config.yaml").is_file() else "a file"
    for above in list(path.resolve().parents)[:2]:
        if (above / "config.yaml").is_file():
            return f"a folder in the run folder {above}"
    names = _names(path)
    if {"config.json", "model.safetensors"} <= names:
        return f"weights, which `msm-dist weights inspect {word(path)}` checks"
    runs = sorted(name for name in names if (path / name / "config.yaml").is_file())
    if runs:
        return (
            f"a folder of runs ({', '.join(runs[:4])}{', ...' if len(runs) > 4 else ''}), which `msm-dist runs` lists"
        )
    if not names:
        return "an empty folder"
    return "a folder that is neither"
