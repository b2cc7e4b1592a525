"""
Writes a tokenizer into the metadata of a GGUF file: makes the entries for a tokenizer dict.

Byte-level byte-pair encoding becomes llama.cpp's kind 'gpt2', and characters its kind 'rwkv'.
"""
import json

from plaingpt.formats.gguf_tokenizer_reading import (CONTROL, DUMMY_MERGE, ESCAPES, NORMAL,
                                                     PRE_TOKENIZERS, UNUSED, USER_DEFINED)
from plaingpt.system.messages import UserError, warn
from plaingpt.text.tokenizer_export import bos_and_eos_of, tokenizer_json_of
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer
from plaingpt.text.tokenizers import load_tokenizer


def gguf_metadata_of(meta, vocab_size):
    """The entries of a GGUF file's metadata for a tokenizer dict.

    vocab_size: rows of the model's embedding; those without a token get an unused one.

    Returns {key: value} of str, bool, int and lists of them. llama.cpp gives the same ids to every
    text. UserError if it can't, or if the vocabulary is larger than the model's."""
    tokenizer = load_tokenizer(meta)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f'the tokenizer has {tokenizer.vocab_size} tokens, but the model has '
                        f'{vocab_size}: use the tokenizer that it was trained with')
    if meta['kind'] == 'char':
        return _metadata_of_characters(tokenizer.chars, vocab_size)
    bos, eos = bos_and_eos_of(meta)
    content = _canonical(tokenizer_json_of(meta))
    return _metadata_of_byte_level(content, bos, eos, meta.get('chat_template'), vocab_size)


def _metadata_of_characters(chars, vocab_size):
    # As 'gpt2', 'llama' or 't5', llama.cpp would take one of the first characters (11, 2 or 1) for
    # the end of a text and stop there, and no entry can tell it otherwise. 'rwkv' has no such
    # default, and the longest token that fits is the character.
    if not ''.join(chars).isascii():
        warn('if a prompt has a character that the model does not know and whose first byte in '
             'UTF-8 is that of one it knows, like é and è, llama.cpp takes more and more memory: '
             "check prompts against the model's characters")
    tokens = {i: ESCAPES.get(char, char) for i, char in enumerate(chars)}
    types = dict.fromkeys(tokens, NORMAL)
    return {'tokenizer.ggml.model': 'rwkv', **_rows(tokens, types, vocab_size),
            'tokenizer.ggml.add_bos_token': False}


def _metadata_of_byte_level(content, bos, eos, chat_template, vocab_size):
    model = content['model']
    pre = _name_of_pre_tokenizer(content)
    if eos is None:
        raise _no_place('without a token that ends a text: llama.cpp would take token 11 for one')
    tokens = {token_id: token for token, token_id in model['vocab'].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in content['added_tokens']:
        if token['lstrip'] or token['rstrip'] or token['single_word']:
            raise _no_place(f'whose token {token["content"]!r} takes the spaces around it')
        tokens[token['id']] = token['content']
        types[token['id']] = CONTROL if token['special'] else USER_DEFINED
    ids = {token: token_id for token_id, token in tokens.items()}

    merges = [f'{left} {right}' for left, right in model['merges']]
    metadata = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': pre,
                **_rows(tokens, types, vocab_size),
                'tokenizer.ggml.merges': merges or [DUMMY_MERGE],
                'tokenizer.ggml.eos_token_id': ids[eos],
                'tokenizer.ggml.add_bos_token': _begins_with(content, bos)}
    if bos is not None:
        metadata['tokenizer.ggml.bos_token_id'] = ids[bos]
    if chat_template is not None:
        metadata['tokenizer.chat_template'] = chat_template
    return metadata


def _name_of_pre_tokenizer(content):
    """The tokenizer.ggml.pre of the content of a tokenizer.json. UserError if there is none."""
    model = content['model']
    if model['type'] != 'BPE' or (content['decoder'] or {}).get('type') != 'ByteLevel':
        raise _no_place('that is not byte-level byte-pair encoding')
    for option in ('dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model[option]:
            raise _no_place(f'with the option {option} in its tokenizer.json')
    for name, known in PRE_TOKENIZERS.items():
        splits_alike = content['pre_tokenizer'] == known.pre_tokenizer
        normalizes_alike = content['normalizer'] in (None, known.normalizer)
        merges_alike = model['ignore_merges'] == known.ignore_merges
        if splits_alike and normalizes_alike and merges_alike:
            return name
    raise _no_place('with this normalizer, pre_tokenizer or ignore_merges in its tokenizer.json: '
                    f'this program knows those of {", ".join(PRE_TOKENIZERS)}')


def _begins_with(content, bos):
    """Whether the tokenizer begins each text with bos. UserError if it adds anything else."""
    processor = content['post_processor'] or {'type': 'ByteLevel'}
    if processor['type'] == 'ByteLevel':
        return False
    if processor['type'] == 'Sequence' and len(processor['processors']) == 2:
        processor = processor['processors'][1]  # Llama 3 has a ByteLevel before the template
    begin = {'SpecialToken': {'id': bos, 'type_id': 0}}
    text = {'Sequence': {'id': 'A', 'type_id': 0}}
    if processor.get('single') == [text]:
        return False
    if processor.get('single') == [begin, text]:
        return True
    raise _no_place('with this post_processor in its tokenizer.json')


def _canonical(json_text):
    """The content of a tokenizer.json, every option in it, and merges as pairs."""
    content = json.loads(HuggingFaceTokenizer(json_text).tokenizer.to_str())
    for part in _parts_of(content['pre_tokenizer']):
        if part['type'] == 'ByteLevel':
            part['trim_offsets'] = True  # which changes no id
    return content


def _parts_of(pre_tokenizer):
    """The pre-tokenizers of a sequence, or the one, as a list."""
    if pre_tokenizer is None:
        return []
    return pre_tokenizer.get('pretokenizers', [pre_tokenizer])


def _rows(tokens, types, vocab_size):
    """The entries for tokens, {id: text}, and their types, with a token in each row."""
    texts = []
    for token_id in range(vocab_size):
        texts.append(tokens.get(token_id, f'[PAD{token_id}]'))
    if len(set(texts)) < len(texts):
        raise _no_place('with several tokens of one text')
    return {'tokenizer.ggml.tokens': texts,
            'tokenizer.ggml.token_type': [types.get(i, UNUSED) for i in range(vocab_size)]}


def _no_place(fault):
    return UserError(f'a GGUF file has no place for a tokenizer {fault}: export to Hugging Face '
                     'with --to=hf')
