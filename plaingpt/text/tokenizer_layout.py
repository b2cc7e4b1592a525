"""
The layout of Hugging Face's tokenizer.json: builds the content of such a file, a dict, from a
vocabulary of characters, of byte-level byte-pair encoding, or of SentencePiece.
"""
SPACE = '\N{LOWER ONE EIGHTH BLOCK}'  # what SentencePiece writes for a space

# GPT-2's pre-tokenizer: its regular expression, then each byte of a word as one character.
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True,
              'use_regex': True}
# The second half of that alone, for tokenizers with another regular expression.
BYTES_ONLY = {**BYTE_LEVEL, 'use_regex': False}


def regex_then_bytes(pattern):
    """A pre-tokenizer with a regular expression of its own in place of GPT-2's."""
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated',
             'invert': False}
    return {'type': 'Sequence', 'pretokenizers': [split, BYTES_ONLY]}


# How cl100k_base splits words, and Llama 3 after it. tiktoken's own expression differs in the
# spaces that end a text after a line break, which no token holds together with that break.
CL100K_WORDS = regex_then_bytes(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# How o200k_base splits them: a capital letter after a small one begins a word.
O200K_WORDS = regex_then_bytes(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_characters():
    """The 256 characters that stand for the bytes in the tokens of a byte-level vocabulary.

    Index: the byte. Printable characters stand for themselves, the other 68 for those from
    U+0100 on."""
    characters = []
    replaced = 0
    for byte in range(256):
        is_printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        if is_printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + replaced))
            replaced += 1
    return characters


def char_content(chars):
    """A tokenizer.json in which each of the characters is a token, with its index as id.

    The package tokenizers refuses a text with any other character, as CharTokenizer does."""
    ids = {char: i for i, char in enumerate(chars)}
    # This model looks each piece up as it is, where BPE would skip unknown characters silently.
    model = {'type': 'WordLevel', 'vocab': ids, 'unk_token': '<unk>'}
    # '.' would not match a line break.
    single = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated',
              'invert': False}
    # Without a decoder, there would be a space between two tokens.
    return _content(model, pre_tokenizer=single, decoder={'type': 'Fuse'})


def byte_level_content(vocab, merges, added_tokens, pre_tokenizer, normalizer=None,
                       ignore_merges=False, bos=None):
    """A tokenizer.json with byte-level byte-pair encoding, as GPT-2 introduced it.

    vocab: {token: id}, each byte of a token as the character that stands for it; the added tokens
    are among them. merges: list of (left, right). added_tokens: see added_token().
    ignore_merges: a word that is a token is that token, whatever the merges would make of it.
    bos: (token, id) with which a text begins, or None."""
    model = _bpe(vocab, merges, ignore_merges=ignore_merges)
    return _content(model, added_tokens=added_tokens, normalizer=normalizer,
                    pre_tokenizer=pre_tokenizer, post_processor=_beginning(bos),
                    decoder=BYTE_LEVEL)


def sentencepiece_content(vocab, merges, added_tokens, unk, adds_space, bos=None):
    """A tokenizer.json with SentencePiece's byte-pair encoding, which has tokens for single bytes.

    unk: the token of what has no other, or None. adds_space: a text gets a space before its first
    word. The other arguments are those of byte_level_content()."""
    model = _bpe(vocab, merges, unk_token=unk, byte_fallback=True, fuse_unk=True)
    normalizers = [{'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}]
    decoders = [{'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '},
                {'type': 'ByteFallback'}, {'type': 'Fuse'}]
    if adds_space:
        normalizers.insert(0, {'type': 'Prepend', 'prepend': SPACE})
        decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
    return _content(model, added_tokens=added_tokens,
                    normalizer={'type': 'Sequence', 'normalizers': normalizers},
                    post_processor=_beginning(bos),
                    decoder={'type': 'Sequence', 'decoders': decoders})


def added_token(token, token_id, special):
    """A token that is found in a text before anything else.

    special: not a part of the text, like '<|endoftext|>'."""
    return {'id': token_id, 'content': token, 'single_word': False, 'lstrip': False,
            'rstrip': False, 'normalized': False, 'special': special}


def _content(model, added_tokens=(), normalizer=None, pre_tokenizer=None, post_processor=None,
             decoder=None):
    return {'version': '1.0', 'truncation': None, 'padding': None,
            'added_tokens': list(added_tokens), 'normalizer': normalizer,
            'pre_tokenizer': pre_tokenizer, 'post_processor': post_processor,
            'decoder': decoder, 'model': model}


def _bpe(vocab, merges, unk_token=None, byte_fallback=False, fuse_unk=False, ignore_merges=False):
    return {'type': 'BPE', 'dropout': None, 'unk_token': unk_token,
            'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'fuse_unk': fuse_unk,
            'byte_fallback': byte_fallback, 'ignore_merges': ignore_merges, 'vocab': vocab,
            'merges': [list(pair) for pair in merges]}


def _beginning(bos):
    """The post-processor that puts a token before each text, None for none."""
    if bos is None:
        return None
    token, token_id = bos

    def text(name, type_id):
        return [{'SpecialToken': {'id': token, 'type_id': type_id}},
                {'Sequence': {'id': name, 'type_id': type_id}}]

    return {'type': 'TemplateProcessing', 'single': text('A', 0),
            'pair': text('A', 0) + text('B', 1),
            'special_tokens': {token: {'id': token, 'ids': [token_id], 'tokens': [token]}}}


BYTE_CHARACTERS = byte_characters()


def written_bytes(token):
    """A token of a byte-level vocabulary, which is bytes, as it stands in a tokenizer.json."""
    return ''.join(BYTE_CHARACTERS[byte] for byte in token)
