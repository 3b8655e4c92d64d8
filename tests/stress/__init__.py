"""Hostile files, kills and long runs: programs of their own, beside the tests."""
