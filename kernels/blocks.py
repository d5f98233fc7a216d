"""Arithmetic of blocks, as launchers need it."""


def blocks_of(number: int, block: int) -> int:
    """How many blocks hold so many."""
    return -(-number // block)


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
