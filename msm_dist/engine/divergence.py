"""Updates that go wrong: left out a few times, with their clips on record, and then the end of the run.

In: the loss of each step and what DeepSpeed made of its gradient. Out: a line of `skipped.jsonl` per update left out,
and past `optim.max_skipped_updates` of them `diverged.json` in the run folder and Diverged on all ranks. Wrong is a
loss or a gradient that is not finite, or one above `optim.skip_loss_above` or `optim.skip_norm_above`. All ranks judge
the same global numbers, which are those of a run that was killed and started again, and so do the same. Such an update
changes neither weights nor moments: the newest checkpoint and the weights at hand are good.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from msm_dist.config import Optim
from msm_dist.engine import state
from msm_dist.engine.world import World
from msm_dist.engine.zero import forget_refused, refuse_norms_above, take_norm_found
from msm_dist.errors import CheckpointError, Diverged
from msm_dist.files import write_atomically
from msm_dist.monitor import read_metrics, truncate_jsonl

SKIPPED_FILE, REPORT_FILE = "skipped.jsonl", "diverged.json"
CLIP_KEYS_SHOWN = 8

log = logging.getLogger(__name__)


class UpdateGuard:
    """Leaves wrong updates out, up to a number of them."""

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        settings: Optim,
        world: World,
        folder: Path,
        step: int,
        skipped: Sequence[int],
    ) -> None:
        """Of a run at `step`, `skipped` the steps without an update until then. A collective.

        To be made after the engine's dry run, whose loss and gradient are of noise.
        """
        self.skipped = tuple(skipped)
        """Steps whose updates were left out."""
        self._engine, self._settings, self._world, self._folder = engine, settings, world, folder
        self._step_loss: Tensor | None = None
        if settings.skip_norm_above is not None:
            refuse_norms_above(engine, settings.skip_norm_above)
        world.on_main(lambda: _truncate(folder / SKIPPED_FILE, step))

    @property
    def counts(self) -> dict[str, int]:
        """How many updates were left out, for the metrics; nothing where none was."""
        return {"skipped_updates": len(self.skipped)} if self.skipped else {}

    def judged(self, loss: Tensor, step_loss: Tensor, is_last: bool) -> Tensor:
        """A micro-batch's `loss`, whose gradient is not finite if it is not, so that DeepSpeed's check sees that.

        Nor is it if the global loss of the step is above its bound, which is known with the last micro-batch:
        `step_loss` is this rank's mean so far. The device does all of this; the host does not wait.
        """
        factor = loss.detach() * 0 + 1
        bound = self._settings.skip_loss_above
        if is_last and bound is not None:
            self._step_loss = step_loss.clone()
            dist.all_reduce(self._step_loss)
            self._step_loss /= self._world.size
            factor = torch.where(self._step_loss > bound, torch.nan, factor)
        return loss * factor

    def note(self, step: int, lr: float, step_loss: Tensor, keys: Sequence[str]) -> None:
        """Record the update of `step` if it was left out; a collective then, and only then.

        `step_loss` is this rank's mean loss, `keys` are its clips. Raises Diverged on all ranks when it is one update
        too many.
        """
        norm_found = take_norm_found(self._engine)
        if not state.was_refused(self._engine):
            return
        # DeepSpeed says -1 of one that is not finite.
        norm = math.inf if norm_found is None or norm_found < 0 else float(norm_found)
        # The number that was judged, to the last bit, where one was.
        mean = self._world.mean([step_loss.item()])[0] if self._step_loss is None else self._step_loss.item()
        clips = [key for of_rank in self._world.gather(list(keys)) for key in of_rank]
        reason = self._reason(mean, norm)
        record = {
            "step": step,
            "lr": lr,
            "reason": reason,
            "loss": mean if math.isfinite(mean) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "clips": clips,
        }
        if len(self.skipped) >= self._settings.max_skipped_updates:
            self._raise(record)
        self.skipped += (step,)
        forget_refused(self._engine)
        self._world.on_main(lambda: _append(self._folder / SKIPPED_FILE, record))
        if self._world.is_main:
            allowed = self._settings.max_skipped_updates
            log.warning(
                "step %d: %s; the update was left out, %d of at most %d (optim.max_skipped_updates). Clips of the step "
                "are in %s",
                *(step, reason, len(self.skipped), allowed, self._folder / SKIPPED_FILE),
            )

    def _reason(self, loss: float, norm: float) -> str:
        settings = self._settings
        if not math.isfinite(loss):
            return "the loss is not finite"
        if settings.skip_loss_above is not None and loss > settings.skip_loss_above:
            return f"the loss {loss:.6g} is above optim.skip_loss_above = {settings.skip_loss_above}"
        if settings.skip_norm_above is not None and settings.skip_norm_above < norm < math.inf:
            return f"the gradient norm {norm:.6g} is above optim.skip_norm_above = {settings.skip_norm_above}"
        return "a gradient is not finite"

    def _raise(self, record: dict[str, Any]) -> NoReturn:
        report = self._folder / REPORT_FILE
        self._world.on_main(lambda: _report(report, record, self._folder / SKIPPED_FILE))
        before = ""
        if self.skipped:
            steps = ", ".join(map(str, self.skipped[-CLIP_KEYS_SHOWN:]))
            before = f" Left out before: {len(self.skipped)}, the last at {steps}."
        clips = record["clips"]
        error = Diverged(
            f"step {record['step']}, lr {record['lr']:.3e}: {record['reason']}; the update was left out (allowed: "
            f"optim.max_skipped_updates = {self._settings.max_skipped_updates}).{before} Clips of the step: "
            f"{', '.join(clips[:CLIP_KEYS_SHOWN])}, ... (all {len(clips)} in {report}). Look at those clips, lower the "
            "learning rate or set optim.clip_norm; the newest checkpoint is untouched"
        )
        error.on_all_ranks = True
        raise error


def _truncate(path: Path, last_step: int) -> None:
    try:
        truncate_jsonl(path, last_step)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _append(path: Path, record: dict[str, Any]) -> None:
    """On the disk before a checkpoint that counts it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _cannot_write(path, error) from None


def _report(path: Path, record: dict[str, Any], skipped: Path) -> None:
    try:
        before = read_metrics(skipped) if skipped.exists() else []
        write_atomically(path, json.dumps(record | {"skipped": before}, indent=1))
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: can't be written ({error.strerror or error}); make room or give write access, then start the same "
        "command again"
    )
