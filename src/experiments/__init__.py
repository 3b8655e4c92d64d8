"""Grids of runs, their analysis and figures."""
