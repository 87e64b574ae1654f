"""A folder of someone else's cannot make a library unpickle, read elsewhere, or take all memory."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from born_again.models.saved import check_index, check_settings, check_size, loading, read_settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 10**9}, "has 'num_layers' = 1000000000, expected at most 1000; correct it"),
        ({"model_args": {"depth": 5000}}, "has 'model_args.depth' = 5000, expected at most 1000"),
        ({"num_labels": 10**5000}, "has 'num_labels' = a number of 16610 bits, expected at most 1000000"),
        ({"attn_implementation": "owner/kernel"}, "would run code from another repository, expected none"),
        ({"a": json.loads("[" * 40 + "]" * 40)}, "deeper than 32"),
    ],
)
def test_settings_that_no_network_needs(settings, message):
    with pytest.raises(ValueError, match=f"path_or_repo: config.json of 'here' .*{message}"):
        check_settings(settings, "here")


def test_settings_of_real_networks_pass():
    check_settings({"num_layers": 48, "num_classes": 21843, "attn_implementation": "sdpa", "tie": True}, "here")


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/x.safetensors", "pytorch_model.bin", ".safetensors", 3])
def test_an_index_that_names_another_folder_or_a_pickle(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ValueError, match="index.json names .*, expected safetensors files beside it; nothing else is"):
        check_index(tmp_path)


def test_an_index_that_is_none_or_lacks_a_file(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(ValueError, match="is no index of weights"):
        check_index(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="names model-1.safetensors, which is missing"):
        check_index(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "model-1.safetensors")
    check_index(tmp_path)


def test_a_network_far_larger_than_its_weights(tmp_path):
    save_file({"w": torch.ones(10, 10)}, tmp_path / "model.safetensors")
    check_size(lambda: nn.Linear(10, 10), tmp_path)
    with pytest.raises(ValueError, match="describes 1,000,001,000,000 weights, expected no more than the 100 that"):
        check_size(lambda: nn.Linear(10**6, 10**6), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[1]", "holds a list"), ("[" * 10**5, "not JSON")]
)
def test_a_configuration_that_is_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path)


def test_whatever_a_library_raises_is_a_value_error_that_says_so():
    with pytest.raises(ValueError, match=r"path_or_repo: 'here' cannot be loaded, expected .* \(KeyError: 'a'\)"):
        with loading("here"):
            {}["a"]  # noqa: B018
    with pytest.raises(OSError, match="disk"), loading("here"):
        raise OSError("disk")
    with pytest.raises(ValueError, match="^path_or_repo: known"), loading("here"):
        raise ValueError("path_or_repo: known")
