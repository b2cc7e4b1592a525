"""
Matrices of 8 or 4 bits a number, which a CPU decodes with.

Each output of a matrix is cut into groups of 32 inputs, rounded to whole numbers between the
smallest and the largest of the group. For a group there are bfloat16 factors:

    int8: weight = number * scale                   number -127 to 127;  8.5 bits a weight
    int4: weight = (number - 8) * scale + zero      number 0 to 15;      5 bits a weight

int4's form is that of torch's own kernel (torch.ops.aten._weight_int4pack_mm_for_cpu). C++ rounds
the inputs of a product as well, to 8 bits in groups of 32, so that it multiplies whole numbers.
"""
import torch
from torch.nn import functional as F

from plaingpt.inference.decoding_kernels import GROUP, TILE, Layer, dequantise

# The largest number of a group is an outlier more often than not. Cutting it off by one of these
# factors may make the others more precise; the factor with the least squared error is taken.
RANGES = (1.0, 0.94, 0.88, 0.82)
OUTPUTS_AT_ONCE = 4096  # of a matrix, while it is quantised
QUADS = GROUP // 4      # four inputs of an output lie together


class Numbers:
    """A quantised matrix: its numbers and factors, before they are packed.

    numbers: int8 (outputs, inputs). scales: bfloat16 (outputs, groups); zeros: the same, or None
    for int8."""

    def __init__(self, numbers, scales, zeros=None):
        self.numbers = numbers
        self.scales = scales
        self.zeros = zeros

    def floats(self):
        """The float32 (outputs, inputs) that they stand for."""
        grouped = self.numbers.view(len(self.numbers), -1, GROUP).float()
        scales = self.scales.float()[..., None]
        if self.zeros is None:
            return (grouped * scales).flatten(1)
        return ((grouped - 8) * scales + self.zeros.float()[..., None]).flatten(1)


def quantize_matrix(weight, kind):
    """The Numbers for a weight, (outputs, inputs) with inputs a multiple of GROUP.

    kind: 'int8' or 'int4'."""
    quantize_part = _to_int8 if kind == 'int8' else _to_int4
    parts = []
    for part in weight.detach().float().split(OUTPUTS_AT_ONCE):
        parts.append(quantize_part(part.view(len(part), -1, GROUP)))
    zeros = None
    if kind == 'int4':
        zeros = torch.cat([part.zeros for part in parts])
    return Numbers(torch.cat([part.numbers for part in parts]),
                   torch.cat([part.scales for part in parts]), zeros)


def _to_int8(grouped):
    """The Numbers of weights, (outputs, groups, GROUP)."""
    scales = (grouped.abs().amax(dim=-1) / 127).bfloat16()
    divisors = _without_zeros(scales.float())[..., None]
    numbers = (grouped / divisors).round().clamp(-127, 127)
    return Numbers(numbers.to(torch.int8).flatten(1), scales)


def _to_int4(grouped):
    """As _to_int8(), with the RANGES that have the least error."""
    lowest, highest = grouped.aminmax(dim=-1)
    best = None
    least_error = torch.full_like(lowest, torch.inf)
    for part in RANGES:
        scales = ((highest - lowest) * part / 15).bfloat16()
        zeros = (lowest * part + 8 * scales.float()).bfloat16()
        divisors = _without_zeros(scales.float())[..., None]
        numbers = ((grouped - zeros.float()[..., None]) / divisors).round().clamp(-8, 7) + 8
        tried = Numbers(numbers.to(torch.int8).flatten(1), scales, zeros)
        error = (tried.floats().view_as(grouped) - grouped).square().sum(dim=-1)
        if best is None:
            best = tried
        is_better = error < least_error
        least_error = torch.where(is_better, error, least_error)
        best.scales = torch.where(is_better, scales, best.scales)
        best.zeros = torch.where(is_better, zeros, best.zeros)
        chosen = is_better.repeat_interleave(GROUP, dim=1)
        best.numbers = torch.where(chosen, tried.numbers, best.numbers)
    return best


def _without_zeros(scales):
    """Scales to divide by: 1 where a group has no range, so that its numbers are 0."""
    return torch.where(scales == 0, 1.0, scales)


# ---- the two ways to multiply ----

class TiledMatrix:
    """A quantised matrix in the order in which the C++ of decoding_kernels reads it.

    tiles: uint8 (tiles, bytes of a tile), as cpp/quantized.h describes them."""

    def __init__(self, matrix):
        """matrix: Numbers. The library of decoding_kernels must be there."""
        self.outputs, self.inputs = matrix.numbers.shape
        self.bits = 8 if matrix.zeros is None else 4
        self.tiles = _tiles_of(matrix)

    @property
    def bytes(self):
        return self.tiles.numel()

    def layer(self, bias=None, norm=None, activation=None):
        """The decoding_kernels.Layer that multiplies by this matrix; the arguments as there."""
        return Layer(self.tiles, self.bits, self.inputs, self.outputs, bias, norm, activation)

    def product(self, x, bias):
        """x (…, inputs) float32 times the transposed matrix, plus the bias or None."""
        return self.layer(bias).run(x)

    def floats(self):
        """The whole matrix, float32 (outputs, inputs)."""
        floats = torch.empty(self.outputs, self.inputs)
        return dequantise(self.tiles, self.bits, None, floats)

    def rows(self, idx):
        """The rows for idx, int64 (…): float32 (…, inputs)."""
        floats = torch.empty(*idx.shape, self.inputs)
        return dequantise(self.tiles, self.bits, idx.contiguous(), floats)


def _tiles_of(matrix):
    """The tiles of Numbers, uint8 (tiles, bytes of a tile)."""
    outputs, inputs = matrix.numbers.shape
    missing = -outputs % TILE  # the last tile is filled up
    numbers = F.pad(matrix.numbers, (0, 0, 0, missing))
    numbers = numbers.view(-1, TILE, inputs // GROUP, QUADS, 4).permute(0, 2, 3, 1, 4)
    factors = [matrix.scales] if matrix.zeros is None else [matrix.scales, matrix.zeros]
    factors = F.pad(torch.stack(factors, dim=-1), (0, 0, 0, 0, 0, missing))
    factors = factors.view(-1, TILE, inputs // GROUP, factors.size(-1)).transpose(1, 2)
    if matrix.zeros is None:
        packed = (numbers.short() + 128).to(torch.uint8)
    else:
        lower, upper = numbers.to(torch.uint8).chunk(2, dim=2)  # halves of a group
        packed = lower | upper << 4
    factor_bytes = factors.flatten(1).contiguous().view(torch.uint8)
    return torch.cat([factor_bytes, packed.flatten(1)], dim=1)


class TorchMatrix:
    """A quantised matrix for torch's own int4 kernel, which computes in bfloat16.

    int8 numbers become two of 4 bits, 16 * high + low, side by side in a matrix of twice the
    width."""

    def __init__(self, matrix):
        """matrix: Numbers."""
        self.outputs, self.inputs = matrix.numbers.shape
        self.matrix = matrix
        self.has_two_parts = matrix.zeros is None
        numbers = matrix.numbers.int()
        scales = matrix.scales.float()
        zeros = matrix.zeros
        if self.has_two_parts:
            # In (part - 8) * scale + zero: number = 16 * (high - 8) + (low - 8) + 8.
            number = numbers + 128
            numbers = torch.cat([number >> 4, number & 15], dim=1)
            zeros = torch.cat([torch.zeros_like(scales), 8 * scales], dim=1)
            scales = torch.cat([16 * scales, scales], dim=1)
        missing = -self.outputs % 16  # the kernel wants whole blocks of outputs
        numbers = F.pad(numbers, (0, 0, 0, missing), value=8)
        factors = torch.stack([scales.bfloat16(), zeros.bfloat16()], dim=-1)
        factors = F.pad(factors, (0, 0, 0, 0, 0, missing))
        self.factors = factors.transpose(0, 1).contiguous()  # (groups, outputs, 2)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)

    @property
    def bytes(self):
        factors = self.matrix.scales.numel() * 2 * (1 if self.has_two_parts else 2)
        kept = self.matrix.numbers.numel() + factors
        return kept + self.packed.numel() + 2 * self.factors.numel()

    def product(self, x, bias):
        """As that of TiledMatrix."""
        rows = x.reshape(-1, self.inputs).bfloat16()
        if self.has_two_parts:
            rows = torch.cat([rows, rows], dim=1)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.factors)
        y = y[:, :self.outputs].float().view(*x.shape[:-1], self.outputs)
        return y if bias is None else y + bias

    def floats(self):
        """As that of TiledMatrix."""
        return self.matrix.floats()

    def rows(self, idx):
        """As that of TiledMatrix."""
        flat = idx.flatten()
        zeros = None if self.matrix.zeros is None else self.matrix.zeros[flat]
        chosen = Numbers(self.matrix.numbers[flat], self.matrix.scales[flat], zeros)
        return chosen.floats().view(*idx.shape, self.inputs)
