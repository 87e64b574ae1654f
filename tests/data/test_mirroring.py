"""Which data sets are not mirrored, and which names of classes raise a doubt."""

import pytest

from born_again.data.images import allows_flip, flip_warning

WRITTEN = """digits mnist ylecun/mnist ./data/MNIST /home/me/mnist_png/ ufldl-stanford/svhn Svhn-cropped
    tanganke/emnist_letters Royc30ne/emnist-byclass
    tanganke/kmnist not-mnist notMNIST_small dpdl-benchmark/omniglot flwrlabs/usps k49mnist
    colored-mnist mnist-m handwritten-letters my_captchas qmnist Kuzushiji-49""".split()
OTHERS = """cifar10 cifar100 uoft-cs/cifar100 zalando-datasets/fashion_mnist FashionMNIST fashion-mnist
    albertvillanova/medmnist-v2 med-mnist PathMNIST beans flowers102 owner/name digitalis letterboxes""".split()


@pytest.mark.parametrize("name", WRITTEN)
def test_digits_and_letters_are_not_mirrored(name):
    assert allows_flip(name) is False


@pytest.mark.parametrize("name", OTHERS)
def test_others_are(name):
    assert allows_flip(name) is True


def test_doubts_of_class_names():
    assert flip_warning("0123456789") == "classes called '0', '1', '2' ... may be digits or letters"
    assert flip_warning(["b", "d"]) == "classes called 'b', 'd' may be digits or letters"
    assert flip_warning(["Left", "none", "Right"]) == ("classes 'Left' and 'Right' may be mirror images of each other")
    assert "'turn_left' and 'turn_right'" in flip_warning(["straight", "turn_left", "turn_right"])
    for names in (["cat", "dog"], ["left", "none"], ["cleft", "cright"], ["10", "11"], ["a", "an"]):
        assert flip_warning(names) is None
