"""
Makes a tokenizer one for chats: adds the special tokens that begin and end a message, and the
template that writes a chat with them, in the form that is called ChatML.
"""
from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_export import bos_and_eos_of, tokenizer_json_of
from plaingpt.text.tokenizer_json import (CHAT_TOKENS, MESSAGE_ENDS, HuggingFaceTokenizer,
                                          describe_tokenizer_json)
from plaingpt.text.tokenizers import load_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

NO_CHATS_OF_CHARACTERS = (
    'a tokenizer of characters has no special tokens, which mark the messages of a chat: use '
    'another one, such as byte, bpe:4096 or gpt2')


def with_chat_tokens(tokenizer):
    """The tokenizer for chats that is made from another one, which gives the same ids to texts.

    MESSAGE_ENDS ends a text for it, so that a program that writes an answer stops there. A
    tokenizer with a chat template is returned as it is. UserError for one of characters."""
    meta = tokenizer.to_meta()
    if meta.get('chat_template') is not None:
        return tokenizer
    if meta['kind'] == 'char':
        raise UserError(NO_CHATS_OF_CHARACTERS)
    import tokenizers
    larger = HuggingFaceTokenizer(tokenizer_json_of(meta)).tokenizer
    tokens = [tokenizers.AddedToken(token, normalized=False) for token in CHAT_TOKENS]
    larger.add_special_tokens(tokens)
    ids = larger.get_vocab(with_added_tokens=True).values()
    if len(set(ids)) < len(ids):  # the package numbers tokens by their count
        raise UserError("the tokenizer's ids have gaps, so it can't get special tokens for a chat: "
                        'use another one, such as byte, bpe:4096 or gpt2')
    bos, _ = bos_and_eos_of(meta)
    return load_tokenizer(describe_tokenizer_json(larger.to_str(), bos, MESSAGE_ENDS,
                                                  CHAT_TEMPLATE))
