"""Read COCO's panoptic annotations: PNGs of segment ids, and a JSON with the category of each segment."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from early_fusion_seg.data.listing import File
from early_fusion_seg.errors import UserError
from early_fusion_seg.io.images import read_image

PANOPTIC = "panoptic_annotations_trainval2017"


class PanopticSegments:
    """The segments of all images in a panoptic JSON.

    They are stored in two flat arrays, which need little memory and are shared with the worker processes.

    Args:
        path: A file such as `panoptic_train2017.json`.

    Raises:
        UserError: The file is damaged or is not a panoptic JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        ids: list[int] = []
        categories: list[int] = []
        self.rows: dict[str, tuple[int, int]] = {}  # key -> range of its segments in both arrays
        try:
            for annotation in json.loads(path.read_bytes())["annotations"]:
                segments = annotation["segments_info"]
                ids += [segment["id"] for segment in segments]
                categories += [segment["category_id"] for segment in segments]
                self.rows[Path(annotation["file_name"]).stem] = (len(ids) - len(segments), len(ids))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a panoptic JSON of COCO ({type(error).__name__}: {error}); "
                f"unpack or download {PANOPTIC}.zip again"
            ) from None
        self.ids = np.array(ids, np.int64)
        self.categories = np.array(categories, np.int64)

    def read(self, file: File) -> NDArray[np.int64]:
        """Read a panoptic PNG as category ids (h, w); 0 is void.

        Raises:
            UserError: A segment of the PNG is not in the JSON.
        """
        start, stop = self.rows[Path(str(file)).stem]
        ids = np.append(self.ids[start:stop], 0)
        order = np.argsort(ids)
        sorted_ids, categories = ids[order], np.append(self.categories[start:stop], 0)[order]
        pixels = read_image(file).astype(np.int64)
        segments = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        places = np.searchsorted(sorted_ids, segments).clip(max=len(sorted_ids) - 1)
        if (unknown := segments[sorted_ids[places] != segments]).size:
            raise UserError(
                f"{file} has a segment {unknown[0]} that {self.path} does not list; they do not match: "
                f"unpack both from the same {PANOPTIC}.zip"
            )
        labels: NDArray[np.int64] = categories[places]
        return labels
