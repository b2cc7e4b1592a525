# train_gpt2.py with what the field has learned since GPT-2, for the same hardware and the same
# tokens a step. Parts and values follow the public speed runs of GPT-2; nobody has run this config
# at full size yet. Start it on one machine with 8 GPUs:
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_modern.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-modern'

position = 'rope'
norm = 'rmsnorm'
mlp = 'swiglu'                  # with the rest a Qwen3, which export.py writes for other programs
qk_norm = True
tied = False
zero_init = True

optimizer = 'muon'
learning_rate = 3e-3            # AdamW's rate, for embeddings, head and norms
muon_learning_rate = 0.02
beta2 = 0.95
weight_decay = 0.01

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens a step, on any number of GPUs.
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 20000               # 10 billion tokens, about one epoch
schedule = 'wsd'                # constant at first: extend the run from any state before the decay
decay_share = 0.4
lr_decay_iters = 20000
warmup_iters = 250
min_lr = 0.0

eval_interval = 1000
eval_iters = 200
log_interval = 10
