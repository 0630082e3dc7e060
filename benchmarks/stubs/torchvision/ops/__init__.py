"""Names of torchvision.ops."""

from .. import Unused


class DeformConv2d(Unused):
    """Imported by pytorchcv for its video networks."""
