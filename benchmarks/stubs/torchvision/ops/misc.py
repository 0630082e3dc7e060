"""Names of torchvision.ops.misc."""

from .. import Unused


class FrozenBatchNorm2d(Unused):
    """timm asks whether a module is one."""
