"""Print text to a terminal as it is."""

import rich
from rich.text import Text


def plain(text: object) -> Text:
    r"""Return a text that rich prints as it is: a `str` would be read as markup (`[old]`) and emoji codes (`:car:`).

    Characters that the terminal's encoding lacks are escaped, as in `K\xe4tzchen`.

    Example:
        >>> plain("sign [back] :car:").plain
        'sign [back] :car:'
    """
    encoding = rich.get_console().encoding
    return Text(str(text).encode(encoding, "backslashreplace").decode(encoding))
