"""
The JSON of answers: whole ones, and the chunks of a stream.
"""
import secrets
import time
from dataclasses import dataclass

from plaingpt.serving.logprob_shapes import ChatLogprobs, CompletionLogprobs

# The engine's words for how a text ended, and OpenAI's. OpenAI has no word for a request whose time
# is over; as max_tokens does, that cuts a text short.
FINISH_REASONS = {None: None, 'stop': 'stop', 'length': 'length', 'timeout': 'length'}


class CompletionShape:
    """How /v1/completions writes texts."""
    id_prefix = 'cmpl'
    kind = 'text_completion'
    chunk_kind = 'text_completion'
    logprobs_class = CompletionLogprobs

    @staticmethod
    def choice(number, text, logprobs, finish_reason):
        """A whole text, or a piece of one: both look the same."""
        return {'index': number, 'text': text, 'logprobs': logprobs,
                'finish_reason': finish_reason}

    piece = choice

    @staticmethod
    def beginning(number):
        """The first chunk of a text, before its first piece; None: there is none."""
        return None


class ChatShape:
    """How /v1/chat/completions writes texts."""
    id_prefix = 'chatcmpl'
    kind = 'chat.completion'
    chunk_kind = 'chat.completion.chunk'
    logprobs_class = ChatLogprobs

    @staticmethod
    def choice(number, text, logprobs, finish_reason):
        """A whole text."""
        message = {'role': 'assistant', 'content': text, 'refusal': None}
        return {'index': number, 'message': message, 'logprobs': logprobs,
                'finish_reason': finish_reason}

    @staticmethod
    def piece(number, text, logprobs, finish_reason):
        """A piece of a text, in a stream."""
        delta = {'content': text} if text else {}
        return {'index': number, 'delta': delta, 'logprobs': logprobs,
                'finish_reason': finish_reason}

    @staticmethod
    def beginning(number):
        """The first chunk of a text, before its first piece."""
        return {'index': number, 'delta': {'role': 'assistant', 'content': ''},
                'logprobs': None, 'finish_reason': None}


@dataclass
class Draft:
    """A text as far as it is known."""
    parts: list                 # of its text
    logprobs: object            # a CompletionLogprobs or ChatLogprobs; None: not wanted
    finish_reason: str | None = None


class Answer:
    """Makes the JSON of one request's answer from the pieces of its texts.

    Either all pieces are add()ed and the whole() is taken, or each becomes a chunk()."""

    def __init__(self, shape, model_name, tokenizer, wanted, sends_usage=False):
        """shape: CompletionShape or ChatShape. wanted: the WantedTexts.

        sends_usage: whether the stream ends with usage_chunk(); then, as with OpenAI, all other
        chunks have an empty 'usage'."""
        self.shape = shape
        self.sends_usage = sends_usage
        self.usage = _Usage(wanted)
        self.head = {'id': f'{shape.id_prefix}-{secrets.token_hex(12)}',
                     'created': int(time.time()), 'model': model_name}
        self.drafts = []
        for text in wanted:
            logprobs = None
            if text.request.top_logprobs is not None:
                logprobs = shape.logprobs_class(tokenizer)
            self.drafts.append(Draft([text.echo], logprobs))
        self.echoes_left = [text.echo for text in wanted]  # what a stream has not sent of prompts

    def add(self, number, piece):
        """Adds a Piece to the text of this number."""
        draft = self.drafts[number]
        draft.parts.append(piece.text)
        draft.finish_reason = FINISH_REASONS[piece.finish_reason]
        if draft.logprobs is not None:
            draft.logprobs.add(piece.prompt_logprobs + piece.logprobs)
        self.usage.count(number, piece)

    def whole(self):
        """The answer with all texts, a dict."""
        choices = []
        for number, draft in enumerate(self.drafts):
            logprobs = None if draft.logprobs is None else draft.logprobs.take()
            text = ''.join(draft.parts)
            choices.append(self.shape.choice(number, text, logprobs, draft.finish_reason))
        return {**self.head, 'object': self.shape.kind, 'choices': choices,
                'usage': self.usage.content()}

    def first_chunks(self):
        """The chunks with which a stream begins, a list of dicts."""
        chunks = []
        for number in range(len(self.drafts)):
            choice = self.shape.beginning(number)
            if choice is not None:
                chunks.append(self._chunk([choice]))
        return chunks

    def chunk(self, number, piece):
        """The chunk for a Piece of the text of this number, a dict, None if it says nothing."""
        self.usage.count(number, piece)
        text = self.echoes_left[number] + piece.text
        self.echoes_left[number] = ''
        logprobs = None
        tokens = piece.prompt_logprobs + piece.logprobs
        if self.drafts[number].logprobs is not None and tokens:
            self.drafts[number].logprobs.add(tokens)
            logprobs = self.drafts[number].logprobs.take()
        if not text and logprobs is None and piece.finish_reason is None:
            return None
        finish_reason = FINISH_REASONS[piece.finish_reason]
        return self._chunk([self.shape.piece(number, text, logprobs, finish_reason)])

    def usage_chunk(self):
        """The last chunk of a stream with sends_usage."""
        return {**self._chunk([]), 'usage': self.usage.content()}

    def _chunk(self, choices):
        chunk = {**self.head, 'object': self.shape.chunk_kind, 'choices': choices}
        if self.sends_usage:
            chunk['usage'] = None
        return chunk


class _Usage:
    """How many tokens a request takes."""

    def __init__(self, wanted):
        self.new_tokens = 0
        self.prompt_tokens = {}  # of each prompt, once for its n texts, as OpenAI counts
        self.cached_tokens = {}  # of these, the ones that needed no reading
        self.prompt_numbers = []
        for text in wanted:
            self.prompt_numbers.append(text.prompt_number)
            self.prompt_tokens[text.prompt_number] = len(text.request.prompt)

    def count(self, number, piece):
        """Counts a Piece of the text of this number."""
        self.new_tokens += piece.new_tokens
        # The first piece tells for all texts of a prompt: the others find it in the cache then.
        self.cached_tokens.setdefault(self.prompt_numbers[number], piece.cached_tokens)

    def content(self):
        """The object 'usage' of an answer."""
        prompt_tokens = sum(self.prompt_tokens.values())
        cached_tokens = sum(self.cached_tokens.values())
        return {'prompt_tokens': prompt_tokens, 'completion_tokens': self.new_tokens,
                'total_tokens': prompt_tokens + self.new_tokens,
                'prompt_tokens_details': {'cached_tokens': cached_tokens}}
