"""The kernels of masking, embedding, restoring and selecting patches against the reference."""

# Marked pytest.mark.gpu where there is one: see MARKS.
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msm_kernels import chunked_sums, patch_drawing, patch_embedding, patch_rows, reference
from msm_kernels.backend import BackendUnavailable, jit, tl
from msm_kernels.patch_drawing import MaskConfig, smallest
from msm_kernels.patch_embedding import EmbedConfig
from msm_kernels.patch_masking import (
    Masking,
    embed_visible_patches,
    random_masking,
    restore_tokens,
    select_masked_tokens,
)
from msm_kernels.patch_rows import RowsConfig
from tests.kernel_checks import (
    BATCH,
    DEVICE,
    DOT_DTYPES,
    DTYPES,
    MARKS,
    ON_GPU,
    PATCHES,
    draw,
    masking_of,
    name_of,
    poison_new_tensors,
    relative_error,
)

pytestmark = MARKS

# And patches of two pixels.
SHAPES = [*PATCHES, ((2, 1), 4, 7, 1)]

# Error by norm against float64: (dtype of weight and tokens, values, gradients, reason).
EMBED_TOLERANCES = {
    torch.float32: (1e-6, 1e-6, "float32 sums of 15 to 320 products"),
    torch.float16: (5e-4, 5e-4, "pixels, then the sum, rounded to 11 bits"),
    torch.bfloat16: (4e-3, 4e-3, "pixels, then the sum, rounded to 8 bits"),
}
RESTORE_TOLERANCES = {
    torch.float32: (1e-7, 1e-6, "one addition; a float32 sum of rows"),
    torch.float16: (5e-4, 5e-4, "rounded once to 11 bits"),
    torch.bfloat16: (3e-3 if ON_GPU else 6e-3, 3e-3 if ON_GPU else 6e-3, "rounded once, by the interpreter to zero"),
}


def embedding(shape, dtype=torch.float32, width=40, num_keep=None):
    """Spectrogram, weight, bias and positions that want gradients; masking."""
    (ph, pw), bands, frames, visible = shape
    num_patches = (bands // ph) * (frames // pw)
    leaves = (
        draw(BATCH, 1, bands, frames, seed=1),
        draw(width, ph * pw, seed=2, dtype=dtype) / (ph * pw) ** 0.5,
        draw(width, seed=3, dtype=dtype),
        draw(num_patches, width, seed=4),
    )
    return tuple(leaf.requires_grad_() for leaf in leaves), masking_of(num_patches, num_keep or visible)


def run_embedding(leaves, masking, patch_size, backend):
    spectrogram, weight, bias, positions = leaves
    return embed_visible_patches(spectrogram, masking, weight, bias, positions, patch_size, backend)


def restoring(dtype=torch.float32, num_prefix=1, width=40, num_patches=13, num_keep=5, batch=BATCH):
    """Tokens, mask token and positions that want gradients; masking."""
    leaves = (
        draw(batch, num_prefix + num_keep, width, seed=5, dtype=dtype),
        draw(1, 1, width, seed=6, dtype=dtype),
        draw(num_prefix + num_patches, width, seed=7),
    )
    return tuple(leaf.requires_grad_() for leaf in leaves), masking_of(num_patches, num_keep, batch)


def run_restoring(leaves, masking, num_prefix, backend):
    tokens, mask_token, positions = leaves
    return restore_tokens(tokens, masking, mask_token, positions, num_prefix, backend)


def with_gradients(run, leaves, masking, setting, backend="triton", exact=False):
    """The value of an op and the gradients of all its leaves, for a gradient drawn for the value."""
    dtype = leaves[1].dtype
    if exact:
        leaves, backend = tuple(leaf.detach().double().requires_grad_() for leaf in leaves), "reference"
    value = run(leaves, masking, setting, backend)
    d_value = draw(*value.shape, seed=8, dtype=dtype).to(value.dtype)
    return value, *torch.autograd.grad(value, leaves, d_value)


def assert_equal(one, other):
    assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


# --- random_masking


@settings(max_examples=25)
@given(data=st.data(), num_patches=st.integers(2, 140), seed=st.integers(0, 2**64 - 1))
def test_masks_are_the_references_bit_by_bit(data, num_patches, seed):
    num_keep = data.draw(st.integers(1, num_patches - 1))
    row = st.tuples(st.integers(0, 2**33), st.integers(0, 2**62), st.integers(0, 2**24 - 1))
    ids = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)), device=DEVICE)
    found = random_masking(seed, ids, num_patches, num_keep, "triton")
    assert {part.dtype for part in found} == {torch.int64}
    assert_equal(found, random_masking(seed, ids, num_patches, num_keep, "reference"))


@pytest.mark.parametrize(
    "seed, num_patches, num_keep",
    [(2**64 - 1, 65, 16), (1, 65, 64), (2**31, 190, 57), (2**63 + 2**31, 513, 1), (2**32 - 1, 2048, 512)],
)
@pytest.mark.parametrize("num_warps", [1, 4])
def test_masks_of_any_length_and_seed_are_the_references(monkeypatch, seed, num_patches, num_keep, num_warps):
    ids = torch.tensor([[0, 0, 0], [3, 2**32 + 9, 2**24 - 1], [2**32 + 1, 2**40, 5]], device=DEVICE)
    expected = random_masking(seed, ids, num_patches, num_keep, "reference")
    poison_new_tensors(monkeypatch)
    strided = torch.stack([ids, ids + 1], dim=-1)[..., 0]
    assert_equal(random_masking(seed, strided, num_patches, num_keep, "triton"), expected)
    config = MaskConfig(num_warps)
    assert_equal(patch_drawing.launch_random_masking(seed, ids, num_patches, num_keep, config), expected)


@jit(do_not_specialize=["num_keys", "num_keep"])
def smallest_kernel(keys, kept, num_keys, num_keep, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < num_keys
    values = tl.load(keys + row * num_keys + place, mask=inside, other=0xFFFFFFFF).to(tl.uint32)
    tl.store(kept + row * BLOCK + place, smallest(values, num_keep).to(tl.int32))


@pytest.mark.parametrize("num_keep", [1, 2, 7, 20, 36])
@pytest.mark.parametrize(
    "values",
    [[0], [2**32 - 1], [0, 2**32 - 1], [5, 2**31, 2**31 - 1, 2**31 + 1], [7, 8, 9]],
    ids=["zeros", "largest", "ends", "signs", "near"],
)
def test_of_equal_keys_the_first_are_kept(values, num_keep):
    generator = torch.Generator().manual_seed(num_keep)
    keys = torch.tensor(values)[torch.randint(len(values), (4, 37), generator=generator)].to(DEVICE)
    kept = torch.empty(4, 64, dtype=torch.int32, device=DEVICE)
    smallest_kernel[(4,)](keys, kept, 37, num_keep, BLOCK=64)
    expected = torch.zeros_like(kept).scatter(1, keys.argsort(dim=1, stable=True)[:, :num_keep], 1)
    assert torch.equal(kept, expected)  # the padding, as large as the largest key, is never kept


def test_words_of_a_seed_fit_signed_32_bits():
    words = [0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1]
    signed = [patch_drawing._signed(word) for word in words]
    assert [word % 2**32 for word in signed] == words
    # Triton takes these, and no others, for 32 bits: test_aot_seeds.py finds one kernel for all of them.
    assert all(-(2**31) <= word < 2**31 for word in signed)


# --- embed_visible_patches


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_embedding_and_its_gradients_are_the_references(monkeypatch, shape, dtype):
    leaves, masking = embedding(shape, dtype)
    expected = with_gradients(run_embedding, leaves, masking, shape[0], exact=True)
    poison_new_tensors(monkeypatch)
    found = with_gradients(run_embedding, leaves, masking, shape[0])
    assert [one.dtype for one in found] == [dtype, torch.float32, dtype, dtype, torch.float32]
    tolerance, gradient_tolerance, reason = EMBED_TOLERANCES[dtype]
    tokens, d_spectrogram, d_weight, d_bias, d_positions = map(relative_error, found, expected)
    assert tokens < tolerance, reason
    assert max(d_weight, d_bias) < gradient_tolerance, reason
    assert max(d_spectrogram, d_positions) < 1e-6  # plain torch, float32


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[7]], ids=name_of)
def test_all_patches_may_be_visible(shape):
    (ph, pw), bands, frames, _ = shape
    leaves, masking = embedding(shape, num_keep=(bands // ph) * (frames // pw))
    assert masking.ids_masked.shape == (BATCH, 0)
    found = with_gradients(run_embedding, leaves, masking, shape[0])
    expected = with_gradients(run_embedding, leaves, masking, shape[0], exact=True)
    assert max(map(relative_error, found, expected)) < 1e-6


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("spectrogram_dtype", [torch.float16, torch.bfloat16])
def test_spectrograms_of_16_bits_are_read_as_they_are(dtype, spectrogram_dtype):
    (spectrogram, *rest), masking = embedding(SHAPES[0], dtype)
    leaves = (spectrogram.detach().to(spectrogram_dtype).requires_grad_(), *rest)
    found = with_gradients(run_embedding, leaves, masking, (16, 16))
    expected = with_gradients(run_embedding, leaves, masking, (16, 16), exact=True)
    assert found[1].dtype == spectrogram_dtype
    assert max(map(relative_error, found, expected)) < 4e-3


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[7], SHAPES[8]], ids=name_of)
@pytest.mark.parametrize(
    "config, programs",
    [
        (EmbedConfig(16, 16, 16, 4, 2), 1),  # steps along the pixels, fewer rows than clips have; whole tokens
        (EmbedConfig(16, 16, 64, 4, 2), 2),  # holds patches, with or without a tail, or steps; parts of tokens
        (EmbedConfig(32, 32, 256, 4, 1), 1),  # one block for everything
    ],
)
def test_every_tile_gives_the_same_embedding(monkeypatch, shape, config, programs):
    leaves, masking = embedding(shape, width=72)
    spectrogram, weight, bias, positions = (leaf.detach() for leaf in leaves)
    monkeypatch.setattr(patch_embedding, "MANY_PROGRAMS", programs)
    tokens, _, d_weight, d_bias, _ = with_gradients(run_embedding, leaves, masking, shape[0], exact=True)
    ids = masking.ids_keep
    found = patch_embedding.launch_embed_forward(spectrogram, ids, weight, bias, positions, shape[0], config)
    assert relative_error(found, tokens) < 1e-6
    d_tokens = draw(*tokens.shape, seed=8)
    found = patch_embedding.launch_embed_backward(d_tokens, spectrogram, ids, shape[0], torch.float32, config)
    assert max(map(relative_error, found, (d_weight, d_bias))) < 1e-6


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[8]], ids=name_of)
def test_masked_pixels_are_never_read(shape):
    (ph, pw), bands, frames, _ = shape
    leaves, masking = embedding(shape)
    patches = reference.patchify(leaves[0].detach(), (ph, pw))
    visible = masking.ids_keep.unsqueeze(-1).expand(-1, -1, ph * pw)
    poisoned = torch.full_like(patches, float("nan")).scatter(1, visible, patches.gather(1, visible))
    poisoned = poisoned.view(BATCH, bands // ph, frames // pw, ph, pw).transpose(2, 3).reshape(leaves[0].shape)
    assert poisoned.isnan().any()
    clean = with_gradients(run_embedding, leaves, masking, (ph, pw))
    dirty = with_gradients(run_embedding, (poisoned.requires_grad_(), *leaves[1:]), masking, (ph, pw))
    assert_equal(clean, dirty)


def test_strided_operands_of_the_embedding_are_taken_as_they_come():
    leaves, masking = embedding(SHAPES[1])
    expected = with_gradients(run_embedding, leaves, masking, (16, 8), exact=True)
    strided = tuple(torch.stack([leaf.detach(), leaf.detach()], -1)[..., 0].requires_grad_() for leaf in leaves)
    ids = torch.stack([masking.ids_keep, masking.ids_keep.flip(1)], -1)[..., 0]
    assert not any(one.is_contiguous() for one in (*strided, ids))
    value = run_embedding(strided, masking._replace(ids_keep=ids), (16, 8), "triton")
    d_value = draw(*value.shape, seed=8).transpose(1, 2).contiguous().transpose(1, 2)
    gradients = torch.autograd.grad(value, strided, d_value)
    assert max(map(relative_error, (value, *gradients), expected)) < 1e-6


@pytest.mark.parametrize("dtype", DOT_DTYPES)
def test_chunks_of_rows_add_up_and_two_runs_give_the_same_bits(monkeypatch, dtype):
    leaves, masking = embedding(SHAPES[4], dtype, num_keep=15)
    expected = with_gradients(run_embedding, leaves, masking, (8, 8), exact=True)
    monkeypatch.setattr(chunked_sums, "CHUNK_ROWS", 16)
    monkeypatch.setattr(patch_embedding, "EMBED_SCRATCH", 4 * 40 * 64)
    assert chunked_sums.chunks_of(45, 4) == (3, 16)
    runs = [with_gradients(run_embedding, leaves, masking, (8, 8)) for _ in range(2)]
    assert max(map(relative_error, runs[0], expected)) < EMBED_TOLERANCES[dtype][1]
    assert_equal(*runs)


def test_chunks_follow_from_the_number_of_rows_alone():
    assert chunked_sums.chunks_of(1, 32) == (1, 256)
    assert chunked_sums.chunks_of(2048 * 16, 32) == (32, 1024)
    assert chunked_sums.chunks_of(1000, 32) == (4, 256)
    for rows in (257, 8193, 99_999):
        chunks, chunk_rows = chunked_sums.chunks_of(rows, 32)
        assert chunks <= 32 and (chunks - 1) * chunk_rows < rows <= chunks * chunk_rows


@pytest.mark.parametrize(
    "wanting, saved, launched",
    [
        ((0, 1, 1, 0), {"ids", "spectrogram"}, ["launch_embed_backward"]),
        ((0, 0, 1, 0), {"ids", "spectrogram"}, ["launch_embed_backward"]),
        ((1, 0, 0, 0), {"ids", "weight"}, []),
        ((0, 0, 0, 1), {"ids"}, []),
        ((0, 0, 0, 0), set(), []),
    ],
)
def test_the_embedding_keeps_and_computes_what_its_gradients_need(monkeypatch, wanting, saved, launched):
    leaves, masking = embedding(SHAPES[0])
    leaves = tuple(leaf.detach().requires_grad_(bool(wants)) for leaf, wants in zip(leaves, wanting, strict=True))
    names = {masking.ids_keep.data_ptr(): "ids"}
    names |= {leaf.data_ptr(): name for leaf, name in zip(leaves, ("spectrogram", "weight"), strict=False)}
    packed, calls = set(), []
    backward = patch_embedding.launch_embed_backward
    monkeypatch.setattr(
        patch_embedding, "launch_embed_backward", lambda *args: calls.append("launch_embed_backward") or backward(*args)
    )
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: packed.add(names[one.data_ptr()]) or one, lambda one: one
    ):
        value = run_embedding(leaves, masking, (16, 16), "triton")
    if any(wanting):
        value.sum().backward()
    assert (packed, calls) == (saved, launched)


# --- restore_tokens


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("width", [5, 40, 96, 192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_restoring_and_its_gradients_are_the_references(monkeypatch, num_prefix, width, dtype):
    leaves, masking = restoring(dtype, num_prefix, width)
    expected = with_gradients(run_restoring, leaves, masking, num_prefix, exact=True)
    rounded = run_restoring(leaves, masking, num_prefix, "reference")
    poison_new_tensors(monkeypatch)
    found = with_gradients(run_restoring, leaves, masking, num_prefix)
    assert [one.dtype for one in found] == [dtype, dtype, dtype, torch.float32]
    tolerance, gradient_tolerance, reason = RESTORE_TOLERANCES[dtype]
    restored, d_tokens, d_mask_token, d_positions = map(relative_error, found, expected)
    assert restored < tolerance, reason
    assert d_tokens == 0  # rows only move
    assert max(d_mask_token, d_positions) < gradient_tolerance, reason
    if dtype != torch.bfloat16 or ON_GPU:
        assert torch.equal(found[0], rounded)


@pytest.mark.parametrize("config", [RowsConfig(1, 64, 4), RowsConfig(4, 32, 1), RowsConfig(16, 16, 2)])
@pytest.mark.parametrize("batch", [1, 5])
def test_every_tile_moves_the_same_rows(monkeypatch, config, batch):
    leaves, masking = restoring(width=40, batch=batch)
    tokens, mask_token, positions = (leaf.detach() for leaf in leaves)
    monkeypatch.setattr(chunked_sums, "CHUNK_ROWS", 16)
    expected = with_gradients(run_restoring, leaves, masking, 1, "reference")
    found = patch_rows.launch_restore_forward(tokens, masking.ids_restore, mask_token, positions, 1, config)
    assert torch.equal(found, expected[0])
    grad = draw(*found.shape, seed=8)
    d_tokens, d_mask_token = patch_rows.launch_restore_backward(grad, masking.ids_restore, 5, 1, torch.float32, config)
    assert torch.equal(d_tokens, expected[1])
    assert relative_error(d_mask_token, expected[2].flatten()) < 1e-6
    selected = patch_rows.launch_select_forward(grad, masking.ids_masked, 1, config)
    assert torch.equal(selected, reference.select_masked_tokens(grad, masking, 1))
    spread = patch_rows.launch_select_backward(selected, masking.ids_restore, 1, config)
    hidden = torch.cat([torch.zeros(batch, 1, device=DEVICE), (masking.ids_restore >= 5).float()], 1)
    assert torch.equal(spread, grad * hidden.unsqueeze(-1))


def test_the_mask_token_sums_over_chunks_with_the_same_bits_each_time(monkeypatch):
    leaves, masking = restoring(num_patches=70, num_keep=20)
    expected = with_gradients(run_restoring, leaves, masking, 1, exact=True)
    monkeypatch.setattr(chunked_sums, "CHUNK_ROWS", 1)
    assert chunked_sums.chunks_of(BATCH * 71, patch_rows.RESTORE_CHUNKS)[0] == 14
    runs = [with_gradients(run_restoring, leaves, masking, 1) for _ in range(2)]
    assert max(map(relative_error, runs[0], expected)) < 1e-6
    assert_equal(*runs)


@pytest.mark.parametrize("chunks", [1, 31, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_sums_are_added_in_float32_and_rounded_once(monkeypatch, chunks, dtype):
    partial = draw(chunks, 7, 11, seed=9)
    poison_new_tensors(monkeypatch)
    total = chunked_sums.launch_sum_chunks(partial, dtype)
    assert (total.shape, total.dtype) == ((7, 11), dtype)
    assert relative_error(total, partial.double().sum(0)) < RESTORE_TOLERANCES[dtype][1]


def test_mask_tokens_are_rounded_to_the_tokens_dtype_first():
    leaves, masking = restoring(torch.float16)
    mixed = (leaves[0], draw(1, 1, 40, seed=6).requires_grad_(), leaves[2])
    value = run_restoring(mixed, masking, 1, "triton")
    assert torch.equal(value, run_restoring(mixed, masking, 1, "reference"))
    assert torch.autograd.grad(value.sum(), mixed[1])[0].dtype == torch.float32


def test_strided_operands_of_restoring_are_taken_as_they_come():
    leaves, masking = restoring()
    expected = with_gradients(run_restoring, leaves, masking, 1, "reference")
    strided = tuple(torch.stack([leaf.detach(), leaf.detach()], -1)[..., 0].requires_grad_() for leaf in leaves)
    ids = torch.stack([masking.ids_restore, masking.ids_restore.flip(1)], -1)[..., 0]
    value = run_restoring(strided, masking._replace(ids_restore=ids), 1, "triton")
    d_value = draw(*value.shape, seed=8).transpose(0, 1).contiguous().transpose(0, 1)
    found = (value, *torch.autograd.grad(value, strided, d_value))
    assert not any(one.is_contiguous() for one in (*strided, ids, d_value))
    assert max(map(relative_error, found, expected)) < 1e-6


# --- select_masked_tokens


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize("width", [5, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selected_rows_and_their_gradients_are_the_references(monkeypatch, num_prefix, width, dtype):
    masking = masking_of(13, 5)
    tokens = draw(BATCH, num_prefix + 13, width, seed=5, dtype=dtype).requires_grad_()
    d_value = draw(BATCH, 8, width, seed=8, dtype=dtype)
    results = []
    for backend in ("reference", "triton"):
        value = select_masked_tokens(tokens, masking, num_prefix, backend)
        results.append((value, *torch.autograd.grad(value, tokens, d_value)))
        poison_new_tensors(monkeypatch)
    assert results[1][0].dtype == dtype
    assert_equal(*results)


def test_strided_operands_of_selecting_are_taken_as_they_come():
    masking = masking_of(13, 5)
    strided = [torch.stack([ids, ids.flip(1)], -1)[..., 0] for ids in masking]
    tokens = draw(14, BATCH, 40, seed=5).transpose(0, 1).requires_grad_()
    d_value = draw(8, BATCH, 40, seed=8).transpose(0, 1)
    results = []
    for backend, ids in (("reference", masking), ("triton", Masking(*strided))):
        value = select_masked_tokens(tokens, ids, 1, backend)
        results.append((value, *torch.autograd.grad(value, tokens, d_value)))
    assert_equal(*results)


# --- all of them


def test_operators_are_registered_completely():
    ops = torch.ops.msm_kernels
    masking = masking_of(13, 5)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]], device=DEVICE)
    torch.library.opcheck(ops.random_masking, (ids, 2**32 - 1, 7, 13, 5))
    (spectrogram, weight, bias, positions), visible = embedding(SHAPES[0])
    torch.library.opcheck(ops.embed_visible_patches, (spectrogram, visible.ids_keep, weight, bias, positions, 16, 16))
    d_tokens = draw(BATCH, 4, 40)
    torch.library.opcheck(
        ops.embed_visible_patches_backward,
        (d_tokens, spectrogram.detach(), visible.ids_keep, 16, 16, torch.float32),
    )
    (tokens, mask_token, places), _ = restoring()
    torch.library.opcheck(ops.restore_tokens, (tokens, masking.ids_restore, mask_token, places, 1))
    rows = draw(BATCH, 14, 40)
    torch.library.opcheck(ops.restore_tokens_backward, (rows, masking.ids_restore, 5, 1, torch.float16))
    torch.library.opcheck(ops.select_masked_tokens, (rows.requires_grad_(), masking.ids_masked, masking.ids_restore, 1))
    torch.library.opcheck(ops.select_masked_tokens_backward, (draw(BATCH, 8, 40), masking.ids_restore, 1))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_the_whole_path_compiles_into_one_graph(backend):
    leaves, _ = embedding(SHAPES[0])
    mask_token, places = draw(1, 1, 40, seed=6).requires_grad_(), draw(15, 40, seed=7)
    ids = torch.tensor([[0, 5, 1], [2, 3, 1], [7, 7, 7]], device=DEVICE)

    def path(spectrogram, weight, bias, positions, mask_token):
        masking = random_masking(2**63 + 5, ids, 15, 4, backend)
        x = embed_visible_patches(spectrogram, masking, weight, bias, positions, (16, 16), backend)
        x = restore_tokens(x, masking, mask_token, places, 0, backend)
        return select_masked_tokens(x, masking, 0, backend).square()

    results = []
    for function in (path, torch.compile(path, fullgraph=True, backend="aot_eager")):
        value = function(*leaves, mask_token)
        results.append((value, *torch.autograd.grad(value.sum(), (*leaves, mask_token))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_differentiating_twice_is_refused():
    leaves, masking = embedding(SHAPES[0])
    value = run_embedding(leaves, masking, (16, 16), "triton")
    (d_weight,) = torch.autograd.grad(value.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="embed_visible_patches_backward"):
        d_weight.sum().backward()


def test_float64_is_the_references_alone():
    leaves, masking = embedding(SHAPES[0])
    for place in range(4):
        mixed = tuple(leaf.double() if index == place else leaf for index, leaf in enumerate(leaves))
        with pytest.raises(BackendUnavailable, match="not float64"):
            run_embedding(mixed, masking, (16, 16), "triton")
    leaves, masking = restoring()
    for place in range(3):
        mixed = tuple(leaf.double() if index == place else leaf for index, leaf in enumerate(leaves))
        with pytest.raises(BackendUnavailable, match="not float64"):
            run_restoring(mixed, masking, 1, "triton")
    rows = draw(BATCH, 14, 40, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="not float64"):
        select_masked_tokens(rows, masking, 1, "triton")
    assert select_masked_tokens(rows, masking, 1, "auto").dtype == torch.float64
