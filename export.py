"""
Writes a trained model for other programs, and checks that it computes the same there:

    python export.py --out_dir=out-shakespeare-char --to=hf --output=shakespeare-hf
    python export.py --init_from=gpt2 --to=gguf --output=gpt2.gguf --type=q8_0
    python export.py --adapter=out-lora/adapter --to=hf --output=merged-hf
    python export.py --adapter=out-lora/adapter --to=peft --output=adapter-hf

hf is a folder for transformers, vLLM and the programs around them. gguf is a file for llama.cpp,
whose matrices may also have 8 bits a number (q8_0) or 4 (q4_0, and q4_1, which is more precise).
Folder and file hold the whole model, with the LoRA adapter merged into it if there is one; peft is
the adapter alone, for the base in Hugging Face's form. docs/models.md says which models can be
exported.
"""
import os
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from configurator import configure
from plaingpt.formats import export_check
from plaingpt.formats.families import NoTarget, family_for
from plaingpt.formats.gguf_writing import write_gguf
from plaingpt.formats.hugging_face_export import export_hugging_face
from plaingpt.formats.model_card import model_card
from plaingpt.formats.peft_adapter import load_adapter
from plaingpt.formats.peft_export import export_adapter
from plaingpt.system.cpu_runtime import release_freed_memory
from plaingpt.system.files import creating
from plaingpt.system.messages import explained, warn
from plaingpt.training.trained_model import open_named, open_trained

# ---- configuration ----
# Model
init_from = 'resume'                # resume (out_dir), gpt2 to gpt2-xl, hub id, folder, .pt, .gguf
out_dir = 'out'                     # folder of the run, relative to the working directory
adapter = ''                        # folder of a LoRA adapter; init_from is then the base it names
# Export
to = 'hf'                           # {'hf' | 'gguf' | 'peft'}
output = ''                         # the new folder, or for gguf the new file
type = 'f32'                        # {'f32' | 'f16' | 'bf16' | 'q8_0' | 'q4_0' | 'q4_1'} of weights

DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}


def problems():
    """Yields what is wrong between keys, beyond the rules in their comments."""
    if not output or '\0' in output:
        yield f'output={output!r} cannot be a file or folder: name one with --output'
    elif os.path.lexists(output):
        yield f'output={output} exists: remove it, or name another'
    if to == 'hf' and type not in DTYPES:
        yield f'type={type} is for gguf: a folder for transformers has f32, f16 or bf16'
    if to == 'peft' and not adapter:
        yield 'to=peft needs the adapter: --adapter=out-lora/adapter'
    if to == 'peft' and type != 'f32':
        yield f'type={type} is for whole models: an adapter is written in f32'


config, given = configure(globals())

# ---- model ----
trained = open_named(config, given)
release_freed_memory()  # what loading took besides the weights
model = trained.gpt
model.eval()

if model.config.logit_softcap > 0:
    # The bound keeps the order of the logits, and so the text at temperature 0.
    warn(f'no other program has logit_softcap={model.config.logit_softcap}: the exported model '
         'writes the same text at temperature 0, but has other probabilities')
    model.config.logit_softcap = 0.0

# Rows that only pad the vocabulary are left out.
vocab_size = trained.load_tokenizer().vocab_size
config_there = replace(model.config, vocab_size=vocab_size)
with explained(NoTarget, prefix=f'{trained.path} cannot be exported: '):
    family = family_for(config_there)

# ---- write ----
# Nothing has the name of the output before the check below is passed.
ids = export_check.probe(config_there)
name = os.path.basename(os.path.abspath(output)).removesuffix('.gguf')
failures = explained(OSError, NoTarget, prefix=f'output={output} cannot be written: ')
with failures, creating(output) as path:
    if to == 'hf':
        # Rounded to the type first, so that the check compares models with the same weights.
        model.to(DTYPES[type]).float()
        os.makedirs(path)
        card = model_card(name, config_there, trained.saved)
        export_hugging_face(path, model, trained.tokenizer, DTYPES[type], card)
    elif to == 'gguf':
        write_gguf(path, model, trained.tokenizer, type, name)
        model.config.gelu = 'tanh'  # the only form in llama.cpp; another one has been warned of
    else:
        export_adapter(path, load_adapter(adapter), config_there)

    # ---- check ----
    # Our model is freed before another program loads its own.
    logits = export_check.logits_of(model, ids, vocab_size)
    parameters = model.get_num_params(non_embedding=False)
    base = trained.path
    del trained, model
    release_freed_memory()
    if to == 'hf':
        verdict = export_check.check_hugging_face(path, ids, logits)
    elif to == 'gguf':
        verdict = export_check.check_gguf(path, type, ids, logits)
    else:
        with TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            opened = open_trained(base)
            opened.gpt.config.logit_softcap = 0.0
            export_hugging_face(folder, opened.gpt, opened.tokenizer)
            verdict = export_check.check_adapter(path, folder, ids, logits)

print(f'{output}: {family.architecture}, {parameters:,} parameters; {verdict}')
