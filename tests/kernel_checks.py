"""What the tests of the Triton kernels share: where they run, how results are compared.

With a GPU the kernels are compiled and run there; without one they run in Triton's interpreter on the CPU, which
conftest.py switches on. The interpreter's `tl.dot` is garbage on bfloat16: DOT_DTYPES leaves it out there.
"""

import pytest
import torch
from torch import Tensor

from msm_kernels.patch_masking import Masking, masking_from_keep

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MARKS = [pytest.mark.gpu] if ON_GPU else []
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOT_DTYPES = DTYPES if ON_GPU else [torch.float32, torch.float16]

# Every patch shape of the recipe and one of odd sizes: (patch, bands, frames, visible).
PATCHES = [
    ((16, 16), 80, 48, 4),
    ((16, 8), 32, 40, 3),
    ((16, 4), 32, 36, 5),
    ((8, 16), 24, 80, 4),
    ((8, 8), 24, 40, 7),
    ((80, 4), 80, 28, 2),
    ((80, 2), 80, 22, 3),
    ((80, 1), 80, 17, 4),
    ((3, 5), 9, 35, 6),
]
BATCH = 3  # times the masked patches of PATCHES, never a multiple of a program's rows


def name_of(shape) -> str:
    """A row of PATCHES as the name of a test's case."""
    return "{}x{}".format(*shape[0])


def masking_of(num_patches: int, num_keep: int, batch: int = BATCH) -> Masking:
    """Random masks, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(num_patches, generator=generator) for _ in range(batch)])
    return masking_from_keep(order[:, :num_keep].to(DEVICE), num_patches)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """||value - exact|| / ||exact|| in float64; infinite where a value is not finite."""
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    assert value.shape == exact.shape
    if not value.isfinite().all():
        return float("inf")
    return ((value - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def poison_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin hand out with NaN (integers: their lowest value), so that an element no
    kernel writes shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make):
    def poisoned(*args, **kwargs) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "meta":
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

    return poisoned
