"""Every Triton op once, forward and backward, on a GPU: what compute-sanitizer watches in tests/test_gpu.py.

`python -m tests.every_op`. With the argument `planted` a kernel stores far past the end of its tensor: a sanitizer that
does not report that does not work on this machine.
"""

import sys

import torch

from msm_kernels.attention import attention
from msm_kernels.backend import jit, launch, tl
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import embed_visible_patches, random_masking, restore_tokens, select_masked_tokens

CLIPS, HEADS, WIDTH = 3, 2, 64


@jit
def store_at(tensor, place):
    tl.store(tensor + place, 1.0)


# (tokens, width of a head, dtype, key mask): several sequences in a tile, one with a tail in tokens or in width, and
# tiles with a running softmax, which float32 reaches first.
SEQUENCES = (
    (5, 32, torch.bfloat16, True),
    (17, 32, torch.bfloat16, False),
    (17, 80, torch.bfloat16, False),
    (66, 32, torch.bfloat16, True),
    (66, 64, torch.bfloat16, True),
    (130, 32, torch.bfloat16, False),
    (130, 80, torch.bfloat16, False),
    (40, 64, torch.float32, True),
)
# (patch, bands, frames)
ENDS = (((16, 16), 80, 80), ((80, 2), 80, 20), ((3, 5), 9, 35))


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


def attend(tokens: int, head_dim: int, dtype: torch.dtype, masked: bool) -> None:
    key_mask = torch.rand(CLIPS, tokens, device="cuda") > 0.3 if masked else None
    out = attention(leaf(CLIPS, tokens, 3 * HEADS * head_dim, dtype=dtype), HEADS, key_mask, "triton")
    out.backward(torch.randn_like(out))


def ends_of_the_model(patch: tuple[int, int], bands: int, frames: int) -> None:
    num_patches = bands // patch[0] * (frames // patch[1])
    num_keep, pixels = num_patches // 3, patch[0] * patch[1]

    spectrogram = torch.randn(CLIPS, 1, bands, frames, device="cuda")
    sample_ids = torch.arange(3 * CLIPS, device="cuda").view(CLIPS, 3)
    masking = random_masking(1, sample_ids, num_patches, num_keep, "triton")
    positions = torch.randn(1 + num_patches, WIDTH, device="cuda")
    weight, bias = leaf(WIDTH, pixels), leaf(WIDTH)
    embedded = embed_visible_patches(spectrogram, masking, weight, bias, positions[1:], patch, "triton")
    restored = restore_tokens(leaf(CLIPS, 1 + num_keep, WIDTH), masking, leaf(1, 1, WIDTH), positions, 1, "triton")
    selected = select_masked_tokens(leaf(CLIPS, 1 + num_patches, WIDTH), masking, 1, "triton")
    for out in (embedded, restored, selected):
        out.backward(torch.randn_like(out))
    prediction = leaf(CLIPS, num_patches - num_keep, pixels)
    for normalize in (False, True):
        masked_patch_loss(prediction, spectrogram, masking, patch, normalize, "triton").backward()


def main() -> None:
    if "planted" in sys.argv[1:]:
        launch(store_at, 1, torch.zeros(4, device="cuda"), 2**22)
    else:
        for sequences in SEQUENCES:
            attend(*sequences)
        for ends in ENDS:
            ends_of_the_model(*ends)
    torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
