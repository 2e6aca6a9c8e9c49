"""Sizes of grids and blocks on the host, where Triton's own `cdiv` and `next_power_of_2` take microseconds a call."""


def cdiv(n: int, size: int) -> int:
    """How many blocks of `size` hold n."""
    return -(-n // size)


def power_of_two(n: int, least: int = 1, most: int | None = None) -> int:
    """The smallest power of two that is at least n and `least`; at most `most`."""
    power = max(least, 1 << max(n - 1, 0).bit_length())
    return power if most is None else min(power, most)


def block_experts(E: int) -> int:
    """The width of a vector with one entry per expert."""
    return power_of_two(E, 2)
