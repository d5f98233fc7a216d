"""What is told and kept of a step whose loss is not finite."""

import json

import pytest

from msm_dist.engine.divergence import raise_diverged
from msm_dist.errors import Diverged


class World:
    """Rank 0 of two."""

    def gather(self, value):
        return [value, ["theirs"]]

    def on_main(self, action):
        return action()


def test_clips_of_all_ranks_are_kept_and_the_first_are_told(tmp_path):
    mine = [f"clip{number}" for number in range(9)]
    with pytest.raises(Diverged, match=r"step 7, lr 1.000e-03: .* clip7, ... \(all 10 in .*diverged.json\)") as error:
        raise_diverged(World(), tmp_path, 7, 1e-3, mine)
    assert error.value.on_all_ranks
    assert error.value.exit_code == 3
    kept = json.loads((tmp_path / "diverged.json").read_text())
    assert kept == {"step": 7, "lr": 1e-3, "clips": [*mine, "theirs"]}
