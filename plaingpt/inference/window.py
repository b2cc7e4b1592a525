"""
The window of each row of a batch: the last tokens that the model sees of it, with their keys and
values.
"""
import contextlib

import torch
from torch.nn import functional as F

from model import round_up
from plaingpt.inference import graphs
from plaingpt.inference.cache import KVCache, has_cpp_attention
from plaingpt.inference.decoding_block import decodes_in_cpp
from plaingpt.system.cpu_kernels import CpuKernels
from plaingpt.system.cuda_kernels import without_cudnn_attention


class Window:
    """The last context_size tokens, or fewer, of each row, and the logits after them.

    The tokens of a row stand at positions 0 to size - 1 of its window, whatever the sizes of the
    others: behind those of a shorter row is room that nothing sees before it is written. Once a row
    is full, its window moves on by `stride` tokens. Positions are counted from the window's
    beginning, so the remaining tokens must then be read again.

    What decode() and append() read and write stays in place, so that a CUDA graph can repeat them.
    The host counts along in count_token(), so it waits for the device only when a window moves."""

    def __init__(self, model, prompts, lengths, num_samples, max_new_tokens, stride, context_size):
        """prompts: int64 (B, T), which all end in the last column; lengths: tokens of each.

        The others as in engine.stream(). The rows are the samples of the first prompt, then those
        of the second, and so on."""
        device = prompts.device
        self.model = model
        self.stride = stride
        self.num_samples = num_samples
        self.context_size = context_size
        self.has_started = False

        # All tokens, with room for the new ones, (rows, T + new); how many columns are filled; and
        # the number of the last one, int64 (1,).
        self.tokens = F.pad(prompts, (0, max_new_tokens)).repeat_interleave(num_samples, dim=0)
        self.filled = prompts.size(1)
        self.last_column = torch.tensor([self.filled - 1], device=device)

        # How many tokens each window has, and the position of the last one, int64 (rows, 1).
        self.sizes = []
        for length in lengths:
            self.sizes += [min(length, context_size)] * num_samples
        self.positions = torch.tensor(self.sizes, device=device)[:, None] - 1

        # On a CPU one position attends 6 times as fast in float32 (12 heads, 400 positions: 45 us
        # instead of 264).
        dtype = model.transformer.ln_f.weight.dtype
        if device.type == 'cpu':
            dtype = torch.float32
        self.rounds_lengths = graphs.are_used_on(device)
        room = cache_room(self.filled + max_new_tokens, context_size, device)
        # From the first decode() on: whether C++ computes all layers, and else weights in another
        # order.
        self.layers_in_cpp = None
        self.packed = None
        # With one position more, decoding always sees a slice. torch.compile would compile again
        # where it sees whole tensors, which it can't while a graph is recorded.
        self.cache = KVCache(model.config, len(self.sizes), room + 1, dtype, device)
        # Neither a compiled model nor a graph can call C++ of our own.
        calls_anything = not self.rounds_lengths and not is_compiled(model)
        self.in_cpp = calls_anything and has_cpp_attention(device)

    # ---- tokens ----

    def last_tokens(self):
        """The last token of each row, int64 (rows, 1)."""
        return self.tokens.index_select(1, self.last_column)

    def append(self, chosen):
        """Adds one token to each row; chosen: int64 (rows, 1)."""
        self.last_column += 1
        self.positions += 1
        self.tokens.index_copy_(1, self.last_column, chosen)

    def count_token(self):
        """Counts on the host what append() has added on the device; returns the new tokens.

        They are int64 (rows, 1), and stay as they are."""
        self.filled += 1
        self.sizes = [size + 1 for size in self.sizes]
        return self.tokens[:, self.filled - 1:self.filled]

    # ---- logits ----

    def must_read(self):
        """Whether the next logits need read(): at the start, and when a row's window is full."""
        return not self.has_started or max(self.sizes) > self.context_size

    def read(self):
        """Logits (rows, V) after the last token of each row, where must_read() is true."""
        if not self.has_started:
            self.has_started = True
            return self._read_prompts()
        full = [row for row, size in enumerate(self.sizes) if size > self.context_size]
        if len(full) == len(self.sizes):
            return self._move(full)
        # The rows that are not full need one position. The full ones take part, though they have
        # no room for another; their logits are replaced.
        self.positions.clamp_(max=self.context_size - 1)
        logits = self.decode(self.visible())
        logits[full] = self._move(full)
        return logits

    def visible(self):
        """How many positions the next decode() must see."""
        longest = min(max(self.sizes), self.context_size)
        if self.rounds_lengths:
            return round_up(longest, graphs.LENGTH_MULTIPLE)
        return longest

    def steps_at_this_length(self):
        """How many steps in a row, with the next one, see visible() positions."""
        until_longer = min(self.visible(), self.context_size) - max(self.sizes) + 1
        until_the_end = self.tokens.size(1) - self.filled
        return min(until_longer, until_the_end)

    def decode(self, visible):
        """Logits (rows, V) after the pass of one more position of each row; visible: visible()."""
        sizes_differ = min(self.sizes) < max(self.sizes)
        hides_some = self.rounds_lengths or sizes_differ
        if self.in_cpp:
            caches = self.cache.decode_in_cpp(self.positions)
        else:
            caches = self.cache.decode(self.positions, visible, hides_some)
        with self._kernels_for_decoding():
            logits, _ = self.model(self.last_tokens(), positions=self.positions, caches=caches)
        return logits[:, -1]

    def _kernels_for_decoding(self):
        """The context in which decode() computes."""
        rows = len(self.tokens)
        if self.layers_in_cpp is None:
            self.layers_in_cpp = self.in_cpp and decodes_in_cpp(self.model, rows)
        if self.layers_in_cpp:
            return contextlib.nullcontext()
        if self.packed is None:
            self.packed = packed_weights(self.model, rows)
        return kernels_for_decoding(self.model, self.tokens.device, rows, self.packed)

    def _read_prompts(self):
        """Reads each prompt once, for all its samples."""
        first_rows = range(0, len(self.sizes), self.num_samples)
        logits = self._prefill(first_rows, self.num_samples)
        return logits.repeat_interleave(self.num_samples, dim=0)

    def _move(self, full):
        """Moves the windows of full rows on, and reads them again."""
        for row in full:
            self.sizes[row] = self.context_size + 1 - self.stride
        self.positions[full] = self.context_size - self.stride
        return self._prefill(full, 1)

    def _prefill(self, row_numbers, samples):
        """Logits (R, V) after the windows of R rows, given by their numbers.

        The keys and values of each are cached for as many rows as it has samples, from its own
        on."""
        longest = max(self.sizes[row] for row in row_numbers)
        rows = torch.tensor(row_numbers, device=self.tokens.device)  # (R,)
        positions = torch.arange(longest, device=rows.device)  # (T,)
        begin = self.last_column - self.positions[rows]  # (R, 1)
        # Shorter windows are followed by whatever comes next; nothing sees it.
        columns = (begin + positions).clamp(max=self.tokens.size(1) - 1)
        idx = self.tokens[rows[:, None], columns]  # (R, T)
        stored_in = rows[:, None] + torch.arange(samples, device=rows.device)  # (R, samples)
        with attention_for_generation(rows.device):
            x = self.model.residuals(idx, positions, self.cache.prefill(stored_in, positions))
        numbers = torch.arange(len(rows), device=rows.device)
        x = x[numbers, self.positions[rows, 0]]  # (R, C), of the last token of each
        return self.model.logits(x)


def cache_room(tokens, context_size, device):
    """The positions of a cache for rows of this many tokens, new ones included, on a device."""
    positions = min(context_size, tokens)
    if graphs.are_used_on(device):
        return round_up(positions, graphs.LENGTH_MULTIPLE)
    return positions


def attention_for_generation(device):
    """A context for a forward pass, in which a GPU computes attention by no kernel of cuDNN."""
    if device.type == 'cuda':
        return without_cudnn_attention()
    return contextlib.nullcontext()


def is_compiled(model):
    """Whether torch.compile has compiled a GPT as a whole."""
    return model._compiled_call_impl is not None


def packed_weights(model, rows):
    """What CpuKernels.pack() returns for this many rows; {} for other models."""
    if is_compiled(model) or not isinstance(model.kernels, CpuKernels):
        return {}
    return model.kernels.pack(model, rows)


@contextlib.contextmanager
def kernels_for_decoding(model, device, rows, packed):
    """A context for a pass of one position of so many rows; packed: from packed_weights()."""
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(attention_for_generation(device))
        contexts.enter_context(without_onednn_for_one_row(device, rows))
        if packed:
            contexts.enter_context(model.kernels.use_packed(packed))
        yield


@contextlib.contextmanager
def without_onednn_for_one_row(device, rows):
    """On a CPU, lets torch's own code multiply a single row by bfloat16 matrices.

    It reads them faster than oneDNN, which is faster for more rows: 36 matrices of 3072 x 768 in
    7 ms against 11. In float32, CpuKernels chooses by itself."""
    has_onednn = torch.backends.mkldnn.is_available()
    if rows > 1 or device.type != 'cpu' or not has_onednn:
        yield
        return
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)
