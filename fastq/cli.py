"""The `fastq` command starts here; its subcommands are in commands.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Turn a missing third-party module into one line that says what to install, exit code 1.

    Serves as a decorator too: `@extra("demo")` on a command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "fastq").partition(".")[0]
        if module == "fastq":
            raise
        sys.exit(
            f"fastq: the Python module {module} is not installed; it comes with\n"
            f'    pip install "fastq-int8[{name}]"\n'
            f'or, in a clone of the repository, pip install -e ".[{name}]"'
        )


def main() -> None:
    """Run the command line."""
    with extra("demo"):
        from fastq.commands import cli
    cli(prog_name="fastq")
