# Fine-tunes GPT-2 XL on Shakespeare's words, for 20 steps. It fits a GPU of 40 GB; --init_from=gpt2 fits a small one.
# Prepare the words first: python data/shakespeare/prepare.py

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = f'ft-{time.time():.0f}'

dataset = 'shakespeare'
prepare = True
init_from = 'gpt2-xl'
always_save_checkpoint = False  # it soon overfits: keep the best

# 1 sequence x 1024 tokens x 32 micro-batches = 32,768 tokens in a step; the 301,966 training tokens are 9.2 steps.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5            # constant and low: the weights are good already
decay_lr = False
