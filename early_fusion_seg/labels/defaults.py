"""Names and colors for classes that have none of their own."""

from early_fusion_seg.errors import UserError


def voc_palette(num_classes: int) -> list[list[int]]:
    """Return the colors of PASCAL VOC: the bits of the class number, dealt to red, green and blue from the top.

    >>> voc_palette(3)
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    return [
        [sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
        for label in range(num_classes)
    ]


def names_of_classes(num_classes: int | None, class_names: list[str] | None) -> list[str]:
    """Return the class names, made up where there are none.

    Raises:
        UserError: Neither is given, they disagree, or the classes are not 1 to 255.

    >>> names_of_classes(2, None)
    ['class 0', 'class 1']
    """
    if class_names is None:
        if num_classes is None:
            raise UserError("give num_classes or class_names: the network must know how many classes there are")
        class_names = [f"class {i}" for i in range(num_classes)]
    if num_classes not in (None, len(class_names)):
        raise UserError(f"num_classes={num_classes}, but class_names has {len(class_names)} names")
    if not 1 <= len(class_names) <= 255:
        raise UserError(f"{len(class_names)} classes; expected 1 to 255, since masks are 8 bit and 255 is ignored")
    return list(class_names)
