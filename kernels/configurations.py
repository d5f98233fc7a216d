"""How kernels are launched: the committed table of measured block sizes and warps.

`configurations.json`, written by `python -m benchmarks.kernels --tune` on the GPU it names, holds
{capability: {"measured": {device, triton, commit, ...}, kernel: {shape class: {dtype: {field: value}}}}}.
A launcher asks with its own default, which serves every GPU that nobody has measured. Nothing is tuned at run
time: a restarted run must round as it did before.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from .backend import capability

TABLE = Path(__file__).with_name("configurations.json")

Configuration = TypeVar("Configuration", bound=NamedTuple)


def configuration(
    kernel: str, shape_class: str, dtype: torch.dtype, device: torch.device, default: Configuration
) -> Configuration:
    """The measured configuration of a kernel for this GPU, shape class and dtype, else `default`.

    A field that the entry leaves out is that of `default`; one that `default` doesn't have raises ValueError.
    """
    fields = table().get(capability(device), {}).get(kernel, {}).get(shape_class, {}).get(_name(dtype), {})
    if unknown := fields.keys() - set(default._fields):
        place = f"{TABLE.name}: {capability(device)}: {kernel}: {shape_class}: {_name(dtype)}"
        raise ValueError(f"{place}: unknown {', '.join(sorted(unknown))}: fields are {', '.join(default._fields)}")
    return default._replace(**fields)


@cache
def table() -> dict:
    """The committed table."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
