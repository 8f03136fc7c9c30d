"""ShortHelp: the layout of `--help`."""

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter


class ShortHelp(DefaultHelpFormatter):
    """Show the options of this project with their defaults, without types and without Lightning's Trainer."""

    def add_argument(self, action: Action) -> None:
        """Leave out the options of the trainer, and model options whose values come from the data."""
        linked = any(" --> " in option for option in action.option_strings)
        if not linked and action.dest.split(".")[0] != "trainer":
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        """Return the help with the default, but no type; None and {} are left out, as the text explains them."""
        text = super()._get_help_string(action)
        text = re.sub(r"(?<=\()type: %\(type\)s, |, type: %\(type\)s| \(type: %\(type\)s\)", "", text)
        return text.replace(" (default: %(default)s)", "") if action.default in (None, {}) else text
