"""
Tokenizers for other programs: the tokenizer.json and tokenizer_config.json of any tokenizer for
transformers, and a file of ranks for tiktoken.
"""
import json

from plaingpt.system.messages import UserError
from plaingpt.text.fast_encoding import rank_file
from plaingpt.text.hidden_names import merge_pairs
from plaingpt.text.tiktoken_encodings import merges_of, read_gpt2_bpe
from plaingpt.text.tokenizer_json import END_OF_TEXT
from plaingpt.text.tokenizer_layout import (BYTE_CHARACTERS, BYTE_LEVEL, CL100K_WORDS, O200K_WORDS,
                                            added_token, byte_level_content, char_content,
                                            written_bytes)
from plaingpt.text.tokenizers import load_tokenizer

# GPT-2's split of a text into words, as tiktoken takes it.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# ---- Hugging Face ----

def tokenizer_json_of(meta):
    """The text of a Hugging Face tokenizer.json that gives the same ids as a tokenizer dict.

    meta: the dict, see tokenizers.py. UserError if it is damaged, or if a character has no UTF-8
    form."""
    tokenizer = load_tokenizer(meta)
    if meta['kind'] == 'tokenizer.json':
        return tokenizer.json_text
    if meta['kind'] == 'char':
        content = _content_of_characters(tokenizer.chars)
    elif meta['kind'] == 'gpt2':
        vocab, merges = read_gpt2_bpe()
        end = added_token(END_OF_TEXT, vocab[END_OF_TEXT], special=True)
        content = byte_level_content(vocab, merges, [end], BYTE_LEVEL)
    else:
        content = _content_of_encoding(tokenizer)
    return json.dumps(content, ensure_ascii=False)


def _content_of_characters(chars):
    for char in chars:
        if '\ud800' <= char <= '\udfff':
            raise UserError(f'the model has a token for {char!r}, half a surrogate pair, which no '
                            'file in UTF-8 can hold: train it on a text without that character')
    return char_content(chars)


def _content_of_encoding(tokenizer):
    """The content of a tokenizer.json for a TiktokenTokenizer with cl100k_base or o200k_base."""
    tokens = tokenizer.tokens()
    vocab = {written_bytes(token): i for i, token in enumerate(tokens)}
    merges = [(written_bytes(left), written_bytes(right)) for left, right in merges_of(tokens)]
    added = []
    for token, token_id in sorted(tokenizer.special_ids.items(), key=lambda item: item[1]):
        vocab[token] = token_id
        added.append(added_token(token, token_id, special=True))
    if tokenizer.name == 'cl100k_base':
        # All tokens can be merged, so this option changes no id. Llama 3, whose words these are,
        # has it, and so llama.cpp knows the two together.
        return byte_level_content(vocab, merges, added, CL100K_WORDS, ignore_merges=True)
    return byte_level_content(vocab, merges, added, O200K_WORDS)


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
    if meta['kind'] in ('gpt2', 'tiktoken'):
        return END_OF_TEXT, END_OF_TEXT
    if meta['kind'] == 'char':
        return None, None
    tokenizer = load_tokenizer(meta)
    eos = None
    if tokenizer.end_of_text is not None:  # perhaps recognised by its name
        eos = tokenizer.tokenizer.id_to_token(tokenizer.end_of_text)
    return tokenizer.bos, eos


# ---- tiktoken ----

def tiktoken_ranks_of(meta):
    """The content of a file of ranks that tiktoken reads, bytes, or None.

    Its lines are the tokens that are made by merging bytes, each in base64, and their ids. Special
    tokens and the split into words stand beside it in code: see tiktoken_encoding_of(). It is None
    for a tokenizer that tiktoken can't express."""
    tokens = _ranked_tokens(meta)
    return None if tokens is None else rank_file(tokens)


def tiktoken_encoding_of(meta, name='plaingpt'):
    """A tiktoken.Encoding that gives the same ids as a tokenizer dict.

    name: of the encoding. UserError if tiktoken can't express the tokenizer, or is missing."""
    tokenizer = load_tokenizer(meta)
    if meta['kind'] in ('gpt2', 'tiktoken'):
        return tokenizer.bpe
    tokens = _ranked_tokens(meta)
    if tokens is None:
        raise UserError("tiktoken can't express this tokenizer: it knows byte-level byte-pair "
                        "encodings whose words are split as GPT-2's and whose ids have the order "
                        'of the merges')
    try:
        import tiktoken
    except ImportError:
        raise UserError("a tiktoken.Encoding needs the package tiktoken: "
                        'pip install tiktoken') from None
    special = {}
    # The package tokenizers numbers added tokens itself, whatever the file says.
    for token_id, token in tokenizer.tokenizer.get_added_tokens_decoder().items():
        special[token.content] = token_id
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def _ranked_tokens(meta):
    """The tokens made by merging bytes, a list of bytes in the order of their ids, or None."""
    tokenizer = load_tokenizer(meta)
    if meta['kind'] in ('gpt2', 'tiktoken'):
        return tokenizer.tokens()
    if meta['kind'] == 'char':
        return None
    content = json.loads(tokenizer.json_text)
    model = content['model']
    added = content.get('added_tokens') or []
    has_gpt2s_words = content.get('pre_tokenizer') == BYTE_LEVEL
    has_no_options = content.get('normalizer') is None and not model.get('ignore_merges')
    all_special = all(token.get('special') for token in added)
    if model.get('type') != 'BPE' or not (has_gpt2s_words and has_no_options and all_special):
        return None

    vocab = dict(model['vocab'])
    for token in added:
        vocab.pop(token['content'], None)
    byte_of = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    tokens = []
    for text in sorted(vocab, key=vocab.get):
        is_next = vocab[text] == len(tokens)
        if not is_next or text == '' or not set(text) <= byte_of.keys():
            return None
        tokens.append(_bytes_of(text, byte_of))
    listed = []
    for left, right in merge_pairs(model['merges']):
        if not set(left + right) <= byte_of.keys():
            return None  # it takes part of a special token
        listed.append((_bytes_of(left, byte_of), _bytes_of(right, byte_of)))
    # tiktoken merges in the order of the ids, and any two tokens that make one.
    if len({token for token in tokens if len(token) == 1}) < 256 or listed != merges_of(tokens):
        return None
    return tokens


def _bytes_of(text, byte_of):
    return bytes(byte_of[character] for character in text)
