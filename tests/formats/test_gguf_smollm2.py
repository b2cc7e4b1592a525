"""A published GGUF file, SmolLM2-135M-Instruct in Q4_1, read and written again."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, or_skip

from plaingpt.formats import foreign_weights
from plaingpt.formats.gguf_reading import gguf_tokenizer_of, load_gguf
from plaingpt.formats.gguf_writing import write_gguf
from plaingpt.formats.llama_cpp import LlamaCpp
from plaingpt.formats.smollm2 import fetch_smollm2
from plaingpt.text.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow

QUESTION = ('<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging '
            'Face<|im_end|>\n<|im_start|>user\nThe capital of France is<|im_end|>\n'
            '<|im_start|>assistant\n')
START = 'The capital of France is'


@pytest.fixture(scope='module')
def smollm2(tmp_path_factory):
    """(path of the file, its GPT, its tokenizer)."""
    folder = str(tmp_path_factory.mktemp('smollm2'))
    path, _ = or_skip(lambda: fetch_smollm2(folder))
    return path, load_gguf(path).eval(), load_tokenizer(gguf_tokenizer_of(path))


def their_llama(gpt):
    """The LlamaForCausalLM of transformers with the weights of a GPT."""
    from transformers import LlamaConfig, LlamaForCausalLM
    ours = gpt.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size, hidden_size=ours.n_embd, intermediate_size=ours.mlp_width,
        num_hidden_layers=ours.n_layer, num_attention_heads=ours.n_head,
        num_key_value_heads=ours.n_kv_head, max_position_embeddings=ours.block_size,
        rms_norm_eps=ours.norm_eps, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
        rope_parameters={'rope_type': 'default', 'rope_theta': ours.rope_theta})
    theirs = LlamaForCausalLM(config).eval()
    tensors = foreign_weights.named_tensors(gpt, ours.vocab_size, 'hugging_face')
    missing, unexpected = theirs.load_state_dict(dict(tensors), strict=False)
    assert (missing, unexpected) == (['lm_head.weight'], [])
    return theirs


def differences_from_llama_cpp(gpt, model, prompts):
    """The differences in the log-probabilities of the four likeliest tokens after each prompt."""
    for ids in prompts:
        logits, _ = gpt(torch.tensor([ids]))
        ours = logits[0, -1].log_softmax(-1)
        theirs = model.top_log_probabilities(ids)
        assert max(theirs, key=theirs.get) == ours.argmax()
        for token, value in theirs.items():
            yield abs(ours[token].item() - value)


@torch.no_grad()
def test_its_answer_is_that_of_transformers(smollm2):
    _, gpt, tokenizer = smollm2
    theirs = their_llama(gpt)
    ids = torch.tensor([tokenizer.encode(QUESTION)])
    logits, _ = gpt(ids, ids)
    expected = theirs(ids).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    ours = gpt.generate(ids, 20, temperature=0)
    assert torch.equal(ours, theirs.generate(ids, max_new_tokens=20, do_sample=False))


@torch.no_grad()
def test_llama_cpp_reads_the_same_numbers_but_rounds_what_it_multiplies_them_with(smollm2):
    pytest.importorskip('xllamacpp')
    path, gpt, tokenizer = smollm2
    prompts = [tokenizer.encode(START), tokenizer.encode(QUESTION)]
    model = LlamaCpp(path, context=64)
    # Where matrices have 4 bits, llama.cpp rounds activations to 8.
    assert max(differences_from_llama_cpp(gpt, model, prompts)) < 0.6


@torch.no_grad()
def test_in_float32_llama_cpp_computes_the_same_and_writes_the_same_text(smollm2, tmp_path):
    pytest.importorskip('xllamacpp')
    _, gpt, tokenizer = smollm2
    path = str(tmp_path / 'smollm2.gguf')
    write_gguf(path, gpt, tokenizer.to_meta())
    model = LlamaCpp(path, context=128)
    prompt = tokenizer.encode(START)
    difference = max(differences_from_llama_cpp(gpt, model, [prompt, tokenizer.encode(QUESTION)]))
    assert difference < 1e-3

    ours = gpt.generate(torch.tensor([prompt]), 40, temperature=0)[0].tolist()
    text, end, _ = tokenizer.decode(ours).partition('<|im_end|>')
    assert end
    assert START + model.greedy_text(START, 40) == text


def test_loading_takes_little_more_memory_than_the_weights(smollm2):
    path, gpt, _ = smollm2
    code = ('import resource, sys\n'
            'from plaingpt.formats.gguf_reading import load_gguf\n'
            'def peak():\n'
            '    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n'
            'before = peak()\n'
            'gpt = load_gguf(sys.argv[1])\n'
            'print(peak() - before)\n')
    ended = subprocess.run([sys.executable, '-c', code, path], cwd=ROOT, capture_output=True,
                           text=True, encoding='utf-8', check=True)
    weights = 4 * sum(parameter.numel() for parameter in gpt.parameters())
    # Besides the weights: the file, 0.17 of them, and the embedding once more, 0.2 of them.
    assert int(ended.stdout) < 1.6 * weights
