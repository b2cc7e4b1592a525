"""plaingpt/inference/graphs.py: decoding steps that are recorded once give the same text.

No GPU is needed: RecordedOperations stands for a CUDA graph. It repeats operations of torch on the
very tensors that they had, so it freezes all that a CUDA graph freezes."""
import pytest
import torch
from conftest import tiny_gpt, tiny_ids
from generating import generate, gpt_with_logits, lively_gpt
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from plaingpt.inference import graphs

# A CUDA graph can hold none of these: the host waits for a value, or a shape depends on one.
NEED_VALUES = [torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
               torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default]


def tensors_in(arguments):
    found = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += tensors_in(argument)
    return found


class RecordedOperations(TorchDispatchMode):
    """The operations of a function, with their tensors; like a CUDA graph, without their effect."""

    def __init__(self, function):
        super().__init__()
        self.operations = []
        self.before = []   # (tensor, copy) of each tensor that is changed
        try:
            with self:
                function()
        finally:
            for tensor, copy in reversed(self.before):
                tensor.copy_(copy)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        if operation in NEED_VALUES:
            raise RuntimeError('operation not permitted when stream is capturing')
        inputs = tensors_in([arguments, list(options.values())])
        for parameter, argument in zip(operation._schema.arguments, arguments, strict=False):
            if parameter.alias_info is not None and parameter.alias_info.is_write:
                self.before.append((argument, argument.clone()))
        output = operation(*arguments, **options)
        # Views and tensors that are written in place need no copying when it is repeated.
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        new = [tensor for tensor in tensors_in([output])
               if tensor.untyped_storage().data_ptr() not in known]
        self.operations.append((operation, arguments, options, output, new))
        return output

    def replay(self):
        for operation, arguments, options, output, new in self.operations:
            repeated = operation(*arguments, **options)
            outputs = tensors_in([output])
            for tensor, result in zip(outputs, tensors_in([repeated]), strict=True):
                if any(tensor is one for one in new):
                    tensor.copy_(result)


@pytest.fixture
def recordings(monkeypatch):
    """Makes a CPU decode as a GPU does; a list of the recordings, with a None for each replay."""
    seen = []
    monkeypatch.setattr(graphs.DecodingGraphs, 'failed', False)

    def record(function, pool, device):
        assert pool == 'the pool'
        recording = RecordedOperations(function)
        seen.append(recording)
        return recording

    def replay(self, original=RecordedOperations.replay):
        seen.append(None)
        original(self)

    monkeypatch.setattr(RecordedOperations, 'replay', replay)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: 'the pool')
    monkeypatch.setattr(graphs, 'record', record)
    monkeypatch.setattr(graphs, 'are_used_on', lambda device: True)
    monkeypatch.setattr(graphs, 'LENGTH_MULTIPLE', 4)
    monkeypatch.setattr(graphs, 'WORTH_RECORDING', 2)
    return seen


def counts(recordings):
    """How many recordings and how many replays."""
    replays = recordings.count(None)
    return len(recordings) - replays, replays


# ---- the same text ----

ARCHITECTURES = {
    'plain': dict(),
    'rope, grouped heads': dict(position='rope', n_head=4, n_kv_head=2, qk_norm=True),
    'alibi': dict(position='alibi'),
    'alibi, grouped heads': dict(position='alibi', n_head=4, n_kv_head=2),
    'no positions, soft cap': dict(position='none', logit_softcap=5.0),
}
OPTIONS = {
    'greedy': dict(temperature=0),
    'greedy, moving by 5': dict(temperature=0, stride=5),
    'sampled': dict(),
    'sampled, moving by 1': dict(stride=1),
    'top-k': dict(top_k=9, stride=16),
    'top-p and min-p': dict(top_p=0.9, min_p=0.02),
    'repetition penalty': dict(repetition_penalty=3.0, vocab_size=29),
    'greedy repetition penalty': dict(repetition_penalty=3.0, temperature=0, stride=5),
    'stop tokens': dict(stop_tokens=[5, 11]),
    'small context': dict(context_size=10),
}


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('options', OPTIONS)
def test_the_text_is_the_same_as_without_graphs(request, options, architecture):
    gpt = lively_gpt(**ARCHITECTURES[architecture])
    prompts = [tiny_ids(length, seed=length) for length in (3, 7, 1)]
    padded = pad_sequence(prompts, batch_first=True, padding_value=30)
    lengths = [len(prompt) for prompt in prompts]

    def texts():
        together = generate(gpt, padded, 40, lengths=lengths, num_samples=2, **OPTIONS[options])
        alone = generate(gpt, prompts[1][None], 40, **OPTIONS[options])
        return together, alone

    together, alone = texts()
    recordings = request.getfixturevalue('recordings')
    together_by_graphs, alone_by_graphs = texts()
    assert torch.equal(together_by_graphs, together)
    assert torch.equal(alone_by_graphs, alone)
    recorded, replayed = counts(recordings)
    assert recorded >= 2
    assert replayed >= recorded


# ---- when they are recorded ----

def test_each_length_is_recorded_once_and_replayed_from_then_on(recordings):
    # 3 tokens are read, the step after them runs by itself, and each multiple of 4 has a graph.
    lively_gpt().generate(tiny_ids(1, 3), 14)
    assert counts(recordings) == (3, 12)
    # Then windows of 16 move on by 8: they are read again, and decoded from 10 positions on.
    recordings.clear()
    lively_gpt().generate(tiny_ids(1, 3), 14 + 8 + 8)
    assert counts(recordings) == (3, 12 + 7 + 7)


def test_a_length_that_serves_too_few_steps_is_not_recorded(recordings, monkeypatch):
    monkeypatch.setattr(graphs, 'WORTH_RECORDING', 4)
    gpt = lively_gpt()
    gpt.generate(tiny_ids(1, 3), 5)  # decodes 4 positions, then 5, 6 and 7
    assert counts(recordings) == (0, 0)
    gpt.generate(tiny_ids(1, 3), 6)
    assert counts(recordings) == (1, 4)
    # 6 to 8 positions, of which the first step runs by itself, then 9 to 12.
    recordings.clear()
    gpt.generate(tiny_ids(1, 5), 8)
    assert counts(recordings) == (1, 4)
    # 6 to 8, then 9 and 10, where the window is full and moves back to 6.
    recordings.clear()
    gpt.generate(tiny_ids(1, 5), 20, stride=5, context_size=10)
    assert counts(recordings) == (0, 0)


# ---- what goes wrong ----

def test_a_model_that_needs_a_value_decodes_without_graphs_after_one_warning(recordings, capsys):
    def look_at(module, inputs, output):
        assert output.sum().item() == 100

    gpt = gpt_with_logits([0.0, 100.0])
    gpt.lm_head.register_forward_hook(look_at)
    for _ in range(2):
        text = gpt.generate(torch.zeros(1, 1, dtype=torch.int64), 10)
        assert text.tolist() == [[0] + [1] * 10]
    assert counts(recordings) == (0, 0)
    [warning] = capsys.readouterr().err.splitlines()
    assert 'no CUDA graph can be recorded, so decoding is slower (operation not perm' in warning


@pytest.mark.parametrize('end_fails', [False, True])
def test_too_little_memory_for_a_graph_is_no_reason_to_go_on(recordings, monkeypatch, end_fails):
    def record_without_memory(*arguments):
        try:
            raise torch.OutOfMemoryError('CUDA out of memory')
        finally:
            if end_fails:  # as torch.cuda.graph's does
                raise RuntimeError('operation failed due to a previous error during capture')

    monkeypatch.setattr(graphs, 'record', record_without_memory)
    with pytest.raises(torch.OutOfMemoryError):
        tiny_gpt().generate(tiny_ids(1, 3), 10)
