"""Faults at drawn moments: a run that meets them must end as one that met none. `python -m tests.chaos` drives it."""
