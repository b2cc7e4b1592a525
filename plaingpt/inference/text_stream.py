"""
The text of a row as its ids arrive: pieces that may be shown at once, up to the first stop.
"""
from dataclasses import dataclass


@dataclass
class _Span:
    """Tokens that make up a stretch of text: one, or the few that share a character."""
    begin: int   # in characters of the whole text
    end: int
    tokens: int


class TextStream:
    """Turns ids into text, and ends it before the first stop.

    A piece of text is ready once it can't change any more: half a character waits for the rest of
    it, and what may begin a stop waits until it has become one or not.

    has_stopped: whether a stop has occurred; then push() must not be called again.
    ready_tokens: how many of the pushed ids make up the text returned so far. A token that a stop
    cuts in two counts, one that lies behind the cut does not."""

    def __init__(self, tokenizer, stops=()):
        """stops: texts that end the text, none of them empty."""
        self.has_stopped = False
        self.ready_tokens = 0
        self._tokenizer = tokenizer
        self._decode = tokenizer.decoder()
        self._stops = tuple(stops)
        self._ids = []
        self._returned = 0      # characters that were returned
        self._held = ''         # characters that were decoded since
        self._spans = []        # of the tokens that are not ready
        self._without_text = 0  # the last tokens, whose characters are unfinished

    def push(self, id):
        """The text that has become ready with the next id."""
        self._ids.append(id)
        new_text = self._decode([id])
        self._without_text += 1
        if not new_text:
            return ''
        self._hold(new_text)
        if self._cut_at_stop():
            return self._release(len(self._held))
        return self._release(len(self._held) - self._may_begin_a_stop())

    def finish(self):
        """The rest of the text, where no more ids follow; '' after a stop."""
        if self.has_stopped:
            return ''
        # Decoding everything at once also returns what stands for an unfinished character.
        decoded = self._returned + len(self._held)
        self._hold(self._tokenizer.decode(self._ids)[decoded:])
        self._cut_at_stop()
        return self._release(len(self._held))

    def _hold(self, new_text):
        """Adds text that the last tokens without any make up."""
        begin = self._returned + len(self._held)
        self._held += new_text
        self._spans.append(_Span(begin, begin + len(new_text), self._without_text))
        self._without_text = 0

    def _cut_at_stop(self):
        """Drops the first stop, with all that follows; returns whether there is one."""
        begins = [self._held.find(stop) for stop in self._stops]
        found = [begin for begin in begins if begin >= 0]
        if not found:
            return False
        self._held = self._held[:min(found)]
        self.has_stopped = True
        # A token that begins at the cut or behind it is not part of the text.
        end = self._returned + len(self._held)
        self._spans = [span for span in self._spans if span.begin < end]
        for span in self._spans:
            span.end = min(span.end, end)
        return True

    def _may_begin_a_stop(self):
        """How many of the last characters held are the beginning of a stop; the most if several."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            ending = self._held[-length:]
            if any(stop.startswith(ending) for stop in self._stops):
                return length
        return 0

    def _release(self, characters):
        """Returns the first characters held, and counts the tokens that they complete."""
        ready = self._held[:characters]
        self._held = self._held[characters:]
        self._returned += characters
        while self._spans and self._spans[0].end <= self._returned:
            self.ready_tokens += self._spans.pop(0).tokens
        return ready
