"""Which implementation of an op runs: fused Triton kernels or the plain reference.

In: the caller's wish, "auto", "triton" or "reference", and the device of the tensors. Out: the one that
runs. Asking for one that can't run raises BackendUnavailable with the reason: nothing falls back silently.
"""

from typing import Literal

import torch

Backend = Literal["auto", "triton", "reference"]
Resolved = Literal["triton", "reference"]


class BackendUnavailable(RuntimeError):
    """The requested backend can't run here. The message says why and what can."""


def require(backend: Backend) -> None:
    """Check a wish before any tensor exists.

    Raises ValueError for an unknown name, BackendUnavailable for one that this version runs on no device.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend = {backend!r}: must be 'auto', 'triton' or 'reference'")
    if backend == "triton":
        raise BackendUnavailable(
            "backend = 'triton': this version has no Triton kernels yet; use 'auto' or 'reference'"
        )


def resolve(backend: Backend, device: torch.device) -> Resolved:
    """The implementation that runs on `device`; raises as `require` does.

    "auto" takes Triton on a GPU where its kernels exist, which is nowhere in this version.
    """
    require(backend)
    return "reference"
