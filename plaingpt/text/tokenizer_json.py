"""
Tokenizers in Hugging Face's file format: reads a tokenizer.json, and recognises those of tiktoken's
encodings and of characters.
"""
import contextlib
import functools
import json

import numpy as np

from plaingpt.system.messages import UserError
from plaingpt.text.fast_encoding import encoder_for_json, is_failure, whole_characters
from plaingpt.text.hidden_names import hide_names, unknown_token_of
from plaingpt.text.known_encodings import name_of_encoding
from plaingpt.text.tokenizer_layout import char_content

END_OF_TEXT = '<|endoftext|>'
MESSAGE_BEGINS = '<|im_start|>'
MESSAGE_ENDS = '<|im_end|>'
CHAT_TOKENS = (MESSAGE_BEGINS, MESSAGE_ENDS)

# What is said where the package tokenizers fails, and the remedy.
UNABLE_TO_READ = ('the tokenizer.json is damaged or unsupported', 'save or download it again')
UNABLE_TO_ENCODE = ('the tokenizer cannot encode this text', 'change the text')


class HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json, through Hugging Face's package tokenizers.

    json_text: the content of the file.
    bos, eos: the tokens that begin and end a text, as text; None: not known.
    chat_template: the Jinja template that turns messages into a prompt, or None.

    special_ids is {token: id} of the tokens that are no part of a text: those that the file calls
    special, bos, eos, and CHAT_TOKENS. Some files don't call their eos special.

    UserError if the package can't read the file, or the file lacks bos or eos."""

    def __init__(self, json_text, bos=None, eos=None, chat_template=None):
        self.json_text = json_text
        self.bos = bos
        self.eos = eos
        self.chat_template = chat_template
        self.tokenizer = _load(json_text)

        ids = self.tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise UserError('the tokenizer.json has an empty vocabulary: save or download it again')
        self.vocab_size = max(ids) + 1  # not the number of tokens: some ids may be unused
        # A model gets a row for each id, so a short file must not ask for billions of them.
        if self.vocab_size > 2 * len(ids) + 1000:
            raise UserError(f'the tokenizer.json has {len(ids)} tokens, but ids up to {max(ids)}: '
                            'save or download it again')

        if bos is not None:
            self._id_of(bos, 'bos')
        if eos is not None:
            self.end_of_text = self._id_of(eos, 'eos')
        else:
            self.end_of_text = self._likely_end_of_text()
        self.special_ids = self._find_special_ids()

    def __reduce__(self):  # in another process, gigatoken's object is made again
        return HuggingFaceTokenizer, (self.json_text, self.bos, self.eos, self.chat_template)

    def _id_of(self, token, name):
        """The id of the token that begins or ends a text. UserError if it is not a token."""
        with _explaining_failures(f'the tokenizer has an invalid {name} token',
                                  'save or download it again'):
            token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f'the tokenizer.json lacks the {name} token, {repr(token)[:99]}: '
                            'save or download the tokenizer again')
        return token_id

    def _likely_end_of_text(self):
        """The id of a token that usually ends a text, or None."""
        for token in (END_OF_TEXT, '</s>'):
            token_id = self.tokenizer.token_to_id(token)
            if token_id is not None:
                return token_id
        return None

    def _find_special_ids(self):
        special = {}
        for token_id, token in self.tokenizer.get_added_tokens_decoder().items():
            if token.special:
                special[token.content] = token_id
        if self.bos is not None:
            special[self.bos] = self.tokenizer.token_to_id(self.bos)
        if self.end_of_text is not None:
            special[self.tokenizer.id_to_token(self.end_of_text)] = self.end_of_text
        for token in CHAT_TOKENS:
            if self.tokenizer.token_to_id(token) is not None:
                special[token] = self.tokenizer.token_to_id(token)
        special.pop('', None)  # a vocabulary may have it, but no text contains it
        return special

    def encode(self, text, special=True, framed=False):
        """list of int ids of the text.

        special: special tokens in text, like '<|endoftext|>', become their ids; False: they are
        text like any other.
        framed: with the tokens that the tokenizer.json puts before and after a text; False: none.
        UserError if the vocabulary can't express the text."""
        text = whole_characters(text)
        if special:
            with _explaining_failures(*UNABLE_TO_ENCODE):
                return self.tokenizer.encode(text, add_special_tokens=framed).ids
        with _explaining_failures(*UNABLE_TO_ENCODE):
            encoding = self._plain.encode(text, add_special_tokens=False)
        self._refuse_special(np.array(encoding.ids, np.uint32))
        return self._plain.post_process(encoding).ids if framed else encoding.ids

    def encode_corpus(self, texts):
        """Encodes texts in which nothing is special: a list with a uint32 array for each.

        Byte-level byte-pair encoding takes about a tenth of the time of the others.
        UserError if the vocabulary can't express a text, or the package gigatoken is missing."""
        if self._fast_encoder is not None:
            encoded = self._fast_encoder.encode(texts)
        else:
            encoded = self._encode_slowly(texts)
        for ids in encoded:
            self._refuse_special(ids)
        return encoded

    def _encode_slowly(self, texts):
        texts = [whole_characters(text) for text in texts]
        with _explaining_failures(*UNABLE_TO_ENCODE):
            encoded = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encoded]

    @functools.cached_property
    def _fast_encoder(self):
        """The FastEncoder that gives the same ids, None if there is none."""
        return encoder_for_json(self._plain_content(), self.special_ids, self._encode_slowly)

    def _plain_content(self):
        """The content of the file, so changed that texts have no special tokens."""
        return hide_names(json.loads(self.json_text), self.special_ids)

    @functools.cached_property
    def _plain(self):
        """The package's tokenizer for texts in which nothing is special."""
        plain = _load(json.dumps(self._plain_content()))
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def _is_refused(self):
        """Whether an id stands for a special token in spite of all: bool (vocab_size,)."""
        refused = np.zeros(self.vocab_size, bool)
        refused[list(self.special_ids.values())] = True
        # A text may have words that are unknown, unless their token ends a text at the same time.
        unknown = unknown_token_of(json.loads(self.json_text)['model'])
        if unknown is not None and unknown not in (self.bos, *CHAT_TOKENS):
            unknown_id = self.tokenizer.token_to_id(unknown)
            if unknown_id is not None and unknown_id != self.end_of_text:
                refused[unknown_id] = False
        return refused

    def _refuse_special(self, ids):
        """UserError if one of the ids of a text in which nothing is special is a special token."""
        found = ids[self._is_refused[ids]]
        if len(found) > 0:
            token = self.tokenizer.id_to_token(int(found[0]))
            raise UserError(f'the text becomes the special token {token[:99]!r}, because the '
                            'tokenizer has no other way to write it: change the text, or use '
                            'another tokenizer')

    def decode(self, ids):
        with _explaining_failures('the tokenizer cannot decode its own ids',
                                  'save or download its tokenizer.json again'):
            return self.tokenizer.decode(ids, skip_special_tokens=False)

    def decoder(self):
        """A function that turns the next ids of a text, a list, into the next characters.

        Characters that may still change wait for the following ids."""
        # The text of a token may depend on the ones before it (a space between words, the bytes of
        # one character), so each call decodes the last tokens again together with the new ones.
        context = []
        returned = 0  # number of characters of the context's text that were returned already

        def decode_next(ids):
            nonlocal context, returned
            context = context + ids
            text = self.decode(context)
            # An unfinished character has at most 3 of its 4 bytes: up to 3 replacement characters.
            unfinished = min(3, len(text) - len(text.rstrip('\N{REPLACEMENT CHARACTER}')))
            ready = max(returned, len(text) - unfinished)
            new_text = text[returned:ready]
            if unfinished == 0 and ids:
                context = ids
                returned = len(self.decode(context))
            else:
                returned = ready
            return new_text

        return decode_next

    def to_meta(self):
        return {'kind': 'tokenizer.json', 'json': self.json_text, 'bos': self.bos,
                'eos': self.eos, 'chat_template': self.chat_template}


def _load(json_text):
    """The package's tokenizer for the text of a tokenizer.json. UserError if it can't read it."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("this model's tokenizer needs the package tokenizers: "
                        'pip install tokenizers') from None
    with _explaining_failures(*UNABLE_TO_READ):
        loaded = tokenizers.Tokenizer.from_str(json_text)
    # The file may ask to cut texts to the length of some model, and to pad shorter ones.
    loaded.no_truncation()
    loaded.no_padding()
    # It may also ask to leave out merges at random, which makes other ids each time.
    if getattr(loaded.model, 'dropout', None) is not None:
        loaded.model.dropout = None
    return loaded


def describe_tokenizer_json(text, bos=None, eos=None, chat_template=None):
    """The tokenizer dict for the text of a tokenizer.json.

    bos, eos, chat_template: see HuggingFaceTokenizer.

    It is {'kind': 'gpt2'} or of kind 'tiktoken' for the vocabulary of such an encoding without a
    chat template, and of kind 'char' for a file that was made from such a tokenizer, however the
    file is formatted. UserError if the text is damaged, or the package tokenizers can't read it."""
    try:
        content = json.loads(text)
        compact = _compact(content)  # in one format, two copies are recognised as the same
    except (ValueError, RecursionError) as error:
        raise UserError(f'the tokenizer.json is damaged ({error}): '
                        'save or download it again') from error
    tokenizer = HuggingFaceTokenizer(compact, bos, eos, chat_template)
    if content['model'].get('dropout') is not None:
        content['model']['dropout'] = None  # as _load() has it, also for other programs
        tokenizer = HuggingFaceTokenizer(_compact(content), bos, eos, chat_template)
    # {'kind': 'gpt2'} can't say that another token ends a text, or how messages are written.
    says_nothing_new = {bos, eos} <= {None, END_OF_TEXT} and chat_template is None
    name = name_of_encoding(content) if says_nothing_new else None
    if name == 'gpt2':
        return {'kind': 'gpt2'}
    if name is not None:
        return {'kind': 'tiktoken', 'name': name}
    if {bos, eos, chat_template} == {None} and _is_of_characters(content, tokenizer):
        vocab = content['model']['vocab']
        return {'kind': 'char', 'chars': sorted(vocab, key=vocab.get)}
    return tokenizer.to_meta()


def _is_of_characters(content, tokenizer):
    """Whether the content of a tokenizer.json, known to be valid, is that of char_content().

    tokenizer: the HuggingFaceTokenizer of the content."""
    model = content['model']
    if model.get('type') != 'WordLevel':
        return False
    chars = sorted(model['vocab'], key=model['vocab'].get)
    if any(len(char) != 1 for char in chars):
        return False
    expected = HuggingFaceTokenizer(json.dumps(char_content(chars)))
    return _canonical(tokenizer) == _canonical(expected)


def _canonical(tokenizer):
    """The content of a HuggingFaceTokenizer's file, which depends on nobody's way of writing it.

    The post-processor only adds tokens to what encode() returns; transformers saves an empty one
    where there was none."""
    content = json.loads(tokenizer.tokenizer.to_str())
    del content['post_processor']
    return content


def _compact(content):
    """A tokenizer.json without white space: GPT-2's takes 1.6 MB of a checkpoint instead of 3.6."""
    return json.dumps(content, ensure_ascii=False, separators=(',', ':'))


@contextlib.contextmanager
def _explaining_failures(sentence, remedy):
    """Turns any failure of the package tokenizers into a UserError.

    It belongs around calls of that package alone, so that a bug of ours keeps its traceback."""
    try:
        yield
    except BaseException as error:
        if not is_failure(error):
            raise  # Ctrl-C
        reason = ' '.join(str(error).split())[:300]  # one line
        raise UserError(f'{sentence} ({reason}): {remedy}') from None
