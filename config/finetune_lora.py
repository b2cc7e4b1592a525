# Adapts GPT-2 to Shakespeare with LoRA. The run trains 0.3M parameters, 0.2% of the 124M, and saves
# only those: in its checkpoints, and in peft's format in adapter/. Sample from it, or merge it:
#     python sample.py --adapter=out-shakespeare-lora/adapter
#     python sample.py --adapter=out-shakespeare-lora/adapter --merge=out-shakespeare-merged
# --init_from also takes a larger GPT-2, a folder that save_pretrained wrote, or the out_dir of your
# own run (give its --dataset and --block_size too).

out_dir = 'out-shakespeare-lora'
eval_interval = 20
eval_iters = 40
log_interval = 5
always_save_checkpoint = False  # ckpt.pt keeps the best weights
early_stop = 3                  # stop after three evaluations without a better validation loss

wandb_project = 'shakespeare'
wandb_run_name = 'lora'

dataset = 'shakespeare'
prepare = True                  # fetch and tokenize the corpus if it is missing
init_from = 'gpt2'

lora_rank = 8
lora_alpha = 16.0
lora_dropout = 0.05
lora_targets = 'c_attn'         # c_attn,c_proj,c_fc learns more, with four times the parameters

# 8 sequences of 1024 tokens a step: 37 steps are one epoch.
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 200
lr_decay_iters = 200
warmup_iters = 10
learning_rate = 1e-3            # adapters start at zero and need a higher rate than weights
min_lr = 1e-4
weight_decay = 0.0
