"""The tasks in data/tasks: their examples, and what a published model scores on them."""
import collections
import json
import time

import pytest
from conftest import ROOT, or_skip, refused, run_here, succeeded
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from plaingpt.formats.gguf_reading import gguf_tokenizer_of, load_gguf
from plaingpt.formats.hugging_face_export import export_hugging_face
from plaingpt.formats.smollm2 import fetch_smollm2

TASKS = ROOT / 'data' / 'tasks'
NAMES = ['plain_facts', 'plain_sentiment']


def examples(task, split):
    lines = (TASKS / f'{task}_{split}.jsonl').read_text(encoding='utf-8').splitlines()
    return [json.loads(line) for line in lines]


def test_facts_have_four_choices_and_the_answer_is_equally_often_at_each_place():
    for split in ('train', 'test'):
        facts = examples('plain_facts', split)
        assert {len(set(fact['choices'])) for fact in facts} == {4}
        places = collections.Counter(fact['answer'] for fact in facts)
        assert set(places.values()) == {len(facts) // 4}


def test_half_of_the_sentences_are_positive():
    for split in ('train', 'test'):
        labels = [example['label'] for example in examples('plain_sentiment', split)]
        assert labels.count(1) == labels.count(0) == len(labels) / 2


@pytest.mark.parametrize('task, key', [('plain_facts', 'question'), ('plain_sentiment', 'text')])
def test_no_example_stands_in_both_splits_or_twice(task, key):
    texts = [example[key] for split in ('train', 'test') for example in examples(task, split)]
    assert len(set(texts)) == len(texts)


def test_a_model_of_letters_is_told_which_character_it_does_not_know(tmp_path, char_data):
    from runs import train
    succeeded(train(tmp_path / 'run', char_data))
    ended = run_here('evaluate.py', out_dir=tmp_path / 'run', tasks='plain_facts',
                     task_path=TASKS, device='cpu', dtype='float32')
    assert "the character 'Q' (U+0051) is not in this vocabulary of" in refused(ended)


# ---- a published model ----

@pytest.fixture(scope='module')
def smollm2(tmp_path_factory):
    """(its GGUF file, the folder of its export to Hugging Face's form in float32)."""
    folder = tmp_path_factory.mktemp('smollm2')
    path, _ = or_skip(lambda: fetch_smollm2(str(folder)))
    exported = folder / 'exported'
    exported.mkdir()
    export_hugging_face(str(exported), load_gguf(path), gguf_tokenizer_of(path))
    return path, exported


CHANCE = {'plain_facts': 0.25, 'plain_sentiment': 0.5}


@pytest.mark.slow
@pytest.mark.parametrize('shots, chat_template', [(0, False), (4, False), (0, True)])
def test_smollm2_beats_chance_and_scores_as_in_lm_evals_own_class(smollm2, tmp_path, shots,
                                                                  chat_template):
    """It scores 0.75 and 0.975 without solved examples, 0.8375 and 0.8625 with four.

    The standard errors are 0.02 to 0.05."""
    from lm_eval.models.huggingface import HFLM
    path, exported = smollm2
    output = tmp_path / 'scores.json'
    began = time.perf_counter()
    ended = run_here('evaluate.py', init_from=path, tasks=','.join(NAMES), task_path=TASKS,
                     num_fewshot=shots, chat_template=chat_template, output=output, device='cpu',
                     dtype='float32')
    print(f'{succeeded(ended)}\n{time.perf_counter() - began:.0f} s')
    ours = json.loads(output.read_text(encoding='utf-8'))

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    theirs = simple_evaluate(
        HFLM(pretrained=str(exported), device='cpu', dtype='float32', batch_size=16),
        tasks=NAMES, task_manager=manager, num_fewshot=shots, apply_chat_template=chat_template)
    for task in NAMES:
        scores = ours['results'][task]
        for metric in ('acc', 'acc_norm'):
            assert scores[f'{metric},none'] == theirs['results'][task][f'{metric},none']
        lines = (tmp_path / f'scores_samples_{task}.jsonl').read_text(encoding='utf-8').splitlines()
        for line, their_sample in zip(lines, theirs['samples'][task], strict=True):
            sample = json.loads(line)
            assert sample['prompt_hash'] == their_sample['prompt_hash']
            for ours_of_choice, theirs_of_choice in zip(
                    sample['filtered_resps'], their_sample['filtered_resps'], strict=True):
                assert float(ours_of_choice[0]) == pytest.approx(theirs_of_choice[0], abs=1e-3)
        if not chat_template:
            assert scores['acc,none'] > CHANCE[task] + 0.25  # five standard errors
