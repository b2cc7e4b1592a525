"""
Fetches SmolLM2-135M-Instruct, and tokenizes tiny shakespeare, which is fetched too unless it lies
beside this script as input.txt:

    python data/smollm2/prepare.py
"""
import os
import sys

sys.path.insert(0, os.path.abspath(os.path.join(__file__, '..', '..', '..')))
from plaingpt.formats.gguf_file import check_package
from plaingpt.formats.gguf_reading import gguf_tokenizer_of
from plaingpt.formats.smollm2 import fetch_smollm2
from plaingpt.text.publishing import write_data_set
from plaingpt.text.shakespeare import read_text, split_text
from plaingpt.text.tokenizers import load_tokenizer

folder = os.path.dirname(os.path.abspath(__file__))
check_package()  # before the download
model_path, model_source = fetch_smollm2(folder)
print(f'{model_path} comes from {model_source}')
text, source, sha256 = read_text(folder)
parts = split_text(text)

# '<|im_end|>' in the text is not a token: special=False.
tokenizer = load_tokenizer(gguf_tokenizer_of(model_path))
ids = {split: tokenizer.encode(part, special=False) for split, part in parts.items()}
write_data_set(folder, tokenizer, ids, source, sha256)
