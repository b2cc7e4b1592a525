"""
What a caller asks of the batching engine (scheduler.py), and what it gets back.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

from plaingpt.inference.sampling import SamplingOptions


class QueueFull(Exception):
    """As many requests wait as may wait; the message says how many."""


class Closed(Exception):
    """The engine takes no more requests: it is about to end."""


@dataclass(frozen=True)
class GenerationRequest:
    """One text to write after a prompt.

    prompt: ids, at least one.
    max_tokens: most new tokens, at least 0. With 0 the prompt alone is read.
    options: how each token is chosen.
    seed: an int, on which alone the random numbers of this text depend.
    stop_tokens: ids that end the text, and are no part of it.
    stops: texts that end the text, and are cut off with all that follows.
    top_logprobs: how many alternatives each token comes with; 0: none but the token's own
        log-probability; None: no log-probabilities at all.
    prompt_logprobs: whether the tokens of the prompt come first, with log-probabilities too.
    deadline: the time.monotonic() after which the text ends as it is; None: never."""
    prompt: tuple[int, ...]
    max_tokens: int
    options: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    deadline: float | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of a prompt or a text, with log-probabilities in nats.

    They are the model's own, before temperature and the other options change them."""
    id: int
    logprob: float | None         # None: the first token of a prompt, which nothing predicts
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the likeliest, best first


@dataclass(frozen=True)
class Piece:
    """What became known of a text since the piece before.

    finish_reason, in the last piece alone: 'stop' for a stop token or text, 'length' for
    max_tokens or a full context, 'timeout' for the deadline, 'cancelled', or 'error' if the engine
    failed."""
    text: str = ''                # may be '' while tokens are half a character, or may begin a stop
    new_tokens: int = 0           # tokens chosen since the piece before, stop tokens among them
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens that make up the text, if asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # in the first piece alone, if asked for
    cached_tokens: int = 0        # in the first piece: tokens of the prompt that needed no reading
    finish_reason: str | None = None


@dataclass
class Ticket:
    """A request that the engine has accepted.

    deliver: a function that gets each Piece, in the thread of the engine. It must neither block
    nor raise."""
    request: GenerationRequest
    deliver: Callable[[Piece], None]
    submitted: float              # time.monotonic()
    is_cancelled: bool = False    # the engine drops the request before its next step


@dataclass(frozen=True)
class EngineStats:
    """How busy the engine is, and what it has done since it began."""
    active: int                   # texts that are read or written now
    waiting: int                  # requests in the queue
    prompt_tokens: int            # tokens of prompts, those in the cache included
    cached_tokens: int            # of these, the ones that needed no reading
    new_tokens: int
    steps: int                    # each is a token of every text that is written, and some prompts
    cache_positions: int          # positions of keys and values that are in use
    cache_room: int               # positions that there are
