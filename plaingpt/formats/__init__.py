"""Files of other projects, in and out: Hugging Face models and adapters of peft."""
