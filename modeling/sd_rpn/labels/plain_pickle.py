"""Reading pickles without trusting them: numbers, strings, containers and arrays of numbers come out, or nothing does.

A pickle is a program, and `pickle.load` runs any function that it names. Here the names under which NumPy stores arrays refer to
stand-ins that check what they are given and build the arrays from the bytes; every other name is refused. No function
of NumPy, or of anything else, is called on behalf of the file.

Nor does a small file fill the memory: its opcodes are read once beforehand, so that no length goes beyond the end of the
file and no memo is larger than what is put into it, and what is built of bytes that it has once and uses often may not
be larger than the file.
"""

import math
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class PlainPickleError(ValueError):
    """The file contains something other than plain data, or is damaged; the message says what."""


def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle that holds plain data.

    Args:
        path: the file.

    Returns:
        What was pickled: numbers, strings, bytes, `None`, NumPy arrays of numbers, and lists, tuples and dictionaries of
        these. NumPy scalars are Python's.

    Raises:
        PlainPickleError: if the file names anything else, or cannot be read as a pickle.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            _check_opcodes(file, path.stat().st_size)
            file.seek(0)
            return _plain(_Unpickler(file, path.stat().st_size).load(), {})
    except OSError:
        raise
    except Exception as error:
        raise PlainPickleError(
            f"{path.name} cannot be read: {str(error).rstrip('.') or type(error).__name__}. Only numbers, strings, "
            "lists, tuples, dictionaries and numeric arrays are accepted, because a pickle can run any program."
        ) from error


def _check_opcodes(file: BinaryIO, size: int) -> None:
    """Refuse opcodes that make an unpickler reserve memory for data that the file does not contain."""
    puts = 0
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name == "FRAME" and argument > size - position:
            raise PlainPickleError("it declares more data than it contains")
        if opcode.name == "MEMOIZE":
            puts += 1
        elif "PUT" in opcode.name:
            # pickle numbers what it memoises one after the other.
            if argument > puts:
                raise PlainPickleError(f"it memoises object {argument} after {puts}")
            puts += 1


class _Budget:
    """Bytes that may still be built for a file."""

    def __init__(self, size: int):
        self.left = size

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise PlainPickleError("it creates more data than it contains")


class _StandIn:
    """Stand-in for a name in the pickle.

    The pickle may try to set the state of any object or class. With this method that never falls back to setting
    attributes.
    """

    def __setstate__(self, state):
        raise PlainPickleError(f"it sets the state of {type(self).__name__}")


class _ArrayClass(_StandIn):
    """`numpy.ndarray`, which is only ever an argument."""

    def __init__(self, *arguments):
        raise PlainPickleError("it calls numpy.ndarray")


class _Dtype(_StandIn):
    """`numpy.dtype` of numbers."""

    budget: _Budget

    def __init__(self, code, *flags):
        if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
            raise PlainPickleError(f"it has an array of {code!r}, not of numbers")
        self.code = code

    def __setstate__(self, state):
        _version, order, subarray, names, fields, *_ = state
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise PlainPickleError("it has an array of records, not of numbers")
        self.code = order + self.code

    def array(self, data, shape: tuple[int, ...], order: str) -> np.ndarray:
        dtype = np.dtype(self.code)
        data = data.value if isinstance(data, _Bytes) else data
        whole = isinstance(data, bytes | bytearray) and all(type(side) is int and side >= 0 for side in shape)
        if not whole or math.prod(shape) * dtype.itemsize != len(data):
            raise PlainPickleError(f"it has an array {shape} whose bytes do not fit")
        self.budget.spend(len(data))
        return np.frombuffer(bytes(data), dtype).reshape(shape, order=order).copy()


class _Array(_StandIn):
    """What `numpy.core.multiarray._reconstruct` returns, an array yet to be filled."""

    def __init__(self, array_class, shape, code):
        if array_class is not _ArrayClass:
            raise PlainPickleError(f"it has an array of the class {array_class!r}")

    def __setstate__(self, state):
        _version, shape, dtype, is_fortran, data = state
        self.value = dtype.array(data, shape, "F" if is_fortran else "C")


class _Buffer(_StandIn):
    """`numpy.core.numeric._frombuffer`."""

    def __init__(self, data, dtype, shape, order):
        self.value = dtype.array(data, shape, "F" if order == "F" else "C")


class _Scalar(_StandIn):
    """`numpy.core.multiarray.scalar`."""

    def __init__(self, dtype, data):
        self.value = dtype.array(data, (), "C").item()


class _Bytes(_StandIn):
    """`_codecs.encode`, by which old protocols store bytes."""

    budget: _Budget

    def __init__(self, text, encoding):
        if encoding != "latin1":
            raise PlainPickleError(f"it encodes text as {encoding!r}")
        self.budget.spend(len(text))
        self.value = text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("_codecs", "encode"): _Bytes,
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that builds stand-ins.

    Args:
        file: the pickle.
        size: of the file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int):
        super().__init__(file)
        self.stand_ins = dict(_STAND_INS)
        for name in (("numpy", "dtype"), ("_codecs", "encode")):
            stand_in = _STAND_INS[name]
            self.stand_ins[name] = type(stand_in.__name__, (stand_in,), {"budget": _Budget(size)})

    def find_class(self, module: str, name: str):
        # NumPy 2 renamed the package.
        stand_in = self.stand_ins.get((module.replace("numpy._core.", "numpy.core."), name))
        if stand_in is None:
            raise PlainPickleError(f"it refers to {module}.{name}")
        return stand_in


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """The data without stand-ins; shared objects stay shared."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, _Array | _Buffer | _Scalar | _Bytes):
        return value.value
    if id(value) in seen:
        if seen[id(value)] is _OPEN:
            raise PlainPickleError("it has a container that contains itself")
        return seen[id(value)]
    seen[id(value)] = _OPEN
    if type(value) in (list, tuple):
        plain = type(value)(_plain(element, seen) for element in value)
    elif type(value) is dict:
        if not all(type(key) in (str, int) for key in value):
            raise PlainPickleError("it has a dictionary whose keys are neither strings nor integers")
        plain = {key: _plain(element, seen) for key, element in value.items()}
    else:
        raise PlainPickleError(f"it contains an object of the type {type(value).__name__.removeprefix('_')}")
    seen[id(value)] = plain
    return plain


_OPEN = object()
