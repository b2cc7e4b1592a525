"""plaingpt/system/compiling.py: what torch.compile compiles, how, and what happens if it fails."""
import pytest
import torch
from conftest import tiny_gpt, tiny_ids

from plaingpt.system import compiling

CPU = torch.device('cpu')
CUDA = torch.device('cuda', 0)


class Compiler:
    """A backend of torch.compile that counts graphs, and runs them as they are."""

    def __init__(self, works=True):
        self.works = works
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.works:
            return graph.forward
        raise RuntimeError('no C++ compiler\nhere')


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def loss_and_gradient(model):
    model.zero_grad()
    ids = tiny_ids(2, 8)
    _, loss = model(ids, ids, with_logits=False)
    loss.backward()
    return loss.detach(), model.transformer.wte.weight.grad


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('works', [True, False])
def test_a_model_that_cannot_be_compiled_stays_eager_with_one_warning(
        capsys, works, checkpointing):
    model = tiny_gpt()
    model.checkpointing = checkpointing
    names = list(model.state_dict())
    expected, expected_gradient = loss_and_gradient(model)
    compiler = Compiler(works)

    compiled = compiling.compile_or_warn(model, lambda: loss_and_gradient(model), backend=compiler)

    assert compiled is works
    assert compiler.graphs > 0
    warnings = capsys.readouterr().err.splitlines()
    if works:
        assert warnings == []
    else:
        [warning] = warnings
        assert 'torch.compile failed' in warning
        assert 'no C++ compiler' in warning
    loss, gradient = loss_and_gradient(model)
    assert torch.allclose(loss, expected)
    assert torch.allclose(gradient, expected_gradient)
    assert list(model.state_dict()) == names


def test_a_mistake_in_the_model_is_not_taken_for_a_failure_to_compile():
    model = tiny_gpt()

    def trial():
        model(tiny_ids(2, 17))

    with pytest.raises(ValueError, match='too long'):
        compiling.compile_or_warn(model, trial, backend='eager')


def test_a_model_that_checkpoints_is_compiled_block_by_block_and_all_blocks_share_their_code():
    model = tiny_gpt(n_layer=4)
    model.checkpointing = True
    compiler = Compiler()
    compiling.compile_or_warn(model, lambda: loss_and_gradient(model), backend=compiler)
    assert compiler.graphs == 1
    loss_and_gradient(model)
    assert compiler.graphs == 1


def test_after_a_reset_the_parameters_that_are_newly_trained_get_gradients():
    stages = [['lm_head'], ['h.1', 'lm_head'], ['']]  # parts of names; '' is in all of them
    model = tiny_gpt()
    compiling.compile_or_warn(model, lambda: loss_and_gradient(model), backend='aot_eager')
    eager = tiny_gpt()
    for patterns in stages:
        for gpt in (model, eager):
            gpt.zero_grad()
            for name, parameter in gpt.named_parameters(remove_duplicate=False):
                parameter.requires_grad_(any(pattern in name for pattern in patterns))
        torch.compiler.reset()
        loss_and_gradient(model)
        loss_and_gradient(eager)
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


# ---- modes ----

@pytest.mark.parametrize('compile_mode, device, processes, checkpointing, mode', [
    ('auto', CUDA, 1, False, 'reduce-overhead'),
    ('auto', CUDA, 2, False, 'default'),
    ('auto', CUDA, 1, True, 'default'),
    ('auto', CPU, 1, False, 'default'),
    ('max-autotune', CUDA, 2, False, 'max-autotune'),
    ('default', CUDA, 1, False, 'default'),
])
def test_small_models_on_one_gpu_are_recorded_as_cuda_graphs(
        compile_mode, device, processes, checkpointing, mode):
    model = tiny_gpt()
    model.checkpointing = checkpointing
    assert compiling.choose_mode(model, device, compile_mode, processes) == mode


def test_a_large_model_is_not_recorded(monkeypatch):
    model = tiny_gpt()
    monkeypatch.setattr(compiling, 'SMALL_MODEL', model.get_num_params())
    assert compiling.choose_mode(model, CUDA, 'auto') == 'default'


@pytest.mark.parametrize('mode, device, graphs', [
    ('reduce-overhead', CUDA, True),
    ('max-autotune', CUDA, True),
    ('max-autotune-no-cudagraphs', CUDA, False),
    ('default', CUDA, False),
    ('reduce-overhead', CPU, False),
])
def test_cuda_graphs_belong_to_some_modes_on_cuda(mode, device, graphs):
    assert compiling.uses_cuda_graphs(mode, device) == graphs


def test_an_unknown_mode_is_refused_with_those_that_exist():
    [sentence] = compiling.problems({'compile_mode': 'fast'})
    assert "compile_mode='fast'" in sentence
    assert 'reduce-overhead' in sentence
    assert list(compiling.problems({'compile_mode': 'auto'})) == []


def test_gradients_are_kept_for_what_is_trained_alone():
    model = tiny_gpt()
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    compiling.keep_gradients(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert (parameter.grad == 0).all()
        else:
            assert parameter.grad is None


def test_kept_gradients_are_added_to_in_place():
    model = tiny_gpt()
    compiling.keep_gradients(model)
    gradient = model.transformer.wpe.weight.grad
    ids = tiny_ids(2, 8)
    _, loss = model(ids, ids)
    loss.backward()
    assert model.transformer.wpe.weight.grad is gradient
    assert (gradient != 0).any()
    model.zero_grad(set_to_none=False)
    assert model.transformer.wpe.weight.grad is gradient
