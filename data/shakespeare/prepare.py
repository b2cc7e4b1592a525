"""
Tokenizes tiny shakespeare, or the input.txt beside this script, with GPT-2's byte-pair encoding:

    python data/shakespeare/prepare.py
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..', '..')))
from plaingpt.text.publishing import write_data_set
from plaingpt.text.shakespeare import read_text, split_text
from plaingpt.text.tokenizers import GPT2Tokenizer

folder = os.path.dirname(os.path.abspath(__file__))
text, source, sha256 = read_text(folder)
parts = split_text(text)

# '<|endoftext|>' in the text is not a token: special=False.
tokenizer = GPT2Tokenizer()
ids = {split: tokenizer.encode(part, special=False) for split, part in parts.items()}
write_data_set(folder, tokenizer, ids, source, sha256)
