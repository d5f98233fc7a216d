#!/usr/bin/env python3
"""`python slurm/submit.py CONFIG [a.b=c ...] --nodes N ...`: the same as `msm-dist submit`, which --help describes."""

import sys

try:
    from msm_dist.cli import main
except ModuleNotFoundError as error:
    print(
        f"{sys.executable} has no {error.name}: submit with the project's own .venv/bin/python after `make setup`, or "
        "activate the environment that has it",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.argv[1:1] = ["submit"]
    main()
