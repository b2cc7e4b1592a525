import mmap

import pytest
import torch
from torch import nn

from plaingpt.system import large_pages

needs_linux = pytest.mark.skipif(not hasattr(mmap, 'MADV_HUGEPAGE'),
                                 reason='this system has no large pages to ask for')


def test_numbers_and_identities_stay():
    tensors = [torch.randn(300, 1000), torch.randn(7, 3).bfloat16(), torch.tensor(5.0),
               torch.randint(0, 255, (1_000_003,), dtype=torch.uint8)]
    copies = [tensor.clone() for tensor in tensors]
    large_pages.move(tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert tensor.dtype == copy.dtype
        assert torch.equal(tensor, copy)


@needs_linux
def test_they_lie_one_after_the_other_from_a_page_on():
    first, second = torch.zeros(1001, 1000), torch.zeros(10)
    large_pages.move([first, second])
    assert first.data_ptr() % large_pages.PAGE == 0
    assert second.data_ptr() == first.data_ptr() + 4_004_032  # the next multiple of 64 bytes


def test_parameters_of_a_module_stay_its_own():
    layer = nn.Linear(1000, 1000)
    weight = layer.weight
    large_pages.move(layer.parameters())
    assert layer.weight is weight
    assert weight.requires_grad
    layer(torch.ones(1, 1000)).sum().backward()
    assert torch.equal(weight.grad, torch.ones(1000, 1000))


def test_what_fills_no_page_stays_where_it_is():
    tensor = torch.randn(100)
    address = tensor.data_ptr()
    large_pages.move([tensor])
    large_pages.move([])
    assert tensor.data_ptr() == address


@needs_linux
def test_a_kernel_without_large_pages(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError('Invalid argument')

    monkeypatch.setattr(mmap, 'mmap', Refusing)
    tensor = torch.randn(1000, 1000)
    copy = tensor.clone()
    large_pages.move([tensor])
    assert torch.equal(tensor, copy)
    assert (large_pages.zeros((1000, 1000), torch.float32, torch.device('cpu')) == 0).all()


def test_a_system_that_knows_none(monkeypatch):
    monkeypatch.delattr(mmap, 'MADV_HUGEPAGE', raising=False)
    tensor = torch.randn(1000, 1000)
    address = tensor.data_ptr()
    large_pages.move([tensor])
    assert tensor.data_ptr() == address


@pytest.mark.parametrize('shape', [(0, 5), (3, 7), (2, 1000, 1001)])
def test_zeros(shape):
    found = large_pages.zeros(shape, torch.bfloat16, torch.device('cpu'))
    assert torch.equal(found, torch.zeros(shape, dtype=torch.bfloat16))
    found.fill_(1)
    assert (found == 1).all()


@needs_linux
def test_many_zeros_lie_in_large_pages():
    found = large_pages.zeros((1000, 1000), torch.float32, torch.device('cpu'))
    assert found.data_ptr() % large_pages.PAGE == 0


def test_zeros_of_another_device():
    assert large_pages.zeros((1000, 1000), torch.float32, torch.device('meta')).is_meta
