"""
The batching engine: a thread that writes many texts at a time, each from when its request comes
until it ends.

Requests wait in a queue until a row of the batch is free; text_batch.py does the work of a step,
and requests.py has what callers ask and get.
"""
import sys
import threading
import time
import traceback

import torch

from plaingpt.inference.drafts import Draft
from plaingpt.inference.engine import InvalidArguments
from plaingpt.inference.requests import Closed, EngineStats, QueueFull, Ticket
from plaingpt.inference.slots import bytes_at_most
from plaingpt.inference.text_batch import TextBatch


class Engine:
    """Writes texts by continuous batching: they join and leave between the steps of one batch.

    All methods may be called from any thread, drain() from any but the engine's own."""

    def __init__(self, gpt, tokenizer, *, max_rows, max_queue, prefill_chunk, context_size=None):
        """gpt: a GPT in evaluation mode, which only the engine uses from start() on.

        max_rows: most texts at a time. max_queue: most requests that wait for a row.
        prefill_chunk: most tokens of prompts that are read between two tokens of other texts.
        context_size: most tokens of prompt and text together; None: block_size.

        InvalidArguments if one is out of range."""
        if context_size is None:
            context_size = gpt.config.block_size
        problems = list(_problems_of_engine(gpt.config, max_rows, max_queue, prefill_chunk,
                                            context_size))
        if problems:
            raise InvalidArguments('; '.join(problems))
        self.context_size = context_size
        self.is_healthy = True  # False after an exception has ended the thread
        self._tokenizer = tokenizer
        self._vocab_size = gpt.config.vocab_size
        self._max_queue = max_queue
        self._batch = TextBatch(gpt, tokenizer, max_rows, prefill_chunk, context_size)
        # The condition guards what follows. It is never held during a step or a delivery.
        self._condition = threading.Condition()
        self._waiting = []          # drafts, the oldest first
        self._is_closed = False     # takes no more requests, and ends with the last text
        self._must_stop = False     # ends all texts before the next step
        self._thread = threading.Thread(target=self._run, name='batching engine', daemon=True)

    def start(self):
        """Starts the thread. Requests from before are taken now."""
        self._thread.start()

    def submit(self, request, deliver):
        """Puts a GenerationRequest into the queue; returns its Ticket.

        deliver: as in Ticket. Raises QueueFull or Closed, and InvalidArguments if the request is
        out of range."""
        problems = list(_problems_of_request(request, self._vocab_size, self.context_size))
        if problems:
            raise InvalidArguments('; '.join(problems))
        ticket = Ticket(request, deliver, time.monotonic())
        draft = Draft(ticket, self._tokenizer, self.context_size)
        with self._condition:
            if self._is_closed:
                raise Closed('the engine takes no more requests')
            # A request for which a row is free does not count as waiting. The thread may just be
            # moving a draft from one list to the other; the set counts it once.
            unfinished = {*self._waiting, *self._batch.drafts}
            if len(unfinished) >= self._batch.max_rows + self._max_queue:
                raise QueueFull(f'{self._max_queue} requests wait already')
            self._waiting.append(draft)
            self._condition.notify()
        return ticket

    def cancel(self, ticket):
        """Ends a text before the next step; nothing happens if it has ended."""
        with self._condition:
            ticket.is_cancelled = True
            self._condition.notify()

    def stats(self):
        """An EngineStats of this moment."""
        counts = self._batch.counts
        with self._condition:
            waiting = len(self._waiting)
        return EngineStats(
            active=len(self._batch.drafts),
            waiting=waiting,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            new_tokens=counts.new_tokens,
            steps=counts.steps,
            cache_positions=self._batch.slots.positions_in_use,
            cache_room=self._batch.slots.positions_in_all)

    @property
    def cache_bytes_at_most(self):
        """Bytes of keys and values once max_rows texts run, one of them up to context_size."""
        slots = self._batch.slots
        return bytes_at_most(slots.config, self._batch.max_rows, self.context_size,
                             slots.keys[0].dtype)

    def drain(self, seconds):
        """Refuses new requests, lets the others end, and stops the thread.

        Those that have not ended after so many seconds end with 'cancelled'."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        has_started = self._thread.ident is not None
        if has_started:
            self._thread.join(seconds)
        with self._condition:
            self._must_stop = True
            self._condition.notify()
        if has_started:
            self._thread.join()
        else:
            self._end_all('cancelled')

    # ---- the thread ----

    @torch.inference_mode()
    def step(self):
        """What the thread repeats while there is work: takes requests in, and does one step.

        Tests call it without a thread."""
        self._admit()
        self._batch.step()

    def _run(self):
        try:
            while self._wait_for_work():
                self.step()
            self._end_all('cancelled')
        except Exception:  # any bug: it is shown, and nobody waits for a thread that has ended
            self.is_healthy = False
            sys.stderr.write('the engine has failed, and ends all texts:\n')
            traceback.print_exc()
            self._end_all('error')

    def _wait_for_work(self):
        """Sleeps until there is something to do; returns False once the thread is to end."""
        with self._condition:
            while True:
                if self._must_stop:
                    return False
                if self._batch.drafts or self._waiting:
                    return True
                if self._is_closed:
                    return False
                self._condition.wait()

    def _admit(self):
        """Moves drafts from the queue to the batch, and ends those whose time is over.

        They come in turn, but one that waits for another to read its beginning lets others pass."""
        with self._condition:
            waiting = list(self._waiting)  # more may come meanwhile, but only this thread removes
        left = set()
        for draft in waiting:
            if draft.reason_to_end is not None:
                draft.end(draft.reason_to_end)
                left.add(draft)
            elif self._batch.admit(draft):
                left.add(draft)
        with self._condition:
            self._waiting = [draft for draft in self._waiting if draft not in left]

    def _end_all(self, finish_reason):
        """Takes no more requests, and ends all that there are."""
        with self._condition:
            self._is_closed = True
            unfinished = self._waiting + self._batch.drafts
            self._waiting = []
        self._batch.drafts = []
        for draft in unfinished:
            if not draft.has_ended:
                draft.end(finish_reason)


def _problems_of_engine(config, max_rows, max_queue, prefill_chunk, context_size):
    """Yields a sentence for each argument of an Engine that is out of range."""
    if max_rows < 1:
        yield f'max_rows={max_rows} must be at least 1'
    if max_queue < 0:
        yield f'max_queue={max_queue} must be at least 0'
    if prefill_chunk < 1:
        yield f'prefill_chunk={prefill_chunk} must be at least 1'
    if not 1 <= context_size <= config.longest:
        yield (f'context_size={context_size} must be at least 1, and at most '
               f'block_size={config.block_size} where positions are learned')


def _problems_of_request(request, vocab_size, context_size):
    """Yields a sentence for each field of a GenerationRequest that is out of range."""
    if not 1 <= len(request.prompt) <= context_size:
        yield (f'the prompt has {len(request.prompt)} tokens, but must have at least 1 and at most '
               f'context_size={context_size}')
    elif min(request.prompt) < 0 or max(request.prompt) >= vocab_size:
        yield f'the ids of the prompt must be at least 0 and below {vocab_size}'
    if request.max_tokens < 0:
        yield f'max_tokens={request.max_tokens} must be at least 0'
    if not -2 ** 63 <= request.seed < 2 ** 64:
        yield f'seed={request.seed} must be a number of 64 bits'
    if '' in request.stops:
        yield "stops must not contain '', which stops every text"
    if request.top_logprobs is not None and request.top_logprobs < 0:
        yield f'top_logprobs={request.top_logprobs} must be at least 0, or None'
    yield from request.options.problems()
