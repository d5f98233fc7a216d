"""`python -m msm_dist` is `msm-dist`."""

from msm_dist.cli import main

main()
