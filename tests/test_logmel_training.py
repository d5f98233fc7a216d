"""Training on stored log-mels instead of the audio that they were made from: the same samples, nearly the same loss."""

import pytest

from msm_dist.config import Features
from msm_dist.data.repack import repack
from tests.test_pretrain import STEPS, Runs

pytestmark = pytest.mark.distributed

LONGER = 3 * STEPS
BOUND = 2e-3
"""Of the difference between the two losses of a step, relative; 8e-4 was seen, 2e-5 in the first step. From step to
step a loss moves by tens of percent. Training multiplies any difference: at five times this rate it was 4 %."""
RATE = "optim.lr=2e-3"


def test_a_run_on_stored_log_mels_has_the_loss_of_the_run_on_audio(tmp_path):
    runs = Runs(tmp_path)
    for split in ("train", "valid"):
        repack(tmp_path / split, tmp_path / f"{split}-logmel", Features())
    # One mean and std for both: an index has those of its own values.
    settings = [f"train.steps={LONGER}", "features.mean=-9.0", "features.std=4.2", RATE]
    stored = [f"data.shards={tmp_path / 'train-logmel'}", f"data.valid_shards={tmp_path / 'valid-logmel'}"]
    for name, more in (("audio", []), ("logmel", stored)):
        codes, output = runs.run(name, *settings, *more, ranks=1)
        assert codes == [0], output
    audio, logmel = runs.trace("audio"), runs.trace("logmel")
    assert len(audio) == 16 * LONGER
    for one, other in zip(audio, logmel, strict=True):
        assert one.pop("audio") != other.pop("audio")
        assert one == other  # key, epoch, clip, crop, offset, mask
    for metric, count in (("loss", LONGER), ("valid_loss", 1 + LONGER // 7)):
        one, other = ([line[metric] for line in runs.metrics(name) if metric in line] for name in ("audio", "logmel"))
        assert len(one) >= count - 1
        assert one[-1] < 0.8 * one[0]
        assert 0 < largest(one, other) < BOUND
        assert largest(one[:-1], one[1:]) > 20 * BOUND


def largest(one: list[float], other: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / a for a, b in zip(one, other, strict=True))
