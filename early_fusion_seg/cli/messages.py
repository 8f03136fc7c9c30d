"""Messages of the commands: print plain text, and shorten the errors of the argument parser."""

import re

import rich

from early_fusion_seg.io.terminal import plain

SKIPPED_LINES = r"Does not validate|Subtypes:|Errors:|Expected a path|Given value type|Expected a <class 'NoneType'>"
REWORDED = (  # the parser's phrase, and a plainer one
    (r"Problem with given class_path '(?:\w+\.)*(\w+)'", r"\1"),
    (r"Expected a dot import path string: (\S+)", r"unknown data module \1"),
    (r"argument \S+ --> (\S+):.*", r"\1 comes from the data, so leave it out"),
    (r"Expected a <class '(?:\w+\.)*(\w+)'>", r"expected \1"),
    (r"Expected a typing\.Literal(\[.*?\])", r"expected one of \1"),
)


def echo(text: str) -> None:
    """Print a text unchanged: rich would read brackets in a path as markup."""
    rich.get_console().print(plain(text), soft_wrap=True)


def one_sentence(message: str) -> str:
    r"""Join the parser's nested message about one key into one sentence.

    Example:
        >>> one_sentence('Parser key "model.width":\n  Expected a <class \'int\'>. Got value: abc')
        'model.width: expected int. Got value: abc'
    """
    keys: list[str] = []
    parts: list[str] = []
    for line in (line.strip(" -") for line in message.splitlines()):
        if match := re.fullmatch(r'Parser key "(.+?)":(.*)', line):
            keys.append(match[1])
            line = match[2].strip()
        if line and not re.match(SKIPPED_LINES, line):
            parts.append(line)
    sentence = "; ".join(parts).replace(":; ", ": ")
    for pattern, words in REWORDED:
        sentence = re.sub(pattern, words, sentence)
    return f"{'.'.join(keys)}: {sentence}" if keys else sentence
