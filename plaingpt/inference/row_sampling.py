"""
Choosing the next token of rows that have options, seeds and log-probabilities of their own.

sampling.py chooses for rows with equal options; here rows are sorted into such groups.
"""
import torch
from torch.nn import functional as F

from plaingpt.inference.requests import TokenLogprobs
from plaingpt.inference.sampling import (SamplingOptions, choose, draw_numbers,
                                         penalize_repetition)

GREEDY = SamplingOptions(temperature=0)


class RowSampler:
    """What the choices of one row depend on besides its logits: options, numbers, tokens seen."""

    def __init__(self, options, seed, prompt, max_tokens, vocab_size, device):
        """options: SamplingOptions. seed: an int, on which alone the row's numbers depend.

        prompt: ids. max_tokens: most tokens that will be chosen. vocab_size: ids from this on are
        never chosen."""
        self.options = options
        # Whatever else is set, the likeliest token is the likeliest.
        self.group = GREEDY if options.is_greedy else options
        self._numbers = draw_numbers(1, max_tokens, [seed])[0]
        self._chosen = 0  # tokens
        self._seen = None  # ids that the row has, bool (vocab_size,)
        if options.repetition_penalty != 1:
            seen_ids = torch.tensor(prompt, dtype=torch.int64, device=device)
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[seen_ids[seen_ids < vocab_size]] = True

    def penalized(self, logits):
        """logits (vocab_size,) in which tokens that the row has are less likely."""
        if self._seen is None:
            return logits
        return penalize_repetition(logits, self._seen, self.options.repetition_penalty)

    def next_number(self):
        """The number in [0, 1) that decides the next choice."""
        return self._numbers[self._chosen].item()

    def count(self, id):
        """Notes that the row has chosen this id."""
        self._chosen += 1
        if self._seen is not None:
            self._seen[id] = True


def choose_for_rows(logits, samplers):
    """The next id of each row, a list; its sampler counts it.

    logits: float32 (rows, vocab_size). samplers: a RowSampler for each row."""
    groups = {}  # options: the numbers of the rows that have them
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.group, []).append(row)

    chosen = [None] * len(samplers)
    for options, rows in groups.items():
        group = logits
        if len(groups) > 1:
            group = logits[rows]
        group = _penalized(group, [samplers[row] for row in rows])
        numbers = [[samplers[row].next_number()] for row in rows]
        numbers = torch.tensor(numbers, dtype=torch.float32, device=logits.device)
        ids = choose(group, options, numbers).flatten().tolist()
        for row, id in zip(rows, ids, strict=True):
            chosen[row] = id
            samplers[row].count(id)
    return chosen


def _penalized(logits, samplers):
    """logits (rows, vocab_size), each row penalized by its own sampler."""
    if all(sampler.options.repetition_penalty == 1 for sampler in samplers):
        return logits
    rows = [sampler.penalized(row) for row, sampler in zip(logits, samplers, strict=True)]
    return torch.stack(rows)


def finite_rows(logits):
    """Whether all logits of a row are finite, a list of bool for logits (rows, V)."""
    # A sum is finite unless one of its terms is not, and takes a thirtieth of isfinite().
    return logits.sum(dim=-1).isfinite().tolist()


def logprobs_of(logits, ids, alternatives, vocab_size):
    """A TokenLogprobs for each row of logits (rows, V), in float32, of which ids[row] is the token.

    alternatives: how many of the likeliest tokens each row lists, all of them below vocab_size."""
    logprobs = F.log_softmax(logits, dim=-1)
    wanted = torch.tensor(ids, device=logits.device)[:, None]
    of_ids = logprobs.gather(1, wanted).flatten().tolist()
    most = min(max(alternatives), vocab_size)
    best = logprobs[:, :vocab_size].topk(most, dim=-1)
    best_ids = best.indices.tolist()
    best_logprobs = best.values.tolist()

    found = []
    for row, (id, logprob) in enumerate(zip(ids, of_ids, strict=True)):
        listed = alternatives[row]
        top = zip(best_ids[row][:listed], best_logprobs[row][:listed], strict=True)
        found.append(TokenLogprobs(id, logprob, tuple(top)))
    return found
