"""
What the makers' data sheets say about GPUs: speed, memory, bandwidth, and which formats they lack.
"""
import re
from typing import NamedTuple


class DataSheet(NamedTuple):
    """The figures of one device."""
    flops: float      # peak FLOP/s of dense matrix products in 16 bits, accumulated in float32
    memory: float     # bytes
    bandwidth: float  # bytes/s between that memory and the chip


# The first pattern that is found in a device's name applies, so special cases come first.
# FLOP/s are those of bfloat16, or, for the T4 and V100, which have none, of float16.
DATA_SHEETS = {
    r'\bGB200\b':          DataSheet(2500e12, 186e9, 8.0e12),
    r'\bB200\b':           DataSheet(2250e12, 180e9, 8.0e12),
    r'\bH200 NVL\b':       DataSheet(835e12, 141e9, 4.8e12),
    r'\bGH200.*144 ?G':    DataSheet(989e12, 144e9, 4.9e12),
    r'\bGH200\b':          DataSheet(989e12, 96e9, 4.0e12),
    r'\bH200\b':           DataSheet(989e12, 141e9, 4.8e12),
    r'\bH100 NVL\b':       DataSheet(835e12, 94e9, 3.9e12),
    r'\bH100 PCIe\b':      DataSheet(756e12, 80e9, 2.0e12),
    r'\bH100\b':           DataSheet(989e12, 80e9, 3.35e12),
    r'\bA100.*40 ?GB\b':   DataSheet(312e12, 40e9, 1.555e12),
    r'\bA100.*PCIe\b':     DataSheet(312e12, 80e9, 1.935e12),
    r'\bA100\b':           DataSheet(312e12, 80e9, 2.039e12),
    r'\bL40S\b':           DataSheet(362e12, 48e9, 864e9),
    r'\bL40\b':            DataSheet(181e12, 48e9, 864e9),
    r'\bL4\b':             DataSheet(121e12, 24e9, 300e9),
    r'\bA40\b':            DataSheet(150e12, 48e9, 696e9),
    r'\bA10G\b':           DataSheet(70e12, 24e9, 600e9),
    r'\bA10\b':            DataSheet(125e12, 24e9, 600e9),
    r'\bV100.*32 ?GB\b':   DataSheet(125e12, 32e9, 900e9),
    r'\bV100\b':           DataSheet(125e12, 16e9, 900e9),
    r'\bT4\b':             DataSheet(65e12, 16e9, 320e9),
    # The $ keeps out the laptop cards, whose names only add a word.
    r'\bRTX 5090$':        DataSheet(209.5e12, 32e9, 1.792e12),
    r'\bRTX 4090$':        DataSheet(165.2e12, 24e9, 1.008e12),
    r'\bRTX 3090$':        DataSheet(71e12, 24e9, 936e9),
    r'\bMI300X\b':         DataSheet(1307e12, 192e9, 5.3e12),
    # One of its two dies, since torch sees each as a device.
    r'\bMI250X\b':         DataSheet(191.5e12, 64e9, 1.6e12),
}
BEFORE_AMPERE = r'\b(V100|T4)\b'
WITHOUT_TF32 = r'\b(V100|T4|MI250X)\b'


def data_sheet(device_name):
    """The DataSheet of a device, by the name that it gives itself; None if we have none."""
    if 'MIG' in device_name.split():
        return None  # a slice of a card
    for pattern, sheet in DATA_SHEETS.items():
        if re.search(pattern, device_name, re.IGNORECASE):
            return sheet
    return None


def is_before_ampere(device_name):
    """Whether a device is an NVIDIA card of a compute capability below 8.

    Such a card has neither bfloat16 nor, in torch, FlashAttention."""
    return re.search(BEFORE_AMPERE, device_name, re.IGNORECASE) is not None


def lacks_tf32(device_name):
    """Whether a device has no TF32, in which other tensor cores multiply float32 numbers."""
    return re.search(WITHOUT_TF32, device_name, re.IGNORECASE) is not None
