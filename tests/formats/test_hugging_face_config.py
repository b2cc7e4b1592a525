"""plaingpt/formats/hugging_face_config.py: entries that GPT can't follow are refused by name."""
from dataclasses import asdict

import pytest
import torch
from conftest import tiny_gpt
from foreign import OPTIONS, ROPE, SHAPE, SWIGLU

from plaingpt.formats.families import NoTarget
from plaingpt.formats.hugging_face_config import config_entries, gpt_config

LLAMA = {**SHAPE, 'model_type': 'llama', 'rms_norm_eps': 1e-5}
GPT2 = {'model_type': 'gpt2', 'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'n_positions': 16,
        'vocab_size': 31}
LLAMA3 = {'rope_type': 'llama3', 'factor': 8, 'low_freq_factor': 1, 'high_freq_factor': 4,
          'original_max_position_embeddings': 8}


# ---- in ----

def test_absent_entries_have_the_values_that_the_architecture_has():
    gpt2 = gpt_config(GPT2)
    assert (gpt2.gelu, gpt2.mlp_width, gpt2.norm_eps, gpt2.tied, gpt2.bias) == \
        ('tanh', 64, 1e-5, True, True)
    llama = gpt_config(LLAMA)
    assert (llama.rope_theta, llama.rope_scaling, llama.tied, llama.bias) == \
        (10000, None, False, False)
    without_grouped_heads = {**LLAMA, 'num_key_value_heads': None}
    assert gpt_config(without_grouped_heads).n_kv_head == 4
    assert gpt_config({**LLAMA, 'model_type': 'qwen3'}).head_size == 128


@pytest.mark.parametrize('entries', [
    {'sliding_window': None},
    {'model_type': 'qwen2', 'sliding_window': 4096, 'use_sliding_window': False},
    {'model_type': 'qwen2', 'attention_bias': True},  # it has biases whatever this entry says
    {'layer_types': ['full_attention', 'full_attention']},
    {'hidden_act': 'swish', 'attention_bias': None},
    {'rope_scaling': {'type': 'default'}},
    {'rope_scaling': None, 'partial_rotary_factor': 1.0, 'logits_scaling': 1.0},
    {'auto_map': {'AutoConfig': 'x.X'}, 'pretraining_tp': 2, 'unknown': [1]},
])
def test_entries_that_change_no_logits_are_accepted(entries):
    gpt_config({**LLAMA, **entries})


def test_llama3s_original_context_stands_in_three_places():
    def context(**entries):
        return gpt_config({**LLAMA, **entries}).rope_scaling['original_context']

    unnamed = {key: value for key, value in LLAMA3.items() if not key.startswith('original')}
    assert context(rope_scaling=LLAMA3) == 8
    assert context(rope_scaling=unnamed) == SHAPE['max_position_embeddings']
    assert context(rope_scaling=LLAMA3, original_max_position_embeddings=16) == 16


@pytest.mark.parametrize('changes, reason', [
    ({'model_type': 'gemma'}, "its architecture, the model_type in config.json, is 'gemma'"),
    ({'model_type': None}, 'is None'),
    ({'model_type': ['llama']}, r"is \['llama'\]"),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'hidden_act': ['silu']}, 'hidden_act is'),
    ({'attention_bias': True}, 'attention_bias is True and its mlp_bias False'),
    ({'mlp_bias': True}, 'attention_bias is False and its mlp_bias True'),
    ({'model_type': 'qwen3', 'attention_bias': True, 'mlp_bias': True}, 'attention_bias is True'),
    ({'model_type': 'mistral', 'sliding_window': None, 'attention_bias': True}, 'attention_bias'),
    ({'model_type': 'qwen2', 'mlp_bias': True}, 'mlp_bias True'),
    ({'attention_bias': 1}, 'attention_bias is 1, neither true nor false'),
    ({'tie_word_embeddings': 'x'}, "tie_word_embeddings is 'x', neither true nor false"),
    ({'model_type': 'mistral', 'sliding_window': 8}, 'sliding_window is 8'),
    ({'model_type': 'mistral'}, 'sliding_window is 4096'),  # what it means in transformers
    ({'sliding_window': 8}, 'sliding_window is 8'),
    ({'model_type': 'qwen2', 'use_sliding_window': True}, 'use_sliding_window=True'),
    ({'layer_types': ['sliding_attention']}, 'layer_types are'),
    ({'layer_types': 'full_attention'}, 'layer_types are'),
    ({'layer_types': 5}, 'layer_types are 5'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'attention_multiplier': 0.1}, 'attention_multiplier=0.1'),
    ({'residual_multiplier': 0.1, 'logits_scaling': 8},
     'residual_multiplier=0.1, logits_scaling=8'),
    ({'final_logit_softcapping': 30.0}, 'final_logit_softcapping=30.0'),
    ({'quantization_config': {'quant_method': 'x'}}, 'quantization_config='),
    ({'num_hidden_layers': 10 ** 9}, 'it has 1000000000 layers, more than 1000'),
    ({'num_hidden_layers': 0}, 'n_layer=0 must be at least 1'),
    ({'num_hidden_layers': -5}, 'n_layer=-5 must be at least 1'),
    ({'num_hidden_layers': 'x'}, "num_hidden_layers is 'x', not an integer"),
    ({'num_hidden_layers': True}, 'num_hidden_layers is True, not an integer'),
    ({'num_hidden_layers': 2.0}, 'num_hidden_layers is 2.0, not an integer'),
    ({'hidden_size': None}, 'hidden_size is None, not an integer'),
    ({'hidden_size': 10 ** 400}, 'hidden_size|n_embd'),
    ({'num_attention_heads': 5, 'num_key_value_heads': 5}, 'must be a multiple of n_head=5'),
    ({'num_attention_heads': 0}, 'n_head=0 must be at least 1'),
    ({'num_key_value_heads': 3}, 'must be a multiple of n_kv_head=3'),
    ({'model_type': 'qwen2', 'num_key_value_heads': None}, 'num_key_value_heads is None'),
    ({'head_dim': 7}, 'turns pairs of channels'),
    ({'vocab_size': 10 ** 12}, 'vocab_size=1000000000000 must be at least 1 and below'),
    ({'rms_norm_eps': None}, 'rms_norm_eps is None, not a number'),
    ({'rms_norm_eps': float('nan')}, 'rms_norm_eps is nan, not a number'),
    ({'rms_norm_eps': -1.0}, 'norm_eps=-1.0'),
    ({'rope_theta': 'x'}, "rope_theta is 'x', not a number"),
    ({'rope_theta': 0}, 'rope_theta=0 must be'),
    ({'rope_theta': float('inf')}, 'rope_theta is inf'),
    ({'rope_theta': 10 ** 400}, 'rope_theta'),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "is of the type 'yarn'"),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "rope_scaling is of the type 'linear'"),
    ({'rope_scaling': {'rope_type': ['llama3']}}, 'rope_scaling is of the type'),
    ({'rope_scaling': 'llama3'}, 'rope_parameters are'),
    ({'rope_parameters': {'full_attention': {'rope_theta': 5.0}}}, 'one rope for all layers'),
    ({'rope_parameters': {'rope_theta': 5.0, 'partial_rotary_factor': 0.5}}, 'is 0.5'),
    ({'rope_scaling': {'rope_type': 'llama3'}}, 'factor is None, not a number'),
    ({'rope_scaling': {**LLAMA3, 'factor': 0}}, 'impossible values'),
    ({'rope_scaling': {**LLAMA3, 'low_freq_factor': -1}}, 'impossible values'),
    ({'rope_scaling': {**LLAMA3, 'low_freq_factor': 4}}, 'impossible values'),
])
def test_entries_that_gpt_does_not_have_are_refused_by_name(changes, reason):
    with pytest.raises(ValueError, match=reason):
        gpt_config({**LLAMA, **changes})


@pytest.mark.parametrize('changes, reason', [
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx=True'),
    ({'scale_attn_weights': False}, 'scale_attn_weights=False'),
    ({'add_cross_attention': True}, 'add_cross_attention=True'),
    ({'activation_function': 'relu'}, "activation_function is 'relu'"),
    ({'n_head': 3}, 'n_embd=16 must be a multiple of n_head=3'),
    ({'n_head': 0}, 'n_head=0 must be at least 1'),
    ({'n_inner': 0}, 'mlp_width=0 must be at least 1'),
    ({'n_inner': 'x'}, "n_inner is 'x', not an integer"),
    ({'n_positions': None}, 'n_positions is None, not an integer'),
])
def test_a_gpt2_that_computes_something_else_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        gpt_config({**GPT2, **changes})


# ---- out ----

@pytest.mark.parametrize('name, options', OPTIONS)
def test_the_entries_of_a_gpt_describe_that_gpt(name, options):
    config = tiny_gpt(**{**options, 'block_size': 9, 'dropout': 0.1}).config
    if name == 'gpt2':
        config.bias = True  # transformers' GPT-2 always has biases
    if name == 'qwen3':
        config.qk_norm_weight = True
    if config.position == 'rope':
        config.rope_theta = 300.0
        config.rope_scaling = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                               'original_context': 4}
    entries = config_entries(config, torch.bfloat16, bos=3, eos=4)
    assert entries['model_type'] == name
    assert (entries['bos_token_id'], entries['eos_token_id']) == (3, 4)
    assert entries['dtype'] == 'bfloat16'
    assert asdict(gpt_config(entries, dropout=0.1)) == asdict(config)


def test_both_forms_of_ropes_entries_describe_the_same_rope():
    scaling = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
               'original_context': 4}
    config = tiny_gpt(**SWIGLU, rope_theta=300.0, rope_scaling=scaling).config
    entries = config_entries(config, torch.float32)
    for left_out in (['rope_parameters'], ['rope_scaling', 'rope_theta']):
        fewer = {key: value for key, value in entries.items() if key not in left_out}
        assert gpt_config(fewer) == config


def test_heads_that_transformers_llama_can_not_have_are_refused():
    for options in ({**SWIGLU, 'n_head': 3, 'head_size': 4}, {**ROPE, 'n_head': 3, 'head_size': 4,
                                                              'mlp': 'relu2'}):
        with pytest.raises(NoTarget, match='n_embd, here 16, that is a multiple of n_head=3'):
            config_entries(tiny_gpt(**options).config, torch.float32)
