"""What the commands say: plain text, and the argument parser's complaints in plain words."""

import re

import rich

NOISE = r"Does not validate|Subtypes:|Errors:|Expected a path|Given value type|Expected a <class 'NoneType'>"
PHRASES = (  # the parser's words, and plainer ones
    (r"Problem with given class_path '(?:\w+\.)*(\w+)'", r"\1"),
    (r"Expected a dot import path string: (\S+)", r"there is no data class \1"),
    (r"argument \S+ --> (\S+):.*", r"\1 comes from the data, so leave it out"),
    (r"Expected a <class '(?:\w+\.)*(\w+)'>", r"expected \1"),
    (r"Expected a typing\.Literal(\[.*?\])", r"expected one of \1"),
)


def say(text: str) -> None:
    """Print a text as it is: paths may hold brackets, which rich would read as markup."""
    rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)


def one_sentence(message: str) -> str:
    r"""Join the parser's nested message about one key to a sentence.

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
        if line and not re.match(NOISE, line):
            parts.append(line)
    sentence = "; ".join(parts).replace(":; ", ": ")
    for pattern, words in PHRASES:
        sentence = re.sub(pattern, words, sentence)
    return f"{'.'.join(keys)}: {sentence}" if keys else sentence
