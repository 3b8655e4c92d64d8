"""Teacher and student: loading, shapes, weights to start from, hidden states on disk."""
