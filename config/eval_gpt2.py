# Evaluates OpenAI's gpt2 (124M) on OpenWebText: nanoGPT published a validation loss of 3.12.

batch_size = 8
eval_iters = 500                # enough batches to trust two decimals
eval_only = True
wandb_log = False
init_from = 'gpt2'
