"""
What kinds of characters a text has: scripts, characters that prose and code seldom hold, and the
traces of a wrong encoding.
"""
import functools
import re

import numpy as np

from plaingpt.corpus.words import categories

# First and last code point of the blocks that most letters of a script are in.
SCRIPTS = {
    'Latin': [(0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0x24F),
              (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xFF21, 0xFF5A)],
    'Greek': [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    'Cyrillic': [(0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)],
    'Armenian': [(0x530, 0x58F)],
    'Hebrew': [(0x590, 0x5FF), (0xFB1D, 0xFB4F)],
    'Arabic': [(0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF),
               (0xFE70, 0xFEFC)],
    'Devanagari': [(0x900, 0x97F), (0xA8E0, 0xA8FF)],
    'Bengali': [(0x980, 0x9FF)],
    'Gujarati': [(0xA80, 0xAFF)],
    'Tamil': [(0xB80, 0xBFF)],
    'Telugu': [(0xC00, 0xC7F)],
    'Kannada': [(0xC80, 0xCFF)],
    'Malayalam': [(0xD00, 0xD7F)],
    'Thai': [(0xE00, 0xE7F)],
    'Georgian': [(0x10A0, 0x10FF), (0x1C90, 0x1CBF)],
    'Ethiopic': [(0x1200, 0x139F)],
    'Hangul': [(0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)],
    'kana': [(0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)],
    'Han': [(0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
            (0x20000, 0x323AF)],
}
OTHER_SCRIPT = 'other'

# Characters that are seldom meant. Joiners (U+200C, U+200D) and direction marks (U+200E, U+200F)
# are missing here, because Persian, Hindi, Hebrew and emoji need them.
ODD = {
    'control characters': [(0x00, 0x08), (0x0B, 0x0C), (0x0E, 0x1F), (0x7F, 0x9F)],
    'replacement characters': [(0xFFFD, 0xFFFD)],
    'private use': [(0xE000, 0xF8FF), (0xFDD0, 0xFDEF), (0xFFFE, 0xFFFF), (0xF0000, 0x10FFFF)],
    'zero-width spaces': [(0x200B, 0x200B), (0x2060, 0x2060)],
    'bidirectional controls': [(0x202A, 0x202E), (0x2066, 0x2069)],
    'byte order marks inside': [(0xFEFF, 0xFEFF)],
    'surrogates': [(0xD800, 0xDFFF)],
}
MOJIBAKE = 'mojibake'

# Numbers that class_table() holds; 0 is everything else.
SCRIPT_NAMES = [*SCRIPTS, OTHER_SCRIPT]
FIRST_SCRIPT = 1
FIRST_ODD = FIRST_SCRIPT + len(SCRIPT_NAMES)
CLASSES = FIRST_ODD + len(ODD)

# UTF-8 that was read as Latin-1 or Windows-1252: é becomes Ã©, a curly quote â€™, и Ð¸. The second
# and third bytes of UTF-8 are 80 to BF, which Windows-1252 shows as these characters.
_FOLLOWING = '[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]'
MOJIBAKE_PATTERN = re.compile(f'[ÂÃÐÑ]{_FOLLOWING}|â[\u0080€]{_FOLLOWING}|ï¿½|ï»¿')


@functools.cache
def class_table():
    """The class of each code point: uint8 (0x110000,).

    FIRST_SCRIPT + i for a letter of SCRIPT_NAMES[i], FIRST_ODD + i for a character of the i-th of
    ODD, 0 for digits, punctuation, spaces and all others."""
    table = np.zeros(0x110000, np.uint8)
    is_letter = np.array([category.startswith('L') for category in categories()])
    letters = np.flatnonzero(is_letter)
    table[letters] = FIRST_SCRIPT + SCRIPT_NAMES.index(OTHER_SCRIPT)
    for number, ranges in enumerate(SCRIPTS.values(), start=FIRST_SCRIPT):
        for first, last in ranges:
            table[first + np.flatnonzero(is_letter[first:last + 1])] = number
    for number, ranges in enumerate(ODD.values(), start=FIRST_ODD):
        for first, last in ranges:
            table[first:last + 1] = number
    return table
