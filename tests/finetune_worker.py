"""`python -m msm_dist.evaluate.finetune` with a process that dies by SIGKILL, or waits for a signal, at a chosen point.

KILL=step:S      the process dies after the update of step S, before anything of it is recorded
KILL=pause:S     nobody dies; after the update of step S the process waits until it has heard a signal
KILL=nan:S       nobody dies; the loss of step S is not a number
KILL=valid       ... in the first validation, before its second batch
KILL=test        ... while the test clips are judged, before the second batch
"""

import os
import signal
import sys
import time

from msm_dist.evaluate import finetune

what, _, number = os.environ.get("KILL", "").partition(":")


def wait_for_a_signal(interruption):
    print("waits", flush=True)
    while not interruption.heard:
        time.sleep(0.02)


def on_step(run, *rest):
    if run.step == int(number):
        if what == "step":
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_a_signal(run.interruption)
    return stop_if_skipped(run, *rest)


def on_judging(run, loader, *rest):
    def batches():
        yield next(loader)
        if (loader is run.valid) == (what == "valid"):
            wait_for_a_signal(run.interruption)
        yield from loader

    return judge(run, batches(), *rest)


def poisoned(run, batch):
    output = forward(run, batch)
    return output._replace(loss=output.loss * float("nan")) if run.step + 1 == int(number) else output


stop_if_skipped, judge, forward = finetune.stop_if_skipped, finetune.judge, finetune.forward
if what in ("step", "pause"):
    finetune.stop_if_skipped = on_step
if what == "nan":
    finetune.forward = poisoned
if what in ("valid", "test"):
    finetune.judge = on_judging
sys.exit(finetune.main(sys.argv[1:]))
