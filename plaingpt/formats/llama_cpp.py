"""
llama.cpp, through the package xllamacpp: what another program computes with a GGUF file.

export.py and the tests compare it with our own model, and bench.py times it.
"""
import importlib.util
from dataclasses import dataclass

import torch

from plaingpt.system.messages import UserError

SILENT = -1  # the verbosity at which llama.cpp prints nothing
MOST_PARTS = 600  # first tokens of a vocabulary that may all be parts of characters


def is_installed():
    """Whether the package xllamacpp is."""
    return importlib.util.find_spec('xllamacpp') is not None


@dataclass(frozen=True)
class TextTimes:
    """What llama.cpp measures of a text, in seconds."""
    reading: float  # until the first new token is chosen
    writing: float  # of the others


class LlamaCpp:
    """The model of a GGUF file in llama.cpp, on the CPU, with as many threads as torch has.

    context: tokens of the longest prompt and its continuation together, at most block_size.
    slots: texts that it writes together; several threads may then call it at once.
    exact: with keys, values and the products with them in float32; False: as by default.
    UserError if the package is missing, or if llama.cpp refuses the file."""

    def __init__(self, path, context, slots=1, exact=True):
        if not is_installed():
            raise UserError('llama.cpp needs the package xllamacpp: pip install xllamacpp')
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context * slots
        params.n_parallel = slots
        params.n_gpu_layers = 0
        params.warmup = False
        params.fit_params = False  # else it may choose a smaller context
        params.verbosity = SILENT
        if exact:  # by default all of this is in float16
            params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
            params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            attention = xllamacpp.llama_flash_attn_type
            params.flash_attn_type = attention.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = torch.get_num_threads()
        params.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:  # which never says more than that it failed
            raise UserError(f'llama.cpp cannot open {path}') from error

    def top_log_probabilities(self, ids, count=4):
        """{id: log-probability in nats} of the likeliest next tokens after a prompt, a list of ids.

        The likeliest comes first."""
        # The answer has no probabilities where the chosen token is a part of a character. They are
        # those before the choice, so it may as well be forced: to the first token that is whole.
        for token in range(MOST_PARTS):
            answer = self._complete(ids, 1, temperature=0, logprobs=count,
                                    logit_bias=[[token, 1000]])
            logprobs = answer['choices'][0]['logprobs']
            if logprobs is not None:
                likeliest = logprobs['content'][0]['top_logprobs']
                return {token['id']: token['logprob'] for token in likeliest}
        raise UserError(f'llama.cpp finds no character among the first {MOST_PARTS} tokens')

    def greedy_text(self, prompt, new_tokens):
        """The likeliest continuation of a prompt, as an OpenAI client would get it.

        prompt: text, or a list of ids. It ends early where the model ends its text."""
        return self._complete(prompt, new_tokens, temperature=0)['choices'][0]['text']

    def text_times(self, ids, new_tokens, temperature, top_k):
        """Writes new_tokens tokens after a prompt, a list of ids, and returns the TextTimes.

        The text does not end early. Where several are written at once, the times of each include
        those in which the others are served."""
        answer = self._complete(ids, new_tokens, temperature=temperature, top_k=top_k, top_p=1.0,
                                min_p=0.0, ignore_eos=True)
        timings = answer['timings']
        read = timings['prompt_n']
        written = timings['predicted_n']
        if read != len(ids) or written != new_tokens:
            raise UserError(f'llama.cpp has read {read} and written {written} tokens instead of '
                            f'{len(ids)} and {new_tokens}')
        return TextTimes(timings['prompt_ms'] / 1000, timings['predicted_ms'] / 1000)

    def _complete(self, prompt, new_tokens, **options):
        """The answer to a request, a dict. UserError if llama.cpp refuses it."""
        request = {'prompt': prompt, 'max_tokens': new_tokens, 'cache_prompt': False, **options}
        answer = self.server.handle_completions(request)
        if 'error' in answer:
            raise UserError(f"llama.cpp refuses a prompt: {answer['error']['message']}")
        return answer
