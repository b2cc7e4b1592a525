"""
What the scripts share, by stage, in the order in which data flows:

    text/        from text to batches: fetching, tokenizers, token files, data sets on disk
    training/    where weights come from, optimizers, checkpoints, the run's folder, processes
    inference/   from a model to text: the key-value cache, sampling, many texts at a time
    serving/     the server: requests and answers over HTTP, the chat page
    formats/     other people's files, in and out: Hugging Face, peft's adapters
    planning/    what a run takes before it starts: memory, FLOPs, time
    system/      what all of them stand on: messages, devices, CPU kernels, atomic files

Imports go down: serving uses inference; inference and planning use training, which uses formats,
which uses text; all use system. One import goes up: formats/peft_adapter.py takes LoraSettings from
training/lora.py.
"""
