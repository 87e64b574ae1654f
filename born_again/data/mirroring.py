"""Whether mirrored images keep their class: what a data set's name and the names of its classes say of it."""

import re
from collections.abc import Sequence
from pathlib import Path

# Of digits and letters, of which some are others when mirrored, and all are no digit or letter that there is.
_WRITTEN = frozenset(
    "digit digits letter letters character characters alphabet alphabets captcha captchas ocr usps svhn omniglot "
    "mnist emnist kmnist k49mnist qmnist notmnist kkanji kuzushiji mnistm hasy hasyv2 chars74k multimnist".split()
)
# Of MNIST's format, but of clothes.
_NOT_WRITTEN = frozenset(("fashion", "medical", "med"))
_OPPOSITES = {"left": "right", "east": "west", "clockwise": "counterclockwise", "forward": "backward"}


def may_mirror(dataset: str) -> bool:
    """False for data sets known to be of digits or letters, by the last part of the name; True for all others.

    Args:
        dataset: "digits", "owner/name" of the Hub, or a folder.
    """
    words = set(re.findall(r"[a-z]+(?:[0-9]+[a-z]*)*|[0-9]+", Path(dataset).name.lower()))
    return not words & _WRITTEN or bool(words & _NOT_WRITTEN)


def doubt_of_mirroring(label_names: Sequence[str]) -> str | None:
    """What in the names of the classes says that a mirrored image may be of another class; None where nothing does.

    Args:
        label_names: name of each class.
    """
    names = [name.lower() for name in label_names]
    if all(re.fullmatch(r"\d|[a-z]", name) for name in names):
        return f"classes called {_some(label_names)} may be digits or letters"
    for name in names:
        for one, other in _OPPOSITES.items():
            swapped = re.sub(rf"(?<![a-z]){one}(?![a-z])", other, name)
            if swapped != name and swapped in names:
                pair = [label_names[names.index(each)] for each in (name, swapped)]
                return f"classes {pair[0]!r} and {pair[1]!r} may be mirror images of each other"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" ..." if len(names) > 3 else "")
