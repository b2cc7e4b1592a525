"""Amounts as text."""
import pytest

from plaingpt.planning.units import short_bytes, short_number, short_time


@pytest.mark.parametrize('number, text', [
    (0, '0'),
    (65, '65'),
    (999, '999'),
    (1000, '1k'),
    (124_439_808, '124M'),
    (999_600_000, '1B'),
    (2.9e11, '290B'),
    (1.2e18, '1.2e+06T'),
])
def test_numbers_are_shortened(number, text):
    assert short_number(number) == text


def test_bytes_are_given_in_decimal_units():
    assert short_bytes(16_700) == '0.0167 MB'
    assert short_bytes(1_492_485_120) == '1.49 GB'


def test_times_are_given_in_the_unit_that_fits():
    assert [short_time(seconds) for seconds in (0.4, 49, 79_918, 200_000)] == [
        '0.4 s', '49 s', '22:11:58', '2.3 days']
