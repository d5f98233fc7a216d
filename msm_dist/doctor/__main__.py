"""The checks of this machine before anything is installed: `python -m msm_dist.doctor [--fix]`."""

import sys

from msm_dist.doctor.machine import run_doctor

sys.exit(run_doctor(fix="--fix" in sys.argv[1:]))
