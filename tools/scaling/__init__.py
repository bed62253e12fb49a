"""The scaling study: many plans of published models, and steps measured on this machine. See tools/scaling_study.py."""
