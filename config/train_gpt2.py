# Trains GPT-2 (124M) on OpenWebText. nanoGPT published a validation loss of about 2.85 for this
# setup, after 4 days on 8 A100 of 40 GB. Start it on one machine with 8 GPUs:
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens a step, on any number of GPUs. One
# GPU of 80 GB takes the same step in fewer, larger pieces:
#     python train.py config/train_gpt2.py --batch_size=60 --gradient_accumulation_steps=8
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000              # 295 billion tokens
lr_decay_iters = 600000
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200
log_interval = 10
