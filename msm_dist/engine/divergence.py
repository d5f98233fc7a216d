"""The end of a run whose loss or gradient is not finite: what is told of it, and kept.

In: the step and its clips. Out: `diverged.json` in the run folder, and Diverged on all ranks. The newest checkpoint is
of before: an update that is not finite is left out.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from msm_dist.engine.world import World
from msm_dist.errors import Diverged
from msm_dist.files import write_atomically

CLIP_KEYS_SHOWN = 8


def raise_diverged(world: World, folder: Path, step: int, lr: float, keys: Sequence[str]) -> NoReturn:
    """Name the clips of a step, `keys` those of this rank. A collective. Raises Diverged."""
    clips = [key for of_rank in world.gather(list(keys)) for key in of_rank]
    report = folder / "diverged.json"
    content = json.dumps({"step": step, "lr": lr, "clips": clips}, indent=1)
    world.on_main(lambda: write_atomically(report, content))
    error = Diverged(
        f"step {step}, lr {lr:.3e}: the loss or a gradient is not finite; the update was left out. Clips of the "
        f"step: {', '.join(clips[:CLIP_KEYS_SHOWN])}, ... (all {len(clips)} in {report}). Look at those clips, lower "
        "the learning rate or set optim.clip_norm; the newest checkpoint is untouched"
    )
    error.on_all_ranks = True
    raise error
