"""
Amounts as people write them: 124M, 1.49 GB, 22:11:58.
"""
from datetime import timedelta


def short_number(number):
    """124439808 as '124M'."""
    prefixes = ['', 'k', 'M', 'B', 'T']
    power = 0
    while number >= 999.5 and power < len(prefixes) - 1:  # 999.5 would be rounded to 1000
        number /= 1000
        power += 1
    return f'{number:.3g}{prefixes[power]}'


def short_bytes(number):
    """1492485120 as '1.49 GB'."""
    if number >= 1e8:
        return f'{number / 1e9:.3g} GB'
    return f'{number / 1e6:.3g} MB'


def short_time(seconds):
    """0.4 as '0.4 s', 79918 as '22:11:58', 200000 as '2.3 days'."""
    if seconds < 60:
        return f'{seconds:.2g} s'
    if seconds < 24 * 3600:
        return str(timedelta(seconds=round(seconds)))
    return f'{seconds / (24 * 3600):.1f} days'
