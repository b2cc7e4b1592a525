"""
A tokenizer among the files of a model in Hugging Face's form: tokenizer.json, and what the files
beside it say of special tokens and of chats.

Models of the hub are downloaded file by file, so the functions here are given one that finds a
file: find(name) returns its path, or None if the model does not have it.
"""
import json
import os

from plaingpt.system.messages import UserError, explained
from plaingpt.text.tokenizer_json import HuggingFaceTokenizer, describe_tokenizer_json

TOKENIZER_JSON = 'tokenizer.json'


def tokenizer_in_file(path):
    """The tokenizer dict of a tokenizer.json, with what the files beside it say.

    UserError if it, or one of the others, is damaged."""
    folder = os.path.dirname(path)

    def find(name):
        beside = os.path.join(folder, name)
        return beside if os.path.isfile(beside) else None

    return read_tokenizer(path, find)


def read_tokenizer(path, find):
    """The tokenizer dict of a tokenizer.json, with what the files beside it say.

    path: of the tokenizer.json. UserError if it or one of the others is damaged."""
    text = _text_in(path)
    with explained(UserError, prefix=f'{path}: '):
        bos, eos = _special_tokens(find, text)
        return describe_tokenizer_json(text, bos, eos, _chat_template(find))


def _text_in(path):
    with (explained(OSError, UnicodeDecodeError, prefix=f'{path} cannot be read: '),
          open(path, encoding='utf-8') as file):
        return file.read()


def _read_json(find, name):
    """The dict in a JSON file; {} if the model does not have it. UserError if it is damaged."""
    path = find(name)
    if path is None:
        return {}
    try:
        content = json.loads(_text_in(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name} is damaged ({error}): save or download it again') from error
    if not isinstance(content, dict):
        raise UserError(f'{name} holds no JSON object: save or download it again')
    return content


def _special_tokens(find, tokenizer_json):
    """(bos, eos) of a model, each the text of a token, or None if no file names it."""
    tokens = {'bos': None, 'eos': None}
    for file in ('tokenizer_config.json', 'special_tokens_map.json'):
        entries = _read_json(find, file)
        for name in tokens:
            if tokens[name] is None:
                tokens[name] = _content_of(file, entries, f'{name}_token')
    if tokens['eos'] is None:
        # Some models name only its id, or several, of which the first is the usual one.
        ids = _read_json(find, 'generation_config.json').get('eos_token_id')
        first = ids[0] if isinstance(ids, list) and ids else ids
        if type(first) is int and 0 <= first < 2 ** 31:
            tokens['eos'] = HuggingFaceTokenizer(tokenizer_json).tokenizer.id_to_token(first)
    return tokens['bos'], tokens['eos']


def _content_of(file, entries, key):
    """The text of a token, which a file holds as text or as {'content': text}; None without one.

    Some files have '' for none."""
    token = entries.get(key)
    if isinstance(token, dict):
        token = token.get('content')
    if token is not None and not isinstance(token, str):
        raise UserError(f'the {key} in {file} is no text: save or download it again')
    return token or None


def _chat_template(find):
    """The Jinja template with which a model's messages become a prompt, or None. It is not run."""
    path = find('chat_template.jinja')
    if path is not None:
        return _text_in(path)
    templates = _read_json(find, 'tokenizer_config.json').get('chat_template')
    if isinstance(templates, str):
        return templates
    if isinstance(templates, list):  # of {'name': …, 'template': …}
        for template in templates:
            is_default = isinstance(template, dict) and template.get('name') == 'default'
            if is_default and isinstance(template.get('template'), str):
                return template['template']
    return None
