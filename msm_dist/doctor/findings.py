"""What a check of `msm-dist doctor` says, and how it is shown.

In: findings. Out: lines on the terminal and an exit code. Needs the standard library only.
"""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NAME_WIDTH = 13
SHOWN = 20
"""Of several faults of one kind."""


@dataclass(frozen=True)
class Finding:
    """One check's outcome.

    "ok"; "warn": works, with a limit that `remedy` lifts; "fail": something must be done; "note": can't be found out.
    """

    name: str
    status: Literal["ok", "warn", "fail", "note"]
    detail: str
    remedy: str = ""


def show(findings: Iterable[Finding]) -> int:
    """Print findings as they come; the exit code: 2 if something must be done, else 0."""
    failed = False
    for finding in findings:
        failed |= finding.status == "fail"
        indent = " " * (len("note  ") + NAME_WIDTH + 1)
        detail = f"\n{indent}".join(map(printable, finding.detail.splitlines() or [""]))
        print(f"{finding.status:<5} {finding.name:<{NAME_WIDTH}} {detail}", flush=True)
        if finding.remedy:
            remedy = f"\n{indent}   ".join(map(printable, finding.remedy.splitlines()))
            print(f"{indent}-> {remedy}", flush=True)
    return 2 if failed else 0


def printable(text: str) -> str:
    """Text of strangers as it may reach a terminal: what steers the terminal is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def word(path: str | Path) -> str:
    """A path as it is written in a command: whoever copies that runs nothing else, whatever it is called."""
    return shlex.quote(str(path))


def counted(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def some(names: Iterable[str], limit: int = SHOWN) -> str:
    """The first of many, and how many there are beyond them."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")
