"""What ``transformers.Trainer`` lacks: checkpoints, guards, signals, optimisers."""
