# Validation loss of OpenAI's gpt2 (124M) on OpenWebText: about 3.12.

batch_size = 8
eval_iters = 500                # enough batches for two decimals
eval_only = True
wandb_log = False
init_from = 'gpt2'
