"""Splitting of a number of tokens."""


def pieces(total: int, count: int) -> list[int]:
    """Sizes of `count` parts of `total`, of which the first `total % count` are larger by one."""
    size, longer = divmod(total, count)
    return [size + (i < longer) for i in range(count)]
