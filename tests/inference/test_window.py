"""plaingpt/inference/window.py: full windows move on, and batches do not change a text."""
import pytest
import torch
from conftest import tiny_ids
from generating import generate, greedy_without_cache, lively_gpt
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pad_sequence

from plaingpt.inference import graphs, window
from plaingpt.inference.cache import KVCache
from plaingpt.inference.engine import stream
from plaingpt.system.cuda_kernels import without_cudnn_attention


@pytest.mark.parametrize('stride', [None, 2, 5, 16])
@pytest.mark.parametrize('length', [1, 15, 16, 17, 40])
def test_greedy_text_is_the_same_as_without_a_cache(length, stride):
    gpt = lively_gpt()
    prompts = tiny_ids(2, length)
    expected = torch.tensor([greedy_without_cache(gpt, prompt, 40, stride or 1)
                             for prompt in prompts.tolist()])
    assert len(expected[:, length:].unique()) > 9  # the text varies
    both = gpt.generate(prompts, 40, temperature=0, stride=stride)
    assert torch.equal(both, expected)
    alone = gpt.generate(prompts[1:], 40, temperature=0, stride=stride)
    assert torch.equal(alone, expected[1:])


def test_no_new_tokens_give_the_prompts_back():
    prompts = tiny_ids(2, 17)
    assert torch.equal(lively_gpt().generate(prompts, 0), prompts)


def test_in_sampling_a_full_window_moves_by_half_of_it_by_default():
    gpt = lively_gpt(block_size=13)
    prompts = tiny_ids(2, 5)
    by_default = generate(gpt, prompts, 40)
    assert torch.equal(by_default, generate(gpt, prompts, 40, stride=7))
    assert not torch.equal(by_default, generate(gpt, prompts, 40, stride=6))


@pytest.mark.parametrize('options', [
    dict(temperature=0),
    dict(temperature=0, stride=5, repetition_penalty=3.0),
    dict(stride=1, repetition_penalty=3.0),
    dict(top_p=0.9),
    dict(stride=5, min_p=0.02),
])
def test_a_padded_row_continues_as_it_would_alone(options):
    gpt = lively_gpt()
    prompts = [tiny_ids(length, seed=length) for length in (3, 20, 1, 16, 11)]
    lengths = [len(prompt) for prompt in prompts]
    padded = pad_sequence(prompts, batch_first=True, padding_value=30)
    together = generate(gpt, padded, 30, lengths=lengths, num_samples=2, **options)
    for number, prompt in enumerate(prompts):
        first = 2 * number  # of the two rows of this prompt
        alone = generate(gpt, prompt[None], 30, first, num_samples=2, **options)
        assert torch.equal(together[first:first + 2, max(lengths):], alone[:, len(prompt):])


def test_the_samples_of_a_prompt_share_one_pass_over_it(monkeypatch):
    gpt = lively_gpt()
    prompts = tiny_ids(2, 6)
    alone = torch.cat([generate(gpt, prompts[number // 3][None], 10, number)
                       for number in range(6)])
    assert len(alone.unique(dim=0)) == 6

    read = []  # the shapes of the passes over more than one position

    def recorded_residuals(idx, *arguments, original=gpt.residuals):
        if idx.size(1) > 1:
            read.append(tuple(idx.shape))
        return original(idx, *arguments)

    monkeypatch.setattr(gpt, 'residuals', recorded_residuals)
    assert torch.equal(generate(gpt, prompts, 10, num_samples=3), alone)
    assert read == [(2, 6)]
    assert torch.equal(generate(gpt, prompts[1:], 10, 4, num_samples=2), alone[4:])


# ---- what a decoding step sees ----

@pytest.fixture
def by_torch(monkeypatch):
    """Attention by torch, which masks what C++ of our own does not even read."""
    monkeypatch.setattr('plaingpt.inference.window.has_cpp_attention', lambda device: False)


def record_masks(gpt):
    """A list that grows by the mask, or None, of each pass of one position through the blocks."""
    masks = []

    def record(block, arguments):
        x, angles, mask, cache = arguments
        if cache.decoding:
            masks.append(cache.mask)

    gpt.transformer.h[0].register_forward_pre_hook(record)
    return masks


def test_rows_of_one_length_need_no_mask(by_torch):
    gpt = lively_gpt()
    masks = record_masks(gpt)
    gpt.generate(tiny_ids(2, 5), 6)
    assert masks == [None] * 5


@pytest.mark.parametrize('position', ['learned', 'alibi'])
def test_a_mask_hides_what_shorter_rows_do_not_have(by_torch, position):
    gpt = lively_gpt(position=position)
    masks = record_masks(gpt)
    gpt.generate(tiny_ids(2, 5), 3, lengths=[3, 5])
    assert len(masks) == 2
    for step, mask in enumerate(masks):
        visible = mask[:, 0, 0] > -torch.inf  # (rows, positions)
        assert visible.sum(dim=1).tolist() == [4 + step, 6 + step]
        assert visible.size(1) == 6 + step


@pytest.mark.parametrize('position', ['learned', 'alibi'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_mask_has_the_precision_of_the_cache(position, dtype):
    gpt = lively_gpt(position=position).bfloat16()
    masks = record_masks(gpt)
    caches = KVCache(gpt.config, 2, 8, dtype, torch.device('cpu'))
    positions = torch.tensor([[2], [4]])
    gpt(tiny_ids(2, 1), positions=positions, caches=caches.decode(positions, 5, hides_some=True))
    assert [mask.dtype for mask in masks] == [dtype]


def test_where_lengths_are_rounded_a_model_is_compiled_once(monkeypatch):
    monkeypatch.setattr(graphs, 'are_used_on', lambda device: True)
    monkeypatch.setattr(graphs, 'LENGTH_MULTIPLE', 4)
    monkeypatch.setattr(graphs, 'WORTH_RECORDING', 1000)
    gpt = lively_gpt()
    counter = CompileCounterWithBackend('aot_eager')
    gpt.compile(backend=counter, dynamic=True)
    gpt.generate(tiny_ids(3, 1), 3)
    compiled_at_first = counter.frame_count
    gpt.generate(tiny_ids(3, 5), 40)
    gpt.generate(tiny_ids(4, 2), 9)
    assert counter.frame_count == compiled_at_first > 0


# ---- cuDNN ----

def test_no_forward_pass_uses_cudnns_attention_and_the_setting_stays_inside(monkeypatch):
    def on_a_gpu(device):
        return without_cudnn_attention()

    monkeypatch.setattr(window, 'attention_for_generation', on_a_gpu)
    gpt = lively_gpt()
    inside = []

    def record(block, arguments):
        inside.append(torch.backends.cuda.cudnn_sdp_enabled())

    gpt.transformer.h[0].register_forward_pre_hook(record)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    for _ in stream(gpt, tiny_ids(2, 14), 6):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert inside == [False] * 6


# ---- the matrix product of a single row on a CPU ----

@pytest.fixture(params=[True, False], ids=['onednn', 'no onednn'])
def onednn_setting(request):
    """Whether the user has oneDNN switched on; it stays so for the test."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip('this torch has no oneDNN')
    with torch.backends.mkldnn.flags(enabled=request.param, allow_tf32=None, fp32_precision=None):
        yield request.param


def record_onednn(monkeypatch, gpt):
    """A list of whether oneDNN is on in each forward pass of gpt, which grows with them."""
    seen = []

    def recorded_forward(*arguments, original=gpt.forward, **keys):
        seen.append(torch._C._get_mkldnn_enabled())
        return original(*arguments, **keys)

    monkeypatch.setattr(gpt, 'forward', recorded_forward)
    return seen


@pytest.mark.parametrize('rows', [1, 2])
def test_a_single_row_is_decoded_without_onednn_and_the_setting_restored(
        monkeypatch, onednn_setting, rows):
    gpt = lively_gpt().bfloat16()
    seen = record_onednn(monkeypatch, gpt)
    text = gpt.generate(tiny_ids(rows, 5), 6, temperature=0)
    assert seen == [onednn_setting and rows > 1] * 5
    assert torch._C._get_mkldnn_enabled() is onednn_setting

    # Each token is, but for bfloat16's rounding, the likeliest one of the float32 model.
    logits, _ = gpt.float()(text[:, :-1], text[:, 1:])
    logits = logits[:, 4:]
    chosen = logits.gather(2, text[:, 5:, None])[..., 0]
    assert (chosen > logits.amax(-1) - 0.1 * logits.std()).all()


def test_the_setting_of_onednn_is_restored_after_an_error(monkeypatch, onednn_setting):
    gpt = lively_gpt().bfloat16()

    def failing_forward(*arguments, **keys):
        raise RuntimeError('out of memory')

    monkeypatch.setattr(gpt, 'forward', failing_forward)
    with pytest.raises(RuntimeError, match='out of memory'):
        gpt.generate(tiny_ids(1, 5), 6, temperature=0)
    assert torch._C._get_mkldnn_enabled() is onednn_setting
