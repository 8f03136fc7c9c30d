"""The command line: one module or package for each command, with a function `main(args) -> exit code`."""

COMMANDS: dict[str, tuple[str, str]] = {  # name -> (module, one line for `--help`)
    "demo": ("demo", "train on synthetic street scenes in a few minutes, nothing to download"),
    "fit": ("fit", "train a model: fit --config camvid --data.root PATH"),
    "estimate": (
        "estimate",
        "measure what fit would take in time and memory: estimate --config camvid --data.root PATH",
    ),
    "validate": ("validate", "score a model on val: validate --config camvid --data.root PATH --ckpt_path FILE"),
    "test": ("test", "score a model on test: test --config camvid --data.root PATH --ckpt_path FILE"),
    "predict": ("predict", "segment a folder of images: predict --ckpt_path FILE --data.root FOLDER"),
    "evaluate": (
        "evaluate",
        "score a folder of PNGs as the benchmark does: evaluate voc --predictions DIR --data.root PATH",
    ),
    "submit": ("submit", "write what a test server takes: submit voc --ckpt_path FILE --data.root PATH --output DIR"),
    "doctor": ("doctor", "check a data set and explain how to fix it: doctor voc --data.root PATH"),
    "fake-data": ("fake_data", "write a tiny synthetic copy of a data set in its official layout: fake-data voc PATH"),
}


def usage() -> str:
    """Return the text of `early-fusion-seg --help`."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items())
    return f"""\
usage: early-fusion-seg COMMAND [options]

Semantic segmentation with a frozen classifier and a reverse HRNet.

commands:
{commands}

options:
  -h, --help  print this; after a command, print its options
  --version   print the version
"""
