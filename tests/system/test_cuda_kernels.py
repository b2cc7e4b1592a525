"""plaingpt/system/cuda_kernels.py: which attention kernels torch may choose."""
import pytest
import torch
from torch.nn import functional as F

from model import Kernels
from plaingpt.system.cuda_kernels import CudaKernels, without_cudnn_attention


@pytest.fixture
def kernels_of(monkeypatch):
    """kernels_of(capability): the CudaKernels of a GPU of this compute capability."""
    def make(capability):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        return CudaKernels(torch.device('cuda', 0))
    return make


@pytest.fixture
def calls(monkeypatch):
    """The calls of F.scaled_dot_product_attention: {argument: value}, and whether cuDNN may run."""
    calls = []
    original = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        calls.append({**options, 'heads': k.size(1), 'cudnn': cudnn})
        return original(q, k, v, **options)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    return calls


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 8, 16, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 8, 16, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize('capability, dtype, has_bias, grouped', [
    ((9, 0), torch.bfloat16, False, True),
    ((8, 0), torch.float16, False, True),
    ((9, 0), torch.bfloat16, True, False),
    ((9, 0), torch.float32, False, False),
    ((7, 5), torch.float16, False, False),
])
def test_grouped_heads_are_repeated_where_flash_attention_does_not_serve(
        kernels_of, calls, capability, dtype, has_bias, grouped):
    q, k, v = inputs(dtype)
    bias = torch.zeros(1, 4, 8, 8, dtype=dtype) if has_bias else None
    expected = Kernels().causal_attention(q, k, v, 0.0, bias, grouped=True)
    calls.clear()
    y = kernels_of(capability).causal_attention(q, k, v, 0.0, bias, grouped=True)
    assert torch.allclose(y, expected, atol=1e-2)
    [call] = calls
    assert call['enable_gqa'] is grouped
    assert call['heads'] == (2 if grouped else 4)


def test_queries_in_float32_take_the_precision_of_the_values_under_autocast(kernels_of, calls):
    q, k, v = inputs()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        kernels_of((9, 0)).causal_attention(q, k, v.bfloat16(), 0.0, grouped=True)
    assert calls[0]['enable_gqa']


@pytest.mark.parametrize('p, cudnn', [(0.0, True), (0.25, True), (0.0625, True), (0.1, False),
                                      (0.2, False)])
def test_cudnn_takes_no_dropout_that_it_would_round(kernels_of, calls, p, cudnn):
    q, k, v = inputs()
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    kernels_of((9, 0)).causal_attention(q, k, v, p, grouped=True)
    assert calls[0]['cudnn'] == (enabled and cudnn)
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_without_cudnn_attention_the_other_kernels_stay_available():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
