"""
Tokenizers for transformers: the tokenizer.json and the tokenizer_config.json of any tokenizer.
"""
import json

from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_json import END_OF_TEXT
from plaingpt.text.tokenizer_layout import (BYTE_LEVEL, added_token, byte_level_content,
                                            char_content)
from plaingpt.text.tokenizers import load_tokenizer, read_gpt2_bpe


def tokenizer_json_of(meta):
    """The text of a Hugging Face tokenizer.json that gives the same ids as a tokenizer dict.

    meta: the dict, see tokenizers.py. UserError if it is damaged, or if a character has no UTF-8
    form."""
    tokenizer = load_tokenizer(meta)
    if meta['kind'] == 'tokenizer.json':
        return tokenizer.json_text
    if meta['kind'] == 'gpt2':
        vocab, merges = read_gpt2_bpe()
        end = added_token(END_OF_TEXT, vocab[END_OF_TEXT], special=True)
        content = byte_level_content(vocab, merges, [end], BYTE_LEVEL)
        return json.dumps(content, ensure_ascii=False)

    for char in tokenizer.chars:
        if '\ud800' <= char <= '\udfff':
            raise UserError(f'the model has a token for {char!r}, half a surrogate pair, which no '
                            'file in UTF-8 can hold: train it on a text without that character')
    return json.dumps(char_content(tokenizer.chars), ensure_ascii=False)


def tokenizer_config_of(meta):
    """The content of the tokenizer_config.json beside that tokenizer.json, a dict.

    Tokens that the tokenizer lacks are absent. UserError if the tokenizer dict is damaged."""
    content = json.loads(tokenizer_json_of(meta))
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    bos, eos = bos_and_eos_of(meta)
    if bos is not None:
        config['bos_token'] = bos
    if eos is not None:
        config['eos_token'] = eos
    model = content['model']
    if model.get('unk_token') in model['vocab']:
        config['unk_token'] = model['unk_token']
    if meta.get('chat_template') is not None:
        config['chat_template'] = meta['chat_template']
    return config


def bos_and_eos_of(meta):
    """The tokens that begin and end a text, each as text, None if the tokenizer has none.

    UserError if the tokenizer dict is damaged."""
    if meta['kind'] == 'gpt2':
        return END_OF_TEXT, END_OF_TEXT
    if meta['kind'] == 'char':
        return None, None
    tokenizer = load_tokenizer(meta)
    eos = None
    if tokenizer.end_of_text is not None:  # perhaps recognised by its name
        eos = tokenizer.tokenizer.id_to_token(tokenizer.end_of_text)
    return tokenizer.bos, eos
