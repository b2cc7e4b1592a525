"""
Tokenizes tiny shakespeare, or the input.txt beside this script, with one token for each character:

    python data/shakespeare_char/prepare.py
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..', '..')))
from plaingpt.text.publishing import write_data_set
from plaingpt.text.shakespeare import read_text, split_text
from plaingpt.text.tokenizers import CharTokenizer

folder = os.path.dirname(os.path.abspath(__file__))
text, source, sha256 = read_text(folder)
parts = split_text(text)

# The vocabulary comes from the whole text, so that val.bin has no unknown characters.
tokenizer = CharTokenizer.from_text(text)
ids = {split: tokenizer.encode(part) for split, part in parts.items()}
write_data_set(folder, tokenizer, ids, source, sha256)
