"""plaingpt/formats/families.py: which architecture a GPT is."""
import pytest
from conftest import tiny_gpt
from foreign import OPTIONS, ROPE, SWIGLU

from plaingpt.formats import families
from plaingpt.formats.families import NoTarget


# ---- which family ----

@pytest.mark.parametrize('name, options', OPTIONS)
def test_a_gpt_has_the_family_that_computes_the_same(name, options):
    assert families.family_for(tiny_gpt(**options).config) is families.FAMILIES[name]


@pytest.mark.parametrize('options, reason', [
    ({'logit_softcap': 30.0}, 'gpt2, has no logit_softcap=30.0'),
    ({**SWIGLU, 'logit_softcap': 30.0}, 'llama, has no logit_softcap=30.0'),
    ({'position': 'alibi'}, "position='alibi'"),
    ({'position': 'none'}, "position='none'"),
    ({'position': 'rope'}, "norm='layernorm', mlp='gelu'"),
    ({'norm': 'rmsnorm', 'bias': False}, "gpt2, has no norm='rmsnorm'"),
    ({'mlp': 'swiglu'}, "gpt2, has no mlp='swiglu'"),
    ({'qk_norm': True}, 'gpt2, has no qk_norm=True'),
    ({'n_kv_head': 1}, 'gpt2, has no n_kv_head=1'),
    ({'head_size': 4}, 'gpt2, has no head_size=4'),
    ({'bias': False, 'qkv_bias': True}, 'gpt2, has no qkv_bias=True'),
    ({**ROPE, 'mlp': 'relu2', 'qk_norm': True}, 'arcee, has no qk_norm=True'),
    ({**ROPE, 'mlp': 'relu2', 'qkv_bias': True}, 'arcee, has no qkv_bias=True'),
    ({**SWIGLU, 'qk_norm': True, 'bias': True}, 'qwen3, has no bias=True'),
    ({**SWIGLU, 'qk_norm': True, 'qkv_bias': True}, 'qwen3, has no qkv_bias=True'),
])
def test_a_gpt_that_no_family_computes_is_refused_by_its_options(options, reason):
    with pytest.raises(NoTarget, match=r'^[^\n]+$') as refusal:
        families.family_for(tiny_gpt(**options).config)
    assert reason in str(refusal.value)
