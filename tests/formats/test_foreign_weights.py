"""plaingpt/formats/foreign_weights.py: where the weights of a GPT go, and how they come back."""
from dataclasses import asdict, replace

import pytest
import torch
from conftest import tiny_gpt
from foreign import OPTIONS, ROPE, SWIGLU, random_gpt

from model import GPTConfig
from plaingpt.formats import families, foreign_weights
from plaingpt.formats.foreign_weights import BadTensor


# ---- there and back ----

@pytest.mark.parametrize('form', ['hugging_face', 'gguf'])
@pytest.mark.parametrize('name, options', OPTIONS)
def test_tensors_under_foreign_names_make_the_same_gpt_again(name, options, form):
    gpt = random_gpt(**options)
    tensors = dict(foreign_weights.named_tensors(gpt, gpt.config.vocab_size, form))

    # A file does not say which of its tensors are only there because the family needs them.
    described = gpt.config
    if name == 'gpt2':
        described = replace(described, bias=True)
    if name == 'qwen3':
        described = replace(described, qk_norm_weight=True)
    config = foreign_weights.without_neutral(described, tensors.__getitem__, form)
    assert asdict(config) == asdict(gpt.config)
    built = foreign_weights.build(config, tensors.__getitem__, form)

    expected = gpt.state_dict()
    found = built.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (built.transformer.wte.weight is built.lm_head.weight) == gpt.config.tied
    # Nothing is shared with the file, so training does not write into it.
    pointers = {tensor.data_ptr() for tensor in tensors.values()}
    assert not pointers & {parameter.data_ptr() for parameter in built.parameters()}
    assert all(parameter.requires_grad for parameter in built.parameters())


@pytest.mark.parametrize('name, options', OPTIONS)
def test_each_parameter_is_in_the_file_once(name, options):
    gpt = random_gpt(**options)
    config = gpt.config
    family = families.family_for(config)
    ours = [mapping.ours for mapping in families.tensors_of(family, config)]
    assert sorted(ours) == sorted(name for name, _ in gpt.named_parameters())
    for form in ('hugging_face', 'gguf'):
        tensors = list(foreign_weights.named_tensors(gpt, config.vocab_size, form))
        names = [name for name, _ in tensors]
        assert len(set(names)) == len(names)
        constants = sum(constant.shape[0] for constant in families.constants_of(family, config))
        total = sum(tensor.numel() for _, tensor in tensors)
        assert total == gpt.get_num_params(non_embedding=False) + constants


def test_rows_that_only_pad_the_vocabulary_are_left_out():
    gpt = random_gpt(tied=False)
    tensors = dict(foreign_weights.named_tensors(gpt, 29, 'hugging_face'))
    for name in ('transformer.wte.weight', 'lm_head.weight'):
        assert torch.equal(tensors[name], gpt.state_dict()[name][:29])


def test_options_stay_where_a_single_number_of_their_tensors_is_not_neutral():
    gpt = random_gpt(bias=False)
    tensors = dict(foreign_weights.named_tensors(gpt, 31, 'gguf'))
    tensors['blk.1.ffn_up.bias'][5] = 1e-9
    described = replace(gpt.config, bias=True)
    config = foreign_weights.without_neutral(described, tensors.__getitem__, 'gguf')
    assert config.bias


def test_biases_of_zero_stay_where_the_family_does_not_need_them():
    gpt = tiny_gpt(**{**SWIGLU, 'bias': True})
    tensors = dict(foreign_weights.named_tensors(gpt, 31, 'gguf'))
    assert foreign_weights.without_neutral(gpt.config, tensors.__getitem__, 'gguf').bias


# ---- refusals ----

@pytest.mark.parametrize('change, reason', [
    (torch.Tensor.bool, 'is torch.bool'),
    (torch.Tensor.int, 'is torch.int32'),
    (lambda tensor: tensor.to(torch.complex64), 'is torch.complex64'),
    (lambda tensor: tensor[:-1], r'has the shape \(15, 16\), expected \(16, 16\)'),
    (lambda tensor: tensor[None], r'has the shape \(1, 16, 16\)'),
    (lambda tensor: tensor / 0, 'not finite'),
])
def test_a_tensor_that_no_gpt_has_is_refused_by_its_name(change, reason):
    gpt = random_gpt(**SWIGLU)
    tensors = dict(foreign_weights.named_tensors(gpt, 31, 'hugging_face'))
    name = 'model.layers.1.self_attn.k_proj.weight'
    tensors[name] = change(tensors[name])
    with pytest.raises(BadTensor, match=rf'layers.1.*{reason}'):
        foreign_weights.build(gpt.config, tensors.__getitem__, 'hugging_face')


def test_sizes_that_are_only_claimed_take_no_memory():
    claimed = GPTConfig(vocab_size=2 ** 31 - 1, n_embd=2 ** 20, n_head=1, n_layer=1)
    with pytest.raises(BadTensor, match='shape'):
        foreign_weights.build(claimed, lambda name: torch.zeros(1), 'gguf')


# ---- the order of rows ----

def test_ggufs_llama_puts_the_channels_that_turn_together_side_by_side():
    rows = torch.arange(12)  # two heads of six channels: 0 turns with 3, 1 with 4, 2 with 5
    assert foreign_weights.permuted(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = torch.randn(12, 5)
    order = foreign_weights.permuted(rows, 2)
    assert torch.equal(foreign_weights.permuted(matrix, 2), matrix[order])
    assert torch.equal(foreign_weights.unpermuted(foreign_weights.permuted(matrix, 2), 2), matrix)


@pytest.mark.parametrize('name, options, is_permuted', [
    ('llama', {**SWIGLU, 'bias': True}, True),
    ('arcee', {**ROPE, 'mlp': 'relu2', 'bias': True}, True),
    ('qwen2', {**SWIGLU, 'qkv_bias': True}, False),
])
def test_gguf_permutes_queries_and_keys_of_some_families(name, options, is_permuted):
    gpt = random_gpt(**options, n_kv_head=2)
    theirs = dict(foreign_weights.named_tensors(gpt, 31, 'hugging_face'))
    gguf = dict(foreign_weights.named_tensors(gpt, 31, 'gguf'))
    for kind in ('weight', 'bias'):
        for projection, heads in (('q', 4), ('k', 2), ('v', None)):
            rows = theirs[f'model.layers.1.self_attn.{projection}_proj.{kind}']
            if is_permuted and heads is not None:
                rows = foreign_weights.permuted(rows, heads)
            assert torch.equal(gguf[f'blk.1.attn_{projection}.{kind}'], rows)
