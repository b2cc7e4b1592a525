# Fine-tunes GPT-2 XL on Shakespeare for 20 steps. --init_from=gpt2 needs a twelfth of the memory.

import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = f'ft-{time.time():.0f}'

dataset = 'shakespeare'
prepare = True                  # fetch and tokenize the corpus if it is missing
init_from = 'gpt2-xl'
always_save_checkpoint = False  # the model overfits soon, so ckpt.pt keeps the best weights

# 32 sequences of 1024 tokens a step: a tenth of the corpus.
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5            # constant and low: the weights are good already
decay_lr = False
