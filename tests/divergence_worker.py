"""One rank of tests/test_divergence_engine.py: updates that are left out, against a run that never had them.

Arguments: a folder and `guard`. As tests/engine_worker.py, from which it has the engine and the data.
"""

import json
import math

import torch

from msm_dist.engine import state, zero
from msm_dist.engine.divergence import SKIPPED_FILE, UpdateGuard
from tests import engine_worker
from tests.engine_matrix import name_of
from tests.engine_worker import WARMUP, Case, clip_norm, config, lr_at, micro_batch, same

STEPS, WRONG = 7, (2, 5)
"""Two updates are left out, each after one that was made and before another one."""
FAR = 1e4


class Guarded(Case):
    """An engine under one guard after the other, trained by the same calls as pre-training's loop."""

    def guarded_by(self, folder, **bounds):
        """Start anew."""
        state.reset(self.engine, self.initial)
        optim = self.cfg.optim.model_copy(update={"max_skipped_updates": len(WRONG)} | bounds)
        self.guard = UpdateGuard(self.engine, optim, self.world, folder, 0, ())
        self.norms = {}

    def train(self, steps, spoil):
        for step in steps:
            zero.set_lr(self.engine, lr_at(step, self.cfg.peak_lr, WARMUP, engine_worker.STEPS))
            total = torch.zeros((), device=self.world.device)
            for micro in range(self.layout.accumulation):
                is_last = micro == self.layout.accumulation - 1
                spectrogram, ids = micro_batch(step, micro * self.world.size + self.world.rank)
                loss = self.engine(spectrogram.to(self.world.device), sample_ids=ids.to(self.world.device)).loss
                loss = spoil(loss, is_last, step)
                total += loss.detach() / self.layout.accumulation
                self.engine.backward(self.guard.judged(loss, total, is_last))
                self.engine.step()
            self.guard.note(step + 1, 0.0, total, [f"clip{step}-{self.world.rank}"])
            self.norms[step] = float(self.engine.get_global_grad_norm())


def guard(world, folder, case):
    """What is left of two wrong updates of each kind: nothing, on all ranks."""
    run = Guarded(world, config(*case, clip_norm(*case)))
    # The first goes wrong on the main rank, the second on the last one.
    wrong_rank = dict(zip(WRONG, (0, world.size - 1), strict=True))

    def without(kind, **bounds):
        run.guarded_by(folders[kind], **bounds)
        run.train([step for step in range(STEPS) if step not in WRONG], lambda loss, is_last, step: loss)
        return run.everything()

    def left_out(kind, spoil, **bounds):
        def spoiling(loss, is_last, step):
            return spoil(loss, is_last, world.rank == wrong_rank[step]) if step in WRONG else loss

        run.guarded_by(folders[kind], **bounds)
        run.train(range(STEPS), spoiling)
        found = run.everything()
        return {
            "unchanged": same(found[0], expected[0]) and found[1] == expected[1],
            "skipped": world.gather(run.guard.skipped),
            "finite": [step for step, norm in run.norms.items() if math.isfinite(norm)],
            "reasons": [json.loads(line)["reason"] for line in (folders[kind] / SKIPPED_FILE).read_text().splitlines()],
        }

    folders = {kind: folder / f"{name_of(case)}-{kind}" for kind in ("plain", "nan", "inf", "loss", "norm", "idle")}
    world.on_main(lambda: [path.mkdir() for path in folders.values()] and None)
    expected = without("plain")
    results = {
        # In the first micro-batches of one rank; in the last one of all ranks.
        "nan": left_out("nan", lambda loss, is_last, mine: loss * (math.nan if mine and not is_last else 1.0)),
        "inf": left_out("inf", lambda loss, is_last, mine: loss * (math.inf if is_last else 1.0)),
        # A summand that has no gradient.
        "loss": left_out(
            "loss", lambda loss, is_last, mine: loss + (1e30 if mine and not is_last else 0.0), skip_loss_above=FAR
        ),
        "norm": left_out(
            "norm", lambda loss, is_last, mine: loss * (1e8 if mine and is_last else 1.0), skip_norm_above=FAR
        ),
    }
    idle = without("idle", skip_loss_above=FAR, skip_norm_above=FAR)
    results["idle"] = same(idle[0], expected[0]) and idle[1] == expected[1] and run.guard.skipped == ()
    run.engine.destroy()
    return results


engine_worker.PHASES["guard"] = guard
if __name__ == "__main__":
    engine_worker.main()
