"""Semantic segmentation with a frozen classifier: early fusion of its features in a reverse HRNet.

The public names are listed in `__init__.pyi` and imported at their first use, because torch, timm and Lightning take
seconds to import and `--help` needs none of them.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
