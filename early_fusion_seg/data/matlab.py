"""Read the label maps of SBD and COCO-Stuff 10k, which are .mat files."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.listing import File
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.image_files import open_file


def read_mat(file: File, name: str, field: str | None = None) -> NDArray[Any]:
    """Read a label map of a .mat file.

    Args:
        file: A .mat file of version 7.2 or older.
        name: Name of the variable.
        field: Name of the field, if the variable is a structure.

    Returns:
        Integers of shape (h, w).

    Raises:
        UserError: The file is missing or damaged, or the variable is missing or no label map.
    """
    from scipy.io import loadmat  # slow to import, and only two data sets need it

    with open_file(file) as opened:
        try:
            value = loadmat(opened, variable_names=[name], struct_as_record=False)[name]
            labels = np.asarray(value if field is None else getattr(value.item(), field))
        except (KeyError, AttributeError):
            variable = name if field is None else f"{name}.{field}"
            raise UserError(f"{file} has no variable {variable}; it is not a label file of this data set") from None
        except Exception as error:  # scipy raises many types of errors for damaged files, from ValueError to zlib.error
            raise UserError(f"{file} is damaged or not a .mat file ({type(error).__name__}: {error})") from None
    if labels.ndim != 2 or labels.dtype.kind not in "uif" or (labels != np.floor(labels)).any():
        raise UserError(f"{file}: {name} is {labels.dtype} of shape {labels.shape}; expected whole numbers (h, w)")
    return labels.astype(np.int32) if labels.dtype.kind == "f" else labels  # MATLAB's numbers are floats by default
