"""
Special tokens in texts with several speakers: a template's own become ids, and the names of special
tokens that somebody writes out in a message stay text.

A chat template makes one text of all messages. Between what the template wrote and what a person
wrote no trace is left there, so the messages are disguised before, and the disguise is taken off
after the text is cut at the special tokens.
"""
import re
from typing import NamedTuple

import numpy as np


class Segment(NamedTuple):
    """A part of a chat that is encoded on its own."""
    pieces: list       # of text, and the ids of the special tokens between them
    text: str          # the same as one text
    is_literal: bool   # whether the text has a special token's name that is just text
    is_learned: bool


class SpecialTokens:
    """The special tokens of a tokenizer, and the disguise in which text doesn't become one."""

    def __init__(self, tokenizer):
        self.ids = tokenizer.special_ids
        independent = True
        for token in tokenizer.tokenizer.get_added_tokens_decoder().values():
            # Such a token takes in the space around it, or depends on what stands beside it.
            looks_around = token.lstrip or token.rstrip or token.single_word
            if token.content in self.ids and looks_around:
                independent = False
        # Where two begin at the same place, the longer one counts.
        names = sorted(self.ids, key=len, reverse=True)
        either = '|'.join(re.escape(name) for name in names) or '(?!)'  # (?!) matches nothing
        self.name = re.compile(f'({either})')
        self.first_char_of_name = re.compile(f'(?={either})(.)', re.DOTALL)
        # Whether the texts between special tokens may be encoded one by one. Some tokenizers put
        # a space before each text.
        adds_nothing = (tokenizer.encode('\na') == tokenizer.encode('\n') + tokenizer.encode('a'))
        self.encodes_texts_separately = independent and adds_nothing

    def disguised(self, messages):
        """Replaces the first character of each special token that is written out in a message.

        The template then runs as ever, and in its output only its own special tokens are whole.
        Returns the messages, and {character in its place: character}."""
        names = set()
        for message in messages:
            names.update(self.first_char_of_name.findall(message['content']))
        if not names:
            return messages, {}
        taken = set()
        for message in messages:
            taken.update(message['content'])
        # The search begins with noncharacters, which hardly any text has.
        free = (chr(code) for code in range(0xFDD0, 0x110000) if chr(code) not in taken)
        stand_ins = dict(zip(sorted(names), free, strict=False))

        def stand_in_of(match):
            return stand_ins[match.group(1)]

        changed = []
        for message in messages:
            content = self.first_char_of_name.sub(stand_in_of, message['content'])
            changed.append({'role': message['role'], 'content': content})
        return changed, {stand_in: char for char, stand_in in stand_ins.items()}

    def segment(self, text, disguise, is_learned):
        """The Segment for a text that a template made of disguised messages."""
        table = str.maketrans(disguise)
        pieces = []
        for number, part in enumerate(self.name.split(text)):
            is_name = number % 2 == 1  # split() returns text and names in turn
            if is_name:
                pieces.append(self.ids[part])
            elif part:
                pieces.append(part.translate(table) if disguise else part)
        plain = text.translate(table) if disguise else text
        return Segment(pieces, plain, plain != text, is_learned)

    def end_of(self, reply):
        """Where the part of a reply ends that is learned: after its last special token.

        If text follows there, it is at the end of the reply."""
        last = None
        for match in self.name.finditer(reply):
            last = match
        ends_with_token = last is not None and not reply[last.end():].strip()
        return last.end() if ends_with_token else len(reply)


# ---- encoding segments ----

def encode_segments(tokenizer, segments):
    """The ids of the Segments of one text, a list with a uint32 array (length,) for each.

    It suits every tokenizer, also those that must see the special tokens with the text. UserError
    if the vocabulary can't express a piece."""
    arrays = []
    last_piece = None  # of the segments so far
    for segment in segments:
        if segment.is_literal:
            ids = encode_literally(tokenizer, segment.pieces)
        elif last_piece is None:
            ids = tokenizer.encode(segment.text)
        else:
            ids = _encode_after(tokenizer, last_piece, segment.text)
        arrays.append(np.array(ids, np.uint32))
        if segment.pieces:
            last_piece = segment.pieces[-1]
    return arrays


def encode_literally(tokenizer, pieces):
    """The ids of pieces in which names of special tokens are text: a list of int."""
    ids = []
    for piece in pieces:
        if isinstance(piece, str):
            ids += tokenizer.encode(piece, special=False)
        else:
            ids.append(piece)
    return ids


def _encode_after(tokenizer, last_piece, text):
    """The ids of a text that follows a special token, or more text.

    A tokenizer may put a space before the first text alone, or before each that follows a special
    token."""
    context = '\n'
    if not isinstance(last_piece, str):
        context = tokenizer.decode([last_piece])
    before = tokenizer.encode(context)
    ids = tokenizer.encode(context + text)
    if ids[:len(before)] == before:
        return ids[len(before):]
    return tokenizer.encode(text)  # the line break has become one token with the text
