"""
Chats as documents: the token ids of a conversation, and the mask of those that a model learns.

A model for chats learns its replies, not the questions. In training it must read, before each
reply, exactly the tokens that it reads there later: those of the chat template's prompt.

What is learned, with the template ChatML as the example (learned tokens in brackets):

    <|im_start|>user⏎Hello<|im_end|>⏎<|im_start|>assistant⏎[Hi!][<|im_end|>]⏎

The line break after the reply is not: by then a chat has stopped writing.
"""
from datetime import datetime

import numpy as np

from plaingpt.system.messages import UserError, explained
from plaingpt.text.chat_template import render_for, template_of
from plaingpt.text.special_tokens import SpecialTokens, encode_segments

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
    special_tokens = SpecialTokens(tokenizer)
    chats = []
    for number, messages in enumerate(conversations):
        origin = f'{origins[number]}: ' if origins is not None else ''
        with explained(UserError, prefix=origin):
            chats.append(_segments(tokenizer, messages, special_tokens))

    if special_tokens.encodes_texts_separately:
        encoded = _encode_pieces(tokenizer, chats)
    else:
        encoded = [encode_segments(tokenizer, chat) for chat in chats]
    return [_joined(tokenizer, chat, arrays)
            for chat, arrays in zip(chats, encoded, strict=True)]


def _segments(tokenizer, messages, special_tokens):
    """The Segments of a chat: in turn what the model reads, and what it writes."""
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
