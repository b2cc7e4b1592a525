"""
What a file that should hold tokens looks like instead: the formats that people mistake for them.
"""
import codecs

import numpy as np

# The first bytes of files that people mistake for raw tokens.
LLM_C_ADVICE = 'a token file of llm.c, which begins with a header: remove its first 1024 bytes'
OTHER_FORMATS = {
    (20240520).to_bytes(4, 'little'): LLM_C_ADVICE,  # GPT-2's tokens
    (20240801).to_bytes(4, 'little'): LLM_C_ADVICE,  # Llama 3's
    b'\x93NUMPY': 'a NumPy file: write its array with .tofile()',
    b'PK\3\4': 'a zip archive',
    b'\x1f\x8b\x08': 'gzip',
    b'\x28\xb5\x2f\xfd': 'Zstandard',
    b'PAR1': 'Parquet',
    b'\x89HDF': 'HDF5',
    b'MMIDIDX\0': 'an index of Megatron',
}


def recognise_format(head):
    """Names the format of a file that begins with these bytes; None if they may be tokens."""
    for magic, name in OTHER_FORMATS.items():
        if head.startswith(magic):
            return name
    # 64 printable characters in a row are text. Tokens hardly ever happen to be valid UTF-8.
    try:
        # The incremental decoder accepts that the last character may be cut off.
        text = codecs.getincrementaldecoder('utf-8')().decode(head)
    except UnicodeDecodeError:
        return None
    if len(text) >= 64 and all(char.isprintable() or char.isspace() for char in text):
        return 'text: convert it to tokens with a prepare.py'
    return None


def recognise_uint32(head):
    """Names uint32 if a file that begins with these bytes seems to hold it, else None.

    Read as uint16, small uint32 numbers have a zero in every other place."""
    halves = np.frombuffer(head[:len(head) // 4 * 4], '<u2').reshape(-1, 2)
    low = halves[:, 0]
    high = halves[:, 1]
    if len(halves) >= 64 and low.any() and not high.any():
        return 'uint32, because every other uint16 is 0: the meta.json beside it has to say so'
    return None
