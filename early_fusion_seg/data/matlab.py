"""Read the .mat files of SBD and COCO-Stuff 10k."""

from typing import Any

from early_fusion_seg.data.listing import File
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import open_file


def read_mat(file: File, name: str) -> Any:
    """Read one variable.

    Args:
        file: A .mat file up to version 7.2.
        name: The variable.

    Returns:
        An array, or for a structure an object with its fields as attributes.

    Raises:
        UserError: The file is missing, damaged or has no such variable.
    """
    from scipy.io import loadmat  # slow to import, and few data sets need it

    with open_file(file) as opened:
        try:
            return loadmat(opened, variable_names=[name], squeeze_me=True, struct_as_record=False)[name]
        except KeyError:
            raise UserError(f"{file} has no variable {name}; it is not a label file of this data set") from None
        except Exception as error:  # scipy raises many types on damaged files, from ValueError to zlib.error
            raise UserError(f"{file} is damaged or no .mat file ({type(error).__name__}: {error})") from None
