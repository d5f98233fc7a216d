"""What is wrong with a machine (machine.py), a run (run.py) or a corpus (shards.py), and what to do about it."""
