"""What the tests of foreign models share: small random models of both sides, and mappings."""
import torch
from conftest import tiny_gpt

from plaingpt.formats import families

# Our options for each family.
ROPE = {'position': 'rope', 'norm': 'rmsnorm', 'bias': False, 'n_head': 4}
SWIGLU = {**ROPE, 'mlp': 'swiglu'}
OPTIONS = [
    ('gpt2', {}),
    ('gpt2', {'bias': False, 'tied': False, 'gelu': 'exact', 'mlp_width': 24, 'norm_eps': 1e-3}),
    ('llama', {**SWIGLU, 'n_kv_head': 2, 'tied': False}),
    ('llama', {**SWIGLU, 'bias': True, 'head_size': 6}),
    ('qwen2', {**SWIGLU, 'qkv_bias': True, 'n_kv_head': 1}),
    ('qwen3', {**SWIGLU, 'qk_norm': True, 'head_size': 6}),
    ('qwen3', {**SWIGLU, 'qk_norm': True, 'qk_norm_weight': True}),
    ('arcee', {**ROPE, 'mlp': 'relu2', 'n_kv_head': 2}),
    ('arcee', {**ROPE, 'mlp': 'relu2', 'bias': True}),
]

# Each option of these architectures that a GPT has, at a size where tests take no time.
SHAPE = {'vocab_size': 61, 'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 32}
LLAMA3_ROPE = {'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 8.0, 'low_freq_factor': 1.0,
               'high_freq_factor': 4.0, 'original_max_position_embeddings': 8}
OF_LLAMAS_KIND = [
    ('Llama', {'tie_word_embeddings': False}),
    ('Llama', {'tie_word_embeddings': True, 'num_key_value_heads': 4, 'rms_norm_eps': 1e-3}),
    ('Llama', {'attention_bias': True, 'mlp_bias': True, 'head_dim': 10}),
    ('Llama', {'rope_parameters': LLAMA3_ROPE}),
    ('Mistral', {'sliding_window': None, 'num_key_value_heads': 1}),
    ('Qwen2', {'tie_word_embeddings': True}),
    ('Qwen2', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 300.0}}),
    ('Qwen3', {'head_dim': 12}),
    ('Arcee', {}),
    ('Arcee', {'attention_bias': True, 'mlp_bias': True, 'tie_word_embeddings': True}),
]


def random_gpt(**options):
    """A GPT whose parameters are all random, biases and norms too."""
    gpt = tiny_gpt(**options)
    for parameter in gpt.parameters():
        is_vector = parameter.dim() == 1
        torch.nn.init.normal_(parameter, mean=1.0 if is_vector else 0.0, std=0.3)
    return gpt


def their_model(kind, **changes):
    """A random model of transformers, biases and norms too. kind: 'Llama', 'Qwen3', …"""
    import transformers
    torch.manual_seed(0)
    no_tokens = {'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None}
    config = getattr(transformers, f'{kind}Config')(**{**SHAPE, **no_tokens, **changes})
    model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
    for parameter in model.parameters():
        is_vector = parameter.dim() == 1
        torch.nn.init.normal_(parameter, mean=1.0 if is_vector else 0.0, std=0.3)
    return model


def save_theirs(folder, kind, max_shard_size='5GB', **changes):
    """Saves their_model() in a folder; returns it."""
    model = their_model(kind, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def assert_equal_gradients(gpt, theirs):
    """Compares the gradients of all parameters of a GPT with those of a model of transformers."""
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    for mapping in families.tensors_of(families.family_for(gpt.config), gpt.config):
        parts = []
        for part in mapping.parts:
            gradient = their_gradients.pop(part.hugging_face)
            parts.append(gradient.t() if mapping.transposed else gradient)
        found = ours.pop(mapping.ours)
        torch.testing.assert_close(found, torch.cat(parts), atol=1e-4, rtol=1e-4)
    assert not ours
    assert not their_gradients
