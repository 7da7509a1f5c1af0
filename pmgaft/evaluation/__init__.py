"""Evaluation: data sets x one attack -> per-image outcomes, shares with intervals, and a report of how they came
about."""
