"""
Text generation: one new token for each sequence of a batch after another, with a key-value cache.

Shapes at the ends of lines: B prompts, T time, V vocabulary, rows = B x samples of each, hs head size.

References:
[1] Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, arXiv 1904.09751: top-p
[2] Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling, arXiv 2407.01082
[3] Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1: repetition penalty
"""
import contextlib

import torch
from torch.nn import functional as F


class Window:
    """What stream() decodes from: the last tokens of each row, at most context_size, and their keys and values.

    The tokens of a row stand at positions 0 to size - 1 of its window, whatever the sizes of the others: behind those
    of a shorter row is room, which nothing sees before it is written. Sizes are known here, not only on the device,
    so that no step waits for it but where a window moves."""

    def __init__(self, model, idx, lengths, max_new_tokens, num_samples, stride, context_size):
        self.model, self.stride, self.num_samples, self.context_size = model, stride, num_samples, context_size
        config, device = model.config, idx.device
        lengths = [length for length in lengths for _ in range(num_samples)]
        self.sizes = [min(length, context_size) for length in lengths]
        self.last = torch.tensor(self.sizes, device=device)[:, None] - 1  # (rows, 1), position of the last token
        self.end = torch.tensor(lengths, device=device)[:, None] - 1  # (rows, 1), where that is in tokens
        self.tokens = F.pad(idx, (0, max_new_tokens)).repeat_interleave(num_samples, dim=0)  # (rows, T + new)
        shape = (len(lengths), min(context_size, max(lengths) + max_new_tokens), config.n_kv_head, config.head_size)
        # On a CPU attention from one position is 6 times as fast in float32 (12 heads, 400 positions: 45 us, not 264).
        dtype = torch.float32 if device.type == 'cpu' else model.lm_head.weight.dtype
        self.kept = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in 'kv') for _ in range(config.n_layer)]
        self.started = False

    def last_tokens(self):
        return self.tokens.gather(1, self.end)  # (rows, 1)

    def append(self, chosen):
        self.last, self.end, self.sizes = self.last + 1, self.end + 1, [size + 1 for size in self.sizes]
        self.tokens.scatter_(1, self.end, chosen)

    def logits(self):
        """Logits (rows, V) after the last token of each row."""
        if not self.started:  # the samples of a prompt share its encoding
            self.started = True
            return self._encode(range(0, len(self.sizes), self.num_samples), self.num_samples)
        S = self.context_size
        full = [row for row, size in enumerate(self.sizes) if size > S]
        logits = self._decode(S) if len(full) < len(self.sizes) else None
        if full:
            for row in full:
                self.sizes[row] = S + 1 - self.stride
            self.last[full] = S - self.stride
            encoded = self._encode(full)
            if logits is None:
                return encoded
            logits[full] = encoded
        return logits

    def _encode(self, rows, samples=1):
        """Logits (R * samples, V) after the windows of these rows, each of which stands for so many that are alike."""
        first = torch.tensor(rows, device=self.tokens.device)  # (R,)
        positions = torch.arange(max(self.sizes[row] for row in rows), device=first.device)  # (T,)
        begin = self.end[first] - self.last[first]  # (R, 1)
        idx = self.tokens[first[:, None], (begin + positions).clamp(max=self.tokens.size(1) - 1)]  # (R, T)
        where = first[:, None, None] + torch.arange(samples, device=first.device)[:, None], positions  # (R, samples, T)
        x = self.model.residuals(idx, positions, [(*kept, where, None) for kept in self.kept])  # (R, T, C)
        x = x[torch.arange(len(first), device=first.device), self.last[first, 0]]  # (R, C)
        return self.model.logits(x).repeat_interleave(samples, dim=0)

    def _decode(self, S):
        """Logits (rows, V) after one more position of each row. Those of full rows mean nothing."""
        positions = self.last.clamp(max=S - 1)  # (rows, 1)
        where = torch.arange(len(positions), device=positions.device)[:, None, None], positions[:, None]
        pasts = [(*kept, where, min(S, max(self.sizes))) for kept in self.kept]
        with _fastest_product(self.tokens, len(positions)):
            return self.model(self.last_tokens(), positions=positions, pasts=pasts)[0][:, -1]


@contextlib.contextmanager
def _fastest_product(x, rows):
    """On a CPU, torch's own product of a bfloat16 matrix and one row reads it faster than oneDNN's, which is faster for
    more rows: 36 matrices of 3072 x 768 in 7 ms against 11."""
    if rows > 1 or x.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        yield
        return
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)
