"""model.py: equal to Hugging Face's GPT-2 and to torch's own kernels, causal and initialised as promised."""
import math

import pytest
import torch
from conftest import TINY_GPT, tiny_gpt, tiny_ids
from torch.nn import functional as F

from model import GPT, GPTConfig, causal_attention, dropout
from plaingpt.planning.data_sheets import DEVICES, data_sheet

# ---- equal to GPT-2 ----

@pytest.fixture(params=[dict(n_layer=1, n_head=1, n_embd=8, vocab_size=13, n_positions=7),
                        dict(n_layer=3, n_head=4, n_embd=32, vocab_size=101, n_positions=24),
                        dict(n_layer=2, n_head=2, n_embd=24, vocab_size=64, n_positions=9, activation_function='gelu')])
def hugging_face(request, tmp_path):
    """A random GPT-2 of Hugging Face, biases and norms too, and the directory that save_pretrained wrote of it."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**request.param, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    return theirs, str(tmp_path)


def test_logits_loss_and_gradients_equal_hugging_faces(hugging_face):
    theirs, directory = hugging_face
    ours = GPT.from_pretrained(directory).eval()
    x = tiny_ids(3, theirs.config.n_positions, vocab_size=theirs.config.vocab_size)
    logits, loss = ours(x[:, :-1], x[:, 1:])
    expected = theirs(x, labels=x)
    torch.testing.assert_close(logits, expected.logits[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, expected.loss, atol=1e-4, rtol=1e-4)
    loss.backward()
    expected.loss.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = theirs_by_name[name].grad
        gradient = gradient.t() if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else gradient
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_a_pretrained_model_has_its_activation_and_only_dropout_can_be_overridden(hugging_face):
    theirs, directory = hugging_face
    ours = GPT.from_pretrained(directory, {'dropout': 0.25})
    assert ours.config.gelu == ('exact' if theirs.config.activation_function == 'gelu' else 'tanh')
    assert ours.config.dropout == ours.transformer.h[0].attn.dropout == ours.transformer.h[0].mlp.dropout == 0.25
    with pytest.raises(ValueError, match='only dropout'):
        GPT.from_pretrained(directory, {'n_layer': 1})


def test_what_is_no_gpt2_is_refused_in_one_sentence(tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
    LlamaConfig().save_pretrained(tmp_path / 'llama')
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=13, scale_attn_by_inverse_layer_idx=True)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / 'scaled')
    (tmp_path / 'empty').mkdir()
    config.scale_attn_by_inverse_layer_idx = False
    pickled = tmp_path / 'pickled'
    config.save_pretrained(pickled)
    torch.save(GPT2LMHeadModel(config).state_dict(), pickled / 'pytorch_model.bin')
    for name, reason in (('gtp2', 'owner/name'), ('llama', "'llama'"), ('scaled', 'inverse_layer_idx'),
                         ('empty', 'config'), ('pickled', 'safetensors')):
        path = name if name == 'gtp2' else str(tmp_path / name)
        with pytest.raises(ValueError, match=reason) as refusal:
            GPT.from_pretrained(path)
        assert '\n' not in str(refusal.value)


def test_names_as_openais_own_files_have_them_are_read(hugging_face, tmp_path):
    from safetensors.torch import save_file
    theirs, directory = hugging_face
    expected = GPT.from_pretrained(directory).state_dict()
    bare = {name: tensor.clone() for name, tensor in theirs.transformer.state_dict().items()}  # no prefix, no lm_head
    bare['h.0.attn.bias'] = torch.ones(1, 1, 4, 4)  # and the causal masks
    save_file(bare, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
    for name, tensor in GPT.from_pretrained(directory).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_that_lack_a_layer_of_their_config_are_refused(hugging_face):
    theirs, directory = hugging_face
    theirs.config.n_layer += 1
    theirs.config.save_pretrained(directory)
    with pytest.raises(ValueError, match='lacks 12 tensors'):
        GPT.from_pretrained(directory)


def test_without_a_network_a_hub_name_is_refused_in_one_sentence(monkeypatch, tmp_path):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match='no-one/has-this cannot be loaded') as refusal:
        GPT.from_pretrained('no-one/has-this')
    assert '\n' not in str(refusal.value)


# ---- the network ----

def test_gpt2s_size_has_its_parameters():
    with torch.device('meta'):
        assert GPT(GPTConfig(bias=False, vocab_size=50257)).get_num_params(non_embedding=False) == 124_337_664
        assert round(GPT(GPTConfig(bias=False)).get_num_params() / 1e4) == 12_359
        assert GPT(GPTConfig(bias=True, vocab_size=50257)).get_num_params(non_embedding=False) == 124_439_808


def test_initial_weights_are_gpt2s():
    model = tiny_gpt(n_layer=8, n_embd=128, vocab_size=512)
    for name, parameter in model.named_parameters():
        if name.endswith('c_proj.weight'):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert (parameter == (0 if name.endswith('bias') else 1)).all()
    assert model.lm_head.weight is model.transformer.wte.weight
    logits, loss = model(tiny_ids(4, 16, vocab_size=512), tiny_ids(4, 16, vocab_size=512, seed=2))
    assert loss.item() == pytest.approx(math.log(512), abs=0.2)


def test_a_token_changes_no_earlier_logits():
    model, x = tiny_gpt(), tiny_ids(2, 16)
    before = model(x, x)[0]
    for t in (1, 7, 15):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 31
        after = model(changed, changed)[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


def test_inference_gives_the_last_position_and_ignored_targets_do_not_count():
    model, x, y = tiny_gpt(), tiny_ids(2, 16), tiny_ids(2, 16, seed=2)
    logits, loss = model(x)
    assert logits.shape == (2, 1, 31) and loss is None
    full, _ = model(x, y)
    torch.testing.assert_close(logits[:, 0], full[:, -1])
    ignored = y.clone()
    ignored[:, 3:] = -1
    torch.testing.assert_close(model(x, ignored)[1], F.cross_entropy(full[:, :3].flatten(0, 1), y[:, :3].flatten()))


def test_dropout_acts_in_training_only_and_where_gpt2_has_it(monkeypatch):
    model, x, drawn = tiny_gpt(dropout=0.5), tiny_ids(3, 8), []
    assert torch.equal(model(x)[0], model(x)[0])
    assert not torch.equal(model.train()(x)[0], model(x)[0])
    monkeypatch.setattr('model._kept', lambda shape, p, dtype: drawn.append((*shape, p)) or torch.ones(shape))
    model(x)
    stream, weights = (3, 8, 16, 0.5), (3, 2, 8, 8, 0.5)
    assert drawn == [stream] + [weights, stream, stream] * 2
    model.eval()(x)
    assert len(drawn) == 7


def test_bias_false_leaves_none():
    assert not [name for name, _ in tiny_gpt(bias=False).named_parameters() if name.endswith('bias')]


def test_exact_and_tanh_gelu_differ_a_little():
    a, b = tiny_gpt(gelu='tanh'), tiny_gpt(gelu='exact')
    difference = (a(tiny_ids(2, 16))[0] - b(tiny_ids(2, 16))[0]).abs().max().item()
    assert 0 < difference < 1e-2


@pytest.mark.parametrize('fields, reason', [
    (dict(n_head=3), 'multiple of n_head'), (dict(n_layer=0), 'n_layer'), (dict(dropout=1.0), 'dropout'),
    (dict(gelu='none'), 'gelu'), (dict(block_size=-1, vocab_size=0), 'block_size.*vocab_size')])
def test_a_config_that_cannot_be_says_why(fields, reason):
    with pytest.raises(ValueError, match=reason):
        GPTConfig(**{**TINY_GPT, **fields})


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match='block_size'):
        tiny_gpt()(tiny_ids(1, 17))


def test_a_cropped_model_is_smaller_and_the_same_within_its_context():
    model, x = tiny_gpt(), tiny_ids(2, 8)
    before = model(x)[0]
    model.crop_block_size(8)
    assert torch.equal(model(x)[0], before)
    weight = model.transformer.wpe.weight
    assert weight.untyped_storage().nbytes() == weight.numel() * 4
    assert model.config.block_size == model.transformer.wpe.num_embeddings == 8
    for size in (9, 0):
        with pytest.raises(ValueError, match='8 positions'):
            model.crop_block_size(size)


# ---- what a CPU computes in another way ----

@pytest.mark.parametrize('dtype, p, tolerance', [
    (torch.float32, 1e-9, 1e-5), (torch.float32, 0.3, 1e-5), (torch.bfloat16, 0.0, 4e-2), (torch.bfloat16, 0.3, 4e-2)])
def test_attention_written_out_is_torchs_own_and_its_dropout_that_of_the_formula(monkeypatch, dtype, p, tolerance):
    B, nh, T, hs = 42, 4, 128, 8  # 32 sequences at a time, and 10
    torch.manual_seed(0)
    inputs = [torch.randn(B, nh, T, hs, dtype=dtype).requires_grad_() for _ in 'qkv']
    gradient, kept = torch.randn(B, nh, T, hs, dtype=dtype), torch.rand(nh, T, T) >= p
    q, k, v = (x.float() for x in inputs)
    if p < 0.1:
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        weights = q @ k.transpose(2, 3) / math.sqrt(hs) + torch.full((T, T), -math.inf).triu(1)
        expected = weights.softmax(-1) * kept / (1 - p) @ v
        monkeypatch.setattr('model._kept', lambda shape, rate, dtype: (kept * (rate == p)).to(dtype).expand(shape))
    expected = [expected, *torch.autograd.grad(expected, inputs, gradient.float())]
    monkeypatch.setattr(F, 'scaled_dot_product_attention', None)
    found = causal_attention(*inputs, p)
    for ours, theirs in zip([found, *torch.autograd.grad(found, inputs, gradient)], expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('p', [0.05, 0.2, 0.5])
def test_dropout_zeroes_each_element_by_itself_with_its_probability(p):
    torch.manual_seed(0)
    masks = [dropout(torch.full((1_000_003,), 3.0), p) for _ in range(2)]
    assert sorted(masks[0].unique().tolist()) == pytest.approx([0, 3 / (1 - p)])
    a, b = ((mask.ne(0).double() - (1 - p)) / math.sqrt(p * (1 - p)) for mask in masks)  # mean 0, variance 1
    independent = [a, a * b, *(a[lane::4] for lane in range(4)), *(a[lag:] * a[:-lag] for lag in range(1, 9))]
    assert all(abs(values.mean().item()) < 4 / math.sqrt(len(values)) for values in independent)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(1,), (3, 5, 67), (2, 501)])
def test_dropout_follows_torchs_seed_and_its_gradient_is_its_mask(shape, dtype):
    def dropped(seed, x):
        torch.manual_seed(seed)
        return dropout(x, 0.25)

    x = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
    y = dropped(0, x)
    y.sum().backward()
    assert torch.equal(y, 2 * x.grad) and y.shape == shape and y.dtype == dtype
    assert torch.equal(dropped(0, x), y) and (len(shape) == 1 or not torch.equal(dropped(1, x), y))
    assert torch.equal(dropout(x, 0.0), x)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('at_once, rows', [(2 ** 26, [64]), (32 * 31, [32] * 2), (5 * 31 + 9, [5] * 12 + [4]),
                                           (1, [1] * 64)])
def test_a_loss_without_logits_is_the_loss_with_them(monkeypatch, at_once, rows, checkpointing):
    model, x, y = tiny_gpt(dropout=0.3).train(), tiny_ids(4, 16), tiny_ids(4, 16, seed=2)
    y[:, 3] = y[1] = -1
    heads, blocks = [], []
    model.lm_head.register_forward_pre_hook(lambda head, inputs: heads.append(inputs[0].numel() // 16))
    model.transformer.h[0].register_forward_pre_hook(lambda *_: blocks.append(1))

    def loss_and_gradients(with_logits):
        torch.manual_seed(5)
        logits, loss = model(x, y, with_logits=with_logits)
        assert (logits is not None) == with_logits
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    expected = loss_and_gradients(with_logits=True)
    monkeypatch.setattr('model.LOGITS_AT_ONCE', at_once)
    model.checkpointing = checkpointing
    heads.clear(), blocks.clear()
    torch.testing.assert_close(loss_and_gradients(with_logits=False), expected)
    assert sorted(heads) == sorted(rows * min(2, len(rows)))  # each part again on the way back
    assert len(blocks) == 1 + checkpointing
    torch.testing.assert_close(loss_and_gradients(with_logits=True), expected)


# ---- optimizer and arithmetic ----

def test_matrices_decay_and_the_rest_does_not_and_adamw_is_fused():
    model = tiny_gpt(bias=True)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    decayed, plain = optimizer.param_groups
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed['params']) and all(p.dim() < 2 for p in plain['params'])
    assert sum(p.numel() for g in optimizer.param_groups for p in g['params']) == model.get_num_params(False)
    assert optimizer.defaults['fused'] and optimizer.defaults['betas'] == (0.9, 0.95)


@pytest.mark.parametrize('name, teraflops', [
    ('NVIDIA H200', 989), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA A10', 125), ('NVIDIA L4', 121), ('NVIDIA L40S', 362), ('NVIDIA A40', 150), ('Tesla T4', 65),
    ('Tesla V100-SXM2-16GB', 125), ('NVIDIA GeForce RTX 3090', 71), ('NVIDIA GeForce RTX 4090', 165.2),
    ('NVIDIA GeForce RTX 5090', 209.5), ('NVIDIA B200', 2250), ('AMD Instinct MI300X', 1307),
    ('AMD Instinct MI250X', 191.5),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('NVIDIA H20', None)])
def test_peak_flops_by_name(name, teraflops):
    figures = data_sheet(name)
    assert (figures and figures[0]) == (teraflops and teraflops * 1e12)


@pytest.mark.parametrize('name, gigabytes', [
    ('NVIDIA A100-SXM4-80GB', 80), ('NVIDIA A100-PCIE-40GB', 40), ('Tesla V100-SXM2-32GB', 32),
    ('Tesla V100-SXM2-16GB', 16), ('h100 sxm', 80), ('NVIDIA H200', 141), ('A100 40 GB', 40),
    ('NVIDIA GH200 480GB', 96), ('NVIDIA GH200 144G HBM3e', 144)])
def test_memory_by_name(name, gigabytes):
    assert data_sheet(name)[1] == gigabytes * 1e9


@pytest.mark.parametrize('row', DEVICES, ids=lambda row: row[0])
def test_data_sheets_are_in_the_units_that_they_state(row):
    _, flops, memory, bandwidth = row
    assert 6e13 < flops < 3e15 and 1e10 < memory < 2e11 and 2e11 < bandwidth < 1e13
    assert 50 < flops / bandwidth < 450  # FLOP a byte: all these cards are within


def test_mfu_is_palms_formula_over_the_peak(monkeypatch):
    model = tiny_gpt()
    assert model.flops_per_token() == 6 * model.get_num_params() + 12 * 2 * 16 * 16
    assert model.estimate_mfu(8, 0.1) is None  # a CPU, whose peak no table has
    flops = model.flops_per_token() * 16 * 8 / 0.1
    monkeypatch.setattr('plaingpt.planning.data_sheets.data_sheet', lambda name: (4 * flops, 1, 1))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a card')
    monkeypatch.setattr(torch.Tensor, 'device', property(lambda tensor: torch.device('cuda')))
    assert model.estimate_mfu(8, 0.1) == pytest.approx(0.25)
