"""
A LoRA adapter for the base in Hugging Face's form, where our layers have other names and parts.

Our layers join matrices that Hugging Face's Llama keeps apart. The product B A of an adapter splits
as exactly: each part of the layer has the same A, and its own rows of B.
"""
from plaingpt.formats.families import family_for, tensors_of
from plaingpt.formats.peft_adapter import write_adapter


def export_adapter(folder, adapter, config):
    """Writes a peft_adapter.Adapter so that peft adapts the base in Hugging Face's form with it.

    config: the GPTConfig of the base, with the vocabulary that it has there.
    NoTarget if the base has no such form, OSError if the folder can't be written."""
    family = family_for(config)
    mappings = {mapping.ours: mapping for mapping in tensors_of(family, config)}
    state = {}
    targets = set()
    for name, b in adapter.state.items():
        layer, is_b, _ = name.partition('.lora_B.weight')
        if not is_b:
            continue
        a = adapter.state[f'{layer}.lora_A.weight']
        mapping = mappings[f'{layer}.weight']
        rows = [part.rows for part in mapping.parts]
        kept = b[:sum(rows)]  # of a head, without the rows that pad its vocabulary
        for part, part_b in zip(mapping.parts, kept.split(rows), strict=True):
            theirs = part.hugging_face.removesuffix('.weight')
            state[f'{theirs}.lora_A.weight'] = a.clone()
            state[f'{theirs}.lora_B.weight'] = part_b
            # The last two parts of the name tell the projections of attention and MLP apart.
            targets.add('.'.join(theirs.split('.')[-2:]))
    # Only the layers of Hugging Face's GPT-2 store their weights as (in, out).
    write_adapter(folder, adapter.lora, sorted(targets), state, family.name == 'gpt2', metadata={})
