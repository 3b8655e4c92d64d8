"""The benchmark and the memory table."""
