"""Read the .mat files of SBD and COCO-Stuff 10k."""

from typing import Any

from early_fusion_seg.data.listing import File
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import open_file


def read_mat(file: File, name: str) -> Any:
    """Read one variable of a .mat file.

    Args:
        file: A .mat file of version 7.2 or older.
        name: Name of the variable.

    Returns:
        An array; for a MATLAB structure, an object with its fields as attributes.

    Raises:
        UserError: The file is missing or damaged, or the variable is missing.
    """
    from scipy.io import loadmat  # slow to import, and only two data sets need it

    with open_file(file) as opened:
        try:
            return loadmat(opened, variable_names=[name], squeeze_me=True, struct_as_record=False)[name]
        except KeyError:
            raise UserError(f"{file} has no variable {name}; it is not a label file of this data set") from None
        except Exception as error:  # scipy raises many types of errors for damaged files, from ValueError to zlib.error
            raise UserError(f"{file} is damaged or not a .mat file ({type(error).__name__}: {error})") from None
