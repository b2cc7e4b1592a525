"""
Log-probabilities in answers: OpenAI's two shapes, one for completions and one for chats.

A token may be a part of a character. Its text is then 'bytes:\\xe2\\x80' in completions, as OpenAI
writes it, and in chats the replacement character, with the bytes beside it.
"""
import codecs
import math

from plaingpt.text.single_tokens import bytes_of_token

LOWEST = -9999.0  # stands for a probability of 0, whose logarithm JSON can't say


class CompletionLogprobs:
    """The tokens of a text as /v1/completions shows them.

    text_offset is where a token begins in the answer's text, in characters; with the prompt echoed,
    that counts from the prompt's beginning."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.characters = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.offset = 0
        self.new = []

    def add(self, tokens):
        """Adds TokenLogprobs, a tuple."""
        self.new += tokens

    def take(self):
        """The object for the tokens that were added since the last call, a dict."""
        texts = []
        logprobs = []
        top_logprobs = []
        offsets = []
        for token in self.new:
            texts.append(self._text_of(token.id))
            logprobs.append(_finite(token.logprob))
            top_logprobs.append(self._top_of(token))
            offsets.append(self.offset)
            content = bytes_of_token(self.tokenizer, token.id)
            self.offset += len(self.characters.decode(content))
        self.new = []
        return {'tokens': texts, 'token_logprobs': logprobs, 'top_logprobs': top_logprobs,
                'text_offset': offsets}

    def _top_of(self, token):
        """{text: log-probability} of the likeliest tokens and the token itself.

        None for the first token of a prompt."""
        if token.logprob is None:
            return None
        top = {}
        for token_id, logprob in token.top:
            top.setdefault(self._text_of(token_id), _finite(logprob))
        top.setdefault(self._text_of(token.id), _finite(token.logprob))
        return top

    def _text_of(self, token_id):
        content = bytes_of_token(self.tokenizer, token_id)
        try:
            return content.decode('utf-8')
        except UnicodeDecodeError:
            return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in content)


class ChatLogprobs:
    """The tokens of a text as /v1/chat/completions shows them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.new = []

    def add(self, tokens):
        """Adds TokenLogprobs, a tuple."""
        self.new += tokens

    def take(self):
        """The object for the tokens that were added since the last call, a dict."""
        content = []
        for token in self.new:
            top = [self._entry(token_id, logprob) for token_id, logprob in token.top]
            content.append({**self._entry(token.id, token.logprob), 'top_logprobs': top})
        self.new = []
        return {'content': content, 'refusal': None}

    def _entry(self, token_id, logprob):
        content = bytes_of_token(self.tokenizer, token_id)
        return {'token': content.decode('utf-8', errors='replace'), 'logprob': _finite(logprob),
                'bytes': list(content)}


def _finite(logprob):
    """A log-probability that JSON can write; None stays None."""
    if logprob is None:
        return None
    return logprob if math.isfinite(logprob) else LOWEST
