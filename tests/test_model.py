"""model.py: the network of GPT-2, causal and initialised as promised, and complete by itself.

Its options are in test_architecture.py, and published weights in formats/test_hugging_face.py."""
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_GPT, tiny_gpt, tiny_ids
from torch.nn import functional as F

import model as model_module
from model import GPT, GPTConfig, Kernels
from plaingpt.planning.data_sheets import DataSheet

# ---- the network ----

def test_gpt2s_size_has_its_parameters():
    with torch.device('meta'):
        without_bias = GPT(GPTConfig(bias=False, vocab_size=50257))
        with_bias = GPT(GPTConfig(bias=True, vocab_size=50257))
        padded = GPT(GPTConfig(bias=False))
    assert without_bias.get_num_params(non_embedding=False) == 124_337_664
    assert with_bias.get_num_params(non_embedding=False) == 124_439_808
    assert round(padded.get_num_params() / 1e4) == 12_359


def test_initial_weights_are_gpt2s():
    model = tiny_gpt(n_layer=8, n_embd=128, vocab_size=512)
    for name, parameter in model.named_parameters():
        if name.endswith('c_proj.weight'):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        elif name.endswith('bias'):
            assert (parameter == 0).all()
        else:
            assert (parameter == 1).all()
    assert model.lm_head.weight is model.transformer.wte.weight
    x = tiny_ids(4, 16, vocab_size=512)
    y = tiny_ids(4, 16, vocab_size=512, seed=2)
    _, loss = model(x, y)
    assert loss.item() == pytest.approx(math.log(512), abs=0.2)


def test_a_token_changes_no_earlier_logits():
    model = tiny_gpt()
    x = tiny_ids(2, 16)
    before, _ = model(x, x)
    for t in 1, 7, 15:
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 31
        after, _ = model(changed, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


def test_without_targets_only_the_last_position_has_logits():
    model = tiny_gpt()
    x = tiny_ids(2, 16)
    logits, loss = model(x)
    assert logits.shape == (2, 1, 31)
    assert loss is None
    full, _ = model(x, x)
    torch.testing.assert_close(logits[:, 0], full[:, -1])


def test_positions_without_a_target_do_not_count():
    model = tiny_gpt()
    x = tiny_ids(2, 16)
    y = tiny_ids(2, 16, seed=2)
    full, _ = model(x, y)
    expected = F.cross_entropy(full[:, :3].flatten(0, 1), y[:, :3].flatten())
    y[:, 3:] = -1
    _, loss = model(x, y)
    torch.testing.assert_close(loss, expected)


def test_bias_false_leaves_none():
    names = [name for name, _ in tiny_gpt(bias=False).named_parameters()]
    assert not [name for name in names if name.endswith('bias')]


def test_exact_and_tanh_gelu_differ_a_little():
    x = tiny_ids(2, 16)
    with_tanh, _ = tiny_gpt(gelu='tanh')(x)
    exact, _ = tiny_gpt(gelu='exact')(x)
    difference = (with_tanh - exact).abs().max().item()
    assert 0 < difference < 1e-2


def test_a_cropped_model_is_smaller_and_the_same_within_its_context():
    model = tiny_gpt()
    x = tiny_ids(2, 8)
    before, _ = model(x)
    model.crop_block_size(8)
    assert torch.equal(model(x)[0], before)
    weight = model.transformer.wpe.weight
    assert weight.untyped_storage().nbytes() == weight.numel() * 4
    assert model.config.block_size == model.transformer.wpe.num_embeddings == 8
    for size in 9, 0:
        with pytest.raises(ValueError, match=f'block_size={size}'):
            model.crop_block_size(size)


# ---- dropout ----

class RecordingKernels(Kernels):
    """Drops nothing, and notes what it was asked to drop."""

    def __init__(self):
        self.drawn = []

    def dropout(self, x, p):
        self.drawn.append(('activations', tuple(x.shape), p))
        return x

    def causal_attention(self, q, k, v, p, bias=None, grouped=False):
        self.drawn.append(('attention weights', tuple(q.shape), p))
        return super().causal_attention(q, k, v, 0.0, bias, grouped)


def test_dropout_acts_where_gpt2_has_it():
    kernels = RecordingKernels()
    model = tiny_gpt(dropout=0.5).use_kernels(kernels).train()
    model(tiny_ids(3, 8))
    activations = ('activations', (3, 8, 16), 0.5)
    weights = ('attention weights', (3, 2, 8, 8), 0.5)
    block = [weights, activations, activations]
    assert kernels.drawn == [activations, *block, *block]


def test_dropout_acts_in_training_only():
    model = tiny_gpt(dropout=0.5)
    x = tiny_ids(3, 8)
    evaluated, _ = model(x)
    assert torch.equal(model(x)[0], evaluated)
    assert not torch.equal(model.train()(x)[0], evaluated)
    kernels = RecordingKernels()
    model.use_kernels(kernels).eval()(x)
    assert kernels.drawn == [('attention weights', (3, 2, 8, 8), 0.0)] * 2


# ---- loss in parts ----

class InParts(Kernels):
    prefers_loss_in_parts = True


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('at_once, rows', [
    (2**26, [64]),
    (32 * 31, [32, 32]),
    (5 * 31 + 9, [5] * 12 + [4]),
    (1, [1] * 64),
])
def test_a_loss_without_logits_is_the_loss_with_them(monkeypatch, at_once, rows, checkpointing):
    """rows: how many the head gets at a time."""
    model = tiny_gpt(dropout=0.3).train()
    x = tiny_ids(4, 16)
    y = tiny_ids(4, 16, seed=2)
    y[:, 3] = -1
    y[1] = -1
    heads = []   # rows in each call of the head
    blocks = []  # calls of the first block
    model.lm_head.register_forward_pre_hook(
        lambda head, inputs: heads.append(inputs[0].numel() // 16))
    model.transformer.h[0].register_forward_pre_hook(lambda block, inputs: blocks.append(1))

    def loss_and_gradients(with_logits):
        torch.manual_seed(5)
        logits, loss = model(x, y, with_logits=with_logits)
        assert (logits is not None) == with_logits
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    expected = loss_and_gradients(with_logits=True)
    monkeypatch.setattr(model_module, 'LOGITS_AT_ONCE', at_once)
    if checkpointing:  # which by itself asks for a loss in parts
        model.checkpointing = True
    else:
        model.use_kernels(InParts())
    heads.clear()
    blocks.clear()
    torch.testing.assert_close(loss_and_gradients(with_logits=False), expected)
    # If there are several parts, each is computed again in the backward pass.
    times = 1 if len(rows) == 1 else 2
    assert sorted(heads) == sorted(rows * times)
    assert len(blocks) == (2 if checkpointing else 1)
    torch.testing.assert_close(loss_and_gradients(with_logits=True), expected)


# ---- the residual stream in bfloat16 ----

@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_residual_stream_may_be_bfloat16(norm, checkpointing):
    model = tiny_gpt(norm=norm, bias=False).train()
    model.checkpointing = checkpointing
    ids = tiny_ids(4, 16)
    dtypes = []
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda block, inputs, y: dtypes.append((inputs[0].dtype, y.dtype)))

    def loss():
        dtypes.clear()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            _, loss = model(ids, ids, with_logits=False)
        return loss

    expected = loss()
    assert dtypes == [(torch.float32, torch.float32)] * 2
    model.residual_dtype = torch.bfloat16
    found = loss()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)] * 2
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.01)
    found.backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()


# ---- refusals ----

@pytest.mark.parametrize('fields, sentence', [
    (dict(n_layer=0), 'n_layer=0 must be at least 1 and below 2**31'),
    (dict(vocab_size=2**31), 'vocab_size=2147483648 must be at least 1 and below 2**31'),
    (dict(block_size=-1, vocab_size=0),
     'block_size=-1 must be at least 1 and below 2**31; '
     'vocab_size=0 must be at least 1 and below 2**31'),
    (dict(n_head=3), 'n_embd=16 must be a multiple of n_head=3'),
    (dict(dropout=1.0), 'dropout=1.0 must be at least 0 and below 1'),
    (dict(dropout=math.nan), 'dropout=nan must be at least 0 and below 1'),
    (dict(gelu='none'), "gelu='none' must be 'tanh' or 'exact'"),
    (dict(n_layer=0, gelu='none'),
     "n_layer=0 must be at least 1 and below 2**31; gelu='none' must be 'tanh' or 'exact'"),
])
def test_an_impossible_config_is_refused_with_all_its_problems(fields, sentence):
    with pytest.raises(ValueError) as refusal:
        GPTConfig(**{**TINY_GPT, **fields})
    assert str(refusal.value) == sentence


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError) as refusal:
        tiny_gpt()(tiny_ids(1, 17))
    assert str(refusal.value) == ('a sequence of 17 tokens is too long: this model takes at most '
                                  '16 (block_size)')


@pytest.mark.parametrize('position', ['learned', 'rope', 'alibi', 'none'])
def test_an_empty_sequence_is_refused(position):
    with pytest.raises(ValueError) as refusal:
        tiny_gpt(position=position)(tiny_ids(1, 0))
    assert str(refusal.value) == 'the sequence is empty: this model needs at least one token'


# ---- optimizer and speed ----

def test_matrices_decay_and_the_rest_does_not_and_adamw_is_fused():
    model = tiny_gpt(bias=True)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    decayed, plain = optimizer.param_groups
    assert decayed['weight_decay'] == 0.1
    assert plain['weight_decay'] == 0.0
    assert all(parameter.dim() >= 2 for parameter in decayed['params'])
    assert all(parameter.dim() < 2 for parameter in plain['params'])
    count = sum(parameter.numel() for parameter in decayed['params'] + plain['params'])
    assert count == model.get_num_params(non_embedding=False)
    assert optimizer.defaults['fused']
    assert optimizer.defaults['betas'] == (0.9, 0.95)


def test_mfu_is_palms_formula_over_the_peak(monkeypatch):
    model = tiny_gpt()
    assert model.flops_per_token() == 6 * model.get_num_params() + 12 * 2 * 16 * 16
    assert model.estimate_mfu(8, 0.1) is None  # no data sheet has the peak of a CPU
    flops = model.flops_per_token() * 16 * 8 / 0.1
    sheet = DataSheet(flops=4 * flops, memory=1, bandwidth=1)
    monkeypatch.setattr('plaingpt.planning.data_sheets.data_sheet', lambda name: sheet)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a card')
    monkeypatch.setattr(torch.Tensor, 'device', property(lambda tensor: torch.device('cuda')))
    assert model.estimate_mfu(8, 0.1) == pytest.approx(0.25)


# ---- the file alone ----

@pytest.fixture
def alone(monkeypatch):
    """As if plaingpt/ were missing."""
    monkeypatch.setattr(model_module, 'has_package', lambda: False)


def lively_gpt():
    """A GPT whose greedy text has many different tokens."""
    model = tiny_gpt()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_the_plain_loop_generates_the_text_of_the_engine(monkeypatch):
    model = lively_gpt()
    x = tiny_ids(3, 5)
    expected = model.generate(x, 30, temperature=0)  # beyond block_size
    monkeypatch.setattr(model_module, 'has_package', lambda: False)
    found = model.generate(x, 30, temperature=0)
    assert torch.equal(found, expected)
    assert torch.equal(found[:, :5], x)
    assert len(found.unique()) > 9


def test_the_plain_loop_samples_from_the_k_likeliest(alone):
    model = lively_gpt()
    x = tiny_ids(1, 5).expand(500, -1)
    logits, _ = model(x[:1])
    likeliest = logits.flatten().topk(3).indices
    torch.manual_seed(0)
    chosen = model.generate(x, 1, temperature=5.0, top_k=3)[:, -1]
    assert set(chosen.tolist()) == set(likeliest.tolist())
    assert len(model.generate(x, 1, temperature=5.0)[:, -1].unique()) > 3
    assert model.generate(x[:1], 1, top_k=100).shape == (1, 6)
    greedy = model.generate(x, 1, temperature=0)[:, -1]
    assert torch.equal(model.generate(x, 1, top_k=1)[:, -1], greedy)


def test_the_plain_loop_samples_from_the_models_distribution(alone):
    model = lively_gpt()
    x = tiny_ids(1, 5)
    logits, _ = model(x)
    expected = F.softmax(logits.flatten() / 1.5, dim=-1)
    torch.manual_seed(0)
    chosen = model.generate(x.expand(20_000, -1), 1, temperature=1.5)[:, -1]
    shares = torch.bincount(chosen, minlength=31) / 20_000
    assert (shares - expected).abs().max() < 0.02


def test_the_options_of_the_engine_are_refused_without_it(alone):
    with pytest.raises(ValueError) as refusal:
        tiny_gpt().generate(tiny_ids(1, 5), 1, stride=2, lengths=[5])
    assert str(refusal.value) == 'stride, lengths: these options need the folder plaingpt/'


TRAIN_AND_GENERATE = """
import sys
sys.modules['plaingpt'] = None  # as if it were missing, also where it is installed
import torch
from model import GPT, GPTConfig
torch.manual_seed(0)
config = GPTConfig(block_size=16, vocab_size=8, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
model = GPT(config)
optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
rows = torch.arange(4)[:, None] + torch.arange(17)  # counting, from 0 to 3 on
ids = rows % 8
losses = []
for step in range(60):
    optimizer.zero_grad()
    _, loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[0] > 1.8, losses
assert losses[-1] < 0.3, losses
assert model.estimate_mfu(1, 1.0) is None

model.eval()
text = model.generate(torch.tensor([[5, 6, 7]]), 20, temperature=0)
assert text.tolist() == [[number % 8 for number in range(5, 28)]], text
sampled = model.generate(torch.tensor([[5, 6, 7]]), 20, temperature=0.8, top_k=3)
assert sampled.shape == (1, 23)
ours = [name for name in sys.modules if name.startswith('plaingpt.')]
assert not ours, ours
print('done')
"""


def test_the_file_copied_alone_trains_and_generates(tmp_path):
    shutil.copy(ROOT / 'model.py', tmp_path)
    environment = dict(os.environ)
    environment.pop('PYTHONPATH', None)
    ended = subprocess.run([sys.executable, '-c', TRAIN_AND_GENERATE], cwd=tmp_path,
                           env=environment, capture_output=True, text=True)
    assert ended.stdout == 'done\n', ended.stderr
