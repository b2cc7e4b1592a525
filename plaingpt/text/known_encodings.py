"""
Recognises tiktoken's encodings in a tokenizer.json, by the digests of their vocabularies.
"""
import hashlib
import json

from plaingpt.text.hidden_names import merge_pairs
from plaingpt.text.tokenizer_layout import CL100K_WORDS, O200K_WORDS

# sha256 of the vocabulary and merges of an encoding, in the form of _digest_of_bpe(), and its name.
NAMES_OF_BPE = {
    '7b24c988c29eb2cd4ccf3838778d27f9bdcceadc0c2f2037a209403b45bed747': 'gpt2',
    '8d16c520fad521071bb5b47738aeeb4ec607fde26e5c0da36ee6fac12b821639': 'cl100k_base',
    'e843b42decbeda9849e124b9b862573bd15713bc028f5456c3bd7dcf1383683b': 'o200k_base',
}


def name_of_encoding(content):
    """The name of tiktoken's encoding that a tokenizer.json, known to be valid, holds, or None."""
    model = content['model']
    if model.get('type') != 'BPE' or content.get('normalizer') is not None:
        return None
    # Some files have '<|endoftext|>' among the added tokens alone, and some have more of those.
    vocab = dict(model['vocab'])
    for token in content.get('added_tokens', []):
        vocab[token['content']] = token['id']
    name = NAMES_OF_BPE.get(_digest_of_bpe(vocab, model['merges']))
    # With another treatment of the text before the merges, the same vocabulary gives other ids.
    before = content.get('pre_tokenizer') or {}
    if name == 'gpt2':
        splits_alike = (before.get('type') == 'ByteLevel' and before.get('use_regex', True)
                        and not before.get('add_prefix_space', True))
    else:
        splits_alike = before == {'cl100k_base': CL100K_WORDS, 'o200k_base': O200K_WORDS}.get(name)
    return name if splits_alike else None


def _digest_of_bpe(vocab, merges):
    """sha256 of {token: id} and of merges."""
    canonical = json.dumps([vocab, merge_pairs(merges)], sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode()).hexdigest()
