"""
The options of GPTConfig that GPT-2 does not have: equal to Hugging Face's models and to formulas,
alone and together.
"""
import math
from dataclasses import asdict, replace

import pytest
import torch
from conftest import TINY_GPT, tiny_gpt, tiny_ids
from generating import greedy_without_cache, lively_gpt
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from model import GPT, GPTConfig, Kernels
from plaingpt.system.cpu_kernels import CpuKernels

MODERN = dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=1,
              logit_softcap=15.0, tied=False, bias=False)
COMBINATIONS = [
    MODERN,
    dict(position='rope', rope_theta=100.0, mlp='relu2', n_head=4, n_kv_head=2, bias=True),
    dict(position='alibi', n_head=4, n_kv_head=2, norm='rmsnorm', mlp='swiglu', bias=True),
    dict(position='alibi', qk_norm=True, logit_softcap=5.0, tied=False),
    dict(position='none', mlp='relu2', norm='rmsnorm', n_kv_head=1),
    dict(qk_norm=True, mlp='swiglu', n_kv_head=1),
]


def name_of(options):
    """A name of a combination of options, for pytest."""
    return f"{options.get('position', 'learned')} {options.get('mlp', 'gelu')}"


all_combinations = pytest.mark.parametrize('options', COMBINATIONS, ids=name_of)


def randomise(model, std=0.3):
    """Draws every parameter anew, those of norms too; returns the model."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


# ---- equal to Hugging Face's models ----

def assert_equal(ours, theirs, sources):
    """Compares the logits and gradients of both models.

    sources: {our name: their names}, whose tensors stacked are our parameter."""
    our_parameters = dict(ours.named_parameters())
    their_parameters = dict(theirs.named_parameters())
    assert our_parameters.keys() == sources.keys()
    with torch.no_grad():
        for name, parts in sources.items():
            stacked = torch.cat([their_parameters[part] for part in parts])
            our_parameters[name].copy_(stacked)

    x = tiny_ids(3, ours.config.block_size, vocab_size=ours.config.vocab_size)
    y = tiny_ids(3, ours.config.block_size, vocab_size=ours.config.vocab_size, seed=2)
    logits, loss = ours(x, y)
    expected = theirs(x).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

    loss.backward()
    F.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    for name, parts in sources.items():
        gradient = torch.cat([their_parameters[part].grad for part in parts])
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(our_parameters[name].grad, gradient, atol=1e-4, rtol=1e-4)


# The names in a block of ours, and in a layer of a Llama or Qwen3.
LLAMA_LAYER = {
    'ln_1': ['input_layernorm'],
    'attn.c_attn': ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'],
    'attn.c_proj': ['self_attn.o_proj'],
    'ln_2': ['post_attention_layernorm'],
    'mlp.c_fc': ['mlp.gate_proj', 'mlp.up_proj'],
    'mlp.c_proj': ['mlp.down_proj'],
}
# The same of an MPT.
MPT_LAYER = {
    'ln_1': ['norm_1'],
    'attn.c_attn': ['attn.Wqkv'],
    'attn.c_proj': ['attn.out_proj'],
    'ln_2': ['norm_2'],
    'mlp.c_fc': ['ffn.up_proj'],
    'mlp.c_proj': ['ffn.down_proj'],
}


def sources_of(layer, n_layer, prefix):
    """{our name: their names} of the weights of all blocks; prefix: what precedes their numbers."""
    sources = {}
    for i in range(n_layer):
        for name, parts in layer.items():
            theirs = [f'{prefix}.{i}.{part}.weight' for part in parts]
            sources[f'transformer.h.{i}.{name}.weight'] = theirs
    return sources


@pytest.mark.parametrize('kind', ['Llama', 'Qwen3'])
@pytest.mark.parametrize('options', [
    dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=101, block_size=24, tied=False),
    dict(n_layer=2, n_head=3, n_embd=36, vocab_size=64, block_size=40, tied=True,
         rope_theta=500.0),
    dict(n_layer=1, n_head=6, n_kv_head=1, n_embd=48, vocab_size=64, block_size=9, tied=False),
])
def test_rope_rmsnorm_swiglu_and_grouped_heads_are_llamas_and_query_key_norm_qwens(kind, options):
    import transformers
    config = GPTConfig(**options, position='rope', norm='rmsnorm', mlp='swiglu',
                       qk_norm=kind == 'Qwen3', bias=False)
    torch.manual_seed(0)
    their_config = getattr(transformers, f'{kind}Config')(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_size,
        rms_norm_eps=1e-5,
        max_position_embeddings=config.block_size,
        tie_word_embeddings=config.tied,
        attention_bias=False,
        rope_parameters={'rope_type': 'default', 'rope_theta': config.rope_theta},
        pad_token_id=None,
    )
    theirs = randomise(getattr(transformers, f'{kind}ForCausalLM')(their_config)).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith(('q_norm.weight', 'k_norm.weight')):  # ours have no weights
            torch.nn.init.ones_(parameter)
    sources = {'transformer.wte.weight': ['model.embed_tokens.weight'],
               'transformer.ln_f.weight': ['model.norm.weight'],
               **sources_of(LLAMA_LAYER, config.n_layer, 'model.layers')}
    if not config.tied:
        sources['lm_head.weight'] = ['lm_head.weight']
    assert_equal(GPT(config), theirs, sources)


@pytest.mark.parametrize('n_head, slopes', [
    (2, [1 / 16, 1 / 256]),
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
])
def test_alibi_is_mpts_and_has_the_slopes_of_the_paper(n_head, slopes):
    from transformers import MptConfig, MptForCausalLM
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
    bias = build_mpt_alibi_tensor(n_head, 3)[:, 0]
    assert (bias == torch.tensor(slopes)[:, None] * torch.tensor([-2, -1, 0])).all()
    torch.manual_seed(0)
    their_config = MptConfig(d_model=32, n_heads=n_head, n_layers=2, vocab_size=71, max_seq_len=20,
                             use_cache=False)
    theirs = randomise(MptForCausalLM(their_config)).eval()
    sources = {'transformer.wte.weight': ['transformer.wte.weight'],
               'transformer.ln_f.weight': ['transformer.norm_f.weight'],
               **sources_of(MPT_LAYER, 2, 'transformer.blocks')}
    ours = GPT(GPTConfig(block_size=20, vocab_size=71, n_layer=2, n_head=n_head, n_embd=32,
                         bias=False, gelu='exact', position='alibi'))
    assert_equal(ours, theirs, sources)


# ---- equal to formulas ----

def test_squared_relu_is_that_of_transformers():
    from transformers.activations import ACT2FN
    mlp = randomise(tiny_gpt(mlp='relu2')).transformer.h[0].mlp
    x = torch.randn(3, 5, 16)
    weights = list(mlp.parameters())
    gradient = torch.randn(3, 5, 16)
    ours = mlp(x)
    theirs = mlp.c_proj(ACT2FN['relu2'](mlp.c_fc(x)))
    torch.testing.assert_close(ours, theirs)
    our_gradients = torch.autograd.grad(ours, weights, gradient)
    their_gradients = torch.autograd.grad(theirs, weights, gradient)
    torch.testing.assert_close(our_gradients, their_gradients)
    assert all(each.abs().max() > 1e-3 for each in their_gradients)


@pytest.mark.parametrize('cap', [0.5, 30.0])
def test_a_soft_cap_is_that_of_the_formula_in_logits_and_loss(cap):
    plain = randomise(tiny_gpt(logit_softcap=0.0), std=0.5)
    capped = tiny_gpt(logit_softcap=cap)
    capped.load_state_dict(plain.state_dict())
    x = tiny_ids(2, 16)
    y = tiny_ids(2, 16, seed=2)
    logits, _ = plain(x, y)
    expected = cap * torch.tanh(logits / cap)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), y.flatten())
    torch.testing.assert_close(capped(x, y), (expected, expected_loss))
    torch.testing.assert_close(capped(x)[0], expected[:, -1:])
    _, loss = capped(x, y, with_logits=False)
    torch.testing.assert_close(loss, expected_loss)
    gradients = torch.autograd.grad(loss, list(capped.parameters()))
    expected_gradients = torch.autograd.grad(expected_loss, list(plain.parameters()))
    torch.testing.assert_close(gradients, expected_gradients)


def test_a_soft_cap_is_computed_in_float32():
    """In bfloat16 it would round the likeliest tokens to one value."""
    model = tiny_gpt(logit_softcap=0.5).bfloat16()
    logits, _ = model(tiny_ids(2, 16))
    assert logits.dtype == torch.float32


@pytest.mark.parametrize('position, ordered', [
    ('none', False), ('rope', True), ('alibi', True), ('learned', True)])
def test_without_positions_one_layer_does_not_see_the_order_of_earlier_tokens(position, ordered):
    model = lively_gpt(position=position, n_layer=1)
    x = tiny_ids(2, 16)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    permuted = torch.cat([x[:, order], x[:, 15:]], dim=1)
    sees_no_order = torch.allclose(model(x)[0], model(permuted)[0], atol=1e-5)
    assert sees_no_order != ordered


def test_rope_sees_distances_alone_and_its_theta():
    model = lively_gpt(position='rope', n_layer=3)
    x = tiny_ids(2, 16)
    positions = torch.arange(16)
    expected = model.residuals(x, positions)
    shifted = model.residuals(x, positions + 977)
    torch.testing.assert_close(shifted, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(model.residuals(x, positions.expand(2, -1)), expected)
    assert not torch.allclose(model.residuals(x, 2 * positions), expected, atol=0.1)
    model.config = replace(model.config, rope_theta=100.0)
    assert not torch.allclose(model.residuals(x, positions), expected, atol=0.1)


@pytest.mark.parametrize('options', [{}, {**MODERN, 'logit_softcap': 0.0}], ids=name_of)
def test_with_projections_of_zero_a_fresh_model_is_its_embedding_and_still_learns(options):
    model = tiny_gpt(zero_init=True, **options)
    x = tiny_ids(2, 16)
    embedded = model.transformer.wte(x)
    if model.transformer.wpe is not None:
        embedded = embedded + model.transformer.wpe.weight
    logits, loss = model(x, x)
    assert torch.equal(logits, model.lm_head(model.transformer.ln_f(embedded)))
    loss.backward()
    for block in model.transformer.h:
        assert block.mlp.c_proj.weight.grad.any()
        assert block.attn.c_proj.weight.grad.any()


def test_without_zero_init_the_projections_are_not_zero():
    assert tiny_gpt().transformer.h[0].mlp.c_proj.weight.any()


def test_without_options_the_initial_weights_are_the_same_as_ever():
    model = tiny_gpt(seed=3)
    assert asdict(model.config) == dict(
        **TINY_GPT, dropout=0.0, bias=True, gelu='tanh', position='learned', rope_theta=10000.0,
        rope_scaling=None, norm='layernorm', norm_eps=1e-5, mlp='gelu', mlp_width=64, qk_norm=False,
        qk_norm_weight=False, qkv_bias=False, head_size=8, n_kv_head=2, logit_softcap=0.0,
        tied=True, zero_init=False)
    # The order in which modules are made and weights drawn, which existing runs depend on.
    torch.manual_seed(3)
    wte = torch.nn.Embedding(31, 16)
    wpe = torch.nn.Embedding(16, 16)
    blocks = []
    for _ in range(2):
        attention = [torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)]
        mlp = [torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)]
        blocks.extend([attention, mlp])
    wte.weight = torch.nn.Linear(16, 31, bias=False).weight
    expected = [wte.weight, wpe.weight]
    with torch.no_grad():
        wte.weight.normal_(0, 0.02)
        wpe.weight.normal_(0, 0.02)
        for first, projection in blocks:
            first.weight.normal_(0, 0.02)
            projection.weight.normal_(0, 0.02 / 2)  # 1 / sqrt(2 n_layer)
            expected.extend([first.weight, projection.weight])
    found = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert len(found) == 10
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


# ---- alone and together ----

@all_combinations
def test_a_token_changes_no_earlier_logits(options):
    model = lively_gpt(**options)
    x = tiny_ids(2, 16)
    before, _ = model(x, x)
    for t in 1, 7, 15:
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 31
        after, _ = model(changed, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


def contexts():
    """(options, context_size) of the combinations, also beyond block_size where that can be."""
    cases = []
    for options in COMBINATIONS:
        cases.append((options, None))
        if 'position' in options:
            cases.append((options, 27))
    cases.append((dict(position='rope', qk_norm=True), 7))
    cases.append((dict(), 7))
    return cases


@pytest.mark.parametrize('stride', [None, 5])
@pytest.mark.parametrize('options, context_size', contexts(),
                         ids=lambda value: name_of(value) if isinstance(value, dict) else None)
def test_greedy_text_is_that_of_encoding_the_whole_window_at_each_token(options, context_size,
                                                                        stride):
    model = lively_gpt(**options)
    rows = [tiny_ids(length, seed=length) for length in (3, 20, 1, 16, 11)]
    lengths = [len(row) for row in rows]
    padded = pad_sequence(rows, batch_first=True, padding_value=30)
    new = model.generate(padded, 30, temperature=0, stride=stride, lengths=lengths,
                         context_size=context_size)[:, 20:]
    expected = []
    for row in rows:
        text = greedy_without_cache(model, row.tolist(), 30, stride or 1, context_size)
        expected.append(text[len(row):])
    assert new.tolist() == expected
    assert len(new.unique()) > 9
    alone = model.generate(rows[0][None], 30, temperature=0, stride=stride,
                           context_size=context_size)
    assert alone[0, 3:].tolist() == expected[0]


def test_a_window_beyond_learned_positions_is_refused():
    sentence = 'context_size=17 must be at least 1, and at most block_size=16'
    with pytest.raises(ValueError, match=sentence):
        tiny_gpt().generate(tiny_ids(1, 20), 2, context_size=17)


@pytest.mark.parametrize('position', ['rope', 'alibi', 'none'])
def test_without_a_table_of_positions_a_window_may_be_longer_than_block_size(position):
    model = tiny_gpt(position=position)
    x = tiny_ids(1, 20)
    assert model(x, x)[0].shape == (1, 20, 31)
    assert model.generate(x, 2, context_size=17).shape == (1, 22)
    with pytest.raises(ValueError, match='context_size=0'):
        model.generate(x, 2, context_size=0)


@pytest.mark.parametrize('kernels', [Kernels, CpuKernels])
@all_combinations
def test_dropout_and_checkpointing_give_the_same_loss_and_gradients(options, kernels):
    model = lively_gpt(dropout=0.2, **options).use_kernels(kernels()).train()
    x = tiny_ids(3, 16)
    y = tiny_ids(3, 16, seed=2)

    def loss_and_gradients(checkpointing):
        model.checkpointing = checkpointing
        torch.manual_seed(5)
        _, loss = model(x, y, with_logits=False)
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    torch.testing.assert_close(loss_and_gradients(True), loss_and_gradients(False))


@all_combinations
def test_bfloat16_is_close_to_float32(options):
    model = lively_gpt(**options).use_kernels(CpuKernels())
    x = tiny_ids(3, 16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 0.3  # with larger weights, rounding would be all that is seen
    exact, exact_loss = model(x, x)

    def assert_close(autocast):
        with torch.autocast('cpu', torch.bfloat16, autocast):
            logits, loss = model(x, x)
        assert (logits - exact).norm() < 0.03 * exact.norm()
        assert abs(loss - exact_loss) < 0.03

    assert_close(autocast=True)  # with gradients: attention is written out
    with torch.no_grad():
        assert_close(autocast=True)
        model.bfloat16()
        assert_close(autocast=False)
        # Each token of the text is nearly the likeliest in float32 too.
        text = model.generate(x[:, :5], 10, temperature=0)
        logits, _ = model.float()(text[:, :-1], text[:, 1:])
        new_logits = logits[:, 4:]
        chosen = new_logits.gather(2, text[:, 5:, None])[..., 0]
        assert (chosen > new_logits.amax(-1) - 0.2 * new_logits.std()).all()


@pytest.mark.parametrize('kernels', [Kernels, CpuKernels])
@pytest.mark.parametrize('options', COMBINATIONS[:4], ids=name_of)
def test_a_compiled_model_is_one_graph_with_the_same_loss_and_text(options, kernels):
    model = lively_gpt(block_size=64, **options).use_kernels(kernels())
    prompt = tiny_ids(2, 5)
    x = tiny_ids(2, 16)
    text = model.generate(prompt, 20, temperature=0)
    _, loss = model.train()(x, x)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=compiler, fullgraph=True)
    torch.testing.assert_close(model(x, x)[1], loss)
    assert len(graphs) == 1
    graphs.clear()
    torch.compiler.reset()
    model.compile(backend=compiler, dynamic=True, fullgraph=True)
    assert torch.equal(model.eval().generate(prompt, 20, temperature=0), text)
    assert 0 < len(graphs) < 5


# ---- shapes and names ----

@pytest.mark.parametrize('position', ['learned', 'rope', 'alibi', 'none'])
def test_a_cropped_model_is_the_same_within_its_context(position):
    model = lively_gpt(position=position)
    x = tiny_ids(2, 8)
    logits, _ = model(x)
    text = model.generate(x, 20, temperature=0, context_size=8)
    model.crop_block_size(8)
    assert torch.equal(model(x)[0], logits)
    assert torch.equal(model.generate(x, 20, temperature=0), text)
    assert model.config.block_size == 8
    assert model.config.position == position
    parameters = sum(parameter.numel() for parameter in GPT(model.config).parameters())
    assert model.get_num_params(non_embedding=False) == parameters
    with pytest.raises(ValueError, match='and at least 1'):
        model.crop_block_size(0)


@pytest.mark.parametrize('position', ['rope', 'alibi', 'none'])
def test_a_context_without_a_table_of_positions_may_grow(position):
    model = tiny_gpt(position=position)
    model.crop_block_size(32)
    assert model.config.block_size == 32
    assert model(tiny_ids(2, 32))[0].shape == (2, 1, 31)


NAMES = {'lm_head.weight', 'transformer.wte.weight', 'transformer.wpe.weight',
         'transformer.ln_f.weight'}
for i in range(2):
    for part in 'ln_1', 'ln_2', 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj':
        NAMES.add(f'transformer.h.{i}.{part}.weight')


def test_without_options_the_names_of_the_weights_are_gpt2s():
    assert set(tiny_gpt(bias=False).state_dict()) == NAMES


@all_combinations
def test_options_change_shapes_and_no_names(options):
    model = tiny_gpt(**{**options, 'bias': False})
    config = model.config
    weights = model.state_dict()
    has_table = config.position == 'learned'
    assert set(weights) == (NAMES if has_table else NAMES - {'transformer.wpe.weight'})
    kv_channels = config.n_kv_head * config.head_size
    assert weights['transformer.h.0.attn.c_attn.weight'].shape == (16 + 2 * kv_channels, 16)
    width = 2 * config.mlp_width if config.mlp == 'swiglu' else config.mlp_width
    assert weights['transformer.h.0.mlp.c_fc.weight'].shape == (width, 16)
    assert (model.lm_head.weight is model.transformer.wte.weight) == config.tied
    looked_up = 0
    if not config.tied:
        looked_up += 31 * 16
    if has_table:
        looked_up += 16 * 16
    assert model.get_num_params(False) - model.get_num_params() == looked_up


@pytest.mark.parametrize('n_embd, width', [(24, 64), (25, 128), (768, 2048), (4096, 10944)])
def test_swiglu_is_8_thirds_as_wide_as_the_model_in_steps_of_64(n_embd, width):
    assert GPTConfig(n_embd=n_embd, n_head=1, mlp='swiglu').mlp_width == width


@pytest.mark.parametrize('fields, sentence', [
    (dict(n_head=4, n_kv_head=3), 'n_head=4 must be a multiple of n_kv_head=3'),
    (dict(n_kv_head=4), 'n_head=2 must be a multiple of n_kv_head=4'),
    (dict(n_kv_head=0), 'n_kv_head=0 must be at least 1 and below 2**31'),
    (dict(n_kv_head=-1), 'n_kv_head=-1 must be at least 1 and below 2**31'),
    (dict(position='rope', n_embd=6),
     "position='rope' turns pairs of channels, but a head has 3"),
    (dict(position='sine'), "position='sine' must be 'learned' or 'rope' or 'alibi' or 'none'"),
    (dict(norm='batch'), "norm='batch' must be 'layernorm' or 'rmsnorm'"),
    (dict(mlp='relu'), "mlp='relu' must be 'gelu' or 'relu2' or 'swiglu'"),
    (dict(logit_softcap=-1.0), 'logit_softcap=-1.0 must be in [0, 1e30]'),
    (dict(logit_softcap=math.nan), 'logit_softcap=nan must be in [0, 1e30]'),
    (dict(logit_softcap=math.inf), 'logit_softcap=inf must be in [0, 1e30]'),
    (dict(rope_theta=0.0), 'rope_theta=0.0 must be in (0, 1e30]'),
    (dict(rope_theta=math.nan), 'rope_theta=nan must be in (0, 1e30]'),
    (dict(norm='', logit_softcap=-1.0),
     "logit_softcap=-1.0 must be in [0, 1e30]; norm='' must be 'layernorm' or 'rmsnorm'"),
])
def test_impossible_options_are_refused_with_all_their_problems(fields, sentence):
    with pytest.raises(ValueError) as refusal:
        GPTConfig(**{**TINY_GPT, **fields})
    assert str(refusal.value) == sentence


def test_only_rope_needs_an_even_head_size():
    GPTConfig(**{**TINY_GPT, 'n_embd': 6})
