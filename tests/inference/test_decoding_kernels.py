import math

import pytest
import torch
from conftest import tiny_gpt, tiny_ids
from torch.nn import functional as F

from model import alibi_bias
from plaingpt.inference import cache, decoding_kernels
from plaingpt.inference.cache import alibi_slopes
from plaingpt.inference.decoding_kernels import attention

pytestmark = pytest.mark.skipif(decoding_kernels.library() is None,
                                reason='the C++ cannot be compiled here')


class Case:
    """A cache in which rows of different lengths stand in slots of any order."""
    slots = torch.tensor([3, 0, 2])
    positions = torch.tensor([8, 0, 4])

    def __init__(self, heads, kv_heads, size):
        torch.manual_seed(1)
        self.q = torch.randn(3, heads, 1, size)
        self.k = torch.randn(3, kv_heads, 1, size)
        self.v = torch.randn(3, kv_heads, 1, size)
        self.keys = torch.randn(4, 9, kv_heads, size)
        self.values = torch.randn(4, 9, kv_heads, size)

    def expected(self, slopes=None):
        """The result by torch, of each row by itself."""
        rows = []
        for row, (slot, position) in enumerate(zip(self.slots, self.positions, strict=True)):
            keys = torch.cat([self.keys[slot, :position].transpose(0, 1), self.k[row]], dim=1)
            values = torch.cat([self.values[slot, :position].transpose(0, 1), self.v[row]], dim=1)
            mask = None
            if slopes is not None:
                distances = position - torch.arange(position + 1)
                mask = (-slopes[:, None] * distances)[None, :, None]
            rows.append(F.scaled_dot_product_attention(
                self.q[row][None], keys[None], values[None], attn_mask=mask, enable_gqa=True))
        return torch.cat(rows)

    def result(self, slopes=None):
        return attention(self.q, self.k, self.v, self.keys, self.values, self.slots, self.positions,
                      slopes)


@pytest.mark.parametrize('heads, kv_heads, size', [(2, 2, 16), (6, 2, 8), (4, 1, 5), (1, 1, 33)])
@pytest.mark.parametrize('has_slopes', [False, True])
def test_attention_is_that_of_torch(heads, kv_heads, size, has_slopes):
    case = Case(heads, kv_heads, size)
    slopes = torch.rand(heads) if has_slopes else None
    expected = case.expected(slopes)
    assert torch.allclose(case.result(slopes), expected, atol=1e-6)


def test_new_keys_and_values_are_stored_and_nothing_else():
    case = Case(heads=4, kv_heads=2, size=8)
    keys, values = case.keys.clone(), case.values.clone()
    case.result()
    keys[case.slots, case.positions] = case.k[:, :, 0]
    values[case.slots, case.positions] = case.v[:, :, 0]
    assert torch.equal(case.keys, keys)
    assert torch.equal(case.values, values)


def test_strided_queries_and_keys():
    case = Case(heads=4, kv_heads=2, size=8)
    expected = case.result()
    together = torch.cat([case.q[:, :, 0], case.k[:, :, 0], case.v[:, :, 0]], dim=1)  # (3, 8, 8)
    q, k, v = together.split([4, 2, 2], dim=1)
    again = attention(q[:, :, None], k[:, :, None], v[:, :, None], case.keys, case.values,
                   case.slots, case.positions)
    assert torch.equal(again, expected)


def test_a_row_does_not_depend_on_its_neighbours():
    case = Case(heads=4, kv_heads=2, size=8)
    together = case.result()
    for row in range(3):
        part = slice(row, row + 1)
        alone = attention(case.q[part], case.k[part], case.v[part], case.keys, case.values,
                       case.slots[part], case.positions[part])
        assert torch.equal(alone, together[part])


def test_large_scores_do_not_overflow():
    case = Case(heads=2, kv_heads=2, size=16)
    case.q *= 1000
    assert torch.allclose(case.result(), case.expected(), atol=1e-4)


def test_slopes_of_alibi():
    config = tiny_gpt(position='alibi', n_head=4).config
    positions = torch.tensor([[6]])
    distances = 6 - torch.arange(7)
    expected = alibi_bias(config, positions, 7)[0, :, 0]
    slopes = alibi_slopes(config)
    assert torch.allclose(-slopes[:, None] * distances, expected)


ARCHITECTURES = {
    'plain': dict(),
    'rope, grouped heads': dict(position='rope', n_head=4, n_kv_head=2, qk_norm=True),
    'alibi, grouped heads': dict(position='alibi', n_head=4, n_kv_head=2),
    'swiglu': dict(mlp='swiglu', norm='rmsnorm', bias=False, position='none'),
}


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_texts_are_those_without_the_library(architecture, dtype, monkeypatch):
    gpt = tiny_gpt(**ARCHITECTURES[architecture]).to(dtype)
    prompts = tiny_ids(3, 5)
    options = dict(lengths=[5, 2, 4], temperature=0, stride=4, num_samples=2)
    in_cpp = gpt.generate(prompts, 20, **options)
    calls = []

    def has_none(device):
        calls.append(device)
        return False

    monkeypatch.setattr('plaingpt.inference.window.has_cpp_attention', has_none)
    by_torch = gpt.generate(prompts, 20, **options)
    assert calls
    if dtype == torch.float32:
        assert torch.equal(in_cpp, by_torch)
    else:  # roundings of 8 bits may choose another token, and then all that follow
        assert torch.equal(in_cpp[:, :7], by_torch[:, :7])


def test_the_library_is_used(monkeypatch):
    used = []
    attention = decoding_kernels.attention

    def spy(*arguments):
        used.append(True)
        return attention(*arguments)

    monkeypatch.setattr(cache.decoding_kernels, 'attention', spy)
    gpt = tiny_gpt()
    gpt.generate(tiny_ids(1, 3), 4)
    assert len(used) == 3 * gpt.config.n_layer  # the first token comes from reading the prompt


def test_attention_has_one_scale():
    # The scores are divided by the square root of the head's size: with one key 0 and another of
    # ones, a query of ones has scores 0 and sqrt(size).
    size = 16
    keys = torch.zeros(1, 2, 1, size)
    values = torch.zeros(1, 2, 1, size)
    ones = torch.ones(1, 1, 1, size)
    y = attention(ones, ones, ones, keys, values, torch.tensor([0]), torch.tensor([1]))
    weight = math.exp(math.sqrt(size)) / (1 + math.exp(math.sqrt(size)))
    assert torch.allclose(y, torch.full_like(y, weight))


@pytest.mark.parametrize('rows, columns, k', [
    (1, 1, 1), (3, 5, 5), (2, 64, 3), (2, 1000, 200), (3, 1037, 16), (2, 1037, 17), (1, 5000, 78),
    (16, 5000, 79)])
def test_the_largest_numbers(rows, columns, k):
    numbers = torch.randn(rows, columns + 3)[:, :columns]  # rows lie further apart
    largest, places = decoding_kernels.top_k(numbers, k)
    expected = numbers.topk(k)
    assert torch.equal(largest, expected.values)
    assert torch.equal(places, expected.indices)


def test_of_equal_numbers_the_first_are_the_largest():
    numbers = torch.randint(0, 4, (5, 900)).float()
    largest, places = decoding_kernels.top_k(numbers, 14)
    expected, order = numbers.sort(descending=True, stable=True)
    assert torch.equal(largest, expected[:, :14])
    assert torch.equal(places, order[:, :14])


def test_infinite_numbers_have_their_places():
    numbers = torch.full((1, 300), -math.inf)
    numbers[0, 7] = 1
    numbers[0, 200] = math.inf
    largest, places = decoding_kernels.top_k(numbers, 3)
    assert largest.tolist() == [[math.inf, 1, -math.inf]]
    assert places.tolist() == [[200, 7, 0]]


@pytest.mark.parametrize('place', [0, 5, 70, 299])
def test_numbers_without_an_order_are_those_of_torch(place):
    numbers = torch.randn(2, 300)
    numbers[1, place] = math.nan
    largest, places = decoding_kernels.top_k(numbers, 3)
    expected = numbers.topk(3)
    assert torch.equal(places, expected.indices)
    assert largest[1, 0].isnan()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_the_largest_numbers_of_another_precision(dtype):
    numbers = torch.arange(100, dtype=dtype)[None]
    largest, places = decoding_kernels.top_k(numbers, 2)
    assert largest.tolist() == [[99, 98]]
    assert places.tolist() == [[99, 98]]
