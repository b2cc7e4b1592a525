"""What a corpus holds, and what tokenizers make of it: the report and the comparison."""
