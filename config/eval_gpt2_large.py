# Evaluates OpenAI's gpt2-large (774M) on OpenWebText: nanoGPT published a validation loss of 2.67.

batch_size = 8
eval_iters = 500                # enough batches to trust two decimals
eval_only = True
wandb_log = False
init_from = 'gpt2-large'
