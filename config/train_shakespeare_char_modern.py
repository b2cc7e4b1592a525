# The nets of train_shakespeare_char.py by what has been learnt since GPT-2: rotary positions, normalised queries and
# keys, SwiGLU, RMSNorm, a head of its own, Muon. On a CPU the small net reaches a validation loss of 1.54 in about the
# time in which the plain one reaches 1.89 (71 s and 62 s on two cores), and 1.87 in a tenth of it:
#     python train.py config/train_shakespeare_char_modern.py --max_iters=100 --lr_decay_iters=100 --eval_interval=100
# docs/modern.md has what each part is worth. The profile for a GPU has not been measured.

out_dir = 'out-shakespeare-char-modern'
dataset = 'shakespeare_char'
prepare = True                  # fetch the corpus when it is not there
log_interval = 10
always_save_checkpoint = False  # keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-modern'

position = 'rope'
qk_norm = True
mlp = 'swiglu'
norm = 'rmsnorm'
tied = False

optimizer = 'muon'
schedule = 'linear'
min_lr = 0.0
warmup_iters = 0                # Muon's steps are of one size from the first on
beta2 = 0.99                    # few tokens in a step
gradient_accumulation_steps = 1

if device == 'cpu':
    rope_theta = 30.0           # periods of 6 to 190 positions: the context is 64
    learning_rate = 2e-2
    muon_learning_rate = 0.03
    muon_momentum = 0.8         # few steps, so a short memory
    eval_interval = 125
    eval_iters = 10             # as many tokens as the plain one's 20, of which the batches have half
    batch_size = 24
    block_size = 64
    n_layer = 4
    n_head = 4
    n_embd = 128
    dropout = 0.0
    max_iters = 1000
else:
    rope_theta = 100.0
    learning_rate = 5e-3
    muon_learning_rate = 0.02
    muon_momentum = 0.9
    eval_interval = 250
    eval_iters = 200
    batch_size = 64
    block_size = 256
    n_layer = 6
    n_head = 6
    n_embd = 384
    dropout = 0.2
    max_iters = 2500
lr_decay_iters = max_iters
