"""Default names and colors for classes without names or colors."""

from early_fusion_seg.errors import UserError


def voc_palette(num_classes: int) -> list[list[int]]:
    """Return the first colors of PASCAL VOC's palette, RGB 0..255.

    Bits 0, 1, 2 of the class number are the highest bits of red, green and blue, bits 3, 4, 5 the next ones, and so on.

    Example:
        >>> voc_palette(3)
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    return [
        [sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
        for label in range(num_classes)
    ]


def names_of_classes(num_classes: int | None, class_names: list[str] | None) -> list[str]:
    """Return the class names, or default names if none are given.

    Args:
        num_classes: Number of classes, 1 to 255.
        class_names: Names of the classes.

    Raises:
        UserError: Neither is given, they disagree, or the number of classes is not 1 to 255.

    Example:
        >>> names_of_classes(2, None)
        ['class 0', 'class 1']
    """
    if class_names is None:
        if num_classes is None:
            raise UserError("the number of classes is unknown; give num_classes or class_names")
        class_names = [f"class {i}" for i in range(num_classes)]
    if num_classes not in (None, len(class_names)):
        raise UserError(f"num_classes={num_classes}, but class_names has {len(class_names)} names")
    if not 1 <= len(class_names) <= 255:
        raise UserError(f"{len(class_names)} classes; expected 1 to 255, because masks have 8 bits and 255 is ignored")
    return list(class_names)
