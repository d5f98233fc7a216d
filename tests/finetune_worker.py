"""`python -m msm_dist.evaluate.finetune` with a process that dies by SIGKILL at a chosen point.

KILL=step:S      the process dies after the update of step S, before anything of it is recorded
KILL=export      ... when all is trained and judged, before the classifier is written
KILL=slow:S      nobody dies; a step takes S seconds longer
"""

import os
import signal
import sys
import time

from msm_dist.evaluate import classifier, finetune

what, _, number = os.environ.get("KILL", "").partition(":")


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def on_step(run, *rest):
    if run.step == int(number):
        die()
    return stop_if_skipped(run, *rest)


def slowly(*arguments):
    time.sleep(float(number))
    return stop_if_skipped(*arguments)


stop_if_skipped = finetune.stop_if_skipped
if what == "step":
    finetune.stop_if_skipped = on_step
if what == "slow":
    finetune.stop_if_skipped = slowly
if what == "export":
    classifier.save = die
sys.exit(finetune.main(sys.argv[1:]))
