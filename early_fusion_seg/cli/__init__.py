"""The command line of what runs on Lightning's Trainer: a LightningCLI for training, and one for what is trained.

`fit` builds the model from the configuration and tells it the classes of the data; so does `estimate`, in a file of its
own. The other commands take the whole model from the checkpoint, and refuse data with other classes. What a run writes
is in one folder.
"""

from early_fusion_seg.cli.base import quiet_lightning
from early_fusion_seg.cli.evaluation import CheckpointCLI
from early_fusion_seg.cli.training import FitCLI


def run(command: str, args: list[str]) -> int:
    """Run a command.

    Args:
        command: "fit", "validate", "test" or "predict".
        args: What follows it.

    Returns:
        0; 1 where some files could not be read; 143 where fit was told to end (SIGTERM).

    Raises:
        UserError: Anything that the user can mend.
    """
    with quiet_lightning():
        return FitCLI(args).fit() if command == "fit" else CheckpointCLI(command, args).evaluate()
