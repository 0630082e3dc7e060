"""Names of torchvision.ops."""

from backdoor_gym import Unused


class DeformConv2d(Unused):
    """Imported by pytorchcv for its video networks."""
