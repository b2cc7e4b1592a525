"""
What only a CUDA device can show; skipped without one. experiments/gpu_suite.py measures the speed.

The whole takes some minutes, most of them torch.compile's:

    python -m pytest tests/test_cuda.py
"""
import json
import math

import pytest
import torch
from conftest import TINY, run, succeeded, tiny_gpt, tiny_ids
from generating import greedy_without_cache, lively_gpt
from runs import losses, metrics, train

from plaingpt.inference.engine import stream
from plaingpt.inference.graphs import DecodingGraphs
from plaingpt.system.devices import place
from plaingpt.training.guard import Guard
from plaingpt.training.optimizers import make_optimizer
from plaingpt.training.processes import Process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
CUDA = torch.device('cuda', 0)
# A run on the GPU, small enough for CUDA graphs.
GPU_RUN = dict(device='cuda', dtype='float32', max_iters=12, eval_interval=12, lr_decay_iters=12)


@pytest.fixture(autouse=True)
def nothing_left_by_other_tests():
    """Undoes what train.py sets in this process: compiled code, and TF32, which is not exact."""
    torch.compiler.reset()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision('highest')


def grad_norms(out_dir):
    return [line['grad_norm'] for line in metrics(out_dir) if 'grad_norm' in line]


# ---- training ----

@pytest.mark.parametrize('compile_mode', ['default', 'reduce-overhead'])
def test_what_is_unfrozen_is_trained_when_compiled(tmp_path, char_data, compile_mode):
    keys = {**GPU_RUN, 'unfreeze': {0: 'head', 4: 'last:1', 8: 'all'}}
    succeeded(train(tmp_path / 'eager', char_data, compile=False, **keys))
    succeeded(train(tmp_path / 'compiled', char_data, compile=True, compile_mode=compile_mode,
                    **keys))
    eager = grad_norms(tmp_path / 'eager')
    assert len(eager) == 12
    assert grad_norms(tmp_path / 'compiled') == pytest.approx(eager, rel=0.02)


@pytest.mark.parametrize('keys', [
    dict(compile_mode='default'),
    dict(compile_mode='reduce-overhead'),
    dict(activation_checkpointing=True),
    dict(compile_mode='reduce-overhead', position='rope', norm='rmsnorm', mlp='swiglu',
         qk_norm=True, n_kv_head=1, logit_softcap=15.0, tied=False, optimizer='muon'),
    dict(position='alibi', n_kv_head=1),
])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, char_data, keys):
    keys = {**GPU_RUN, **keys}
    compile_mode = keys.pop('compile_mode', 'default')
    succeeded(train(tmp_path / 'eager', char_data, compile=False, **keys))
    succeeded(train(tmp_path / 'compiled', char_data, compile=True, compile_mode=compile_mode,
                    **keys))
    for key in ('loss', 'val_loss'):
        eager = losses(tmp_path / 'eager', key)
        assert losses(tmp_path / 'compiled', key) == pytest.approx(eager, rel=0.01)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_step_that_is_not_logged_never_waits_for_the_device(
        tmp_path, char_data, monkeypatch, optimizer, compiled, dtype):
    original = Guard.step
    steps = []

    def step(guard, number, loss, grad_norm):
        original(guard, number, loss, grad_norm)
        steps.append(number)
        if number == 4:  # from here on, every wait raises
            torch.cuda.set_sync_debug_mode('error')
        if number == 9:
            torch.cuda.set_sync_debug_mode('default')

    monkeypatch.setattr(Guard, 'step', step)
    try:
        succeeded(train(tmp_path / 'out', char_data, **{
            **GPU_RUN, 'optimizer': optimizer, 'compile': compiled, 'log_interval': 100,
            'dtype': dtype}))
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert steps == list(range(1, 13))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_gradient_that_is_not_finite_leaves_weights_and_state_alone(optimizer):
    gpt = place(tiny_gpt().train(), CUDA)
    keys = {**TINY, 'optimizer': optimizer, 'decay_lr': True, 'beta1': 0.9, 'beta2': 0.95,
            'weight_decay': 0.1, 'muon_learning_rate': 0.02, 'muon_momentum': 0.95}
    weight_optimizer = make_optimizer(gpt, keys, 'cuda')
    guard = Guard(Process(CUDA), weight_optimizer, torch.amp.GradScaler('cuda', enabled=False))
    ids = tiny_ids(2, 8).to(CUDA)

    def step(number, factor):
        _, loss = gpt(ids, ids)
        (factor * loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        guard.step(number, loss.detach(), norm)
        weight_optimizer.zero_grad()

    def everything():
        tensors = [parameter.detach().clone() for parameter in gpt.parameters()]
        for state in weight_optimizer.state_dict()['state'].values():
            tensors += [value.clone() for value in state.values() if torch.is_tensor(value)]
        return tensors

    step(1, 1.0)
    before = everything()
    step(2, math.nan)
    for ours, theirs in zip(everything(), before, strict=True):
        assert torch.equal(ours, theirs)
    assert guard.read().halted.step == 2


def test_float16_is_trained_with_a_scaler(tmp_path, char_data):
    keys = {**GPU_RUN, 'max_iters': 60, 'eval_interval': 60, 'lr_decay_iters': 60}
    succeeded(train(tmp_path / 'half', char_data, **{**keys, 'dtype': 'float16'}))
    succeeded(train(tmp_path / 'full', char_data, **keys))
    half = losses(tmp_path / 'half')
    assert half[60] < half[0] - 0.3
    assert half[60] == pytest.approx(losses(tmp_path / 'full')[60], abs=0.1)


def test_a_resumed_run_has_the_losses_of_one_that_was_not_interrupted(tmp_path, char_data):
    keys = {**GPU_RUN, 'compile': True, 'eval_interval': 6}
    succeeded(train(tmp_path / 'whole', char_data, **keys))
    succeeded(train(tmp_path / 'parts', char_data, **{**keys, 'max_iters': 6}))
    succeeded(train(tmp_path / 'parts', char_data, resume='always', **keys))
    whole = losses(tmp_path / 'whole', 'loss')
    assert losses(tmp_path / 'parts', 'loss') == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize('keys', [
    dict(),
    dict(compile=False),
    dict(activation_checkpointing=True),
    dict(dropout=0.2),
])
def test_a_plan_is_within_15_percent_of_the_memory_that_is_allocated(tmp_path, keys):
    figures = tmp_path / 'bench.json'
    succeeded(run('bench.py', device='cuda', real_data=False, n_layer=6, batch_size=16,
                  num_steps=2, json=figures, **keys))
    found = json.loads(figures.read_text(encoding='utf-8'))
    assert found['planned_memory_bytes'] == pytest.approx(found['peak_memory_bytes'], rel=0.15)


# ---- text ----

ARCHITECTURES = [
    dict(),
    dict(position='rope', n_head=4, n_kv_head=2),
    dict(position='alibi', n_head=4, n_kv_head=2),
]


@pytest.mark.parametrize('shape', ARCHITECTURES)
@pytest.mark.parametrize('lengths', [[6, 6, 6], [3, 6, 5]])
def test_greedy_text_with_a_cache_is_that_without_one(shape, lengths):
    gpt = place(lively_gpt(block_size=300, **shape), CUDA)
    prompts = tiny_ids(3, 6).to(CUDA)
    new = list(stream(gpt, prompts, 200, temperature=0, lengths=lengths))
    text = torch.cat(new, dim=1)
    for row, length in enumerate(lengths):
        expected = greedy_without_cache(gpt, prompts[row, :length].tolist(), 200)
        assert text[row].tolist() == expected[length:]


@pytest.mark.parametrize('options', [
    dict(top_k=5, temperature=0.8),
    dict(top_p=0.9, repetition_penalty=1.2),
    dict(stop_tokens=[3]),
    dict(context_size=16, stride=4),
])
def test_sampled_text_is_that_of_a_cpu(options):
    prompts = tiny_ids(3, 6)
    texts = []
    for device in (torch.device('cpu'), CUDA):
        gpt = place(lively_gpt(block_size=300), device)
        new = list(stream(gpt, prompts.to(device), 200, seeds=range(3), **options))
        texts.append(torch.cat(new, dim=1).cpu())
    # A random number may fall so close to a border that rounding decides, also when a row stops.
    columns = min(text.size(1) for text in texts)
    on_cpu, on_gpu = (text[:, :columns] for text in texts)
    assert (on_cpu == on_gpu).float().mean().item() > 0.6


def test_a_model_that_cannot_be_recorded_writes_the_same_text_with_one_warning(
        capsys, monkeypatch):
    monkeypatch.setattr(DecodingGraphs, 'failed', False)

    def text():
        return torch.cat(list(stream(gpt, prompts, 40, temperature=0)), dim=1).tolist()

    def wait_for_the_device(head, inputs, logits):
        logits.sum().item()

    gpt = place(lively_gpt(block_size=300), CUDA)
    prompts = tiny_ids(3, 6).to(CUDA)
    expected = text()
    gpt.lm_head.register_forward_hook(wait_for_the_device)
    assert text() == expected
    assert text() == expected
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    warnings = capsys.readouterr().err.splitlines()
    assert len([line for line in warnings if 'no CUDA graph can be recorded' in line]) == 1


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_rms_norm_keeps_the_precision_of_its_input_under_autocast(dtype):
    x = torch.randn(2, 8, 16, dtype=dtype, device=CUDA)
    norm = tiny_gpt(norm='rmsnorm').transformer.ln_f.to(CUDA)
    with torch.autocast('cuda', dtype=torch.bfloat16):
        assert norm(x).dtype == dtype


def test_a_token_never_waits_for_the_device():
    gpt = place(lively_gpt(block_size=300), CUDA)
    prompts = tiny_ids(3, 6).to(CUDA)
    tokens = stream(gpt, prompts, 150, temperature=0.8, top_k=5, seeds=range(3))
    for _ in range(8):
        next(tokens)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(60):
            next(tokens)
    finally:
        torch.cuda.set_sync_debug_mode('default')
