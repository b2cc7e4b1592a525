import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from plaingpt.inference import decoding_kernels
from plaingpt.inference.quantized_weights import (GROUP, TiledMatrix, TorchMatrix,
                                                  quantize_matrix)

needs_library = pytest.mark.skipif(decoding_kernels.library() is None,
                                   reason='the C++ cannot be compiled here')
MATRICES = [pytest.param(TiledMatrix, marks=needs_library), TorchMatrix]


def random_matrix(outputs, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(outputs, inputs, generator=generator)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- numbers ----

@pytest.mark.parametrize('kind, most', [('int8', 0.007), ('int4', 0.08)])
def test_the_error_of_normal_weights(kind, most):
    # Rounding to steps of (highest - lowest) / 15 has an error of a step / sqrt(12), and 32 normal
    # numbers have a range of about 4.1 standard deviations: 0.079.
    weight = random_matrix(64, 256)
    assert relative_error(quantize_matrix(weight, kind).floats(), weight) < most


def test_every_int8_is_within_half_a_step():
    weight = random_matrix(8, 64)
    numbers = quantize_matrix(weight, 'int8')
    steps = numbers.scales.float().repeat_interleave(GROUP, dim=1)
    # A scale is rounded to 8 bits, so the largest numbers may be cut off by 1 / 256 more.
    allowed = steps / 2 + weight.abs() / 256 + 1e-9
    assert ((numbers.floats() - weight).abs() <= allowed).all()


@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_groups_without_a_range(kind):
    weight = torch.zeros(2, 96)
    weight[1] = 0.5
    floats = quantize_matrix(weight, kind).floats()
    assert (floats[0] == 0).all()
    assert torch.allclose(floats[1], torch.tensor(0.5), rtol=1 / 128)


def test_an_outlier_does_not_cost_the_others_their_precision():
    weight = random_matrix(1, 64)
    weight[0, 3] = 1.0
    error = (quantize_matrix(weight, 'int4').floats() - weight)[0, GROUP:]
    assert error.norm() / weight[0, GROUP:].norm() < 0.1


def test_a_long_matrix_is_quantised_in_parts(monkeypatch):
    weight = random_matrix(10, 64)
    whole = quantize_matrix(weight, 'int4')
    monkeypatch.setattr('plaingpt.inference.quantized_weights.OUTPUTS_AT_ONCE', 3)
    parts = quantize_matrix(weight, 'int4')
    assert torch.equal(parts.floats(), whole.floats())


# ---- products ----

def rounded(x):
    """What C++ makes of inputs, float32 (rows, inputs): whole numbers times a scale a group."""
    grouped = x.view(len(x), -1, GROUP)
    scales = grouped.abs().amax(dim=-1, keepdim=True) / 127
    factors = torch.where(scales > 0, 1 / scales, 0.0)
    return ((grouped * factors).round() * scales).flatten(1)


@needs_library
@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('outputs', [1, 4, 30, 65])
def test_products_are_those_of_rounded_inputs(kind, outputs):
    numbers = quantize_matrix(random_matrix(outputs, 96), kind)
    matrix = TiledMatrix(numbers)
    assert torch.equal(matrix.floats(), numbers.floats())
    bias = random_matrix(1, outputs, seed=1)[0]
    for rows in [*range(1, 27), 128, 129, 300]:
        x = torch.randn(rows, 96)
        expected = F.linear(rounded(x), numbers.floats(), bias)
        assert torch.allclose(matrix.product(x, bias), expected, atol=1e-5)
        without_bias = F.linear(rounded(x), numbers.floats())
        assert torch.allclose(matrix.product(x[:, None], None)[:, 0], without_bias, atol=1e-5)


@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('outputs', [1, 4, 30, 65])
def test_products_of_torchs_kernel(kind, outputs):
    numbers = quantize_matrix(random_matrix(outputs, 96), kind)
    matrix = TorchMatrix(numbers)
    bias = random_matrix(1, outputs, seed=1)[0]
    for rows in (1, 2, 9, 150):
        x = torch.randn(rows, 96)
        expected = F.linear(x, numbers.floats(), bias)
        assert torch.allclose(matrix.product(x, bias), expected, atol=0.02)  # in bfloat16


@needs_library
@pytest.mark.parametrize('kind, most', [('int8', 0.01), ('int4', 0.01)])
def test_rounded_inputs_cost_little(kind, most):
    numbers = quantize_matrix(random_matrix(64, 256), kind)
    x = torch.randn(50, 256)
    error = relative_error(TiledMatrix(numbers).product(x, None), F.linear(x, numbers.floats()))
    assert 0 < error < most


@needs_library
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_inputs_of_any_size(kind):
    numbers = quantize_matrix(random_matrix(20, 96), kind)
    matrix = TiledMatrix(numbers)
    x = torch.randn(3, 96)
    x[0] = 0
    x[1] *= 1e30
    x[2] *= 1e-30
    expected = F.linear(rounded(x), numbers.floats())
    sizes = torch.tensor([[1], [1e30], [1e-30]])
    assert torch.allclose(matrix.product(x, None) / sizes, expected / sizes, atol=1e-5)


@needs_library
@pytest.mark.parametrize('kind', ['int8', 'int4'])
@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_a_number_that_is_not_finite_is_not_lost(kind, number):
    matrix = TiledMatrix(quantize_matrix(random_matrix(20, 96), kind))
    x = torch.randn(2, 96)
    x[1, 40] = number
    product = matrix.product(x, None)
    assert product[0].isfinite().all()
    assert not product[1].isfinite().any()


@needs_library
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_the_extremes_of_all_numbers(kind):
    # Sums of products of bytes must hold the largest ones.
    weight = torch.ones(16, 64)
    weight[:, ::3] = -1
    numbers = quantize_matrix(weight, kind)
    for x in (torch.ones(1, 64), weight[:1], -weight[:1]):
        product = TiledMatrix(numbers).product(x, None)
        assert torch.allclose(product, F.linear(x, numbers.floats()), atol=1e-4)


@needs_library
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_a_row_does_not_depend_on_its_neighbours(kind):
    matrix = TiledMatrix(quantize_matrix(random_matrix(70, 128), kind))
    x = torch.randn(150, 128)
    alone = torch.cat([matrix.product(row[None], None) for row in x])
    for rows in range(1, len(x) + 1):
        assert torch.equal(matrix.product(x[:rows], None), alone[:rows])


@pytest.mark.parametrize('make_matrix', MATRICES)
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_rows_of_an_embedding(make_matrix, kind):
    numbers = quantize_matrix(random_matrix(30, 64), kind)
    matrix = make_matrix(numbers)
    idx = torch.tensor([[0, 29], [7, 7], [3, 28]])
    assert torch.allclose(matrix.rows(idx), numbers.floats()[idx], atol=1e-7)
    assert torch.allclose(matrix.rows(idx.T), numbers.floats()[idx.T], atol=1e-7)  # not contiguous


@needs_library
@pytest.mark.parametrize('kind, bits', [('int8', 8.5), ('int4', 5.0)])
def test_bits_of_a_weight(kind, bits):
    matrix = TiledMatrix(quantize_matrix(random_matrix(64, 96), kind))
    assert matrix.bytes * 8 / (64 * 96) == bits


@needs_library
@settings(max_examples=30, deadline=None)
@given(outputs=st.integers(1, 40), groups=st.integers(1, 5), rows=st.integers(1, 20),
       kind=st.sampled_from(['int8', 'int4']), seed=st.integers(0, 1000))
def test_any_shape(outputs, groups, rows, kind, seed):
    numbers = quantize_matrix(random_matrix(outputs, GROUP * groups, seed), kind)
    x = torch.randn(rows, GROUP * groups)
    product = TiledMatrix(numbers).product(x, None)
    assert torch.allclose(product, F.linear(rounded(x), numbers.floats()), atol=1e-5)


# ---- threads ----

@needs_library
def test_threads_that_multiply_at_the_same_time():
    numbers = quantize_matrix(random_matrix(256, 256), 'int8')
    x = torch.randn(4, 256)
    expected = TiledMatrix(numbers).product(x, None)
    matrices = [TiledMatrix(numbers) for _ in range(4)]

    def multiply(matrix):
        torch.set_num_threads(2)
        return all(torch.equal(matrix.product(x, None), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(multiply, matrices))


PROGRAM = '''
import os, signal, torch
from plaingpt.inference.quantized_weights import TiledMatrix, quantize_matrix
torch.set_num_threads(2)
matrix = TiledMatrix(quantize_matrix(torch.randn(256, 256), 'int8'))
x = torch.randn(4, 256)
expected = matrix.product(x, None)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(matrix.product(x, None), expected) else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
'''


@needs_library
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='this system has no fork')
def test_a_fork_multiplies_without_the_threads_of_its_parent():
    ended = subprocess.run([sys.executable, '-c', PROGRAM], cwd=ROOT, capture_output=True,
                           text=True, timeout=60)
    assert ended.stdout == '0\n', ended.stderr
