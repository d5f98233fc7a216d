"""The Triton kernels of attention against the reference in float64."""

import logging

import pytest
import torch

from msm_kernels import attention as subject
from msm_kernels import attention_short, reference
from msm_kernels.attention import attention, launch_backward, launch_forward, regime, shape_class
from msm_kernels.attention_short import Short
from msm_kernels.attention_tiled import Tiled
from msm_kernels.backend import BackendUnavailable
from tests.kernel_checks import DEVICE, DOT_DTYPES, MARKS, ON_GPU, draw, poison_new_tensors, relative_error

pytestmark = MARKS  # pytest.mark.gpu where there is one

TOLERANCES = {
    torch.float32: 2e-6,  # sums of up to 1024 terms; on a GPU a product is three tf32 ones
    torch.float16: 1e-3,  # P, dS and the result are rounded to 11 bits
    torch.bfloat16: 8e-3,  # the same to 8 bits
}


def exact(qkv, num_heads, key_mask, grad):
    """Output and gradient in float64."""
    qkv = qkv.detach().cpu().double().requires_grad_()
    out = reference.attention(qkv, num_heads, None if key_mask is None else key_mask.cpu())
    out.backward(grad.cpu().double())
    return out, qkv.grad


def errors(B, N, num_heads, D, dtype, key_mask=None):
    qkv = draw(B, N, 3 * num_heads * D, dtype=dtype).requires_grad_()
    grad = draw(B, N, num_heads * D, seed=1, dtype=dtype)
    out = attention(qkv, num_heads, key_mask, backend="triton")
    out.backward(grad)
    assert out.dtype == qkv.grad.dtype == dtype
    exact_out, exact_grad = exact(qkv, num_heads, key_mask, grad)
    return relative_error(out, exact_out), relative_error(qkv.grad, exact_grad)


def some_keys(B, N):
    """A random mask; the first clip has one key, the last, if there are three, none."""
    mask = draw(B, N, seed=2) > -0.5
    mask[0] = False
    mask[0, N // 2] = True
    if B > 2:
        mask[-1] = False
    return mask


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "B, N, num_heads, D",
    [
        (5, 1, 2, 32),
        (3, 16, 1, 64),
        (5, 17, 3, 64),
        (3, 17, 2, 80),
        (3, 37, 2, 32),
        (2, 17, 1, 128),
        (2, 48, 1, 128),
        (1, 64, 2, 64),
        (3, 66, 1, 64),
        (2, 66, 1, 80),
        (1, 96, 1, 32),
        (3, 103, 1, 64),
        (1, 103, 1, 128),
        (1, 129, 2, 32),
        (2, 131, 1, 64),
        (1, 191, 1, 80),
    ],
)
def test_output_and_gradient_are_those_of_the_reference(monkeypatch, B, N, num_heads, D, masked, dtype):
    poison_new_tensors(monkeypatch)
    out, grad = errors(B, N, num_heads, D, dtype, some_keys(B, N) if masked else None)
    assert out < TOLERANCES[dtype]
    assert grad < TOLERANCES[dtype]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "N, config",
    [
        (1, Short(16, 0, 1, 1, 1)),  # sixteen sequences in a tile
        (5, Short(32, 16, 1, 2, 1)),  # nine, one of them across main tile and tail
        (17, Short(64, 0, 2, 4, 1)),  # three, two tiles after each other, the last one half empty
        (17, Short(64, 16, 3, 4, 2)),
        (37, Short(32, 16, 1, 2, 1)),
        (66, Short(64, 16, 1, 2, 1)),
        (66, Short(64, 64, 1, 4, 1)),
        (90, Short(64, 32, 2, 4, 2)),
        (66, Short(128, 0, 1, 8, 1)),
    ],
)
def test_every_way_to_tile_a_short_sequence_is_right(monkeypatch, N, config, masked):
    """All that the tuner may choose from; the number of clips fills no tile."""
    poison_new_tensors(monkeypatch)
    B, D, dtype = 11 if N < 30 else 3, 32, torch.float16
    qkv, grad = draw(B, N, 6 * D, dtype=dtype), draw(B, N, 2 * D, seed=1, dtype=dtype)
    key_mask = some_keys(B, N) if masked else None
    out, lse = launch_forward(qkv, 2, key_mask, config)
    d_qkv = launch_backward(grad, qkv, None, lse, 2, key_mask, config)
    assert lse.numel() == 0
    exact_out, exact_grad = exact(qkv, 2, key_mask, grad)
    assert relative_error(out, exact_out) < TOLERANCES[dtype]
    assert relative_error(d_qkv, exact_grad) < TOLERANCES[dtype]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "N, config",
    [
        (130, Tiled(32, 64, 4, 1)),
        (130, Tiled(64, 32, 4, 2)),
        (160, Tiled(32, 32, 4, 3)),
        (129, Tiled(128, 128, 8, 1)),
    ],
)
def test_every_way_to_tile_a_long_sequence_is_right(monkeypatch, N, config, masked):
    poison_new_tensors(monkeypatch)
    dtype = torch.float16
    qkv, grad = draw(3, N, 3 * 32, dtype=dtype), draw(3, N, 32, seed=1, dtype=dtype)
    key_mask = some_keys(3, N) if masked else None
    out, lse = launch_forward(qkv, 1, key_mask, config)
    d_qkv = launch_backward(grad, qkv, out, lse, 1, key_mask, config)
    exact_out, exact_grad = exact(qkv, 1, key_mask, grad)
    assert relative_error(out, exact_out) < TOLERANCES[dtype]
    assert relative_error(d_qkv, exact_grad) < TOLERANCES[dtype]


@pytest.mark.parametrize("N", [20, 140])
def test_log_of_the_row_sums_is_kept_for_long_sequences_only(N):
    qkv = draw(2, N, 3 * 64, dtype=torch.float16)
    lse = launch_forward(qkv, 2)[1]
    if N == 20:
        assert lse.numel() == 0
        return
    q, k, _ = qkv.double().view(2, N, 3, 2, 32).permute(2, 0, 3, 1, 4)
    expected = (q @ k.transpose(-2, -1) / 32**0.5).logsumexp(-1) / torch.tensor(2.0).log().to(DEVICE)
    assert relative_error(lse, expected) < 1e-3


@pytest.mark.parametrize("N", [20, 140])
def test_masked_keys_have_no_influence(N):
    qkv = draw(2, N, 3 * 64, dtype=torch.float16)
    key_mask = some_keys(2, N)
    hidden = torch.zeros_like(qkv, dtype=torch.bool)
    hidden[..., 64:] = ~key_mask[..., None]  # keys and values, not queries
    other = torch.where(hidden, torch.full_like(qkv, 3000.0), qkv)
    assert torch.equal(attention(qkv, 2, key_mask, backend="triton"), attention(other, 2, key_mask, backend="triton"))


@pytest.mark.parametrize("N", [20, 140])
def test_a_clip_without_keys_gives_zeros_and_no_gradient(N):
    qkv = draw(3, N, 3 * 64, dtype=torch.float16).requires_grad_()
    key_mask = torch.ones(3, N, dtype=torch.bool, device=DEVICE)
    key_mask[1] = False
    out = attention(qkv, 2, key_mask, backend="triton")
    out.sum().backward()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(qkv.grad[1], torch.zeros_like(qkv.grad[1]))
    assert qkv.grad[0].any()


# Rows past the end of a block overflow in the dK, dV kernel; they are never stored.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("N", [20, 66, 140])
@pytest.mark.parametrize("keys", [slice(None), slice(-1, None)])
@pytest.mark.parametrize("shift", [300.0, -300.0])
def test_scores_far_from_zero_do_not_overflow(N, keys, shift):
    qkv = draw(1, N, 3 * 32, dtype=torch.float16)
    qkv[..., 0] = 40.0
    qkv[:, keys, 32] = shift  # adds 40 * shift / sqrt(32), some 2100, to the scores of these keys
    qkv.requires_grad_()
    grad = draw(1, N, 32, seed=1, dtype=torch.float16)
    out = attention(qkv, 1, backend="triton")
    out.backward(grad)
    exact_out, exact_grad = exact(qkv, 1, None, grad)
    assert relative_error(out, exact_out) < 1e-3
    assert relative_error(qkv.grad, exact_grad) < 2e-2  # float32 scores of 2100 have 2e-4 left


@pytest.mark.parametrize("N", [20, 140])
def test_two_backward_passes_give_the_same_bits(N):
    qkv, grad = draw(3, N, 3 * 64, dtype=torch.float16), draw(3, N, 64, seed=1, dtype=torch.float16)
    gradients = []
    for _ in range(2):
        leaf = qkv.clone().requires_grad_()
        attention(leaf, 2, backend="triton").backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "N, config",
    [(5, None), (8, None), (17, None), (17, Short(64, 0, 1, 4, 1)), (33, Short(64, 16, 1, 4, 1)), (140, None)],
)
def test_a_clip_does_not_depend_on_the_others_of_its_batch(N, config):
    qkv, grad = draw(7, N, 3 * 64, dtype=torch.float16), draw(7, N, 64, seed=1, dtype=torch.float16)
    other = torch.where(torch.arange(7, device=DEVICE)[:, None, None] == 3, 200 * qkv, qkv)
    results = []
    for value in (qkv, other):
        out, lse = launch_forward(value, 2, None, config)
        results.append((out, launch_backward(grad, value, out, lse, 2, None, config)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one[:3], two[:3])
        assert torch.equal(one[4:], two[4:])


def test_inputs_and_gradients_may_be_views():
    wide = draw(2, 20, 4 * 64, dtype=torch.float16)
    view = wide[..., 64:].detach().requires_grad_()
    plain = view.detach().contiguous().requires_grad_()
    grad = draw(2, 64, 20, seed=1, dtype=torch.float16).transpose(1, 2)
    attention(view, 2, backend="triton").backward(grad)
    attention(plain, 2, backend="triton").backward(grad.contiguous())
    assert not view.is_contiguous()
    assert torch.equal(view.grad, plain.grad)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("N", [17, 140, 1030])
def test_no_clips_are_no_work(N, backend):
    qkv = torch.empty(0, N, 3 * 64, device=DEVICE).requires_grad_()
    out = attention(qkv, 2, backend=backend)
    out.sum().backward()
    assert out.shape == (0, N, 64)
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_no_tokens_are_refused(backend):
    with pytest.raises(ValueError, match="N and width 1 or more"):
        attention(torch.empty(2, 0, 3 * 64, device=DEVICE), 2, backend=backend)


def test_a_mask_on_another_device_is_refused():
    key_mask = torch.ones(2, 5, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="key_mask is on meta"):
        attention(draw(2, 5, 3 * 64), 2, key_mask, backend="triton")


@pytest.mark.parametrize("N, masked", [(17, False), (17, True), (129, True)])
def test_ops_are_what_torch_asks_of_custom_ops(N, masked):
    qkv = draw(1, N, 3 * 32, dtype=torch.float16).requires_grad_()
    key_mask = some_keys(1, N) if masked else None
    torch.library.opcheck(subject._attention, (qkv, 1, key_mask))
    out, lse = subject._attention(qkv.detach(), 1, key_mask)
    saved = None if N == 17 else out
    torch.library.opcheck(subject._attention_backward, (torch.ones_like(out), qkv.detach(), saved, lse, 1, key_mask))


def test_regime_depends_on_shape_and_dtype_alone():
    bf16, fp32 = torch.bfloat16, torch.float32
    assert [regime(n, 64, bf16) for n in (1, 128, 129, 1024, 1025)] == ["short", "short", "tiled", "tiled", "sdpa"]
    assert [regime(n, 64, fp32) for n in (32, 33)] == ["short", "tiled"]
    assert [regime(n, 128, bf16) for n in (64, 65)] == ["short", "tiled"]
    assert regime(17, 48, bf16) == "sdpa"


def test_every_short_sequence_fits_its_default_tile():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for D in subject.HEAD_DIMS:
            for N in range(1, 1025):
                assert shape_class(N, D)
                if regime(N, D, dtype) == "short":
                    for backward in (False, True):
                        config = attention_short.default(N, D, dtype, backward)
                        assert config.rows + config.tail >= N


@pytest.mark.parametrize("masked", [False, True])
def test_longer_sequences_go_to_torch_and_say_so_once(caplog, masked):
    subject._say.cache_clear()
    key_mask = some_keys(3, 1030) if masked else None
    with caplog.at_level(logging.WARNING, logger="msm_kernels"):
        errors_of_two = [errors(3, 1030, 1, 32, torch.float32, key_mask) for _ in range(2)]
    assert max(max(pair) for pair in errors_of_two) < 1e-5
    assert [record.getMessage() for record in caplog.records] == [
        "attention: sequences longer than 1024 tokens go to torch's scaled_dot_product_attention"
    ]


def test_a_width_that_no_kernel_takes_goes_to_torch_under_auto(caplog, monkeypatch):
    subject._say.cache_clear()
    monkeypatch.setattr(subject, "resolve", lambda *_: "triton")  # as on a GPU
    qkv = draw(2, 5, 3 * 48)
    with caplog.at_level(logging.WARNING, logger="msm_kernels"):
        out = attention(qkv, 1)
    assert relative_error(out, reference.attention(qkv.double(), 1, None)) < 1e-6
    assert "heads 48 wide go to torch's scaled_dot_product_attention" in caplog.text


def test_a_width_that_no_kernel_takes_is_refused_when_triton_is_asked_for():
    with pytest.raises(BackendUnavailable, match="heads are 48 wide"):
        attention(draw(1, 5, 3 * 48), 1, backend="triton")


def test_float64_is_refused_when_triton_is_asked_for():
    with pytest.raises(BackendUnavailable, match="not float64"):
        attention(draw(1, 5, 3 * 32, dtype=torch.float64), 1, backend="triton")


@pytest.mark.skipif(ON_GPU, reason="on a GPU auto is Triton")
def test_auto_on_a_cpu_is_the_reference():
    qkv = draw(2, 17, 3 * 64)
    assert torch.equal(attention(qkv, 2), reference.attention(qkv, 2, None))
