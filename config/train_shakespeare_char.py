# Trains a character-level GPT on Shakespeare: the run to start with, and to debug on.
# On a GPU it trains the 10.7M-parameter "baby GPT" for some minutes; nanoGPT published a best
# validation loss of 1.47. On a CPU it trains a 0.8M-parameter net for about a minute, or less, and
# reaches a validation loss of 1.90 (1.88 to 1.91 over five seeds).

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
prepare = True                  # fetch and tokenize the corpus if it is missing
eval_interval = 250             # often, because the larger net overfits
log_interval = 10
always_save_checkpoint = False  # ckpt.pt keeps the best weights

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

gradient_accumulation_steps = 1
learning_rate = 1e-3            # small nets tolerate higher rates
min_lr = 1e-4
beta2 = 0.99                    # a step has few tokens, so average over more steps
warmup_iters = 100

if device == 'cpu':
    eval_iters = 20
    batch_size = 12
    block_size = 64
    n_layer = 4
    n_head = 4
    n_embd = 128
    gelu = 'exact'              # the faster form on a CPU
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
