"""
Prompts of chats: the ids that a model reads before it answers, and the tokens that end an answer.

The ids are those that the model has read in training (plaingpt/corpus/chat_documents.py): special
tokens come from the chat template alone, and each earlier reply begins a token.
"""
import functools
import itertools
from datetime import datetime

import numpy as np

from plaingpt.system.messages import UserError
from plaingpt.text.chat_template import render_for, template_of
from plaingpt.text.special_tokens import SpecialTokens, encode_literally, encode_segments

# To find where a reply begins, the chat is rendered once more for each. A chat with more replies is
# encoded as one text, which has other ids only where a reply begins with white space.
MOST_REPLIES = 64

# Contents that no template writes of its own accord, to find the tokens around them.
QUESTION = 'qzqzq'
ANSWER = 'zqzqz'


def encode_chat_prompt(tokenizer, messages):
    """The ids of a chat with the beginning of an answer, a list of int.

    messages: a list of {'role': 'user', 'content': 'Hello'}. The name of a special token in a
    content stays text.
    UserError if the tokenizer has no chat template, the template refuses the messages, or the
    vocabulary can't express them."""
    template_of(tokenizer)  # raises where it has none
    special_tokens = _special_tokens_of(tokenizer)
    messages, disguise = special_tokens.disguised(messages)
    segments = [special_tokens.segment(text, disguise, False)
                for text in _parts(tokenizer, messages, special_tokens)]
    if special_tokens.encodes_texts_separately:
        ids = []
        for segment in segments:
            ids += encode_literally(tokenizer, segment.pieces)
        return ids
    return np.concatenate(encode_segments(tokenizer, segments)).tolist()


@functools.lru_cache(maxsize=8)
def _special_tokens_of(tokenizer):
    return SpecialTokens(tokenizer)


def _parts(tokenizer, messages, special_tokens):
    """The text of a prompt, cut where earlier replies begin and end: a list of str.

    It is cut as in training, so that each part has the same ids as there."""
    now = datetime.now()  # of all renderings, so that they agree about the date
    text = render_for(tokenizer, messages, now=now)
    replies = []
    for number, message in enumerate(messages):
        if message['role'] == 'assistant':
            replies.append(number)
    if len(replies) > MOST_REPLIES:
        return [text]
    cuts = []
    for number in replies:
        try:
            before = render_for(tokenizer, messages[:number], now=now)
            whole = render_for(tokenizer, messages[:number + 1], False, now)
        except UserError:
            return [text]  # the template refuses a chat that ends here, though not this one
        if not whole.startswith(before) or not text.startswith(whole):
            return [text]  # the template rewrites what stands before a later message
        begin = len(before)
        cuts += [begin, begin + special_tokens.end_of(whole[begin:])]
    parts = []
    for begin, end in itertools.pairwise([0, *cuts, len(text)]):
        parts.append(text[begin:end])
    return parts


@functools.lru_cache(maxsize=8)
def tokens_that_end_a_reply(tokenizer):
    """The ids at which an answer in a chat ends, a frozenset of int.

    They are the token that ends a text, and every special token that the template writes between a
    reply and the next message: <|im_end|> in ChatML, and <|im_start|> for a model that forgets the
    first. UserError if the tokenizer has no chat template."""
    template_of(tokenizer)
    ends = set()
    if tokenizer.end_of_text is not None:
        ends.add(tokenizer.end_of_text)
    question = {'role': 'user', 'content': QUESTION}
    answer = {'role': 'assistant', 'content': ANSWER}
    try:
        text = render_for(tokenizer, [question, answer, question], add_generation_prompt=False)
    except UserError:
        return frozenset(ends)  # the template refuses even this chat; each prompt will say why
    after_reply = text.rpartition(ANSWER)[2]
    before_question = after_reply.rpartition(QUESTION)[0]
    special_tokens = _special_tokens_of(tokenizer)
    for name in special_tokens.name.findall(before_question):
        ends.add(special_tokens.ids[name])
    return frozenset(ends)
