"""Scores, metrics, intervals, generated proteins, and the results file."""
