"""plaingpt/training/lora.py: an adapter computes and learns as peft's, and is merged exactly."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_gpt, tiny_ids
from fine_tuning import A, B, add_adapter, logits, loss, save_gpt2

from model import Dropout, Kernels
from plaingpt.formats import peft_adapter
from plaingpt.formats.hugging_face import load_pretrained
from plaingpt.system.messages import UserError
from plaingpt.training import lora


@pytest.mark.parametrize('tied', [True, False])
def test_the_digest_is_that_of_the_weights(tied):
    gpt, same, other = (tiny_gpt(tied=tied) for _ in range(3))
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.bias[3] += 1e-6
    digest = lora.digest_of_base(gpt)
    assert len(digest) == 64
    assert lora.digest_of_base(same) == digest
    assert lora.digest_of_base(other) != digest
    same.crop_block_size(8)
    assert lora.digest_of_base(same) != digest


def test_importing_it_is_light():
    code = ('import sys\n'
            'from plaingpt.formats import hugging_face, peft_adapter\n'
            'from plaingpt.training import lora, starting_weights\n'
            'heavy = {"peft", "transformers", "safetensors"} & set(sys.modules)\n'
            'sys.exit(len(heavy))\n')
    command = [sys.executable, '-c', code]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


# ---- what an adapter computes and learns ----

def test_an_adapter_computes_and_learns_what_pefts_does_on_hugging_faces_model(tmp_path):
    from peft import PeftModel
    from transformers import GPT2LMHeadModel
    base = save_gpt2(tmp_path / 'gpt2')
    targets = 'c_attn,mlp.c_proj,c_fc'
    gpt = add_adapter(load_pretrained(str(tmp_path / 'gpt2')), targets=targets)
    settings = lora.LoraSettings(3, 12, 0.0, targets, str(tmp_path / 'gpt2'))
    peft_adapter.save_adapter(tmp_path / 'adapter', gpt, settings)
    plain = logits(base, tiny_ids(2, 16))

    base = GPT2LMHeadModel.from_pretrained(tmp_path / 'gpt2').eval()
    theirs = PeftModel.from_pretrained(base, tmp_path / 'adapter', is_trainable=True).eval()
    expected = logits(theirs, tiny_ids(2, 16))
    assert torch.allclose(logits(gpt, tiny_ids(2, 16)), expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-1)

    loss(gpt, tiny_ids(4, 16)).backward()
    loss(theirs, tiny_ids(4, 16)).backward()
    our_gradients = gradients(gpt)
    their_gradients = {name.removeprefix(peft_adapter.PREFIX): gradient
                       for name, gradient in gradients(theirs).items()}
    assert our_gradients.keys() == their_gradients.keys()
    assert len(our_gradients) == 2 * 2 * 3  # A and B of 3 layers in 2 blocks
    for name, gradient in our_gradients.items():
        assert gradient.abs().max() > 1e-4, name
        assert torch.allclose(gradient, their_gradients[name], atol=1e-6, rtol=1e-4), name


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()
            if parameter.grad is not None}


MODERN = {'tied': False, 'n_kv_head': 1, 'mlp': 'swiglu', 'position': 'rope', 'norm': 'rmsnorm',
          'bias': False}


@pytest.mark.parametrize('shape, targets', [
    ({}, 'c_attn,c_proj'),
    (MODERN, 'attn.c_attn, mlp.c_fc,lm_head'),
])
def test_merging_leaves_a_plain_model_with_the_same_logits(shape, targets):
    idx = tiny_ids(2, 16)
    plain = tiny_gpt(**shape)
    gpt = add_adapter(tiny_gpt(**shape), targets=targets)
    expected = logits(gpt, idx)
    assert not torch.allclose(expected, logits(plain, idx), atol=1e-3)

    lora.merge_adapter(gpt)
    assert torch.allclose(logits(gpt, idx), expected, atol=1e-5)
    assert gpt.state_dict().keys() == plain.state_dict().keys()
    assert vars(gpt).keys() - {'kernels'} == vars(plain).keys()
    assert all(parameter.requires_grad for parameter in gpt.parameters())
    plain.load_state_dict(gpt.state_dict())
    assert torch.equal(logits(plain, idx), logits(gpt, idx))

    lora.merge_adapter(plain)  # it has no adapter
    assert torch.equal(logits(plain, idx), logits(gpt, idx))


def test_an_adapter_changes_nothing_at_first_and_it_alone_learns():
    plain = tiny_gpt()
    gpt = add_adapter(tiny_gpt(), targets='c_attn,c_fc', trained=False)
    assert torch.equal(logits(gpt, tiny_ids(2, 16)), logits(plain, tiny_ids(2, 16)))
    loss(gpt, tiny_ids(2, 16)).backward()
    trainable = {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}
    expected = {f'transformer.h.{block}.{layer}.lora_{matrix}.default.weight'
                for block in (0, 1) for layer in ('attn.c_attn', 'mlp.c_fc') for matrix in 'AB'}
    assert trainable == gradients(gpt).keys() == expected
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    decayed, not_decayed = optimizer.param_groups
    assert len(decayed['params']) == 8
    assert not not_decayed['params']


def test_bfloat16_autocast_leaves_the_adapter_in_float32():
    gpt = add_adapter(tiny_gpt(), targets='c_attn,c_proj,c_fc')
    expected = loss(gpt, tiny_ids(2, 16))
    with torch.autocast('cpu', torch.bfloat16):
        found = loss(gpt, tiny_ids(2, 16))
    found.backward()
    assert found != expected
    assert torch.allclose(found, expected, atol=0.05)
    matrices = [parameter for parameter in gpt.parameters() if parameter.requires_grad]
    assert {matrix.dtype for matrix in matrices} == {torch.float32}
    assert {matrix.grad.dtype for matrix in matrices} == {torch.float32}


def test_an_adapter_starts_the_same_for_the_same_seed_whatever_was_drawn_before():
    def first_matrix(seed, draws):
        gpt = tiny_gpt()
        torch.manual_seed(seed)
        torch.rand(draws)
        before = torch.get_rng_state()
        add_adapter(gpt, dropout=0.1, trained=False)
        assert torch.equal(torch.get_rng_state(), before)
        return lora.adapter_state(gpt)[A]

    assert torch.equal(first_matrix(1, draws=0), first_matrix(1, draws=100))
    assert not torch.equal(first_matrix(1, draws=0), first_matrix(2, draws=0))


# ---- dropout ----

@pytest.mark.parametrize('training', [True, False])
def test_an_adapter_drops_in_training_only(training):
    gpt = add_adapter(tiny_gpt().train(training), dropout=0.5)
    repeated = torch.equal(logits(gpt, tiny_ids(2, 16)), logits(gpt, tiny_ids(2, 16)))
    assert repeated is not training


def test_dropout_of_an_adapter_comes_from_the_kernels_of_the_model():
    class HalfKernels(Kernels):
        def dropout(self, x, p):
            dropped.append((tuple(x.shape), p))
            return x / 2

    dropped = []
    gpt = tiny_gpt().train()
    gpt.use_kernels(HalfKernels())
    add_adapter(gpt, dropout=0.25, targets='c_attn')
    gpt(tiny_ids(3, 8))
    assert dropped == [((3, 8, 16), 0.25)] * 2  # the input of c_attn, in each block
    layer = gpt.transformer.h[0].attn.c_attn
    assert isinstance(layer.lora_dropout['default'], Dropout)
    gpt.use_kernels(Kernels())  # a later change reaches the adapter too
    gpt(tiny_ids(3, 8))
    assert len(dropped) == 2


def test_ranks_that_share_a_batch_drop_what_one_rank_would():
    from plaingpt.system.cpu_kernels import CpuKernels
    kernels = CpuKernels()
    gpt = tiny_gpt().train()
    gpt.use_kernels(kernels)
    add_adapter(gpt, dropout=0.5)
    idx = tiny_ids(4, 16)

    def rows(first, step):
        torch.manual_seed(7)
        kernels.set_rows(first, step)
        return logits(gpt, idx[first::step])

    whole = rows(0, 1)
    torch.testing.assert_close(rows(0, 2), whole[0::2])
    torch.testing.assert_close(rows(1, 2), whole[1::2])


# ---- refusals ----

@pytest.mark.parametrize('name', ['c_porj', 'wte', 'lm_head', 'attn', 'proj', ''])
def test_a_target_that_is_no_linear_layer_is_refused(name):
    sentence = f"'{name}' is no layer that can be adapted; choose from c_attn, c_fc, c_proj$"
    with pytest.raises(ValueError, match=sentence):
        lora.add_lora(tiny_gpt(), 2, 4, 0.0, f'c_attn,{name}')


def test_without_peft_lora_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(UserError, match='pip install peft'):
        lora.add_lora(tiny_gpt(), 2, 4, 0.0, 'c_attn')


KEYS = {'lora_rank': 8, 'lora_alpha': 16.0, 'lora_targets': 'c_attn', 'trainable': 'all',
        'unfreeze': None}


@pytest.mark.parametrize('changes, sentences', [
    ({}, []),
    ({'trainable': 'head'}, ['lora_rank=8 trains nothing but the adapter']),
    ({'unfreeze': {1: 'all'}}, ['lora_rank=8 trains nothing but the adapter']),
    ({'lora_targets': 'c_attn,'}, ["lora_targets='c_attn,' must name layers"]),
    ({'lora_targets': ''}, ["lora_targets='' must name layers"]),
    ({'lora_alpha': 1e300}, ['lora_alpha=1e+300 must be at most 1e+30']),
    ({'lora_rank': 0, 'lora_targets': '', 'lora_alpha': 1e300, 'trainable': 'head'}, []),
])
def test_keys_that_describe_no_adapter_are_named(changes, sentences):
    found = list(lora.problems(KEYS | changes))
    assert len(found) == len(sentences)
    for line, sentence in zip(found, sentences, strict=True):
        assert sentence in line


# ---- the adapter's tensors ----

def test_the_state_has_pefts_names_and_is_restored():
    from peft import get_peft_model_state_dict
    gpt = add_adapter(tiny_gpt(), targets='c_attn,c_fc')
    fresh = add_adapter(tiny_gpt(), targets='c_attn,c_fc', trained=False)
    idx = tiny_ids(2, 16)
    state = lora.adapter_state(gpt)
    assert state.keys() == get_peft_model_state_dict(gpt).keys()
    lora.restore_adapter(fresh, state)
    assert torch.equal(logits(fresh, idx), logits(gpt, idx))
    assert not torch.equal(logits(fresh, idx), logits(tiny_gpt(), idx))


def without_a_matrix(state):
    del state[A]


def with_another_matrix(state):
    state['c'] = torch.ones(3, 3)


def with_another_shape(state):
    state[A] = torch.ones(3, 3)


def with_a_transposed_matrix(state):
    state[B] = state[B].T


@pytest.mark.parametrize('change, sentence', [
    (without_a_matrix, rf'{A} is missing, expected \(3, 16\)'),
    (with_another_matrix, r'c is \(3, 3\), expected none of this name'),
    (with_another_shape, rf'{A} is \(3, 3\), expected \(3, 16\)'),
    (with_a_transposed_matrix, rf'{B} is \(3, 48\), expected \(48, 3\)'),
])
def test_tensors_of_another_adapter_are_refused(change, sentence):
    state = dict(lora.adapter_state(add_adapter(tiny_gpt())))
    change(state)
    with pytest.raises(ValueError, match=sentence):
        lora.restore_adapter(add_adapter(tiny_gpt()), state)


def test_an_adapter_without_the_digest_of_its_base_is_used_with_a_warning(capsys):
    gpt = add_adapter(tiny_gpt())
    settings = lora.LoraSettings(3, 12, 0.0, 'c_attn', base='somewhere')
    fresh = tiny_gpt()
    lora.restore_lora(fresh, settings, lora.adapter_state(gpt), 'it')
    assert 'it does not hold the digest of its base' in capsys.readouterr().err
    assert torch.equal(logits(fresh, tiny_ids(2, 16)), logits(gpt, tiny_ids(2, 16)))


def test_an_adapter_of_other_weights_is_refused():
    gpt = add_adapter(tiny_gpt())
    settings = lora.LoraSettings(3, 12, 0.0, 'c_attn', 'base', lora.digest_of_base(tiny_gpt()))
    with pytest.raises(UserError, match='it belongs to other weights than base has now'):
        lora.restore_lora(tiny_gpt(seed=1), settings, lora.adapter_state(gpt), 'it')


def test_no_memory_is_taken_for_the_rank_that_a_file_claims():
    state = lora.adapter_state(add_adapter(tiny_gpt()))
    settings = lora.LoraSettings(2 ** 30, 12, 0.0, 'c_attn')
    sentence = r'it: .*c_attn.lora_A.weight is \(3, 16\), expected \(1073741824, 16\)'
    with pytest.raises(UserError, match=sentence):
        lora.restore_lora(tiny_gpt(), settings, state, 'it')
