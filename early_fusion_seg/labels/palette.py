"""Colours for classes that have none of their own."""


def voc_palette(num_classes: int) -> list[list[int]]:
    """Return the colours of PASCAL VOC: the bits of the class number, dealt to red, green and blue from the top.

    >>> voc_palette(3)
    [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    return [
        [sum(((label >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
        for label in range(num_classes)
    ]
