"""
The tokenizers that --tokenizer can name:

    gpt2, cl100k_base, o200k_base   the vocabulary of GPT-2, GPT-4, GPT-4o
    byte                            a token for each byte
    char                            a token for each character of the text
    bpe:4096                        byte-pair encoding with 4,096 tokens, trained on the text
    PATH                            a tokenizer.json, a folder that holds one, or a data set

Those for chats also have special tokens and a template, see chat_tokens.py.
"""
import os
import re
from dataclasses import dataclass

from plaingpt.system.messages import UserError
from plaingpt.text.chat_tokens import NO_CHATS_OF_CHARACTERS, with_chat_tokens
from plaingpt.text.data_sets import folder_of, read_meta
from plaingpt.text.tiktoken_encodings import ENCODINGS
from plaingpt.text.tokenizer_folder import TOKENIZER_JSON, tokenizer_in_file
from plaingpt.text.tokenizer_json import CHAT_TOKENS, END_OF_TEXT
from plaingpt.text.tokenizer_training import byte_tokenizer, train_tokenizer
from plaingpt.text.tokenizers import CharTokenizer, load_tokenizer

KNOWN = f'{", ".join(ENCODINGS)}, byte, char, bpe:4096 or the path of a tokenizer.json or data set'
LARGEST_VOCABULARY = 1_000_000


@dataclass(frozen=True)
class Choice:
    """A tokenizer that choose() has understood."""
    name: str          # as it was given
    chat: bool         # with special tokens and a template for chats
    trained_size: int  # tokens in the vocabulary to train; 0: none
    path: str          # of the tokenizer.json, folder or data set; '': none

    @property
    def needs_text(self):
        """Whether it is made from the text that it will encode."""
        return self.trained_size > 0 or self.name == 'char'

    def tokenizer(self):
        """The tokenizer, of a choice that needs no text.

        UserError if its files can't be fetched or read, or if it can't become one for chats."""
        if self.path:
            found = load_tokenizer(_tokenizer_dict_at(self.path))
        elif self.name == 'byte':
            found = byte_tokenizer()
        else:
            found = load_tokenizer({'kind': 'tiktoken', 'name': self.name})
        return with_chat_tokens(found) if self.chat else found

    def train(self, texts):
        """The tokenizer, made from texts: an iterable of str, for char of all characters.

        UserError if the texts are too short."""
        if self.name == 'char':
            characters = set()
            for text in texts:
                characters.update(text)
            if not characters:
                raise UserError('there is no text, so there are no characters to make a tokenizer '
                                'of: check the files')
            return CharTokenizer(sorted(characters))
        trained = train_tokenizer(texts, self.trained_size, _special_tokens(self.chat))
        return with_chat_tokens(trained) if self.chat else trained


def choose(spec, chat=False):
    """The Choice that the text of --tokenizer names.

    chat: with special tokens and a template for chats.
    UserError if nothing has this name, or if it can't be for chats."""
    if spec == 'char' and chat:
        raise UserError(f'tokenizer={spec!r}: {NO_CHATS_OF_CHARACTERS}')
    if spec in ('char', 'byte') or spec in ENCODINGS:
        return Choice(spec, chat, trained_size=0, path='')
    if spec.startswith('bpe:'):
        return Choice(spec, chat, _trained_size(spec, chat), path='')
    return Choice(spec, chat, trained_size=0, path=_existing_path(spec))


def _special_tokens(chat):
    return (END_OF_TEXT, *CHAT_TOKENS) if chat else (END_OF_TEXT,)


def _trained_size(spec, chat):
    """The number of tokens that bpe:N asks for. UserError if it is none, or too small or large."""
    digits = spec.removeprefix('bpe:')
    special = _special_tokens(chat)
    smallest = 256 + 1 + len(special)
    size = int(digits) if re.fullmatch('[0-9]{1,9}', digits) else 0
    if not smallest <= size <= LARGEST_VOCABULARY:
        raise UserError(f'tokenizer={spec!r}: write the number of tokens after the colon, as in '
                        f'bpe:4096, from {smallest} (256 bytes, 1 merge and {", ".join(special)}) '
                        f'to {LARGEST_VOCABULARY:,}')
    return size


# ---- tokenizers in files ----

def _existing_path(spec):
    """The path of the file or folder that is meant. UserError if there is none."""
    path = os.path.expanduser(spec)
    for candidate in (path, folder_of(path)):
        if spec and os.path.exists(candidate):
            return candidate
    raise UserError(f'tokenizer={spec!r} is no tokenizer, and no such file or folder exists here '
                    f'or in data/: use {KNOWN}')


def _tokenizer_dict_at(path):
    """The tokenizer dict in a tokenizer.json, a folder with one, or a data set."""
    if os.path.isfile(path):
        return tokenizer_in_file(path)
    if os.path.exists(os.path.join(path, 'meta.json')):
        return read_meta(path)['tokenizer']
    tokenizer_json = os.path.join(path, TOKENIZER_JSON)
    if os.path.exists(tokenizer_json):
        return tokenizer_in_file(tokenizer_json)
    if os.path.exists(os.path.join(path, 'meta.pkl')):  # a data set of nanoGPT
        return read_meta(path)['tokenizer']
    raise UserError(f'{path} holds no tokenizer, neither meta.json nor {TOKENIZER_JSON}: name '
                    'another folder')
