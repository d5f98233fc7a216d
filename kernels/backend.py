"""Which implementation of an op runs: fused Triton kernels or the plain reference.

In: the caller's wish, "auto", "triton" or "reference", and the device and dtype of the tensors. Out: the one
that runs. Asking for one that can't run raises BackendUnavailable with the reason: nothing falls back silently.

Triton's names come from here, so that the package imports where Triton is not installed. With
TRITON_INTERPRET=1 in the environment its kernels run on a CPU, in a slow interpreter made for tests.
"""

from functools import cache
from typing import Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "Backend",
    "BackendUnavailable",
    "capability",
    "describe",
    "dot_precision",
    "jit",
    "launch",
    "require",
    "resolve",
    "tl",
    "triton",
]

Backend = Literal["auto", "triton", "reference"]
Resolved = Literal["triton", "reference"]

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, as the environment said when this module was imported."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels compute on, always with float32 accumulators; float64 is the reference's."""
OLDEST_NVIDIA = (8, 0)


class BackendUnavailable(RuntimeError):
    """The requested backend can't run here. The message says why and what can."""


def jit(function=None, **options):
    """`triton.jit`, or the bare function where Triton is not installed (it is then never called)."""
    if function is None:
        return lambda decorated: jit(decorated, **options)
    return function if triton is None else triton.jit(function, **options)


def launch(kernel, num_programs: int, tensor: torch.Tensor, *arguments, **options) -> None:
    """Start a kernel on the device of `tensor`, its first argument, over a one-dimensional grid; none for none.

    Multiplication and addition fuse, said here because Triton's own default differs between its versions.
    """
    if num_programs == 0:
        return
    with torch.cuda.device_of(tensor):
        kernel[(num_programs,)](tensor, *arguments, enable_fp_fusion=True, **options)


def dot_precision(tensor: torch.Tensor) -> str:
    """How `tl.dot` multiplies operands of this tensor's dtype on its device; it matters for float32 alone.

    Three tf32 products make up a float32 one to about 2**-21 on NVIDIA's tensor cores; exact products there spill
    registers heavily (kernels/README.md). Triton's own default, one tf32 product, is good to 2**-11 only.
    """
    return "tf32x3" if tensor.dtype == torch.float32 and capability(tensor.device)[0].isdigit() else "ieee"


def require(backend: Backend) -> None:
    """Check a wish before any tensor exists.

    Raises ValueError for an unknown name, BackendUnavailable for one that this machine can't run: on its GPU or,
    without one, on the CPU.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend = {backend!r}: must be 'auto', 'triton' or 'reference'")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "triton" and (reason := _why_not_triton(here, None)):
        raise BackendUnavailable(f"backend = 'triton': {reason}; use 'auto' or 'reference'")


def resolve(backend: Backend, device: torch.device, dtype: torch.dtype | None = None) -> Resolved:
    """The implementation that runs on tensors of this device and dtype (none: any that kernels take).

    "auto" takes Triton on a GPU that it can compile for and the reference elsewhere. Raises ValueError for an
    unknown name, BackendUnavailable for "triton" where it can't run.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend = {backend!r}: must be 'auto', 'triton' or 'reference'")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return "reference"
    reason = _why_not_triton(device.type, device.index, dtype)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise BackendUnavailable(f"backend = 'triton': {reason}; use 'auto' or 'reference'")
    return "reference"


def describe(backend: Backend, device: torch.device) -> str:
    """One phrase for the log: what `resolve` gives on `device` and, where "auto" passed Triton over, why."""
    if resolve(backend, device) == "triton":
        return f"Triton {triton.__version__} kernels{' (interpreted)' if INTERPRETED else ''}"
    if backend == "auto" and device.type == "cuda":
        return f"reference kernels ({_why_not_triton('cuda', device.index)})"
    return "reference kernels"


@cache
def capability(device: torch.device) -> str:
    """The compute capability of a GPU as the configuration table writes it: "9.0", "gfx942"; "cpu" for a CPU."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _why_not_triton(device_type: str, index: int | None, dtype: torch.dtype | None = None) -> str | None:
    """What keeps Triton from running there; none if nothing does."""
    if triton is None:
        return "Triton is not installed"
    if dtype is not None and dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if INTERPRETED:
        return None
    if device_type != "cuda":
        return f"Triton compiles for GPUs and the tensors are on {device_type}"
    return _too_old(index)


@torch.compiler.assume_constant_result
def _too_old(index: int | None) -> str | None:
    """The same in every call: torch.compile need not look inside."""
    return _asked_once_too_old(index)


@cache
def _asked_once_too_old(index: int | None) -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability(index) >= OLDEST_NVIDIA:
        return None
    return "the GPU has compute capability {}.{}; the kernels need 8.0".format(*torch.cuda.get_device_capability(index))
