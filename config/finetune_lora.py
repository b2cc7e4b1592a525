# Adapts GPT-2 to Shakespeare's words with LoRA: 0.3M parameters learn, 0.2% of the 124M, and they alone are saved, as
# the adapter/ of out_dir. --init_from takes a larger GPT-2, a directory of save_pretrained, or the folder of a run of
# your own (with its --dataset and --block_size). Then
#     python sample.py --adapter=out-shakespeare-lora/adapter
#     python sample.py --adapter=out-shakespeare-lora/adapter --merge=out-shakespeare-merged

out_dir = 'out-shakespeare-lora'
eval_interval = 20
eval_iters = 40
log_interval = 5
always_save_checkpoint = False  # keep the best
early_stop = 3                  # and end when it has not been bettered three times

wandb_project = 'shakespeare'
wandb_run_name = 'lora'

dataset = 'shakespeare'
prepare = True
init_from = 'gpt2'

lora_rank = 8
lora_alpha = 16.0
lora_dropout = 0.05
lora_targets = 'c_attn'         # c_attn,c_proj,c_fc learns more, of four times as many parameters

# 8 sequences of 1024 tokens in a step: 37 steps go once through the corpus.
batch_size = 1
gradient_accumulation_steps = 8
max_iters = 200
lr_decay_iters = 200
warmup_iters = 10
learning_rate = 1e-3            # adapters begin at nothing, and take more than weights
min_lr = 1e-4
weight_decay = 0.0
