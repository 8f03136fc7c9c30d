# The public names of the package: one line each, imported at their first use.
from .data.camvid import CamVidDataModule as CamVidDataModule
from .data.cityscapes import CityscapesDataModule as CityscapesDataModule
from .data.coco import COCODataModule as COCODataModule
from .data.folder import FolderDataModule as FolderDataModule
from .data.mapillary import MapillaryVistasDataModule as MapillaryVistasDataModule
from .data.synthetic import SyntheticDataModule as SyntheticDataModule
from .data.voc import VOCDataModule as VOCDataModule
from .encoder import FrozenEncoder as FrozenEncoder
from .head import ReverseHRNet as ReverseHRNet
from .inference import InferenceSettings as InferenceSettings
from .labels import LabelSet as LabelSet
from .metrics import SegmentationMetrics as SegmentationMetrics
from .multi_head import MultiHead as MultiHead
from .network import EarlyFusionNet as EarlyFusionNet
from .segmenter import ReverseHRNetSeg as ReverseHRNetSeg

__all__: list[str]
__version__: str
