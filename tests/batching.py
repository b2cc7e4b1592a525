"""What the tests of the batching engine share: engines of tiny models, requests, receivers."""
import threading

import torch
from generating import lively_gpt

from plaingpt.inference.engine import stream
from plaingpt.inference.requests import GenerationRequest
from plaingpt.inference.sampling import SamplingOptions
from plaingpt.inference.scheduler import Engine
from plaingpt.text.tokenizers import CharTokenizer

LETTERS = CharTokenizer('abcdefghijklmnopqrstuvwxyzABCDE')  # 31, as many as tiny models know


def make_engine(gpt=None, *, max_rows=4, max_queue=20, prefill_chunk=8, context_size=None,
                tokenizer=LETTERS):
    """An Engine that has not started, of a lively model with room for 64 tokens."""
    if gpt is None:
        gpt = lively_gpt(block_size=64)
    return Engine(gpt, tokenizer, max_rows=max_rows, max_queue=max_queue,
                  prefill_chunk=prefill_chunk, context_size=context_size)


def ask(prompt, max_tokens=10, **fields):
    """A GenerationRequest after text or ids; temperature, top_k, … are fields of its options."""
    if isinstance(prompt, str):
        prompt = LETTERS.encode(prompt)
    options = {}
    for name in ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty'):
        if name in fields:
            options[name] = fields.pop(name)
    return GenerationRequest(tuple(prompt), max_tokens, SamplingOptions(**options), **fields)


class Receiver:
    """Keeps the pieces of one text."""

    def __init__(self):
        self.pieces = []
        self.ended = threading.Event()

    def __call__(self, piece):
        assert not self.ended.is_set(), 'a piece after the last one'
        self.pieces.append(piece)
        if piece.finish_reason is not None:
            self.ended.set()

    @property
    def text(self):
        return ''.join(piece.text for piece in self.pieces)

    @property
    def new_tokens(self):
        return sum(piece.new_tokens for piece in self.pieces)

    @property
    def logprobs(self):
        return [found for piece in self.pieces for found in piece.logprobs]

    @property
    def finish_reason(self):
        """Of the last piece so far."""
        return self.pieces[-1].finish_reason if self.pieces else None


def submit(engine, *arguments, **fields):
    """(receiver, ticket) of a request as from ask()."""
    receiver = Receiver()
    ticket = engine.submit(ask(*arguments, **fields), receiver)
    return receiver, ticket


def step_to_the_end(engine, most=1000):
    """Does steps in this thread until the engine has nothing to do."""
    for _ in range(most):
        stats = engine.stats()
        if stats.active == 0 and stats.waiting == 0:
            return
        engine.step()
    raise AssertionError('the engine does not come to an end')


def write(engine, *arguments, **fields):
    """The Receiver of a request, in an engine without a thread, after all requests have ended."""
    receiver, _ = submit(engine, *arguments, **fields)
    step_to_the_end(engine)
    return receiver


def text_of_stream(gpt, request):
    """The text that engine.stream() writes for a GenerationRequest."""
    options = request.options
    prompt = torch.tensor([request.prompt])
    new = stream(gpt, prompt, request.max_tokens, options.temperature, options.top_k,
                 top_p=options.top_p, min_p=options.min_p,
                 repetition_penalty=options.repetition_penalty, vocab_size=LETTERS.vocab_size,
                 seeds=[request.seed])
    return LETTERS.decode(torch.cat(list(new), dim=1)[0].tolist())
