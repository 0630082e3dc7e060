"""Names of torchvision.datasets: timm imports these, and looks for others in ``try``."""

from . import Unused

CIFAR10 = CIFAR100 = FashionMNIST = ImageFolder = KMNIST = MNIST = Unused
