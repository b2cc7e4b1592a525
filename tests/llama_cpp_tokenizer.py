"""llama.cpp's tokenizer, through the package xllamacpp, for a file's metadata."""
import json
import urllib.request

import gguf
import numpy as np

from plaingpt.formats.llama_cpp import LlamaCpp

# Where tokenizers differ: spaces, line breaks, digits, contractions, letters of many bytes.
TEXTS = ['Hello world', '  a\n\n b\t\r\nc \n', 'x 1 12345 ½ ٣ Ⅷ', "I'll WE'VE o'clock 'tis",
         'naïve 日本語 🙂🙃 e\u0301', 'a\u00a0b\u3000c\u2028d', 'def f(x): return x**2  # ok',
         'the king and queen', '...!?«»', ' ' * 40 + 'a' * 99]

WIDTH = 32


def write_tiny_gguf(path, metadata):
    """Writes a Llama of one block with random weights and this tokenizer to a GGUF file."""
    vocab_size = len(metadata['tokenizer.ggml.tokens'])
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    shapes = {'token_embd': (vocab_size, WIDTH), 'output': (vocab_size, WIDTH),
              'output_norm': (WIDTH,), 'blk.0.attn_norm': (WIDTH,), 'blk.0.ffn_norm': (WIDTH,)}
    for name in ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down'):
        shapes[f'blk.0.{name}'] = (WIDTH, WIDTH)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f'{name}.weight', 0.3 * random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCppTokenizer:
    """The tokenizer of a GGUF file, as llama.cpp's server offers it."""

    def __init__(self, path):
        self.server = LlamaCpp(path, 256).server

    def encode(self, text, special=True):
        answer = self._post('tokenize', content=text, parse_special=special)
        return answer['tokens']

    def encode_with_beginning(self, text):
        """The ids of a text that a model reads, with the token that begins it if there is one."""
        return self._post('tokenize', content=text, add_special=True)['tokens']

    def decode(self, ids):
        return self._post('detokenize', tokens=ids)['content']

    def complete(self, prompt, new_tokens, seed):
        """Samples text. Returns the server's answer."""
        return self._post('completion', prompt=prompt, n_predict=new_tokens, temperature=1.0,
                          seed=seed)

    def _post(self, page, **request):
        request = urllib.request.Request(f'{self.server.listening_address}/{page}',
                                         json.dumps(request).encode(),
                                         {'Content-Type': 'application/json'})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
