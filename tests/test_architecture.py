"""The options of GPTConfig that GPT-2 has not: equal to Hugging Face's models and to formulas, alone and together."""
import math
from dataclasses import asdict, replace

import pytest
import torch
from conftest import TINY_GPT, tiny_gpt, tiny_ids
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from model import GPT, GPTConfig, causal_attention

MODERN = dict(position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, n_kv_head=1, logit_softcap=15.0, tied=False,
              bias=False)
COMBINATIONS = [
    MODERN, dict(position='rope', rope_theta=100.0, mlp='relu2', n_head=4, n_kv_head=2, bias=True),
    dict(position='alibi', n_head=4, n_kv_head=2, norm='rmsnorm', mlp='swiglu', bias=True),
    dict(position='alibi', qk_norm=True, logit_softcap=5.0, tied=False),
    dict(position='none', mlp='relu2', norm='rmsnorm', n_kv_head=1), dict(qk_norm=True, mlp='swiglu', n_kv_head=1)]
NAMES = [f'{options.get("position", "learned")} {options.get("mlp", "gelu")}' for options in COMBINATIONS]


def randomised(model, std=0.3):
    """The model with every parameter, norms too, drawn anew."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def lively(**options):
    """A GPT that gives different tokens at different places, at positions it has learnt or not."""
    model = tiny_gpt(**options)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def assert_equal(ours, theirs, sources):
    """Logits and gradients of both; sources: {our name: their names, whose tensors are stacked}."""
    with torch.no_grad():
        parameters, given = dict(ours.named_parameters()), dict(theirs.named_parameters())
        assert parameters.keys() == sources.keys()
        for name, parts in sources.items():
            parameters[name].copy_(torch.cat([given[part] for part in parts]))
    x = tiny_ids(3, ours.config.block_size, vocab_size=ours.config.vocab_size)
    y = tiny_ids(3, ours.config.block_size, vocab_size=ours.config.vocab_size, seed=2)
    logits, loss = ours(x, y)
    expected = theirs(x).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    loss.backward()
    F.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    for name, parts in sources.items():
        gradient = torch.cat([given[part].grad for part in parts])
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-4, rtol=1e-4)


# ---- equal to Hugging Face's ----

def of_llamas_form(n_layer, tied):
    """{our name: their names} of a Llama or Qwen3."""
    sources = {'transformer.wte.weight': ['model.embed_tokens.weight'],
               'transformer.ln_f.weight': ['model.norm.weight']}
    if not tied:
        sources['lm_head.weight'] = ['lm_head.weight']
    for i in range(n_layer):
        ours, theirs = f'transformer.h.{i}', f'model.layers.{i}'
        sources |= {f'{ours}.{name}.weight': [f'{theirs}.{part}.weight' for part in parts.split()] for name, parts in (
            ('ln_1', 'input_layernorm'), ('ln_2', 'post_attention_layernorm'), ('attn.c_proj', 'self_attn.o_proj'),
            ('attn.c_attn', 'self_attn.q_proj self_attn.k_proj self_attn.v_proj'),
            ('mlp.c_fc', 'mlp.gate_proj mlp.up_proj'), ('mlp.c_proj', 'mlp.down_proj'))}
    return sources


@pytest.mark.parametrize('kind', ['Llama', 'Qwen3'])
@pytest.mark.parametrize('options', [
    dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=101, block_size=24, tied=False),
    dict(n_layer=2, n_head=3, n_embd=36, vocab_size=64, block_size=40, tied=True, rope_theta=500.0),
    dict(n_layer=1, n_head=6, n_kv_head=1, n_embd=48, vocab_size=64, block_size=9, tied=False)])
def test_rope_rmsnorm_swiglu_and_grouped_heads_are_llamas_and_query_key_norm_qwens(kind, options):
    import transformers
    c = GPTConfig(**options, position='rope', norm='rmsnorm', mlp='swiglu', qk_norm=kind == 'Qwen3', bias=False)
    torch.manual_seed(0)
    theirs = getattr(transformers, f'{kind}ForCausalLM')(getattr(transformers, f'{kind}Config')(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.mlp_width, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_size, rms_norm_eps=1e-5,
        max_position_embeddings=c.block_size, tie_word_embeddings=c.tied, attention_bias=False,
        rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta}, pad_token_id=None))
    randomised(theirs)
    for name, parameter in theirs.named_parameters():
        if name.endswith(('q_norm.weight', 'k_norm.weight')):  # ours have none
            torch.nn.init.ones_(parameter)
    assert_equal(GPT(c), theirs.eval(), of_llamas_form(c.n_layer, c.tied))


@pytest.mark.parametrize('n_head, slopes', [(2, [1 / 16, 1 / 256]), (8, [2 ** -i for i in range(1, 9)])])
def test_alibi_is_mpts_and_has_the_papers_slopes(n_head, slopes):
    from transformers import MptConfig, MptForCausalLM
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
    torch.manual_seed(0)
    theirs = randomised(MptForCausalLM(MptConfig(d_model=32, n_heads=n_head, n_layers=2, vocab_size=71, max_seq_len=20,
                                                 use_cache=False))).eval()
    assert (build_mpt_alibi_tensor(n_head, 3)[:, 0] == torch.tensor(slopes)[:, None] * torch.tensor([-2, -1, 0])).all()
    sources = {'transformer.wte.weight': ['transformer.wte.weight'], 'transformer.ln_f.weight':
               ['transformer.norm_f.weight']}
    for i in range(2):
        sources |= {f'transformer.h.{i}.{name}.weight': [f'transformer.blocks.{i}.{part}.weight'] for name, part in (
            ('ln_1', 'norm_1'), ('ln_2', 'norm_2'), ('attn.c_attn', 'attn.Wqkv'), ('attn.c_proj', 'attn.out_proj'),
            ('mlp.c_fc', 'ffn.up_proj'), ('mlp.c_proj', 'ffn.down_proj'))}
    assert_equal(GPT(GPTConfig(20, 71, 2, n_head, 32, bias=False, gelu='exact', position='alibi')), theirs, sources)


# ---- equal to formulas ----

def test_squared_relu_is_transformers():
    from transformers.activations import ACT2FN
    mlp, x = randomised(tiny_gpt(mlp='relu2')).transformer.h[0].mlp, torch.randn(3, 5, 16)
    expected = mlp.c_proj(ACT2FN['relu2'](mlp.c_fc(x)))
    weights, gradient = list(mlp.parameters()), torch.randn(3, 5, 16)
    torch.testing.assert_close(mlp(x), expected)
    for ours, theirs in zip(*(torch.autograd.grad(y, weights, gradient) for y in (mlp(x), expected)), strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('cap', [0.5, 30.0])
def test_a_soft_cap_is_that_of_the_formula_in_logits_and_loss_and_generation(cap):
    plain, capped = (randomised(tiny_gpt(logit_softcap=c), 0.5) for c in (0.0, cap))
    capped.load_state_dict(plain.state_dict())
    x, y = tiny_ids(2, 16), tiny_ids(2, 16, seed=2)
    expected = cap * torch.tanh(plain(x, y)[0] / cap)
    loss = F.cross_entropy(expected.flatten(0, 1), y.flatten())
    torch.testing.assert_close(capped(x, y), (expected, loss))
    torch.testing.assert_close(capped(x, y, with_logits=False)[1], loss)
    torch.testing.assert_close(capped(x)[0], expected[:, -1:])
    gradients = (torch.autograd.grad(of, list(model.parameters())) for of, model in ((capped(x, y)[1], capped),
                                                                                     (loss, plain)))
    torch.testing.assert_close(*gradients)
    assert capped.bfloat16()(x)[0].dtype == torch.float32  # in which a cap does not round the likeliest to one value


@pytest.mark.parametrize('position, ordered', [('none', False), ('rope', True), ('alibi', True), ('learned', True)])
def test_without_positions_one_layer_does_not_see_the_order_of_what_was_before(position, ordered):
    model, x = lively(position=position, n_layer=1), tiny_ids(2, 16)
    permuted = torch.cat([x[:, torch.randperm(15, generator=torch.Generator().manual_seed(0))], x[:, 15:]], dim=1)
    assert torch.allclose(model(x)[0], model(permuted)[0], atol=1e-5) != ordered


def test_rope_sees_distances_alone_and_its_theta():
    model, x = lively(position='rope', n_layer=3), tiny_ids(2, 16)
    at = [model.residuals(x, positions) for positions in (torch.arange(16), torch.arange(16) + 977,
                                                          2 * torch.arange(16), torch.arange(16).expand(2, -1))]
    torch.testing.assert_close(at[1], at[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(at[3], at[0]) and not torch.allclose(at[2], at[0], atol=0.1)
    model.config = replace(model.config, rope_theta=100.0)
    assert not torch.allclose(model.residuals(x, torch.arange(16)), at[0], atol=0.1)


def test_with_projections_of_zero_a_fresh_model_is_its_embedding_and_still_learns():
    for options in dict(zero_init=True), MODERN | dict(zero_init=True, logit_softcap=0.0):
        model, x = tiny_gpt(**options), tiny_ids(2, 16)
        weights = model.transformer
        embedded = weights.wte(x) + (weights.wpe.weight if weights.wpe else 0)
        logits, loss = model(x, x)
        assert torch.equal(logits, model.lm_head(weights.ln_f(embedded)))
        loss.backward()
        assert all(block.mlp.c_proj.weight.grad.any() and block.attn.c_proj.weight.grad.any() for block in weights.h)
    assert tiny_gpt().transformer.h[0].mlp.c_proj.weight.any()


def test_without_options_the_initial_weights_are_those_of_before():
    options = dict(position='learned', rope_theta=10000.0, norm='layernorm', mlp='gelu', qk_norm=False, n_kv_head=2,
                   logit_softcap=0.0, tied=True, zero_init=False)
    model = tiny_gpt(seed=3)
    assert asdict(model.config) == TINY_GPT | dict(dropout=0.0, bias=True, gelu='tanh') | options
    torch.manual_seed(3)
    wte, wpe = torch.nn.Embedding(31, 16), torch.nn.Embedding(16, 16)
    layers = [torch.nn.Linear(n, m) for _ in range(2) for n, m in ((16, 48), (16, 16), (16, 64), (64, 16))]
    wte.weight = torch.nn.Linear(16, 31, bias=False).weight
    with torch.no_grad():
        expected = [part.weight.normal_(0, 0.02 / 2 if i in (3, 5, 7, 9) else 0.02)  # residual projections: 1/sqrt(2 L)
                    for i, part in enumerate((wte, wpe, *layers))]
    found = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert len(found) == len(expected) == 10 and all(map(torch.equal, found, expected))


# ---- alone and together ----

@pytest.mark.parametrize('options', COMBINATIONS, ids=NAMES)
def test_a_token_changes_no_earlier_logits(options):
    model, x = lively(**options), tiny_ids(2, 16)
    before = model(x, x)[0]
    for t in 1, 7, 15:
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 31
        after = model(changed, changed)[0]
        assert torch.equal(after[:, :t], before[:, :t]) and not torch.allclose(after[:, t], before[:, t])


def naive(model, row, n, stride, context_size):
    """The row and its n likeliest tokens, as a list, by encoding all of the window for each of them."""
    row, begin = list(row), max(0, len(row) - context_size)
    for _ in range(n):
        if len(row) - begin > context_size:
            begin = len(row) - (context_size - stride + 1)
        row.append(model(torch.tensor([row[begin:]]))[0].argmax().item())
    return row


@pytest.mark.parametrize('stride', [None, 5])
@pytest.mark.parametrize('options, context_size', [
    *((options, size) for options in COMBINATIONS for size in (None, 27) if size is None or 'position' in options),
    (dict(position='rope', qk_norm=True), 7), (dict(), 7)],
    ids=lambda value: f'{value.get("position")} {value.get("mlp")}' if isinstance(value, dict) else str(value))
def test_greedy_text_is_that_of_encoding_the_whole_window_at_each_token(options, context_size, stride):
    model, rows = lively(**options), [tiny_ids(length, seed=length) for length in (3, 20, 1, 16, 11)]
    padded = pad_sequence(rows, batch_first=True, padding_value=30)
    new = model.generate(padded, 30, temperature=0, stride=stride, lengths=[len(row) for row in rows],
                         context_size=context_size)[:, 20:]
    expected = [naive(model, row.tolist(), 30, stride or 1, context_size or 16)[len(row):] for row in rows]
    assert len(new.unique()) > 9 and new.tolist() == expected
    alone = model.generate(rows[0][None], 30, temperature=0, stride=stride, context_size=context_size)
    assert alone[0, 3:].tolist() == expected[0]


def test_a_window_beyond_learned_positions_is_refused():
    x = tiny_ids(1, 20)
    with pytest.raises(ValueError, match='context_size=17 must be at least 1, and at most block_size=16'):
        tiny_gpt().generate(x, 2, context_size=17)
    for position in 'rope', 'alibi', 'none':
        model = tiny_gpt(position=position)
        assert model(x, x)[0].shape == (1, 20, 31) and model.generate(x, 2, context_size=17).shape == (1, 22)
        with pytest.raises(ValueError, match='context_size=0'):
            model.generate(x, 2, context_size=0)


@pytest.mark.parametrize('nkv', [4, 2, 1])
@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize('dtype, p, tolerance', [
    (torch.float32, 1e-9, 1e-5), (torch.float32, 0.3, 1e-5), (torch.bfloat16, 0.0, 4e-2), (torch.bfloat16, 0.3, 4e-2)])
def test_attention_written_out_with_a_bias_and_grouped_heads_is_torchs_own(monkeypatch, dtype, p, tolerance, biased,
                                                                           nkv):
    B, nh, T, hs = 42, 4, 128, 8  # 32 sequences at a time, and 10
    torch.manual_seed(0)
    inputs = [torch.randn(B, heads, T, hs, dtype=dtype).requires_grad_() for heads in (nh, nkv, nkv)]
    gradient, kept = torch.randn(B, nh, T, hs, dtype=dtype), torch.rand(nh, T, T) >= p
    ahead = torch.full((T, T), -math.inf).triu(1)
    bias = (torch.randn(nh, T, T).to(dtype) + ahead.to(dtype)) if biased else None
    q, k, v = (x.float() for x in inputs)
    k, v = (x.repeat_interleave(nh // nkv, dim=1) for x in (k, v))
    if p < 0.1:
        expected = F.scaled_dot_product_attention(q, k, v, bias.float() if biased else ahead)
    else:
        weights = (q @ k.transpose(2, 3) / math.sqrt(hs) + (bias.float() if biased else ahead)).softmax(-1)
        expected = weights * kept / (1 - p) @ v
        monkeypatch.setattr('model._kept', lambda shape, rate, dtype: (kept * (rate == p)).to(dtype).expand(shape))
    expected = [expected, *torch.autograd.grad(expected, inputs, gradient.float())]
    monkeypatch.setattr(F, 'scaled_dot_product_attention', None)
    found = causal_attention(*inputs, p, bias, nkv < nh)
    for ours, theirs in zip([found, *torch.autograd.grad(found, inputs, gradient)], expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('options', COMBINATIONS, ids=NAMES)
def test_dropout_and_checkpointing_give_the_same_loss_and_gradients(options):
    model, x, y = lively(dropout=0.2, **options).train(), tiny_ids(3, 16), tiny_ids(3, 16, seed=2)

    def loss_and_gradients(checkpointing):
        model.checkpointing = checkpointing
        torch.manual_seed(5)
        loss = model(x, y, with_logits=False)[1]
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    torch.testing.assert_close(loss_and_gradients(True), loss_and_gradients(False))


@pytest.mark.parametrize('options', COMBINATIONS, ids=NAMES)
def test_bfloat16_is_close_to_float32(options):
    model, x = lively(**options), tiny_ids(3, 16)
    for parameter in model.parameters():
        parameter.data *= 0.3 if parameter.dim() == 2 else 1  # or rounding would be all that is seen
    exact, loss = model(x, x)

    def assert_close(autocast):
        with torch.autocast('cpu', torch.bfloat16, autocast):
            logits, close = model(x, x)
        assert (logits - exact).norm() < 0.03 * exact.norm() and abs(close - loss) < 0.03

    assert_close(autocast=True)  # attention written out
    with torch.no_grad():
        assert_close(autocast=True)
        model.bfloat16()
        assert_close(autocast=False)
        new = model.generate(x[:, :5], 10, temperature=0)
        logits = model.float()(new[:, :-1], new[:, 1:])[0][:, 4:]
        assert (logits.gather(2, new[:, 5:, None])[..., 0] > logits.amax(-1) - 0.2 * logits.std()).all()


@pytest.mark.parametrize('options', COMBINATIONS[:4], ids=NAMES[:4])
def test_a_compiled_model_is_one_graph_with_the_same_loss_and_text(options):
    graphs, model, x = [], lively(block_size=64, **options), tiny_ids(2, 5)
    expected = model.generate(x, 20, temperature=0)
    loss = model.train()(tiny_ids(2, 16), tiny_ids(2, 16))[1]

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model.compile(backend=compiler, fullgraph=True)
    torch.testing.assert_close(model(tiny_ids(2, 16), tiny_ids(2, 16))[1], loss)
    assert len(graphs) == 1
    graphs.clear()
    torch.compiler.reset()
    model.compile(backend=compiler, dynamic=True, fullgraph=True)
    assert torch.equal(model.eval().generate(x, 20, temperature=0), expected) and 0 < len(graphs) < 5


# ---- shapes and names ----

@pytest.mark.parametrize('position', ['learned', 'rope', 'alibi', 'none'])
def test_a_cropped_model_is_the_same_within_its_context(position):
    model, x = lively(position=position), tiny_ids(2, 8)
    before, text = model(x)[0], model.generate(x, 20, temperature=0, context_size=8)
    model.crop_block_size(8)
    assert torch.equal(model(x)[0], before) and torch.equal(model.generate(x, 20, temperature=0), text)
    assert model.config.block_size == 8 and asdict(model.config)['position'] == position
    assert model.get_num_params(False) == sum(p.numel() for p in GPT(model.config).parameters())
    for size in (9, 0) if position == 'learned' else (0,):
        with pytest.raises(ValueError, match='8 positions'):
            model.crop_block_size(size)
    if position != 'learned':  # which alone have an end
        model.crop_block_size(32)
        assert model(tiny_ids(2, 32))[0].shape[1] == 1


def test_the_names_of_the_weights_are_gpt2s_whatever_the_options():
    names = set(tiny_gpt(bias=False).state_dict())
    assert names == {f'{part}.weight' for part in (
        'lm_head', 'transformer.wte', 'transformer.wpe', 'transformer.ln_f', *(
            f'transformer.h.{i}.{part}' for i in range(2)
            for part in ('ln_1', 'ln_2', 'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')))}
    for options in COMBINATIONS:
        model = tiny_gpt(**options | {'bias': False})
        weights, c = model.state_dict(), model.config
        assert set(weights) == (names if c.position == 'learned' else names - {'transformer.wpe.weight'})
        assert weights['transformer.h.0.attn.c_attn.weight'].shape == (16 + 2 * c.n_kv_head * c.head_size, 16)
        assert weights['transformer.h.0.mlp.c_fc.weight'].shape[0] == c.mlp_width * (1 + (c.mlp == 'swiglu'))
        assert (model.lm_head.weight is model.transformer.wte.weight) == c.tied
        looked_up = (not c.tied) * 31 * 16 + (c.position == 'learned') * 16 * 16
        assert model.get_num_params(False) - model.get_num_params() == looked_up
    for n_embd, width in (24, 64), (25, 128), (768, 2048), (4096, 10944):
        assert GPTConfig(n_embd=n_embd, n_head=1, mlp='swiglu').mlp_width == width


@pytest.mark.parametrize('fields, reason', [
    (dict(n_head=4, n_kv_head=3), 'n_head=4 must be a multiple of n_kv_head=3'), (dict(n_kv_head=0), 'n_kv_head=0'),
    (dict(n_kv_head=-1), 'n_kv_head=-1'), (dict(n_kv_head=4), 'n_head=2 must be a multiple of n_kv_head=4'),
    (dict(position='rope', n_embd=6), "position='rope' turns pairs of channels, and a head has 3"),
    (dict(position='sine'), "position='sine' must be 'learned' or 'rope' or 'alibi' or 'none'"),
    (dict(norm='batch'), "norm='batch'"), (dict(mlp='relu'), "mlp='relu'"), (dict(logit_softcap=-1.0), 'softcap=-1.0'),
    (dict(logit_softcap=math.nan), 'softcap=nan'), (dict(logit_softcap=math.inf), 'softcap=inf'),
    (dict(rope_theta=0.0), 'rope_theta=0.0'), (dict(rope_theta=math.nan), 'rope_theta=nan'),
    (dict(norm='', mlp='', position='', logit_softcap=-1.0), 'logit_softcap=-1.0 .*position=.*norm=.*mlp=')])
def test_options_that_cannot_be_are_refused_in_one_sentence(fields, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        GPTConfig(**{**TINY_GPT, **fields})
    assert '\n' not in str(refusal.value)
    GPTConfig(**TINY_GPT | dict(n_embd=6))  # which without rope can be
