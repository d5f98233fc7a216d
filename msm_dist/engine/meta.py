"""What meta.json of a checkpoint holds, and the rules that it is held to before anything is done with it.

In: the text of a meta.json whose digest is the one in `complete`. Out: its plain values. Fails with CheckpointError,
which names file, field, value and rule. No accident changes both files so that they agree: a checkpoint that breaks a
rule was edited, or saved by a faulty program. It is no damaged one, to be put aside for the one before: it is refused.

`Meta` is what all readers need; `RunMeta` what a start of any run does; `PretrainingMeta` that of pre-training. A field
is optional where earlier versions did not write it. Further fields are kept and not looked at: later versions add some.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from msm_dist.errors import CheckpointError
from msm_dist.plain import parse_json, shown

FORMAT = 1
LARGEST_STEP = 10**8 - 1
"""A folder's name has eight digits for it."""
LARGEST_COUNT = 2**53
"""Counts are summed over ranks as floating point."""
FAULTS_SHOWN = 3

FileName = Annotated[str, Field(pattern=r"^state-[0-9]{5,}-of-[0-9]{5,}\.safetensors$")]
Step = Annotated[int, Field(ge=0, le=LARGEST_STEP)]
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Deviation = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class File(_Strict):
    """A file of tensors as it was written."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class LossScale(_Strict):
    """The state of fp16's dynamic loss scale."""

    cur_scale: float = Field(gt=0)
    cur_iter: Count
    last_overflow_iter: int = Field(ge=-1, le=LARGEST_COUNT)
    cur_hysteresis: int = Field(ge=1, le=LARGEST_COUNT)


class Meta(_Strict):
    """What is needed to take the weights out."""

    format: int = Field(ge=FORMAT, le=FORMAT)
    step: Step
    """Updates done when it was saved."""
    files: dict[FileName, File] = Field(min_length=1)
    mean: float | None = None
    std: Deviation | None = None
    """Of log-mel, as the run normalised it; only in pre-training's."""
    corpus: list[dict[str, Any]] | None = None
    """What was trained on, for those who get the weights."""


class RunMeta(Meta):
    """What a start of any run reads: all of a fine-tuning run's."""

    optimizer_step: float = Field(ge=0)
    """Updates Adam has made: those of `step` that were not left out."""
    loss_scale: LossScale | None
    cursor: int = Field(ge=0)
    skipped_updates: list[int] = []
    """Steps whose updates were left out."""

    @field_validator("optimizer_step")
    @classmethod
    def _counts_updates(cls, value: float, info: ValidationInfo) -> float:
        step = info.data.get("step", LARGEST_STEP)
        if value > step or value % 1:
            raise ValueError(f"must be a whole number, and at most the {step} steps that were done")
        return value

    @field_validator("skipped_updates")
    @classmethod
    def _lists_steps(cls, value: list[int], info: ValidationInfo) -> list[int]:
        step = info.data.get("step", LARGEST_STEP)
        if value != sorted(set(value)) or not all(1 <= one <= step for one in value):
            raise ValueError(f"must be steps from 1 to {step}, each larger than the one before")
        return value


class PretrainingMeta(RunMeta):
    """What a start of pre-training reads."""

    bad_samples: Count
    missing_samples: Count = 0
    mean: float
    std: Deviation


def read_meta(text: bytes, path: Path, kind: type[Meta]) -> dict[str, Any]:
    """The values in the text of `path`, which is of that kind; what is optional may lack. Raises CheckpointError."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise _refusal(path, f"no JSON ({error})") from None
    written = values.get("format") if isinstance(values, dict) else FORMAT
    if type(written) is int and written != FORMAT:
        raise CheckpointError(
            f"{path.parent}: format {shown(written, 40)}, this version reads {FORMAT}; use the version that wrote it"
        )
    try:
        kind.model_validate(values)
    except ValidationError as error:
        faults = [_told(fault) for fault in error.errors(include_url=False)]
        more = len(faults) - FAULTS_SHOWN
        told = "; ".join(faults[:FAULTS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise _refusal(path, told) from None
    return values


def _told(fault: Any) -> str:
    """Field, value and rule of one fault found by pydantic."""
    parts = [part for part in fault["loc"] if part != "[key]"]
    field = ".".join(shown(part, 80)[1:-1] if isinstance(part, str) else str(part) for part in parts)
    if fault["type"] == "missing":
        return f"{field} is missing: must be there"
    if fault["type"] in ("model_type", "dict_type"):
        message = "must be an object of names and values"
    elif fault["type"] == "string_pattern_mismatch":
        message = f"must look like {fault['ctx']['pattern'].strip('^$')}"
    else:
        message = fault["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return f"{field or 'its content'} = {shown(fault['input'], 80)}: {message[:1].lower()}{message[1:]}"


def _refusal(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {fault}. Its digest in `complete` is true, so it was written like this: put the meta.json and the "
        f"complete back that the run saved, or move {path.parent} away to go on from the one before"
    )
