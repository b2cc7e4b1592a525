"""
Hides special tokens from the texts that a tokenizer.json encodes.

The package tokenizers has an option for that, encode_special_tokens, but it only stops the search
for added tokens. The model behind it still looks up words, or merges characters. So a text with the
name of a token in its vocabulary becomes that token. Here the tokens get names that no text has.
"""
import secrets


def hide_names(content, names):
    """The content of a valid tokenizer.json, in which these tokens have other names.

    All ids stay, and also the tokens that stand alongside a special one, which the package numbers
    by their order. A name of one character stays: without it, the model would drop the character
    from a text or call it unknown."""
    model = content['model']
    known = vocabulary_of(model)
    hidden = {}
    for name in names:
        is_character = len(name) == 1 and name in known
        if not is_character:
            hidden[name] = name + secrets.token_hex(16)  # chosen anew, so that nobody can write it

    changed = dict(model)
    if isinstance(model['vocab'], list):
        changed['vocab'] = [[hidden.get(token, token), score] for token, score in model['vocab']]
    else:
        changed['vocab'] = {hidden.get(token, token): i for token, i in model['vocab'].items()}
    if model.get('unk_token') in hidden:
        changed['unk_token'] = hidden[model['unk_token']]
    if 'merges' in model:
        changed['merges'] = _merges_without(hidden, model)

    added = []
    for token in content.get('added_tokens') or []:
        if token['content'] in hidden:
            token = token | {'content': hidden[token['content']], 'special': True}
        added.append(token)
    return content | {'model': changed, 'added_tokens': added}


def _merges_without(names, model):
    """The merges of a model that neither make one of the tokens nor use one."""
    prefix = model.get('continuing_subword_prefix') or ''
    kept = []
    for left, right in merge_pairs(model['merges']):
        made = left + right.removeprefix(prefix)
        if not {left, right, made} & names.keys():
            kept.append([left, right])
    return kept


def merge_pairs(merges):
    """The merges of a tokenizer.json as [left, right]; in older files they are 'left right'."""
    return [merge.split(' ') if isinstance(merge, str) else merge for merge in merges]


def vocabulary_of(model):
    """The tokens of a model in a valid tokenizer.json, without the added ones: a set."""
    if isinstance(model['vocab'], list):  # [token, score], in the order of their ids
        return {token for token, _ in model['vocab']}
    return set(model['vocab'])


def unknown_token_of(model):
    """The token of a model that stands for what it doesn't know, as text, or None."""
    if isinstance(model['vocab'], list):
        unknown = model.get('unk_id')
        return None if unknown is None else model['vocab'][unknown][0]
    return model.get('unk_token')
