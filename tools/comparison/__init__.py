"""Of runs with different settings over several seeds, what is shown: the parts of tools/compare_runs.py."""
