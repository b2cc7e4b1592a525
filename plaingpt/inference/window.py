"""
The window of each row of a batch: the last tokens that the model sees of it, with their keys and
values.
"""
import contextlib

import torch
from torch.nn import functional as F

from plaingpt.inference.cache import KVCache


class Window:
    """The last context_size tokens, or fewer, of each row, and the logits after them.

    The tokens of a row stand at positions 0 to size - 1 of its window, whatever the sizes of the
    others: behind those of a shorter row is room that nothing sees before it is written. Once a row
    is full, its window moves on by `stride` tokens. Positions are counted from the window's
    beginning, so the remaining tokens must then be read again.

    The sizes are known on the host too, so that only a step that moves a window waits for the
    device."""

    def __init__(self, model, idx, lengths, max_new_tokens, num_samples, stride, context_size):
        """idx: int64 (B, T), prompts; lengths: tokens of each. The others as in engine.stream().

        The rows are the samples of the first prompt, then those of the second, and so on."""
        self.model = model
        self.stride = stride
        self.num_samples = num_samples
        self.context_size = context_size
        self.has_started = False

        row_lengths = []
        for length in lengths:
            row_lengths += [length] * num_samples
        self.sizes = [min(length, context_size) for length in row_lengths]
        # The place of each row's last token, (rows, 1): in its window, and among all its tokens.
        self.last = torch.tensor(self.sizes, device=idx.device)[:, None] - 1
        self.end = torch.tensor(row_lengths, device=idx.device)[:, None] - 1
        # All tokens, with room for the new ones: (rows, T + new).
        self.tokens = F.pad(idx, (0, max_new_tokens)).repeat_interleave(num_samples, dim=0)

        # On a CPU one position attends 6 times as fast in float32 (12 heads, 400 positions: 45 us
        # instead of 264).
        dtype = model.lm_head.weight.dtype
        if idx.device.type == 'cpu':
            dtype = torch.float32
        positions = min(context_size, max(row_lengths) + max_new_tokens)
        self.cache = KVCache(model.config, len(row_lengths), positions, dtype, idx.device)

    def last_tokens(self):
        """The last token of each row, int64 (rows, 1)."""
        return self.tokens.gather(1, self.end)

    def append(self, chosen):
        """Adds one token to each row; chosen: int64 (rows, 1)."""
        self.last = self.last + 1
        self.end = self.end + 1
        self.sizes = [size + 1 for size in self.sizes]
        self.tokens.scatter_(1, self.end, chosen)

    def logits(self):
        """Logits (rows, V) after the last token of each row."""
        if not self.has_started:
            self.has_started = True
            return self._prefill_prompts()
        full = [row for row, size in enumerate(self.sizes) if size > self.context_size]
        if not full:
            return self._decode()
        if len(full) == len(self.sizes):
            return self._move(full)
        # The rows that are not full need one position, the full ones all of theirs.
        logits = self._decode()
        logits[full] = self._move(full)
        return logits

    def _prefill_prompts(self):
        """Reads each prompt once, for all its samples."""
        first_rows = range(0, len(self.sizes), self.num_samples)
        logits = self._prefill(first_rows, self.num_samples)
        return logits.repeat_interleave(self.num_samples, dim=0)

    def _move(self, full):
        """Moves the windows of full rows on, and reads them again."""
        for row in full:
            self.sizes[row] = self.context_size + 1 - self.stride
        self.last[full] = self.context_size - self.stride
        return self._prefill(full, 1)

    def _prefill(self, row_numbers, samples):
        """Logits (R, V) after the windows of R rows, given by their numbers.

        The keys and values of each are cached for as many rows as it has samples, from its own
        on."""
        longest = max(self.sizes[row] for row in row_numbers)
        rows = torch.tensor(row_numbers, device=self.tokens.device)  # (R,)
        positions = torch.arange(longest, device=rows.device)  # (T,)
        begin = self.end[rows] - self.last[rows]  # (R, 1)
        # Shorter windows are followed by whatever comes next; nothing sees it.
        places = (begin + positions).clamp(max=self.tokens.size(1) - 1)
        idx = self.tokens[rows[:, None], places]  # (R, T)
        stored_in = rows[:, None] + torch.arange(samples, device=rows.device)  # (R, samples)
        x = self.model.residuals(idx, positions, self.cache.prefill(stored_in, positions))
        numbers = torch.arange(len(rows), device=rows.device)
        x = x[numbers, self.last[rows, 0]]  # (R, C), of the last token of each
        return self.model.logits(x)

    def _decode(self):
        """Logits (rows, V) after one more position of each row; those of full rows mean nothing."""
        positions = self.last.clamp(max=self.context_size - 1)  # (rows, 1)
        visible = min(self.context_size, max(self.sizes))
        caches = self.cache.decode(positions, visible)
        with without_onednn_for_one_row(self.tokens.device, len(positions)):
            logits, _ = self.model(self.last_tokens(), positions=positions, caches=caches)
        return logits[:, -1]


@contextlib.contextmanager
def without_onednn_for_one_row(device, rows):
    """On a CPU, lets torch's own code multiply a single row by bfloat16 matrices.

    It reads them faster than oneDNN, which is faster for more rows: 36 matrices of 3072 x 768 in
    7 ms against 11."""
    has_onednn = torch.backends.mkldnn.is_available()
    if rows > 1 or device.type != 'cpu' or not has_onednn:
        yield
        return
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)
