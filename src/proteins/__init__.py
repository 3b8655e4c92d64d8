"""From a source of proteins to token ids in batches."""
