"""From files of text to token files: finding, reading, splitting, tokenizing, and a report."""
