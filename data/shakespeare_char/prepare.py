"""
Tiny shakespeare, or the input.txt that lies beside this script, as one token a character:

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
tokenizer = CharTokenizer.from_text(text)
ids = {split: tokenizer.encode(part) for split, part in split_text(text).items()}
write_data_set(folder, tokenizer, ids, source, sha256)
