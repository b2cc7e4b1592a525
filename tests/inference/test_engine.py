"""plaingpt/inference/engine.py: seeds, stop tokens, compiled models, and wrong arguments."""
import math

import pytest
import torch
from conftest import tiny_gpt, tiny_ids
from generating import generate, gpt_with_logits, greedy_without_cache, lively_gpt

from plaingpt.inference.engine import InvalidArguments
from plaingpt.system import cpu_kernels
from plaingpt.system.devices import place


def test_with_seeds_the_text_depends_on_them_alone():
    gpt = lively_gpt()
    prompts = tiny_ids(2, 3)
    torch.manual_seed(1)
    first = generate(gpt, prompts, 30)
    torch.manual_seed(2)
    second = generate(gpt, prompts, 30)
    assert torch.equal(first, second)
    assert not torch.equal(first, generate(gpt, prompts, 30, seed=1))


def test_without_seeds_the_text_depends_on_the_generator_of_torch():
    gpt = lively_gpt()
    prompts = tiny_ids(2, 3)
    texts = []
    for torch_seed in (1, 1, 2):
        torch.manual_seed(torch_seed)
        texts.append(gpt.generate(prompts, 30))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_compiled_model_gives_the_same_text():
    gpt = lively_gpt()
    prompts = tiny_ids(2, 5)
    eager = gpt.generate(prompts, 20, temperature=0)
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph.forward

    gpt.compile(backend=count_graphs, dynamic=True)
    assert torch.equal(gpt.generate(prompts, 20, temperature=0), eager)
    assert 0 < len(graphs) < 5  # not one for each length


def test_several_rows_on_a_cpu_use_packed_weights_which_are_never_stale(monkeypatch):
    gpt = place(lively_gpt(), torch.device('cpu')).eval()
    gpt.kernels.uses_onednn = False  # but for packed weights
    calls = []
    onednn_linear = cpu_kernels.onednn_linear

    def noted(*arguments):
        calls.append(1)
        return onednn_linear(*arguments)

    monkeypatch.setattr(cpu_kernels, 'onednn_linear', noted)
    prompts = tiny_ids(3, 4)
    for _ in range(2):
        text = gpt.generate(prompts, 20, temperature=0).tolist()
        assert text == [greedy_without_cache(gpt, row, 20) for row in prompts.tolist()]
        for parameter in gpt.parameters():
            parameter.data.neg_()  # which leaves no trace in the version of a tensor
    assert bool(calls) == cpu_kernels.has_onednn()


# ---- stop tokens ----

def test_a_row_repeats_its_stop_token_and_the_others_go_on():
    gpt = tiny_gpt(seed=3)
    prompts = tiny_ids(4, 3)
    free = generate(gpt, prompts, 40)
    stop = free[0, 10].item()
    stopped = generate(gpt, prompts, 40, stop_tokens=[stop])
    assert torch.equal(stopped[0, :11], free[0, :11])
    assert stop in stopped[0, 3:].tolist()
    for new in stopped[:, 3:].tolist():
        if stop in new:
            assert set(new[new.index(stop):]) == {stop}


def test_generation_ends_once_all_rows_have_ended():
    gpt = gpt_with_logits([0.0, 100.0])  # the next token is always 1
    prompts = torch.zeros(3, 1, dtype=torch.int64)
    assert gpt.generate(prompts, 40, stop_tokens=[1]).shape == (3, 2)


# ---- wrong arguments ----

@pytest.mark.parametrize('options, sentence', [
    (dict(temperature=-1.0), 'temperature=-1.0 must be a number of at least 0'),
    (dict(temperature=math.nan), 'temperature=nan must be a number of at least 0'),
    (dict(top_k=-1), 'top_k=-1 must be at least 1, or 0 or None for all'),
    (dict(top_p=0.0), 'top_p=0.0 must be above 0 and at most 1'),
    (dict(top_p=1.5), 'top_p=1.5 must be above 0 and at most 1'),
    (dict(min_p=-0.1), 'min_p=-0.1 must be at least 0 and at most 1'),
    (dict(min_p=1.5), 'min_p=1.5 must be at least 0 and at most 1'),
    (dict(min_p=math.nan), 'min_p=nan must be at least 0 and at most 1'),
    (dict(repetition_penalty=0.0), 'repetition_penalty=0.0 must be above 0'),
    (dict(repetition_penalty=math.inf), 'repetition_penalty=inf must be above 0 and finite'),
    (dict(stride=0), 'stride=0 must be at least 1 and at most the context_size'),
    (dict(stride=17), 'stride=17 must be at least 1 and at most the context_size'),
    (dict(context_size=0), 'context_size=0 must be at least 1'),
    (dict(context_size=17), 'context_size=17 must be at least 1, and at most block_size=16'),
    (dict(max_new_tokens=-1), 'max_new_tokens=-1 must be at least 0'),
    (dict(num_samples=0), 'num_samples=0 must be at least 1'),
    (dict(num_samples=2, seeds=[1]), '1 x 2 rows need as many seeds, not 1'),
    (dict(lengths=[0]), 'the prompt has no tokens'),
    (dict(lengths=[4]), 'lengths=[4] must be one for each of 1 rows, and at most 3'),
    (dict(lengths=[3, 3]), 'lengths=[3, 3] must be one for each of 1 rows, and at most 3'),
])
def test_an_argument_out_of_range_is_refused(options, sentence):
    with pytest.raises(InvalidArguments) as refusal:
        tiny_gpt().generate(tiny_ids(1, 3), **{'max_new_tokens': 3, **options})
    assert sentence in str(refusal.value)


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidArguments, match='the prompt has no tokens'):
        tiny_gpt().generate(torch.zeros(1, 0, dtype=torch.int64), 3)


def test_all_arguments_out_of_range_are_named_at_once():
    with pytest.raises(InvalidArguments, match='min_p=2 .*; stride=0 '):
        tiny_gpt().generate(tiny_ids(1, 3), 3, stride=0, min_p=2)
