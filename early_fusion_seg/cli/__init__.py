"""The command line: one module or package per command, with a function `main(args) -> exit code`."""

COMMANDS: dict[str, tuple[str, str]] = {  # name -> (module, one line: what it does, and an example)
    "demo": ("demo", "train on synthetic street scenes in a few minutes; nothing is downloaded"),
    "fit": ("fit", "train a model: fit --config camvid --data.root PATH"),
    "estimate": (
        "estimate",
        "measure the time and memory that fit needs: estimate --config camvid --data.root PATH",
    ),
    "validate": ("validate", "score a model on val: validate --config camvid --data.root PATH --ckpt_path FILE"),
    "test": ("test", "score a model on test: test --config camvid --data.root PATH --ckpt_path FILE"),
    "calibrate": (
        "calibrate",
        "fit the temperature of the probabilities on val: calibrate camvid --ckpt_path FILE --data.root PATH",
    ),
    "predict": ("predict", "segment images: predict FOLDER --ckpt_path FILE"),
    "export": (
        "export",
        "write a model as an ONNX or PT2 file and check it: export --ckpt_path FILE --format onnx --output DIR",
    ),
    "evaluate": (
        "evaluate",
        "score PNG predictions by the benchmark's rules: evaluate voc --predictions DIR --data.root PATH",
    ),
    "submit": ("submit", "write the file for a test server: submit voc --ckpt_path FILE --data.root PATH --output DIR"),
    "doctor": ("doctor", "check a data set and print how to fix it: doctor voc --data.root PATH"),
    "fake-data": ("fake_data", "write a tiny synthetic copy of a data set in its official layout: fake-data voc PATH"),
}


def example(command: str) -> str:
    """Return an example of a command, for its `--help`.

    Example:
        >>> example("fit")
        'early-fusion-seg fit --config camvid --data.root PATH'
    """
    return f"early-fusion-seg {COMMANDS[command][1].partition(': ')[2] or command}"


def usage() -> str:
    """Return the text of `early-fusion-seg --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return f"""\
usage: early-fusion-seg COMMAND [options]

Semantic segmentation with a frozen pretrained encoder and a reverse HRNet head.

commands:
{commands}

options:
  -h, --help   print this help; after a command: print its options
  --version    print the version
  --traceback  after a command: print where an error was raised
"""
