"""heareval.predictions.runner, unmodified, on a PyTorch and a Lightning of today.

    python tests/hear/predict.py [options of the runner] FOLDER_OF_EMBEDDINGS ...

Two things are arranged from outside: torch since 2.6 loads the kit's own checkpoints only when told to trust them, and
the kit sets `FitLoop.current_epoch` when it tests an event task, which has no setter since Lightning 1.6.
"""

import os

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

from pytorch_lightning.loops.fit_loop import FitLoop


def _epoch(loop: FitLoop) -> int:
    return loop.epoch_progress.current.completed


def _set_epoch(loop: FitLoop, epoch: int) -> None:
    loop.epoch_progress.current.completed = epoch


if not isinstance(getattr(FitLoop, "current_epoch", None), property):
    FitLoop.current_epoch = property(_epoch, _set_epoch)

if __name__ == "__main__":
    from heareval.predictions.runner import runner

    runner()
