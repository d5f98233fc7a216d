"""One rank of tests/test_divergence_engine.py: updates that are left out, against a run that never had them.

Arguments: a folder and `guard`. As tests/engine_worker.py, from which it has the engine and the data.
"""

import torch

from msm_dist.engine import zero
from msm_dist.engine.divergence import UpdateGuard
from tests import engine_worker
from tests.engine_matrix import name_of
from tests.engine_worker import WARMUP, Case, clip_norm, config, lr_at, micro_batch, same

STEPS, WRONG = 7, (2, 5)
"""Two updates are left out, each after one that was made and before another one."""
HIGH = 1e30
FAR = 1e4


class Guarded(Case):
    """An engine under a guard, trained by the same calls as pre-training's loop."""

    def __init__(self, world, cfg, folder):
        super().__init__(world, cfg)
        self.guard = UpdateGuard(self.engine, cfg.optim, world, folder, 0, ())
        self.losses, self.norms = [], []

    def train(self, steps, spoil=lambda loss, is_last, step: loss):
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
            self.losses.append(self.world.mean([total.item()])[0])
            self.norms.append(float(self.engine.get_global_grad_norm()))


def guard(world, folder, case):
    """What is left of two wrong updates of each kind: nothing, on all ranks."""
    clip = clip_norm(*case)
    plain = Case(world, config(*case, clip))
    for step in range(STEPS):
        if step not in WRONG:
            plain.train(step, step + 1)
    expected, counters = plain.everything()
    plain.engine.destroy()
    spoilt = {
        # One rank's first micro-batch, all ranks' last one.
        "nan": ({}, lambda loss, last, mine: loss * (float("nan") if mine and not last else 1.0)),
        "inf": ({}, lambda loss, last, mine: loss * (float("inf") if last else 1.0)),
        "loss": ({"skip_loss_above": FAR}, lambda loss, last, mine: loss + (HIGH if mine and not last else 0.0)),
        "norm": ({"skip_norm_above": FAR}, lambda loss, last, mine: loss * (1e8 if mine and last else 1.0)),
        "both": ({"skip_loss_above": FAR, "skip_norm_above": FAR}, None),
    }
    result = {}
    for kind, (bounds, spoil) in spoilt.items():
        cfg = config(*case, clip)
        cfg = cfg.model_copy(update={"optim": cfg.optim.model_copy(update=bounds | {"max_skipped_updates": 2})})
        root = folder / f"{name_of(case)}-{kind}"
        if world.is_main:
            root.mkdir()
        world.barrier()
        run = Guarded(world, cfg, root)
        # The first is on the main rank, the second on the last one.
        ranks = dict(zip(WRONG, (0, world.size - 1), strict=True))

        def spoiling(loss, last, step, spoil=spoil, ranks=ranks):
            return spoil(loss, last, world.rank == ranks[step]) if step in ranks else loss

        if spoil is None:
            run.train([step for step in range(STEPS) if step not in WRONG])
        else:
            run.train(range(STEPS), spoiling)
        found, counters_found = run.everything()
        result[kind] = {
            "unchanged": same(found, expected) and counters_found == counters,
            "skipped": world.gather(run.guard.skipped),
            "norms": [run.norms[step] for step in WRONG] if spoil else [],
        }
        run.engine.destroy()
    return result


engine_worker.PHASES["guard"] = guard
if __name__ == "__main__":
    engine_worker.main()
