# Evaluates OpenAI's gpt2-medium (350M) on OpenWebText: nanoGPT published a validation loss of 2.84.

batch_size = 8
eval_iters = 500                # enough batches to trust two decimals
eval_only = True
wandb_log = False
init_from = 'gpt2-medium'
