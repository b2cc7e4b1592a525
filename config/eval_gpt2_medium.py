# Validation loss of OpenAI's gpt2-medium (350M) on OpenWebText: about 2.84.

batch_size = 8
eval_iters = 500                # enough batches for two decimals
eval_only = True
wandb_log = False
init_from = 'gpt2-medium'
