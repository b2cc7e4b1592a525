# train_shakespeare_char.py with the modern recipe: rotary positions, normalised queries and keys,
# SwiGLU, RMSNorm, an untied head, Muon. On two CPU cores the small net reaches a validation loss of
# 1.54 in 71 s, where the plain config takes 62 s to reach 1.89. A tenth of the steps reach 1.87:
#     python train.py config/train_shakespeare_char_modern.py \
#         --max_iters=100 --lr_decay_iters=100 --eval_interval=100
# docs/modern.md measures each part. The GPU profile has not been measured.

out_dir = 'out-shakespeare-char-modern'
dataset = 'shakespeare_char'
prepare = True                  # fetch and tokenize the corpus if it is missing
log_interval = 10
always_save_checkpoint = False  # ckpt.pt keeps the best weights

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
warmup_iters = 0                # Muon's updates have their full size from the first step
beta2 = 0.99                    # a step has few tokens, so average over more steps
gradient_accumulation_steps = 1

if device == 'cpu':
    rope_theta = 30.0           # periods of 6 to 152 positions, for a context of 64
    learning_rate = 2e-2
    muon_learning_rate = 0.03
    muon_momentum = 0.8         # a short memory, because the run is short
    eval_interval = 125
    eval_iters = 10             # as many tokens as the plain config's 20 batches of 12
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
