"""Distil causal protein language models into smaller GPT-2 students."""
