# A character-level GPT on Shakespeare, to start with and to debug on: minutes on a GPU, about one on a CPU.
# On a GPU: the 10.7M-parameter "baby GPT", best validation loss 1.47 as published. On a CPU: a small net of 0.8M, which
# reaches 1.90 (1.88 to 1.91 over five seeds).

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
prepare = True                  # fetch the corpus when it is not there
eval_interval = 250             # often, because the big net overfits
log_interval = 10
always_save_checkpoint = False  # keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
learning_rate = 1e-3            # small nets take more
min_lr = 1e-4
beta2 = 0.99                    # few tokens in a step
warmup_iters = 100

if device == 'cpu':
    eval_iters = 20
    batch_size = 12
    block_size = 64
    n_layer = 4
    n_head = 4
    n_embd = 128
    dropout = 0.0
    max_iters = 2000
else:
    eval_iters = 200
    batch_size = 64
    block_size = 256
    n_layer = 6
    n_head = 6
    n_embd = 384
    dropout = 0.2
    max_iters = 5000
lr_decay_iters = max_iters
