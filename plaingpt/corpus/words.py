"""
Which characters make words, in any script.
"""
import functools
import unicodedata

import numpy as np

# Scripts that put no spaces between words.
WITHOUT_SPACES = [(0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007),
                  (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
                  (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x20000, 0x323AF)]
BETWEEN_WORDS, IN_WORD, WORD = 0, 1, 2  # what word_table() holds
ASSIGNED_LETTERS = 0x32400  # no letters or digits are assigned above


def code_points(text):
    """The code points of a text: uint32 (len(text),)."""
    return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')


@functools.cache
def word_table():
    """How each code point makes words: uint8 (0x110000,).

    IN_WORD for letters, digits, their marks and the underscore; WORD for a letter that counts as a
    word of its own, because its script puts no spaces between words; else BETWEEN_WORDS."""
    table = np.zeros(0x110000, np.uint8)
    for code, category in enumerate(categories()):
        if category[0] in 'LMN':
            table[code] = IN_WORD
    table[ord('_')] = IN_WORD
    for first, last in WITHOUT_SPACES:
        block = table[first:last + 1]
        block[block == IN_WORD] = WORD
    return table


@functools.cache
def categories():
    """The Unicode categories of the code points below ASSIGNED_LETTERS, such as 'Lu': a list."""
    return [unicodedata.category(chr(code)) for code in range(ASSIGNED_LETTERS)]
