"""Speed and memory on a GPU against what a user would pick instead: one script per subject, run by `make bench`."""
