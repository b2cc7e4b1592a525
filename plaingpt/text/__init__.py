"""From text to batches: fetching, tokenizers, token files, data sets on disk."""
