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

CLIPS, WIDTH = 3, 64


@jit
def store_at(tensor, place):
    tl.store(tensor + place, 1.0)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def attend(tokens: int, masked: bool) -> None:
    key_mask = torch.rand(CLIPS, tokens, device="cuda") > 0.3 if masked else None
    out = attention(leaf(CLIPS, tokens, 3 * WIDTH), 2, key_mask, "triton")
    out.backward(torch.randn_like(out))


def ends_of_the_model(patch: tuple[int, int], frames: int) -> None:
    num_patches = 80 // patch[0] * (frames // patch[1])
    num_keep, pixels = num_patches // 3, patch[0] * patch[1]

    spectrogram = torch.randn(CLIPS, 1, 80, frames, device="cuda")
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
        # Several sequences in a tile; a tail; a running softmax.
        for tokens, masked in ((17, False), (66, True), (130, False)):
            attend(tokens, masked)
        for patch, frames in (((16, 16), 80), ((80, 2), 20)):
            ends_of_the_model(patch, frames)
    torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
