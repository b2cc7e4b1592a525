"""
GPT-2 in one file: configuration, blocks, loss, import of published weights, optimizer, FLOP arithmetic.

What has come since is there as options of GPTConfig, all off: a reader of GPT-2 can pass over every line that asks for
one. docs/modern.md measures what each is worth.

Shapes at the ends of lines: B batch, T time (positions), C channels (n_embd), V vocabulary, nh heads, hs head size.

References:
[1] Radford et al. 2019, Language Models are Unsupervised Multitask Learners (GPT-2)
[2] Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B: FLOPs per token and MFU
[3] Su et al. 2021, RoFormer, arXiv 2104.09864, equation 34 (rope) [4] Press et al. 2021, ALiBi, arXiv 2108.12409
[5] Zhang and Sennrich 2019, RMSNorm, arXiv 1910.07467 [6] So et al. 2021, Primer, arXiv 2109.08668 (squared ReLU)
[7] Shazeer 2020, GLU Variants, arXiv 2002.05202 [8] Henry et al. 2020, Query-Key Normalization, arXiv 2010.04245
[9] Ainslie et al. 2023, GQA, arXiv 2305.13245 [10] Gemma Team 2024, Gemma 2, arXiv 2408.00118, section 2 (soft cap)
"""
import re

# From the makers' data sheets: peak dense matrix FLOP/s in bfloat16 with float32 accumulation (float16 on T4 and V100,
# which have no bfloat16), bytes of memory, and bytes/s between it and the chip. The first pattern found in the name
# that the device gives itself counts.
DEVICES = (
    (r'\bGB200\b',         2500e12, 186e9, 8.0e12),
    (r'\bB200\b',          2250e12, 180e9, 8.0e12),
    (r'\bH200 NVL\b',       835e12, 141e9, 4.8e12),
    (r'\bGH200.*144 ?G',     989e12, 144e9, 4.9e12),
    (r'\bGH200\b',          989e12,  96e9, 4.0e12),
    (r'\bH200\b',           989e12, 141e9, 4.8e12),
    (r'\bH100 NVL\b',       835e12,  94e9, 3.9e12),
    (r'\bH100 PCIe\b',      756e12,  80e9, 2.0e12),
    (r'\bH100\b',           989e12,  80e9, 3.35e12),
    (r'\bA100.*40 ?GB\b',   312e12,  40e9, 1.555e12),
    (r'\bA100.*PCIe\b',     312e12,  80e9, 1.935e12),
    (r'\bA100\b',           312e12,  80e9, 2.039e12),
    (r'\bL40S\b',           362e12,  48e9, 864e9),
    (r'\bL40\b',            181e12,  48e9, 864e9),
    (r'\bL4\b',             121e12,  24e9, 300e9),
    (r'\bA40\b',            150e12,  48e9, 696e9),
    (r'\bA10G\b',            70e12,  24e9, 600e9),
    (r'\bA10\b',            125e12,  24e9, 600e9),
    (r'\bV100.*32 ?GB\b',   125e12,  32e9, 900e9),
    (r'\bV100\b',           125e12,  16e9, 900e9),
    (r'\bT4\b',              65e12,  16e9, 320e9),
    (r'\bRTX 5090$',        209.5e12, 32e9, 1.792e12),  # $: the laptop cards carry the same number and a word more
    (r'\bRTX 4090$',        165.2e12, 24e9, 1.008e12),
    (r'\bRTX 3090$',         71e12,   24e9, 936e9),
    (r'\bMI300X\b',        1307e12, 192e9, 5.3e12),
    (r'\bMI250X\b',         191.5e12, 64e9, 1.6e12),   # of one of its two dies, which is what torch sees as a device
)


def data_sheet(device_name):
    """[FLOP/s, bytes, bytes/s] of a device by its name, as in DEVICES, or None where the table has no such device."""
    if 'MIG' in device_name.split():  # a slice of a card
        return None
    return next((figures for pattern, *figures in DEVICES if re.search(pattern, device_name, re.I)), None)
