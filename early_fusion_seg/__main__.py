"""The command line: `early-fusion-seg COMMAND`, or `python -m early_fusion_seg COMMAND`."""

import errno
import io
import os
import re
import signal
import sys
import traceback
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from early_fusion_seg.cli import COMMANDS, usage
from early_fusion_seg.cli.arguments import help_text
from early_fusion_seg.errors import UserError, is_ctrl_c

TRACEBACK = "--traceback"
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # a full or read-only disk

OPENMP = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""Settings of the OpenMP libraries of GNU and Intel: a thread that waits for others sleeps soon instead of spinning.

Spinning threads take the time of those that compute when another process uses one of the cores.
"""


def main(args: list[str] | None = None) -> int:
    """Run a command.

    Args:
        args: Command line arguments; default: those of this process.

    Returns:
        Exit code: 0 on success; 1 if a part of the work failed; 2 on a user error, explained in one line on stderr; 128
        plus its number after a signal: 130 after Ctrl-C, 143 after SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without a character shows its number instead
            stream.reconfigure(errors="backslashreplace")
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in OPENMP.items():  # read when PyTorch is imported
            os.environ.setdefault(name, value)
    given = sys.argv[1:] if args is None else args
    shown = TRACEBACK in given or bool(os.environ.get("EARLY_FUSION_SEG_TRACEBACK"))
    try:
        return _dispatch([arg for arg in given if arg != TRACEBACK])
    except UserError as error:
        reported: Exception = error
        message = plain_message(error)
    except OSError as error:  # for example, an output folder that cannot be written
        reported = error
        if isinstance(error.__context__, UserError):  # the first error; then a logger failed to write too
            message = plain_message(error.__context__)
        elif error.filename is None and error.errno not in WRITE_ERRORS:
            raise
        else:
            file = error.filename or "an output file"
            message = f"{file}: {error.strerror}; check the path, the permissions and the free space"
    except RuntimeError as error:
        reported = error
        lost = re.search(r"Connection (closed|reset) by peer[^\n]*", str(error))  # gloo's message
        if lost is None:
            raise
        message = f"lost the connection to another process ({lost[0]}); see the output of that process"
    except (KeyboardInterrupt, SystemExit) as error:
        number = signal.SIGINT if is_ctrl_c(error) else signal.SIGTERM
        if number == signal.SIGTERM and type(error).__name__ != "SIGTERMException":  # Lightning's, perhaps not imported
            raise
        print(f"early-fusion-seg: stopped by {number.name}", file=sys.stderr)
        return 128 + number
    if shown:
        traceback.print_exception(reported)
    print(f"early-fusion-seg: error: {message}", file=sys.stderr)
    return 2


def _dispatch(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if command == "--version":
        print(f"early-fusion-seg {version('early-fusion-seg')}")
        return 0
    if command not in COMMANDS:
        similar = get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        raise UserError(f"unknown command {command!r}; {hint}The commands are {', '.join(COMMANDS)}")
    if args[1:] in (["-h"], ["--help"]) and (text := help_text(command)):
        print(text, end="")
        return 0
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for data modules and callbacks of the user, as `python -m` finds them
    module = import_module(f"early_fusion_seg.cli.{COMMANDS[command][0]}")
    return int(module.main(args[1:]))


def plain_message(error: UserError) -> str:
    """Return the message of an error, without the traceback that a DataLoader worker adds.

    Example:
        >>> plain_message(UserError("no such folder"))
        'no such folder'
    """
    text = str(error)
    if not text.startswith("Caught "):
        return text
    name = rf"{re.escape(type(error).__module__)}\.{type(error).__name__}"
    return re.split(rf"^{name}: ", text, flags=re.MULTILINE)[-1].rstrip()


if __name__ == "__main__":
    sys.exit(main())
