"""
Chats as documents: the token ids of a conversation, and the mask of those that a model learns.

A model for chats learns its replies, not the questions. In training it must read, before each
reply, exactly the tokens that it reads there later: those of the chat template's prompt.

What is learned, with the template ChatML as the example (learned tokens in brackets):

    <|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎[Hi!][<|im_end|>]⏎

The line break after the reply is not: by then a chat has stopped writing.
"""
import re
from datetime import datetime
from typing import NamedTuple

import numpy as np

from plaingpt.system.messages import UserError, explained
from plaingpt.text.chat_template import render_for, template_of

NOW = datetime(2026, 1, 1)  # for templates that write the date, so that tokens never depend on it


def encode_chats(tokenizer, conversations, origins=None):
    """Encodes conversations with the chat template of a tokenizer.

    conversations: lists of messages that check_messages() accepts.
    origins: where each comes from, for error messages.

    Returns a list with (ids, mask) for each: uint32 (length,) and uint8 (length,). The mask is 1
    where a model learns to predict the token: on what the template writes for an assistant message
    after the prompt for it, up to its last special token. It is 0 on all else, and on white space
    that follows that token.

    The ids before a reply are those of the prompt that render_for() writes. Each reply begins a
    token, also where its first characters would join the prompt's last ones, because that is how a
    model writes it. Special tokens come from the template alone: one that is written out in a
    message stays text.

    The document ends with one end_of_text: that of the last reply if it ends so, else one that is
    appended. If the reply has no end of its own, the appended one is learned, so that the model
    learns to stop.

    UserError if the template fails, or writes earlier messages differently once a later one
    follows, as some do with the thoughts before an answer."""
    template_of(tokenizer)  # raises where it has none
    special_tokens = _SpecialTokens(tokenizer)
    chats = []
    for number, messages in enumerate(conversations):
        origin = f'{origins[number]}: ' if origins is not None else ''
        with explained(UserError, prefix=origin):
            chats.append(_segments(tokenizer, messages, special_tokens))

    if special_tokens.encodes_texts_separately:
        encoded = _encode_pieces(tokenizer, chats)
    else:
        encoded = _encode_segments(tokenizer, chats)
    return [_joined(tokenizer, chat, arrays)
            for chat, arrays in zip(chats, encoded, strict=True)]


class _Segment(NamedTuple):
    """A part of a chat that is encoded on its own."""
    pieces: list       # of text, and the ids of the special tokens between them
    text: str          # the same as one text
    is_literal: bool   # whether the text has a special token's name that is just text
    is_learned: bool


def _segments(tokenizer, messages, special_tokens):
    """The _Segments of a chat: in turn what the model reads, and what it writes."""
    messages = [{'role': message['role'], 'content': message['content']} for message in messages]
    messages, disguise = special_tokens.disguised(messages)
    segments = []
    written = ''  # what the segments stand for
    whole = ''
    for number, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        prompt = render_for(tokenizer, messages[:number], now=NOW)
        whole = render_for(tokenizer, messages[:number + 1], add_generation_prompt=False,
                           now=NOW)
        if not prompt.startswith(written) or not whole.startswith(prompt):
            raise UserError(f"the chat template rewrites what stands before message {number + 1} "
                            'when that one follows, so no text of the whole chat holds what the '
                            'model reads: use another template, or a record for each reply')
        reply = whole[len(prompt):]
        reply = reply[:special_tokens.end_of(reply)]
        segments.append(special_tokens.segment(prompt[len(written):], disguise, False))
        segments.append(special_tokens.segment(reply, disguise, True))
        written = prompt + reply

    if messages[-1]['role'] != 'assistant':
        whole = render_for(tokenizer, messages, add_generation_prompt=False, now=NOW)
        if not whole.startswith(written):
            raise UserError('the chat template rewrites earlier messages when a later one follows: '
                            'use another template, or leave out what follows the last reply')
    segments.append(special_tokens.segment(whole[len(written):], disguise, False))
    return segments


class _SpecialTokens:
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
        """The _Segment for a text that a template made of disguised messages."""
        table = str.maketrans(disguise)
        pieces = []
        for number, part in enumerate(self.name.split(text)):
            is_name = number % 2 == 1  # split() returns text and names in turn
            if is_name:
                pieces.append(self.ids[part])
            elif part:
                pieces.append(part.translate(table) if disguise else part)
        plain = text.translate(table) if disguise else text
        return _Segment(pieces, plain, plain != text, is_learned)

    def end_of(self, reply):
        """Where the part of a reply ends that is learned: after its last special token.

        If text follows there, it is at the end of the reply."""
        last = None
        for match in self.name.finditer(reply):
            last = match
        ends_with_token = last is not None and not reply[last.end():].strip()
        return last.end() if ends_with_token else len(reply)


# ---- encoding segments ----

def _encode_pieces(tokenizer, chats):
    """The ids of all segments, a list of arrays for each chat. The pieces are encoded together."""
    texts = []
    for chat in chats:
        for segment in chat:
            texts += [piece for piece in segment.pieces if isinstance(piece, str)]
    encoded = iter(tokenizer.encode_corpus(texts))
    for chat in chats:
        arrays = []
        for segment in chat:
            parts = [np.zeros(0, np.uint32)]
            for piece in segment.pieces:
                parts.append(next(encoded) if isinstance(piece, str) else [piece])
            arrays.append(np.concatenate(parts).astype(np.uint32))
        yield arrays


def _encode_segments(tokenizer, chats):
    """As _encode_pieces(), for tokenizers that must see the special tokens with the text."""
    for chat in chats:
        arrays = []
        last_piece = None  # of the segments so far
        for segment in chat:
            if segment.is_literal:
                ids = _encode_literally(tokenizer, segment.pieces)
            elif last_piece is None:
                ids = tokenizer.encode(segment.text)
            else:
                ids = _encode_after(tokenizer, last_piece, segment.text)
            arrays.append(np.array(ids, np.uint32))
            if segment.pieces:
                last_piece = segment.pieces[-1]
        yield arrays


def _encode_literally(tokenizer, pieces):
    """The ids of pieces in which names of special tokens are text."""
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


def _joined(tokenizer, chat, arrays):
    """(ids, mask) of a chat from the ids of its segments."""
    masks = []
    for segment, ids in zip(chat, arrays, strict=True):
        masks.append(np.full(len(ids), segment.is_learned, np.uint8))
    ids = np.concatenate(arrays)
    mask = np.concatenate(masks)
    learned = np.flatnonzero(mask)
    ends = len(learned) > 0 and ids[learned[-1]] == tokenizer.end_of_text
    if tokenizer.end_of_text is not None and not ends:
        ids = np.append(ids, np.uint32(tokenizer.end_of_text))
        mask = np.append(mask, np.uint8(_stops_without_a_token(chat)))
    return ids, mask


def _stops_without_a_token(chat):
    """Whether a chat ends with a reply, and the template writes no token at its end."""
    if len(chat) < 3:  # what is read, a reply, and the rest
        return False
    last_reply = chat[-2]
    rest = chat[-1]
    if rest.pieces:
        return False
    return not last_reply.pieces or isinstance(last_reply.pieces[-1], str)
