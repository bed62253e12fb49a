"""Looking at credit without a model, from what a run recorded. See tools/inspect_credit.py, tools/sweep_credit.py."""
