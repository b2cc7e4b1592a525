"""
A batch of texts that are read and written side by side. In a step each text that is read gets its
next token, and some of the prompts are read further.

scheduler.py decides which texts take part; slots.py keeps their keys and values; drafts.py what is
known of each text.
"""
import contextlib
from dataclasses import dataclass

import torch

from model import LOGITS_AT_ONCE
from plaingpt.inference.decoding_block import decodes_in_cpp
from plaingpt.inference.row_sampling import choose_for_rows, finite_rows, logprobs_of
from plaingpt.inference.slot_attention import Stretch
from plaingpt.inference.slots import Slots, shared_beginning
from plaingpt.inference.window import kernels_for_decoding, packed_weights
from plaingpt.system.messages import sentence_for, warn


@dataclass
class Counts:
    """What a batch has done since it began; as in requests.EngineStats."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0


class TextBatch:
    """The drafts that are read and written now. Only one thread may use it.

    A step has a forward pass for the last tokens of all that are written, and another for pieces
    of prompts. Every token is a row of its pass, and attends to its own slot. One pass for both
    would read the weights only once, but some kernels compute few rows otherwise than many: a text
    would depend on whether prompts are read beside it.

    On a CPU in float32, a text is the same to the bit whatever is written or read beside it. Two
    things may still move a last bit: tokens of a prompt that another text has read already, in
    other pieces; and GELU, where the threads cannot share its numbers out in whole vectors, as 7
    threads can't."""

    def __init__(self, gpt, tokenizer, max_rows, prefill_chunk, context_size):
        """The arguments as in scheduler.Engine."""
        weight = gpt.transformer.ln_f.weight  # quantised layers have none
        self.gpt = gpt
        self.vocab_size = min(tokenizer.vocab_size, gpt.config.vocab_size)
        self.max_rows = max_rows
        self.prefill_chunk = prefill_chunk
        self.device = weight.device
        self.drafts = []
        self.counts = Counts()
        # On a CPU one position attends faster in float32; see window.Window.
        dtype = torch.float32 if self.device.type == 'cpu' else weight.dtype
        self.slots = Slots(gpt.config, max_rows, context_size, dtype, self.device)
        # oneDNN multiplies two rows or more by other instructions than one. Two at least, and its
        # own order of the weights, give a row the same bits whatever the number of rows.
        self.rows_for_kernels = max(2, max_rows)
        self.packed = packed_weights(gpt, self.rows_for_kernels)
        in_cpp = decodes_in_cpp(gpt, max_rows)  # it computes single rows as it does others
        self.fewest_rows = 2 if self.packed and not in_cpp else 1

    # ---- who takes part ----

    def admit(self, draft):
        """Takes a draft in; returns whether it could."""
        # Comparing prompts takes time, so it comes last.
        if len(self.drafts) >= self.slots.max_slots or self._should_wait(draft):
            return False
        slot = self.slots.take(draft.request.prompt, draft.most_shared)
        if slot is None:
            return False  # there is no memory for another slot
        draft.begin(slot, self.vocab_size, self.device)
        self.drafts.append(draft)
        self.counts.prompt_tokens += len(draft.request.prompt)
        self.counts.cached_tokens += draft.cached_tokens
        return True

    def _should_wait(self, draft):
        """Whether another draft is about to read more of the prompt than any slot has by now.

        Of several samples of one prompt, for example, only the first reads it. The other draft is
        in the batch, so it reads on or ends: nothing waits forever."""
        if draft.awaited is not None:
            reader, length = draft.awaited
            if not reader.has_ended and reader.read < length:
                return True
        draft.awaited = None
        _, most = self.slots.closest(draft.request.prompt, draft.most_shared)
        for reader in self.drafts:
            if reader.unread > 1:
                length = shared_beginning(draft.request.prompt, reader.request.prompt)
                length = min(length, draft.most_shared)
                if length > most:
                    most = length
                    draft.awaited = (reader, length)
        return draft.awaited is not None

    def end(self, draft, finish_reason):
        """Ends a draft as it is; its slot is free afterwards."""
        draft.end(finish_reason)
        self._remove(draft)

    def _remove(self, draft):
        self.slots.release(draft.slot)
        self.drafts.remove(draft)

    # ---- a step ----

    def step(self):
        """Reads and chooses for all drafts, and delivers a Piece for each with a new token."""
        for draft in list(self.drafts):
            if draft.reason_to_end is not None:
                self.end(draft, draft.reason_to_end)
        singles, pieces = self._parts()
        if singles or pieces:
            self.counts.steps += 1
        if singles:
            self._read(singles)
        if pieces:
            self._read(pieces)

    def _read(self, parts):
        """Reads these parts, all of one token or all of several, and chooses where they end."""
        try:
            self.slots.make_room(max(stretch.end for _, stretch in parts))
            x = self._forward(parts)
            self._add_prompt_logprobs(parts, x)
            logits, complete = self._next_logits(parts, x)
        except Exception as error:
            self._end_for_memory(parts, error)
            return
        for draft, stretch in parts:
            draft.slot.tokens += draft.tokens[stretch.begin:stretch.end]
        self._choose(logits, complete)

    def _parts(self):
        """(singles, pieces): lists of (draft, Stretch), of one token or of several.

        Prompts are read in pieces that depend on the prompt alone, the one that came first before
        the others. Together they have at most prefill_chunk tokens."""
        singles = []
        pieces = []
        budget = self.prefill_chunk
        for draft in self.drafts:
            size = min(draft.unread, self.prefill_chunk)
            stretch = Stretch(draft.slot.number, draft.read, draft.read + size)
            if draft.unread > 1:
                if size > budget:
                    budget = 0  # the prompts after this one do not overtake it
                    continue
                budget -= size
            if stretch.is_single:
                singles.append((draft, stretch))
            else:
                pieces.append((draft, stretch))
        return singles, pieces

    def _forward(self, parts):
        """The residual stream (N, C) after a pass of these parts, for their tokens in order."""
        ids = []
        positions = []
        for draft, stretch in parts:
            ids += draft.tokens[stretch.begin:stretch.end]
            positions += range(stretch.begin, stretch.end)
        stretches = [stretch for _, stretch in parts]
        if len(ids) < self.fewest_rows:
            # The only token is read twice, into the same place.
            ids *= 2
            positions *= 2
            stretches *= 2
        ids = torch.tensor(ids, device=self.device)[:, None]
        positions = torch.tensor(positions, device=self.device)[:, None]
        with self._kernels():
            x = self.gpt.residuals(ids, positions, self.slots.caches(stretches))
        return x[:, 0]

    def _logits(self, x):
        """Logits (N, V) in float32 of x (N, C)."""
        rows = len(x)
        if rows < self.fewest_rows:
            x = x.repeat(2, 1)
        with self._kernels():
            return self.gpt.logits(x)[:rows].float()

    def _kernels(self):
        if self.device.type == 'cpu' and not self.packed:
            return contextlib.nullcontext()  # of which each pass takes two
        return kernels_for_decoding(self.gpt, self.device, self.rows_for_kernels, self.packed)

    def _next_logits(self, parts, x):
        """(logits, drafts): the next token's logits (R, V), of the R drafts that are read then."""
        last_rows = []
        complete = []
        row = -1
        for draft, stretch in parts:
            row += stretch.size
            if stretch.end == len(draft.tokens):
                last_rows.append(row)
                complete.append(draft)
        if not complete:
            return None, []
        if len(last_rows) < len(x):
            x = x[last_rows]
        return self._logits(x), complete

    def _add_prompt_logprobs(self, parts, x):
        """Computes the log-probabilities of prompts, where they are asked for, as far as read."""
        row = 0
        for draft, stretch in parts:
            next_row = row + stretch.size
            if draft.request.prompt_logprobs and stretch.begin < len(draft.request.prompt):
                # Each position predicts the token after it; the last one predicts no prompt's.
                ids = draft.request.prompt[stretch.begin + 1:stretch.end + 1]
                alternatives = draft.request.top_logprobs or 0
                found = self._logprobs_of_ids(x[row:row + len(ids)], ids, alternatives)
                draft.add_prompt_logprobs(found)
            row = next_row

    def _logprobs_of_ids(self, x, ids, alternatives):
        """The TokenLogprobs of R ids after a residual stream x (R, C), each with so many others."""
        rows_at_once = max(1, LOGITS_AT_ONCE // self.gpt.config.vocab_size)
        found = []
        for begin in range(0, len(ids), rows_at_once):
            part = slice(begin, begin + rows_at_once)
            logits = self._logits(x[part])
            found += logprobs_of(logits, ids[part], [alternatives] * len(logits), self.vocab_size)
        return found

    def _choose(self, logits, complete):
        """Chooses the next token of drafts that are read up to their end, from logits (R, V)."""
        writing = []
        rows = []
        finite = finite_rows(logits) if complete else []
        for row, draft in enumerate(complete):
            if not finite[row]:
                self.slots.forget(draft.slot)
                self.end(draft, 'error')
            elif not draft.needs_token:
                self.end(draft, 'length')
            else:
                writing.append(draft)
                rows.append(row)
        if not writing:
            return
        if len(rows) < len(logits):
            logits = logits[rows]
        ids = choose_for_rows(logits[:, :self.vocab_size], [draft.sampler for draft in writing])
        self.counts.new_tokens += len(ids)
        logprobs = self._logprobs(logits, ids, writing)
        for draft, id, of_id in zip(writing, ids, logprobs, strict=True):
            if draft.add(id, of_id):
                self._remove(draft)

    def _logprobs(self, logits, ids, drafts):
        """A TokenLogprobs for each draft that asks for them, else None."""
        found = [None] * len(drafts)
        asking = [row for row, draft in enumerate(drafts)
                  if draft.request.top_logprobs is not None]
        if asking:
            alternatives = [drafts[row].request.top_logprobs for row in asking]
            of_asking = logprobs_of(logits[asking], [ids[row] for row in asking], alternatives,
                                    self.vocab_size)
            for row, logprobs in zip(asking, of_asking, strict=True):
                found[row] = logprobs
        return found

    def _end_for_memory(self, parts, error):
        """Where memory was too short for a pass, ends the drafts that needed most of it.

        They are those that read a prompt, else those that need a larger cache, else the longest.
        The others are in the next step. Raises the error if it is another one."""
        warn_of_memory(error)
        reading = [draft for draft, stretch in parts if not stretch.is_single]
        growing = [draft for draft, stretch in parts if stretch.end > self.slots.room]
        longest = max([draft for draft, _ in parts], key=lambda draft: len(draft.tokens))
        for draft in reading or growing or [longest]:
            self.end(draft, 'error')


def warn_of_memory(error):
    """Warns that a request ends for lack of memory. Raises the error if it is another one."""
    if sentence_for(error) is None:
        raise error
    warn(f'a request ends early: {sentence_for(error)}')
