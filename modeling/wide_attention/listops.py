"""ListOps (arXiv 1804.06028) in the form of the Long Range Arena: nested operations on lists of digits, with a digit as result."""

import random
from collections.abc import Iterator
from dataclasses import dataclass


OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
SYMBOLS = (*map(str, range(10)), *OPERATIONS, END)


@dataclass(frozen=True)
class Difficulty:
    """How the expressions are drawn; the defaults are the standard ones.

    Attributes:
        max_depth: largest number of operations inside one another.
        max_arguments: largest number of arguments of an operation, of which it has at least two.
        min_length, max_length: number of symbols of an expression; others are drawn again.
        digit_probability: how likely an argument is a digit and no further operation.
    """

    max_depth: int = 10
    max_arguments: int = 10
    min_length: int = 500
    max_length: int = 2000
    digit_probability: float = 0.75

    def __post_init__(self):
        if self.max_depth < 1 or self.max_arguments < 2:
            raise ValueError(f"max_depth must be at least 1 and max_arguments at least 2, got {self}.")
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(f"min_length must be at least 1 and at most max_length, got {self}.")
        if not 0 <= self.digit_probability < 1:
            raise ValueError(f"digit_probability must be at least 0 and below 1, got {self}.")
        longest = self.longest()
        if self.min_length > longest:
            raise ValueError(
                f"min_length={self.min_length} is never reached: the longest expression has {longest} symbols."
            )

    def longest(self) -> int:
        """Symbols of the longest expression that can be drawn."""
        length = 1
        for _ in range(self.max_depth):
            length = 2 + self.max_arguments * length
        return length


def evaluate(expression: str) -> int:
    """The value of an expression. The median is rounded down.

    Raises:
        ValueError: if it is none.
    """
    stack: list[list] = [[]]
    for symbol in expression.split():
        if symbol in OPERATIONS:
            stack.append([symbol])
        elif symbol == END and len(stack) > 1 and len(stack[-1]) > 1:
            operation, *arguments = stack.pop()
            stack[-1].append(_apply(operation, arguments))
        elif symbol.isdigit() and len(symbol) == 1:
            stack[-1].append(int(symbol))
        else:
            raise ValueError(f"{symbol!r} is not allowed at its position in {expression[:80]!r}.")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"{expression[:80]!r} is not one complete expression.")
    return stack[0][0]


def _apply(operation: str, arguments: list[int]) -> int:
    if operation == "[MIN":
        return min(arguments)
    if operation == "[MAX":
        return max(arguments)
    if operation == "[SM":
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def _draw(source: random.Random, difficulty: Difficulty, depth: int, budget: int) -> list[str] | None:
    """Symbols of an expression; `None` once it has become longer than the budget."""
    if depth > 0 and (depth == difficulty.max_depth or source.random() < difficulty.digit_probability):
        return [str(source.randrange(10))]
    symbols = [source.choice(OPERATIONS)]
    for _ in range(source.randint(2, difficulty.max_arguments)):
        argument = _draw(source, difficulty, depth + 1, budget - len(symbols) - 1)
        if argument is None or len(symbols) + len(argument) + 1 > budget:
            return None
        symbols += argument
    return [*symbols, END]


def generate(count: int, difficulty: Difficulty | None = None, seed: int = 0) -> Iterator[tuple[str, int]]:
    """Draw different expressions and their values.

    Args:
        count: how many.
        difficulty: the standard one if not given.
        seed: the same one gives the same expressions.

    Raises:
        RuntimeError: if there are not so many expressions of this difficulty.
    """
    difficulty = difficulty or Difficulty()
    source, seen, failures = random.Random(seed), set(), 0
    while len(seen) < count:
        symbols = _draw(source, difficulty, 0, difficulty.max_length)
        expression = None if symbols is None else " ".join(symbols)
        if expression is None or len(symbols) < difficulty.min_length or expression in seen:
            failures += 1
            if failures > 200_000 and failures > 10_000 * len(seen):
                raise RuntimeError(f"Only {len(seen)} of {count} distinct expressions were found with {difficulty}.")
            continue
        seen.add(expression)
        yield expression, evaluate(expression)
