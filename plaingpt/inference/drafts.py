"""
Drafts: what the batching engine knows of each text that it has promised to write.
"""
import sys
import time
import traceback

from plaingpt.inference.requests import Piece, TokenLogprobs
from plaingpt.inference.row_sampling import RowSampler
from plaingpt.inference.text_stream import TextStream


class Draft:
    """The prompt and the text of one request, from when it waits until its last Piece.

    tokens: those of the prompt and the new ones.
    slot: where their keys and values are, a slots.Slot; None while the request waits.
    awaited: another draft that reads a beginning which this one can share, and how many tokens of
    it; None if there is none."""

    def __init__(self, ticket, tokenizer, context_size):
        """context_size: most tokens of prompt and text together."""
        request = ticket.request
        self.ticket = ticket
        self.request = request
        self.tokens = list(request.prompt)
        self.slot = None
        self.awaited = None
        self.sampler = None
        self.cached_tokens = 0
        self.prompt_logprobs = []  # of the tokens read so far, if asked for
        self.has_ended = False
        self._stream = TextStream(tokenizer, request.stops)
        self._most_new = min(request.max_tokens, context_size - len(self.tokens))
        self._logprobs = []        # of the new tokens, in order
        self._delivered = 0        # new tokens whose text was delivered
        self._has_delivered = False  # whether there was a first piece

    # ---- where it stands ----

    def begin(self, slot, vocab_size, device):
        """Gives the draft its slot, which may hold the beginning of its prompt already.

        vocab_size: ids from this on are never chosen."""
        self.slot = slot
        self.awaited = None
        self.cached_tokens = len(slot.tokens)
        self.sampler = RowSampler(self.request.options, self.request.seed, self.request.prompt,
                                  self._most_new, vocab_size, device)

    @property
    def most_shared(self):
        """How many tokens of the prompt need no reading, if some slot has them."""
        if self.request.prompt_logprobs:
            return 0  # which takes the logits of all
        return len(self.request.prompt) - 1  # those of the last are needed

    @property
    def read(self):
        """How many tokens have their keys and values in the slot."""
        return len(self.slot.tokens)

    @property
    def unread(self):
        return len(self.tokens) - self.read

    @property
    def needs_token(self):
        """Whether a token is to be chosen once all others are read."""
        return len(self.tokens) - len(self.request.prompt) < self._most_new

    @property
    def reason_to_end(self):
        """'cancelled' or 'timeout' if the draft must end as it is, else None."""
        if self.ticket.is_cancelled:
            return 'cancelled'
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() >= deadline:
            return 'timeout'
        return None

    # ---- what becomes of it ----

    def add_prompt_logprobs(self, found):
        """Adds TokenLogprobs of the tokens that were just read; the first token has none."""
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(TokenLogprobs(self.tokens[0], None))
        self.prompt_logprobs += found

    def add(self, id, logprobs):
        """Adds a new token and delivers what text it makes ready; returns whether that was the end.

        logprobs: its TokenLogprobs, or None where they are not asked for."""
        if id in self.request.stop_tokens:
            self.end('stop', new_tokens=1)
            return True
        self.tokens.append(id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        text = self._stream.push(id)
        if self._stream.has_stopped:
            self.end('stop', text, new_tokens=1)
        elif not self.needs_token:
            self.end('length', text, new_tokens=1)
        else:
            self._deliver(Piece(text, 1, self._ready_logprobs(), **self._first_piece()))
        return self.has_ended

    def end(self, finish_reason, text='', new_tokens=0):
        """Delivers the last piece: this text, which is ready, and what was held back.

        After an error that stays back. new_tokens: how many were chosen since the piece before."""
        first = self._first_piece()
        if finish_reason == 'error':
            # The tokenizer may have failed, or the log-probabilities may not be finite.
            first.pop('prompt_logprobs', None)
        else:
            text += self._stream.finish()
        self.has_ended = True
        self._deliver(Piece(text, new_tokens, self._ready_logprobs(), **first,
                            finish_reason=finish_reason))

    def _ready_logprobs(self):
        """The log-probabilities of the tokens whose text has become ready since the last call."""
        ready = self._logprobs[self._delivered:self._stream.ready_tokens]
        self._delivered = self._stream.ready_tokens
        return tuple(ready)

    def _first_piece(self):
        """The fields of a Piece that the first one alone has."""
        if self._has_delivered:
            return {}
        fields = {'cached_tokens': self.cached_tokens}
        if len(self.prompt_logprobs) == len(self.request.prompt):
            fields['prompt_logprobs'] = tuple(self.prompt_logprobs)
        return fields

    def _deliver(self, piece):
        """Hands a piece over. A receiver that fails loses its own text and no other."""
        self._has_delivered = True
        try:
            self.ticket.deliver(piece)
        except Exception:  # of any kind: its bug is shown, and ends no other text
            sys.stderr.write('a receiver of text has failed, so its request is cancelled:\n')
            traceback.print_exc()
            self.ticket.is_cancelled = True
