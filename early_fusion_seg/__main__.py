"""The command line: `early-fusion-seg COMMAND`, or `python -m early_fusion_seg COMMAND`."""

import errno
import re
import sys
from importlib import import_module
from importlib.metadata import version

from early_fusion_seg.errors import UserError

USAGE = """\
usage: early-fusion-seg COMMAND [options]

Semantic segmentation with a frozen classifier and a reverse HRNet.

commands:
  demo      train on synthetic street scenes in a few minutes, no download
  fit       train:            fit --config camvid --data.root PATH
  estimate  time and memory that fit would take, from a few steps: estimate --config camvid --data.root PATH
  validate  score on val:     validate --config camvid --data.root PATH --ckpt_path FILE
  test      score on test:    test --config camvid --data.root PATH --ckpt_path FILE
  predict   segment a folder: predict --ckpt_path FILE --data.root FOLDER
  evaluate  score PNGs as the benchmark does: evaluate cityscapes --predictions DIR --data.root PATH
  submit    write what its test server takes: submit cityscapes --ckpt_path FILE --data.root PATH --output DIR
  doctor    say what is right and wrong with a data set: doctor voc --data.root PATH
  fake-data write a tiny synthetic data set in an official layout: fake-data voc PATH

options:
  -h, --help  print this; after a command, print its options
  --version   print the version
"""
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # a full or read-only place
COMMANDS = ("demo", *TRAINER_COMMANDS, "estimate", "evaluate", "submit", "doctor", "fake-data")


def main(args: list[str] | None = None) -> int:
    """Run a command.

    Args:
        args: Default: those of the process.

    Returns:
        0; 1 where some of the work could not be done; 2 where the user has to mend something, which stderr then says in
        one sentence.
    """
    try:
        return _dispatch(sys.argv[1:] if args is None else args)
    except UserError as error:
        message = plain_message(error)
    except OSError as error:  # of a file named by the user, such as an output that cannot be written
        if isinstance(error.__context__, UserError):  # said first; then a logger could not write either
            message = plain_message(error.__context__)
        elif error.filename is None and error.errno not in UNWRITABLE:
            raise
        else:
            file = error.filename or "a file of the output"
            message = f"{file}: {error.strerror}; check the path, the rights and the space there"
    except RuntimeError as error:
        lost = re.search(r"Connection (closed|reset) by peer[^\n]*", str(error))  # gloo's words
        if lost is None:
            raise
        message = f"the connection to another process has ended, which may have said why ({lost[0]})"
    print(f"early-fusion-seg: error: {message}", file=sys.stderr)
    return 2


def _dispatch(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"early-fusion-seg {version('early-fusion-seg')}")
        return 0
    if command in TRAINER_COMMANDS:
        from early_fusion_seg import cli

        return cli.run(command, args[1:])
    if command == "estimate":
        from early_fusion_seg.cli import estimate

        return estimate.main(args[1:])
    if command in COMMANDS:
        module = import_module(f"early_fusion_seg.commands.{command.replace('-', '_')}")
        return int(module.main(args[1:]))
    raise UserError(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}")


def plain_message(error: UserError) -> str:
    """Return the message of an error; where a DataLoader's worker wrapped it, without the worker's traceback.

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
