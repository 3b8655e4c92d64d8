"""Comparison, report, model card and hub."""
