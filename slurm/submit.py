#!/usr/bin/env python3
"""`python slurm/submit.py CONFIG [a.b=c ...] --nodes N ...`: the same as `msm-dist submit`, which --help describes."""

import sys

from msm_dist.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["submit"]
    main()
