"""Standard tasks: our scores and texts against those of lm_eval's own class for transformers."""
import json
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, tiny_gpt
from fine_tuning import save_gpt2
from foreign import save_theirs
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from plaingpt.evaluation import harness
from plaingpt.evaluation.lm_eval_model import GPTForTasks
from plaingpt.formats.hugging_face import load_pretrained, tokenizer_of
from plaingpt.system.devices import place
from plaingpt.system.messages import UserError
from plaingpt.text.tokenizers import CharTokenizer, load_tokenizer

CPU = torch.device('cpu')
BLOCK_SIZE = 48
TASKS = str(ROOT / 'data' / 'tasks')


# ---- equal to lm_eval's own class ----

class Pair(NamedTuple):
    """The same model twice, as lm_eval sees it."""
    ours: GPTForTasks
    theirs: object  # an HFLM


@pytest.fixture(scope='module', params=['GPT2', 'Llama'])
def pair(request, tmp_path_factory, text):
    """GPT2: learned positions, no token before a text. Llama: rope, and <s> before each text."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False,
                                  special_tokens=['<s>', '</s>'],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    names = {'eos_token': '</s>'}
    if request.param == 'Llama':
        names['bos_token'] = '<s>'
        tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A',
                                                                 special_tokens=[('<s>', 0)])
    their_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    their_tokenizer.save_pretrained(folder)
    if request.param == 'GPT2':
        save_gpt2(folder, std=0.3, n_layer=2, n_head=2, n_embd=24, vocab_size=300,
                  n_positions=BLOCK_SIZE, eos_token_id=1)
    else:
        save_theirs(folder, 'Llama', vocab_size=300, max_position_embeddings=BLOCK_SIZE,
                    eos_token_id=1)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    gpt = place(load_pretrained(str(folder)), CPU).eval()
    return Pair(GPTForTasks(gpt, load_tokenizer(tokenizer_of(str(folder))), 4, seed=0),
                HFLM(pretrained=theirs, tokenizer=their_tokenizer, batch_size=4))


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=argument, idx=0)
            for argument in arguments]


CONTINUATIONS = [
    ('the king', ' and queen'),
    ('the king', ' and queen'),            # twice the same
    ('the king', ' and hearts'),
    ('the king and queen of', ' all'),     # choices that may differ in a token
    ('the king and queen of', ' our'),
    ('the king and queen of', ' x'),
    ('the king ', 'and queen'),            # the space belongs to the continuation
    ('the king\n', '\nwill rise'),
    ('', 'sleeping'),
    ('', 'the king and queen of all our sleeping hearts'),
    ('another', ' Tag – schöne Grüße, 日本 🙂'),
    ('a day will ' * 20, ' rise to see'),  # longer than block_size
    ('</s>the king', ' rise'),
    ('<s>the king', ' rise'),
]


def test_log_probabilities_of_continuations(pair):
    ours = pair.ours.loglikelihood(requests('loglikelihood', CONTINUATIONS), True)
    theirs = pair.theirs.loglikelihood(requests('loglikelihood', CONTINUATIONS), True)
    for argument, found, expected in zip(CONTINUATIONS, ours, theirs, strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-4), argument
        assert found[1] == expected[1], argument


def test_what_greedy_decoding_writes_is_the_likeliest(pair):
    """And with another last token it is not."""
    windows = []
    for context in ([5, 6, 7], [40], list(range(60, 80))):
        idx = pair.ours.gpt.generate(torch.tensor([context]), 6, temperature=0)
        written = idx[0, len(context):].tolist()
        other_end = [*written[:-1], (written[-1] + 1) % 300]
        windows += [(None, context, written), (None, context, other_end)]
    ours = pair.ours._loglikelihood_tokens(windows, True)
    theirs = pair.theirs._loglikelihood_tokens(windows, True)
    assert [is_likeliest for _, is_likeliest in ours] == [True, False] * 3
    assert [is_likeliest for _, is_likeliest in theirs] == [True, False] * 3


def test_log_probabilities_of_whole_texts(pair, text):
    arguments = [('the king',), (text[:1000],), ('Grüße 🙂',), ('',), (text[500:740],)]
    ours = pair.ours.loglikelihood_rolling(requests('loglikelihood_rolling', arguments), True)
    theirs = pair.theirs.loglikelihood_rolling(requests('loglikelihood_rolling', arguments), True)
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-6)


def test_new_texts(pair, text):
    few = {'until': ['\n', 'e', 'king'], 'max_gen_toks': 12}
    many = {'until': [], 'max_gen_toks': 30, 'do_sample': False}
    default = {'until': 'sleeping', 'temperature': 0.0, 'max_gen_toks': 20}
    arguments = []
    for start in ['the king', 'all our', 'Grüße 🙂', text[:700], 'hearts will', 'the king']:
        arguments += [(start, few), (start, many), (start, default)]
    ours = pair.ours.generate_until(requests('generate_until', arguments), True)
    theirs = pair.theirs.generate_until(requests('generate_until', arguments), True)
    assert ours == theirs
    assert len(set(ours)) > 8  # they differ, and some of them are not cut at once


CHAT = """{% for message in messages %}
{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<s>assistant: ' }}
{% endif %}
"""


def test_chats(pair, monkeypatch):
    monkeypatch.setattr(pair.ours.tokenizer, 'chat_template', CHAT)
    monkeypatch.setattr(pair.theirs.tokenizer, 'chat_template', CHAT)
    question = [{'role': 'user', 'content': 'Who? '}]
    beginning = [*question, {'role': 'assistant', 'content': 'Who? The king'}]
    assert pair.ours.apply_chat_template(question).endswith('</s>\n<s>assistant: \n')
    for chat, is_complete in ((question, True), (beginning, True), (beginning, False)):
        expected = pair.theirs.apply_chat_template(chat, is_complete)
        assert pair.ours.apply_chat_template(chat, is_complete) == expected


# ---- what only ours does ----

@pytest.fixture
def letters():
    """A model of single letters, which has no token that begins or ends a text."""
    return GPTForTasks(tiny_gpt(vocab_size=64), CharTokenizer('abcdefgh '), 4, seed=0)


def answer(model, kind, *argument):
    return getattr(model, kind)(requests(kind, [argument]), True)[0]


@pytest.mark.parametrize('kind, arguments, sentence', [
    ('loglikelihood', ('', ''), 'the probability of an empty text'),
    ('loglikelihood', ('ab', ''), 'that adds no token to its context'),
    ('loglikelihood', ('', 'ab'), "of a text's first token, but this model has no token"),
    ('loglikelihood_rolling', ('ab',), "of a text's first token, but this model has no token"),
    ('loglikelihood', ('a', 'b' * 17), 'of 17 tokens at once, but the model reads at most 16'),
    ('loglikelihood', ('a', '!'), "the character '!' (U+0021) is not in this vocabulary of 9 "),
    ('generate_until', ('ab', {'until': [], 'max_gen_toks': 16}), 'up to 16 new tokens'),
    ('generate_until', ('ab', {'until': [], 'num_beams': 3}), 'asks for num_beams in generation'),
    ('generate_until', ('ab', {'until': [], 'temperature': -1.0}), 'temperature=-1.0 must be'),
])
def test_what_the_model_cannot_do_is_refused(letters, kind, arguments, sentence):
    with pytest.raises(UserError, match=sentence.replace('(', r'\(').replace('+', r'\+')
                       .replace(')', r'\)')):
        answer(letters, kind, *arguments)


def test_rows_without_a_token_are_neither_counted_nor_chosen(letters):
    total = 0
    for char in 'abcdefgh ':
        log_probability, _ = answer(letters, 'loglikelihood', 'abc', char)
        total += torch.tensor(log_probability).exp().item()
    assert total == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        letters.gpt.lm_head.weight[40] *= 1000  # one that would be the likeliest
    assert set(answer(letters, 'generate_until', 'abc', {})) <= set('abcdefgh ')


def test_a_sampled_text_depends_on_the_seed_and_on_its_own_number(letters):
    options = {'do_sample': True, 'temperature': 1.0, 'max_gen_toks': 8}
    arguments = [('abc', options)] * 6
    first = letters.generate_until(requests('generate_until', arguments), True)
    again = letters.generate_until(requests('generate_until', arguments), True)
    assert first == again
    assert len(set(first)) > 1
    letters.seed = 1
    other = letters.generate_until(requests('generate_until', arguments), True)
    assert other != first


def test_damaged_weights_are_refused():
    gpt = tiny_gpt(vocab_size=9)
    with torch.no_grad():
        gpt.transformer.ln_f.weight[0] = torch.nan
    model = GPTForTasks(gpt, CharTokenizer('abcdefgh '), 4, seed=0)
    with pytest.raises(UserError, match='becomes nan: the weights are damaged'):
        answer(model, 'loglikelihood', 'ab', 'c')


def test_few_logits_at_a_time_give_the_same(letters, monkeypatch):
    arguments = [('ab', 'cdefgh'), ('a', 'bcd'), ('abcdef', 'gh')]
    expected = letters.loglikelihood(requests('loglikelihood', arguments), True)
    monkeypatch.setattr('plaingpt.evaluation.lm_eval_model.LOGITS_AT_ONCE', 2 * 64)
    found = letters.loglikelihood(requests('loglikelihood', arguments), True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected])


# ---- tasks, results ----

@pytest.fixture
def small():
    """(GPT, tokenizer) that can read the tasks in data/tasks."""
    chars = set()
    for path in (ROOT / 'data' / 'tasks').glob('*.*'):
        chars |= set(path.read_text(encoding='utf-8'))
    return tiny_gpt(vocab_size=len(chars), block_size=128), CharTokenizer(sorted(chars))


def test_both_tasks_of_the_repository_run_and_results_are_written(small, tmp_path, capsys):
    output = tmp_path / 'scores.json'
    results = harness.run(*small, ['plain_facts', 'plain_sentiment'], task_path=TASKS, limit=12,
                          num_fewshot=1, output=str(output), name='a model')
    assert set(results['results']) == {'plain_facts', 'plain_sentiment'}
    table = capsys.readouterr().out
    written = json.loads(output.read_text(encoding='utf-8'))
    assert written['model_name'] == 'a model'
    for task, choices in (('plain_facts', 4), ('plain_sentiment', 2)):
        scores = written['results'][task]
        assert f'|{task}' in table
        assert f"{scores['acc,none']:.4f}" in table or str(scores['acc,none']) in table
        assert written['n-shot'][task] == 1
        lines = (tmp_path / f'scores_samples_{task}.jsonl').read_text(encoding='utf-8')
        samples = [json.loads(line) for line in lines.splitlines()]
        assert len(samples) == 12
        assert sum(sample['acc'] for sample in samples) / 12 == scores['acc,none']
        assert {len(sample['resps']) for sample in samples} == {choices}
    assert len(list(tmp_path.iterdir())) == 3


def task_file(folder, name, **changes):
    content = {
        'task': name, 'custom_dataset': '!function splits.read_splits',
        'dataset_kwargs': json.dumps({'name': 'plain_facts'}), 'output_type': 'multiple_choice',
        'test_split': 'test', 'doc_to_text': 'question', 'doc_to_choice': 'choices',
        'doc_to_target': 'answer', **changes}
    lines = [f'{key}: {value}' for key, value in content.items()]
    (folder / f'{name}.yaml').write_text('\n'.join(lines), encoding='utf-8')
    for source in (ROOT / 'data' / 'tasks').glob('*s*.*'):
        if source.suffix != '.yaml':
            (folder / source.name).write_text(source.read_text(encoding='utf-8'), encoding='utf-8')


def test_a_task_of_ones_own_is_found_in_any_working_directory(small, tmp_path, monkeypatch):
    task_file(tmp_path, 'mine')
    monkeypatch.chdir('/')
    results = harness.run(*small, ['mine'], task_path=str(tmp_path), limit=3)
    assert results['n-samples']['mine']['effective'] == 3


@pytest.mark.slow  # it reads all tasks of lm_eval, as the next one does
def test_a_group_comes_with_its_tasks(small, tmp_path, capsys):
    task_file(tmp_path, 'one')
    task_file(tmp_path, 'two')
    (tmp_path / 'both.yaml').write_text(
        'group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]', encoding='utf-8')
    results = harness.run(*small, ['both'], task_path=str(tmp_path), limit=4)
    one, two = (results['results'][name]['acc,none'] for name in ('one', 'two'))
    assert results['groups']['both']['acc,none'] == pytest.approx((one + two) / 2)
    assert capsys.readouterr().out.count('both') == 2


@pytest.mark.slow
@pytest.mark.parametrize('tasks, task_path, sentence', [
    (['plain_fact'], TASKS, r'tasks=plain_fact: there is no task of this name in lm_eval, and no '
                            r'valid \.yaml file in .* describes it; did you mean plain_facts\?'),
    (['hellaswagg'], '', 'did you mean hellaswag'),
])
def test_an_unknown_task_is_refused(small, tasks, task_path, sentence):
    with pytest.raises(UserError, match=sentence):
        harness.run(*small, tasks, task_path=task_path)


def test_more_solved_examples_than_a_task_has_are_refused(small):
    with pytest.raises(UserError, match='num_fewshot=9: the task plain_facts has 8 solved'):
        harness.run(*small, ['plain_facts'], task_path=TASKS, num_fewshot=9)


@pytest.mark.parametrize('changes', [
    {'dataset_kwargs': '{name: missing}'},
    {'custom_dataset': '!function splits.missing'},
    {'doc_to_text': '"{{ question | nothing }}"'},
    {'output_type': 'poetry'},
    {'test_split': 'missing'},
], ids=str)
def test_a_task_that_cannot_be_loaded_ends_in_one_sentence(small, tmp_path, changes):
    task_file(tmp_path, 'broken', **changes)
    with pytest.raises(UserError, match='^tasks=broken cannot be loaded ') as raised:
        harness.run(*small, ['broken'], task_path=str(tmp_path))
    assert '\n' not in str(raised.value)


def test_without_lm_eval_its_pip_command_is_offered(small, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    with pytest.raises(UserError, match=r'need the package lm_eval .*pip install lm_eval==0\.4'):
        harness.run(*small, ['plain_facts'])


def test_the_module_itself_does_not_need_lm_eval():
    code = 'import sys\nfrom plaingpt.evaluation import harness\nprint("lm_eval" in sys.modules)'
    ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                           encoding='utf-8', check=True)
    assert ended.stdout == 'False\n'


def test_a_model_without_a_chat_template_is_refused(small):
    with pytest.raises(UserError, match='this model has no chat template'):
        harness.run(*small, ['plain_facts'], task_path=TASKS, chat_template=True)


def test_an_output_that_cannot_be_written_is_refused(small, tmp_path):
    with pytest.raises(UserError, match='output cannot be written: '):
        harness.run(*small, ['plain_facts'], task_path=TASKS, limit=1,
                    output=str(tmp_path / 'no' / 'scores.json'))
