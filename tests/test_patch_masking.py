import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_kernels import reference
from msm_kernels.attention import attention
from msm_kernels.patch_masking import (
    embed_visible_patches,
    masking_from_keep,
    random_masking,
    restore_tokens,
    select_masked_tokens,
)

# Known-answer vectors of Random123 for philox4x32-10: counter words, key words, output words.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_of_integers(key, counter):
    """Philox4x32-10 in Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def kept_patches(seed, epoch, clip, crop, num_patches, num_keep):
    """The documented rule, patch by patch."""
    key = (seed % 2**32, seed >> 32)
    words = [
        philox_of_integers(key, (p // 4, crop + (1 << 24), clip % 2**32, epoch))[p % 4] for p in range(num_patches)
    ]
    return sorted(sorted(range(num_patches), key=lambda p: (words[p], p))[:num_keep])


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    output = reference.philox(key[0] | key[1] << 32, *(torch.tensor([word]) for word in counter))
    assert [int(word) for word in output] == words == list(philox_of_integers(key, counter))


def test_philox_equals_triton():
    pytest.importorskip("triton")
    program = """
import torch, triton, triton.language as tl
from msm_kernels.reference import philox

@triton.jit
def draw(out, seed, c1, c2, c3, n: tl.constexpr):
    c0 = tl.arange(0, n).to(tl.uint32)
    words = tl.philox(seed, c0, *[(c0 * 0 + c).to(tl.uint32) for c in (c1, c2, c3)])
    for i in tl.static_range(4):
        tl.store(out + tl.arange(0, n) * 4 + i, words[i].to(tl.int64))

seed, c1, c2, c3 = 0x123456789ABCDEF0, (1 << 24) + 5, 0xFEDCBA98, 77
out = torch.zeros(16, 4, dtype=torch.int64)
draw[(1,)](out, seed, c1, c2, c3, 16)
ours = philox(seed, torch.arange(16), *(torch.full((16,), c) for c in (c1, c2, c3)))
assert torch.equal(out, torch.stack(ours, 1)), (out, ours)
"""
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "seed, sample, num_patches, num_keep",
    [(0, (0, 0, 0), 65, 16), (2**63 - 1, (3, 2_000_000, 2), 190, 57), (2**40 + 9, (1, 2**33 + 7, 5), 6, 1)],
)
def test_kept_patches_follow_the_documented_rule(seed, sample, num_patches, num_keep):
    masking = random_masking(seed, torch.tensor([sample]), num_patches, num_keep)
    assert masking.ids_keep[0].tolist() == kept_patches(seed, *sample, num_patches, num_keep)


def test_masks_do_not_drift_between_versions():
    ids = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert random_masking(42, ids, 20, 5).ids_keep.tolist() == [
        [1, 3, 6, 7, 17],
        [2, 6, 7, 10, 16],
        [1, 4, 8, 11, 16],
        [3, 4, 12, 15, 19],
    ]


@settings(max_examples=50)
@given(data=st.data(), num_patches=st.integers(2, 200), seed=st.integers(0, 2**64 - 1))
def test_masking_is_a_partition_in_ascending_order(data, num_patches, seed):
    num_keep = data.draw(st.integers(1, num_patches - 1))
    ids = torch.tensor([[0, 5, 1], [7, 2**40, 0]])
    keep, masked, restore = random_masking(seed, ids, num_patches, num_keep)
    assert keep.shape == (2, num_keep)
    assert masked.shape == (2, num_patches - num_keep)
    assert (keep.diff(dim=1) > 0).all()
    assert (masked.diff(dim=1) > 0).all()
    concat = torch.cat([keep, masked], dim=1)
    assert torch.equal(concat.gather(1, restore), torch.arange(num_patches).expand(2, -1))


def test_a_mask_depends_on_its_sample_alone_and_on_all_of_it():
    ids = torch.tensor([[2, 3, 1], [3, 3, 1], [2, 4, 1], [2, 3, 2], [2, 3 + 2**16, 1]])
    kept = random_masking(7, ids, 65, 16).ids_keep
    assert torch.equal(kept[3:4], random_masking(7, ids[3:4], 65, 16).ids_keep)
    rows = [*kept.tolist(), random_masking(8, ids[:1], 65, 16).ids_keep[0].tolist()]
    rows.append(random_masking(7 + 2**32, ids[:1], 65, 16).ids_keep[0].tolist())
    assert len({tuple(row) for row in rows}) == len(rows)


def test_every_patch_is_kept_equally_often():
    ids = torch.stack([torch.zeros(20000).long(), torch.arange(20000), torch.zeros(20000).long()], dim=1)
    kept = random_masking(1, ids, 65, 16).ids_keep
    share = torch.bincount(kept.flatten(), minlength=65) / len(ids)
    deviation = (16 / 65 * 49 / 65 / len(ids)) ** 0.5
    assert ((share - 16 / 65).abs() < 4 * deviation).all()


def test_ties_go_to_the_lower_index(monkeypatch):
    monkeypatch.setattr(reference, "philox", lambda seed, *words: tuple(torch.zeros(2, 5) for _ in range(4)))
    assert random_masking(0, torch.zeros(2, 3).long(), 20, 3).ids_keep.tolist() == [[0, 1, 2]] * 2


def test_masking_from_keep_completes_any_order():
    keep, masked, restore = masking_from_keep(torch.tensor([[4, 0], [1, 2]]), 5)
    assert keep.tolist() == [[0, 4], [1, 2]]
    assert masked.tolist() == [[1, 2, 3], [0, 3, 4]]
    assert restore.tolist() == [[0, 2, 3, 4, 1], [2, 0, 1, 3, 4]]


@pytest.fixture
def example():
    """Clips of 2 x 3 patches of 4 x 2, two of six visible, width 5, float64."""
    generator = torch.Generator().manual_seed(0)
    spectrogram = torch.randn(3, 1, 8, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    positions = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return spectrogram, masking_from_keep(torch.tensor([[0, 4], [2, 3], [1, 5]]), 6), weight, bias, positions


def test_visible_patches_are_projected_and_placed(example):
    spectrogram, masking, weight, bias, positions = example
    tokens = embed_visible_patches(*example, patch_size=(4, 2))
    for clip, kept in enumerate(masking.ids_keep.tolist()):
        for place, patch in enumerate(kept):
            row, column = divmod(patch, 3)  # frequency-major
            pixels = spectrogram[clip, 0, 4 * row : 4 * row + 4, 2 * column : 2 * column + 2].reshape(-1)
            expected = weight @ pixels + bias + positions[patch]
            torch.testing.assert_close(tokens[clip, place], expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_embedding_are_right(example):
    spectrogram, masking, *rest = example
    leaves = [leaf.requires_grad_() for leaf in (spectrogram, *rest)]
    assert torch.autograd.gradcheck(lambda x, *rest: embed_visible_patches(x, masking, *rest, (4, 2)), leaves)


def test_masked_patches_are_never_read(example):
    spectrogram, masking, *rest = example
    hidden = torch.ones_like(spectrogram, dtype=torch.bool)
    for clip, kept in enumerate(masking.ids_keep.tolist()):
        for patch in kept:
            row, column = divmod(patch, 3)
            hidden[clip, 0, 4 * row : 4 * row + 4, 2 * column : 2 * column + 2] = False
    poisoned = spectrogram.masked_fill(hidden, float("nan"))
    assert torch.equal(
        embed_visible_patches(poisoned, masking, *rest, (4, 2)),
        embed_visible_patches(spectrogram, masking, *rest, (4, 2)),
    )


def test_embedding_in_bfloat16_rounds_once(example):
    spectrogram, masking, weight, bias, positions = example
    low = weight.bfloat16(), bias.bfloat16()
    tokens = embed_visible_patches(spectrogram.float(), masking, *low, positions.float(), (4, 2))
    exact = embed_visible_patches(spectrogram.float(), masking, *(x.float() for x in low), positions.float(), (4, 2))
    assert tokens.dtype == torch.bfloat16
    assert torch.equal(tokens, exact.bfloat16())


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_every_token_returns_to_its_place(num_prefix):
    masking = masking_from_keep(torch.tensor([[0, 3], [2, 4]]), 5)
    tokens = torch.arange(2 * (num_prefix + 2) * 3, dtype=torch.float64).reshape(2, -1, 3) + 100
    mask_token = torch.full((1, 1, 3), -1.0, dtype=torch.float64)
    positions = torch.arange((num_prefix + 5) * 3, dtype=torch.float64).reshape(-1, 3) / 1000
    restored = restore_tokens(tokens, masking, mask_token, positions, num_prefix) - positions
    expected = torch.full((2, num_prefix + 5, 3), -1.0, dtype=torch.float64)
    expected[:, :num_prefix] = tokens[:, :num_prefix]
    for clip, kept in enumerate(masking.ids_keep.tolist()):
        for place, patch in enumerate(kept):
            expected[clip, num_prefix + patch] = tokens[clip, num_prefix + place]
    torch.testing.assert_close(restored, expected)


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_gradients_of_restoring_and_selecting_are_right(num_prefix):
    generator = torch.Generator().manual_seed(0)
    masking = masking_from_keep(torch.tensor([[0, 3], [2, 4]]), 5)
    shapes = (2, num_prefix + 2, 3), (1, 1, 3), (num_prefix + 5, 3), (2, num_prefix + 5, 3)
    *leaves, rows = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(lambda x, *rest: restore_tokens(x, masking, *rest, num_prefix), leaves)
    assert torch.autograd.gradcheck(lambda x: select_masked_tokens(x, masking, num_prefix), rows)


def test_restored_positions_are_added_before_rounding():
    masking = masking_from_keep(torch.tensor([[1]]), 2)
    tokens, mask_token = torch.full((1, 1, 1), 1.0).bfloat16(), torch.full((1, 1, 1), 3.0).bfloat16()
    positions = torch.full((2, 1), 2**-8 * (1 + 2**-10))  # above half a bfloat16 step at 1; in bfloat16 a tie
    restored = restore_tokens(tokens, masking, mask_token, positions, 0)
    assert restored.dtype == torch.bfloat16
    assert restored[0, 1].item() == 1 + 2**-7
    assert restored[0, 0].item() == 3.0


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_masked_tokens_are_selected_in_their_order(num_prefix):
    masking = masking_from_keep(torch.tensor([[0, 3], [2, 4]]), 5)
    tokens = torch.arange(2 * (num_prefix + 5) * 3, dtype=torch.float64).reshape(2, -1, 3).requires_grad_()
    selected = select_masked_tokens(tokens, masking, num_prefix)
    rows = [[1, 2, 4], [0, 1, 3]]
    for clip, places in enumerate(rows):
        assert torch.equal(selected[clip], tokens[clip, [num_prefix + place for place in places]])
    (gradient,) = torch.autograd.grad(selected.sum(), tokens)
    expected = torch.zeros_like(tokens)
    for clip, places in enumerate(rows):
        expected[clip, [num_prefix + place for place in places]] = 1
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "64 bits"),
        ({"sample_ids": torch.zeros(2, 3)}, "torch.float32"),
        ({"sample_ids": torch.zeros(2, 2).long()}, "one row of"),
        ({"num_keep": 0}, "at least one must be visible"),
        ({"num_keep": 65}, "num_keep = 65 of 65"),
    ],
)
def test_impossible_masks_are_refused(change, message):
    arguments = {"seed": 0, "sample_ids": torch.zeros(2, 3).long(), "num_patches": 65, "num_keep": 16}
    with pytest.raises(ValueError, match=message):
        random_masking(**(arguments | change))


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.zeros(3, 8, 6), "spectrogram is"),
        (0, torch.zeros(3, 1, 8, 7), "8 bands x 7 frames"),
        (0, torch.zeros(2, 1, 8, 6), "ids_restore is"),
        (2, torch.zeros(5, 1, 4, 2), "weight is"),
        (3, torch.zeros(4), "bias is"),
        (4, torch.zeros(7, 5), "positions is"),
    ],
)
def test_embedding_refuses_shapes_that_disagree(example, place, value, message):
    arguments = list(example)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        embed_visible_patches(*arguments, patch_size=(4, 2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": torch.zeros(1, 2, 4)}, "tokens is"),
        ({"mask_token": torch.zeros(4)}, "mask_token is"),
        ({"positions": torch.zeros(3, 4)}, "positions is"),
    ],
)
def test_restoring_refuses_shapes_that_disagree(change, message):
    masking = masking_from_keep(torch.tensor([[0, 2]]), 3)
    arguments = {"tokens": torch.zeros(1, 3, 4), "mask_token": torch.zeros(1, 1, 4)}
    arguments |= {"positions": torch.zeros(4, 4), "masking": masking, "num_prefix": 1}
    with pytest.raises(ValueError, match=message):
        restore_tokens(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": torch.zeros(1, 3, 4)}, r"tokens is \[1, 3, 4\]: must be \[1, 4, 4\]"),
        ({"tokens": torch.zeros(4, 4)}, "tokens is"),
        ({"num_prefix": 0}, "tokens is"),
        ({"masking": reference.Masking(*(torch.zeros(1, size).long() for size in (2, 2, 3)))}, "ids_masked is"),
    ],
)
def test_selecting_refuses_shapes_that_disagree(change, message):
    arguments = {"tokens": torch.zeros(1, 4, 4), "num_prefix": 1}
    arguments |= {"masking": masking_from_keep(torch.tensor([[0, 2]]), 3)}
    with pytest.raises(ValueError, match=message):
        select_masked_tokens(**(arguments | change))


MASKING = masking_from_keep(torch.tensor([[0, 2]]), 3)


@pytest.mark.parametrize(
    "masking, message",
    [
        (MASKING._replace(ids_keep=MASKING.ids_keep.float()), "masking.ids_keep is torch.float32"),
        (MASKING._replace(ids_restore=MASKING.ids_restore.int()), "masking.ids_restore is torch.int32"),
        (MASKING._replace(ids_masked=MASKING.ids_masked[:, :0]), "masking.ids_masked is"),
        (MASKING._replace(ids_masked=MASKING.ids_masked.to("meta")), "ids_masked is on meta"),
    ],
)
def test_a_masking_that_no_kernel_can_follow_is_refused(masking, message):
    restoring = (torch.zeros(1, 2, 4), masking, torch.zeros(1, 1, 4), torch.zeros(3, 4), 0)
    embedding = (torch.zeros(1, 1, 2, 6), masking, torch.zeros(4, 4), torch.zeros(4), torch.zeros(3, 4), (2, 2))
    for call in (
        lambda: restore_tokens(*restoring),
        lambda: select_masked_tokens(torch.zeros(1, 3, 4), masking, 0),
        lambda: embed_visible_patches(*embedding),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_negative_prefix_is_refused():
    with pytest.raises(ValueError, match="num_prefix = -1"):
        restore_tokens(torch.zeros(1, 1, 4), MASKING, torch.zeros(1, 1, 4), torch.zeros(2, 4), -1)
    with pytest.raises(ValueError, match="num_prefix = -1"):
        select_masked_tokens(torch.zeros(1, 2, 4), MASKING, -1)


def test_integers_are_no_tokens():
    with pytest.raises(ValueError, match="tokens is torch.int64"):
        select_masked_tokens(torch.zeros(1, 3, 4).long(), MASKING, 0)
    with pytest.raises(ValueError, match="qkv is torch.int64"):
        attention(torch.zeros(1, 3, 6).long(), 2)


@pytest.mark.parametrize("patch_size", [(0, 2), (2, -1)])
def test_a_patch_without_pixels_is_refused(patch_size):
    spectrogram, weights = torch.zeros(1, 1, 2, 6), (torch.zeros(4, 4), torch.zeros(4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="must be 1 or more bands and frames"):
        embed_visible_patches(spectrogram, MASKING, *weights, patch_size)
