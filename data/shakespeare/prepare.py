"""
Tiny shakespeare, or the input.txt that lies beside this script, in GPT-2's byte-pair encoding:

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
tokenizer = GPT2Tokenizer()
ids = {split: tokenizer.encode(part, special=False) for split, part in split_text(text).items()}
write_data_set(folder, tokenizer, ids, source, sha256)
