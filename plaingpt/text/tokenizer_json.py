"""
Tokenizers in Hugging Face's file format: reads a tokenizer.json, and recognises GPT-2's own and
those of characters.
"""
import contextlib
import hashlib
import json

from plaingpt.system.messages import UserError
from plaingpt.text.tokenizer_layout import char_content

END_OF_TEXT = '<|endoftext|>'

# sha256 of GPT-2's vocabulary and merges in the form of _digest_of_bpe().
GPT2_BPE_SHA256 = '7b24c988c29eb2cd4ccf3838778d27f9bdcceadc0c2f2037a209403b45bed747'


class HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json, through Hugging Face's package tokenizers.

    json_text: the content of the file.
    bos, eos: the tokens that begin and end a text, as text; None: not known.
    chat_template: the Jinja template that turns messages into a prompt, or None.

    UserError if the package can't read the file, or the file lacks bos or eos."""

    def __init__(self, json_text, bos=None, eos=None, chat_template=None):
        try:
            import tokenizers
        except ImportError:
            raise UserError("this model's tokenizer needs the package tokenizers: "
                            'pip install tokenizers') from None
        self.json_text = json_text
        self.bos = bos
        self.eos = eos
        self.chat_template = chat_template
        with _explaining_failures('the tokenizer.json is damaged or unsupported',
                                  'save or download it again'):
            self.tokenizer = tokenizers.Tokenizer.from_str(json_text)
        # The file may ask to cut texts to the length of some model, and to pad shorter ones.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

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

    def encode(self, text, special=True, framed=False):
        """list of int ids of the text.

        special: special tokens in text, like '<|endoftext|>', become their ids; False: they are
        text like any other.
        framed: with the tokens that the tokenizer.json puts before and after a text; False: none.
        UserError if the vocabulary can't express the text."""
        # Half a surrogate pair has no UTF-8 form. It becomes U+FFFD, as tiktoken has it.
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
        self.tokenizer.encode_special_tokens = not special
        with _explaining_failures('the tokenizer cannot encode this text', 'change the text'):
            return self.tokenizer.encode(text, add_special_tokens=framed).ids

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


def describe_tokenizer_json(text, bos=None, eos=None, chat_template=None):
    """The tokenizer dict for the text of a tokenizer.json.

    bos, eos, chat_template: see HuggingFaceTokenizer.

    It is {'kind': 'gpt2'} for GPT-2's own vocabulary without a chat template, and of kind 'char'
    for a file that was made from such a tokenizer, however the file is formatted. UserError if the
    text is damaged, or the package tokenizers can't read it."""
    try:
        content = json.loads(text)
        # In one format, two copies of a tokenizer are recognised as the same; in this one, without
        # white space, GPT-2's takes 1.6 MB of a checkpoint instead of 3.6.
        compact = json.dumps(content, ensure_ascii=False, separators=(',', ':'))
    except (ValueError, RecursionError) as error:
        raise UserError(f'the tokenizer.json is damaged ({error}): '
                        'save or download it again') from error
    tokenizer = HuggingFaceTokenizer(compact, bos, eos, chat_template)
    # {'kind': 'gpt2'} can't say that another token ends a text, or how messages are written.
    says_nothing_new = {bos, eos} <= {None, END_OF_TEXT} and chat_template is None
    if says_nothing_new and _is_gpt2(content):
        return {'kind': 'gpt2'}
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


def _is_gpt2(content):
    """Whether the content of a tokenizer.json, known to be valid, is GPT-2's own tokenizer."""
    model = content['model']
    if model.get('type') != 'BPE':
        return False
    # With another treatment of the text before the merges, the same vocabulary gives other ids.
    before = content.get('pre_tokenizer') or {}
    splits_like_gpt2 = (before.get('type') == 'ByteLevel' and before.get('use_regex', True)
                        and not before.get('add_prefix_space', True))
    if content.get('normalizer') is not None or not splits_like_gpt2:
        return False
    # Some files have '<|endoftext|>' among the added tokens alone, and some have more of those.
    vocab = dict(model['vocab'])
    for token in content.get('added_tokens', []):
        vocab[token['content']] = token['id']
    return _digest_of_bpe(vocab, model['merges']) == GPT2_BPE_SHA256


def _digest_of_bpe(vocab, merges):
    """sha256 of {token: id} and of merges, which are 'a b' in older files, ['a', 'b'] in newer."""
    pairs = []
    for merge in merges:
        pairs.append(merge.split(' ') if isinstance(merge, str) else merge)
    canonical = json.dumps([vocab, pairs], sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextlib.contextmanager
def _explaining_failures(sentence, remedy):
    """Turns any failure of the package tokenizers into a UserError.

    It belongs around calls of that package alone, so that a bug of ours keeps its traceback."""
    try:
        yield
    except BaseException as error:
        # The package raises plain Exception. Where a hostile file makes its Rust code panic, it
        # raises PanicException, which is no Exception and can't be imported.
        is_panic = type(error).__name__ == 'PanicException'
        if not isinstance(error, Exception) and not is_panic:
            raise  # Ctrl-C
        reason = ' '.join(str(error).split())[:300]  # one line
        raise UserError(f'{sentence} ({reason}): {remedy}') from None
