import pytest
import torch

from msm_dist.config import parse_config
from msm_dist.summary import attention_notes
from tests.kernel_checks import DEVICE


def notes(backend, **model):
    values = {"model": {"backend": backend, **model}, "data": {"crop_frames": 1008}, "train": {"steps": 1}}
    return attention_notes(parse_config(values, "test"), DEVICE)


@pytest.mark.parametrize(
    "model, expected",
    [
        ({}, []),
        ({"patch_size": "8x8"}, ["sequences longer than 1024 tokens"]),  # the decoder's 1,261
        ({"embed_dim": 96, "depth": 1, "num_heads": 2}, ["heads 48 wide"]),
    ],
)
def test_a_run_says_at_its_start_what_of_its_attention_is_torchs(model, expected):
    found = notes("triton", **model)
    assert found == [f"attention: {what} go to torch's scaled_dot_product_attention" for what in expected]


def test_the_reference_has_nothing_to_say():
    if not torch.cuda.is_available():
        assert notes("auto", patch_size="8x8") == []
    assert notes("reference", patch_size="8x8") == []
