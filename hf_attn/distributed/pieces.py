"""How a number of tokens is dealt out."""


def pieces(total: int, count: int) -> list[int]:
    """`total` in `count` pieces, of which the first `total % count` are one larger."""
    size, longer = divmod(total, count)
    return [size + (i < longer) for i in range(count)]
