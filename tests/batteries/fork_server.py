"""Fresh processes that do not import the heavy libraries again: forks of a process that has imported them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path


_SERVER = """
import json, os, sys, traceback
preload, forget = json.loads(sys.stdin.readline())
for name in preload:
    try:
        __import__(name)
    except ImportError:
        pass
for name in [name for name in sys.modules if name.split(".")[0] in forget]:
    del sys.modules[name]
for line in sys.stdin:
    code, folder = json.loads(line)
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        try:
            os.chdir(folder)
            exec(code, {"__name__": "__main__"})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(write)
    with open(read) as pipe:
        output = pipe.read()
    _, status = os.wait()
    print(json.dumps([status, output]), flush=True)
"""


class ForkServer:
    """Context manager that runs Python code in forks of a process.

    Args:
        preload: modules that the process imports first, if they are installed.
        forget: packages imported by these modules that the code has to import itself.
        environment: environment variables in addition to those of this process.
    """

    def __init__(
        self, preload: tuple[str, ...], forget: tuple[str, ...] = (), environment: dict[str, str] | None = None
    ):
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._send([preload, forget])

    def _send(self, message) -> None:
        print(json.dumps(message), file=self._server.stdin, flush=True)

    def run(self, code: str, folder: Path | str = ".") -> str:
        """Run code in a folder and return what it prints.

        Raises:
            AssertionError: with the output, if the code fails.
        """
        self._send([textwrap.dedent(code), str(folder)])
        status, output = json.loads(self._server.stdout.readline())
        assert status == 0, output
        return output.strip()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *error) -> None:
        self._server.stdin.close()
        assert self._server.wait() == 0
