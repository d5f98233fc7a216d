"""What a cluster wants of its jobs: the profile of a site, as YAML.

In: a file such as slurm/cluster.example.yaml. Out: a `Site`, all of whose fields may be left out; every fault of the
file in one ConfigError. The lines of `setup` are run by the job's shell: a profile is code of the person who submits.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from msm_dist.errors import ConfigError
from msm_dist.plain import parse_yaml
from msm_dist.sweep import repeated_key

PLAIN_PYTHON = "python3"
"""Interpreter in a container that names none, and on a node of which nothing else is known."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Word = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),  # YAML reads `mem: 0` as a number
    Field(min_length=1, pattern=r"^[^\n\r\x00]+$"),
]
Mount = Annotated[str, Field(pattern=r"^/[^,\n\r\x00]*$")]
OURS = {
    "array": "--sweep and --max-parallel",
    "error": "nothing: one log holds both",
    "export": "environment:",
    "job-name": "run.name=",
    "nodes": "--nodes",
    "ntasks": "--nodes and --tasks-per-node or --gpus-per-node",
    "ntasks-per-node": "--tasks-per-node or --gpus-per-node",
    "gpus-per-node": "--gpus-per-node, and gres:",
    "open-mode": "nothing: a requeued job appends to its log",
    "output": "run.dir= and run.name=",
    "parsable": "nothing: what sbatch says is read here",
    "requeue": "nothing: it is always set",
    "signal": "signal_seconds:",
    "time": "--time",
    "wait": "nothing: msm-dist runs shows how jobs go on",
}
"""Options of sbatch that have their place elsewhere."""


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is no text: quote it, as 'true', or write 1")
    return value


class Container(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The image that the ranks run in. It holds msm_dist's dependencies; msm_dist itself comes from the snapshot."""

    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: srun's --container options; apptainer: `apptainer exec` around Python."""
    image: Word
    """Image as the runtime names it: an enroot or docker name, a .sqsh, a .sif."""
    mounts: tuple[Mount, ...] = ()
    """Host paths, or HOST:CONTAINER; the folders of submission and of the run are always there."""
    python: Word = PLAIN_PYTHON
    """Interpreter inside."""


class Site(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What is the same for all jobs on one cluster. The command line's options win."""

    account: Word | None = None
    """--account of sbatch."""
    qos: Word | None = None
    """--qos of sbatch."""
    partition: Word | None = None
    """--partition of sbatch."""
    constraint: Word | None = None
    """--constraint of sbatch: features of nodes."""
    exclude: Word | None = None
    """--exclude of sbatch: nodes not to use."""
    mem: Word | None = None
    """--mem of sbatch: memory of a node, such as 64G; 0 is all of it."""
    gres: Word | None = None
    """How GPUs are asked for instead of --gpus-per-node=N: as a GRES with {gpus} in it, such as gpu:a100:{gpus}, or
    `none` for whole nodes of a site without GRES."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPUs of a rank; none: its loader processes and two."""
    signal_seconds: int = Field(300, ge=30, le=3600)
    """How long before the time limit a job is told to save."""
    setup: tuple[str, ...] = ()
    """Shell lines before the ranks start, such as `module load cuda`. The interpreter is that of `python`."""
    environment: dict[Name, Annotated[str | int | float, BeforeValidator(_no_truth)]] = {}
    """Environment variables of the job."""
    python: Word | None = None
    """Interpreter on the nodes, ~ being the home of who submits; none: the one that submits."""
    container: Container | None = None
    """Image that the ranks run in."""
    srun: tuple[Word, ...] = ()
    """More options of srun, such as --mpi=none."""
    sbatch: dict[str, Word | int | bool] = {}
    """More options of sbatch by their long names, such as reservation: night; true for one without a value."""

    @field_validator("python")
    @classmethod
    def _python(cls, value: str | None) -> str | None:
        return value and os.path.expanduser(value)

    @field_validator("gres")
    @classmethod
    def _gres(cls, value: str | None) -> str | None:
        if value not in (None, "none") and "{gpus}" not in value:
            raise ValueError("must hold {gpus} where the number of GPUs goes, such as gpu:a100:{gpus}, or be none")
        return value

    @field_validator("setup")
    @classmethod
    def _setup(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        if any("#SBATCH" in line for line in lines):
            raise ValueError("#SBATCH counts only at the top of a script; write sbatch: with `option: value` below it")
        return lines

    @field_validator("sbatch")
    @classmethod
    def _sbatch(cls, options: dict[str, Word | int | bool]) -> dict[str, Word | int | bool]:
        named = {name.lstrip("-").replace("_", "-"): value for name, value in options.items()}
        for name, value in named.items():
            if name in OURS:
                raise ValueError(f"{name} has its place elsewhere: {OURS[name]}")
            if name.replace("-", "_") in cls.model_fields:
                raise ValueError(f"{name} has a field of its own: {name.replace('-', '_')}:")
            if value is False:
                raise ValueError(f"{name}: false says nothing to sbatch; leave it out")
        return named


def load_site(path: Path | None) -> Site:
    """The profile in a file; of no file the one that asks for nothing. Raises ConfigError."""
    if path is None:
        return Site()
    try:
        text = path.read_text(encoding="utf-8")
        values, root = parse_yaml(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such cluster profile; slurm/cluster.example.yaml shows one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold `field: value` lines; slurm/cluster.example.yaml shows them")
    if values and (twice := repeated_key(root)):
        raise ConfigError(f"{path}: {twice}: is given twice; remove one")
    try:
        return Site.model_validate(values or {})
    except ValidationError as error:
        raise ConfigError("\n".join([f"{path}:", *(f"  {_describe(fault)}" for fault in error.errors())])) from None


def _describe(fault: dict) -> str:
    """One fault found by pydantic: field, value, rule."""
    names = [str(part) for part in fault["loc"]]
    field = ".".join(name for name in names if name not in {"str", "int", "float", "bool", "[key]"})
    known = list((Container if names[0] == "container" and len(names) > 1 else Site).model_fields)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        return f"{field}: unknown field; {hint}"
    if fault["type"] == "tuple_type":
        return f"{field} = {fault['input']!r}: must be a list, such as [{fault['input']}]"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{field} = {fault['input']!r}: {message[:1].lower()}{message[1:]}"
