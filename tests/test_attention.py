import pytest
import torch

from msm_kernels.attention import attention


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def by_head(qkv, num_heads, key_mask=None):
    """The definition, head by head, keys left out one by one."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    size = width // num_heads
    out = torch.zeros(batch, tokens, width, dtype=qkv.dtype)
    for clip in range(batch):
        keys = key_mask[clip] if key_mask is not None else torch.ones(tokens, dtype=torch.bool)
        for head in range(num_heads):
            start = head * size
            q, k, v = (qkv[clip, :, part * width + start :][:, :size] for part in range(3))
            weights = (q @ k[keys].T / size**0.5).softmax(dim=1)
            out[clip, :, start : start + size] = weights @ v[keys]
    return out


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7])
def test_attention_is_its_definition(num_heads, tokens):
    qkv = draw(2, tokens, 36)
    torch.testing.assert_close(attention(qkv, num_heads), by_head(qkv, num_heads), rtol=1e-12, atol=1e-12)


def test_masked_keys_have_no_influence():
    qkv = draw(2, 7, 36)
    key_mask = torch.tensor([[True] * 4 + [False] * 3, [False, True] * 3 + [False]])
    expected = by_head(qkv, 3, key_mask)
    torch.testing.assert_close(attention(qkv, 3, key_mask), expected, rtol=1e-12, atol=1e-12)


def test_a_clip_without_keys_gives_zeros_and_finite_gradients():
    qkv = draw(2, 4, 12).requires_grad_()
    out = attention(qkv, 2, torch.tensor([[False] * 4, [True] * 4]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    out.sum().backward()
    assert torch.equal(qkv.grad[0], torch.zeros_like(qkv.grad[0]))
    assert qkv.grad[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_result(dtype):
    qkv = 4 * draw(2, 50, 72).to(dtype)  # large scores, where a softmax in half precision is far off
    exact = attention(qkv.double(), 3)
    out = attention(qkv, 3)
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("key_mask", [None, [[True, False, True], [False, False, True]]])
def test_gradients_are_right(key_mask):
    key_mask = None if key_mask is None else torch.tensor(key_mask)
    assert torch.autograd.gradcheck(lambda qkv: attention(qkv, 2, key_mask), draw(2, 3, 12).requires_grad_())


@pytest.mark.parametrize(
    "qkv, num_heads, key_mask, message",
    [
        (torch.zeros(2, 12), 2, None, "qkv is"),
        (torch.zeros(1, 2, 14), 2, None, "num_heads = 2"),
        (torch.zeros(1, 2, 12), 0, None, "num_heads = 0"),
        (torch.zeros(1, 2, 12), 2, torch.ones(1, 2), "key_mask is torch.float32"),
        (torch.zeros(1, 2, 12), 2, torch.ones(1, 3, dtype=torch.bool), "key_mask is torch.bool"),
    ],
)
def test_malformed_arguments_are_refused(qkv, num_heads, key_mask, message):
    with pytest.raises(ValueError, match=message):
        attention(qkv, num_heads, key_mask)
