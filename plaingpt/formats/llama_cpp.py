"""
llama.cpp, through the package xllamacpp: what another program computes with a GGUF file.

export.py and the tests compare it with our own model.
"""
import importlib.util

import torch

from plaingpt.system.messages import UserError

SILENT = -1  # the verbosity at which llama.cpp prints nothing
MOST_PARTS = 600  # first tokens of a vocabulary that may all be parts of characters


def is_installed():
    """Whether the package xllamacpp is."""
    return importlib.util.find_spec('xllamacpp') is not None


class LlamaCpp:
    """The model of a GGUF file in llama.cpp, on the CPU, with keys and values in float32.

    context: tokens of the longest prompt and its continuation together, at most block_size.
    UserError if the package is missing, or if llama.cpp refuses the file."""

    def __init__(self, path, context):
        if not is_installed():
            raise UserError('llama.cpp needs the package xllamacpp: pip install xllamacpp')
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.fit_params = False  # else it may choose a smaller context
        params.verbosity = SILENT
        # By default keys, values and the products with them are in float16.
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
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
            choice = self._complete(ids, 1, logprobs=count, logit_bias=[[token, 1000]])
            if choice['logprobs'] is not None:
                likeliest = choice['logprobs']['content'][0]['top_logprobs']
                return {token['id']: token['logprob'] for token in likeliest}
        raise UserError(f'llama.cpp finds no character among the first {MOST_PARTS} tokens')

    def greedy_text(self, prompt, new_tokens):
        """The likeliest continuation of a prompt, as an OpenAI client would get it.

        prompt: text, or a list of ids. It ends early where the model ends its text."""
        return self._complete(prompt, new_tokens)['text']

    def _complete(self, prompt, new_tokens, **options):
        request = {'prompt': prompt, 'max_tokens': new_tokens, 'temperature': 0,
                   'cache_prompt': False, **options}
        answer = self.server.handle_completions(request)
        if 'error' in answer:
            raise UserError(f"llama.cpp refuses a prompt: {answer['error']['message']}")
        return answer['choices'][0]
