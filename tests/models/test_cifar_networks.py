"""The 32x32 networks: sizes against the papers, arithmetic against slow twins, and timm's contract."""

import ast
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import born_again.models
from born_again.models.cifar_network import WideBlock
from born_again.models.densenet_cifar import DenseBlock, DenseNetCifar
from born_again.models.resnet_students import BottleneckBlock, ResNetStudentCifar
from born_again.models.wide_resnet_cifar import WideResNetCifar

DENSENETS = {  # name: (depth, growth rate, third compression, parameters at 10 classes)
    "densenet112_33_cifar": (112, 33, False, 6_892_786),
    "densenet106_33_cifar": (106, 33, False, 6_270_851),
    "densenet90_60_cifar": (90, 60, True, 16_173_010),
    "densenet80_80_cifar": (80, 80, True, 22_421_610),
    "densenet80_120_cifar": (80, 120, True, 50_363_410),
    "test_densenet_cifar": (16, 8, True, 20_650),
}
WIDE_RESNETS = {  # name: (depth, width, channels of the stem, parameters at 10 classes)
    "wide_resnet28_1_cifar": (28, 1, 16, 369_498),
    "wide_resnet28_2_cifar": (28, 2, 16, 1_467_610),
    "wide_resnet28_5_cifar": (28, 5, 16, 9_132_634),
    "wide_resnet28_10_cifar": (28, 10, 16, 36_479_194),
    "wide_resnet16_1_cifar": (16, 1, 16, 175_066),
    "test_wide_resnet_cifar": (16, 1, 8, 44_274),
}
PAPER = [  # 1805.04770, table 1: millions of parameters, and the classes that fit them
    ("densenet106_33_cifar", 10, 6.3, 0.01),
    ("densenet90_60_cifar", 10, 16.1, 0.01),
    ("densenet80_80_cifar", 10, 22.4, 0.01),
    ("densenet80_120_cifar", 10, 50.4, 0.01),
    ("wide_resnet28_1_cifar", 100, 0.38, 0.02),
    ("wide_resnet28_2_cifar", 100, 1.48, 0.01),
    ("wide_resnet28_5_cifar", 100, 9.16, 0.01),
    ("wide_resnet28_10_cifar", 10, 36.5, 0.01),
]
RESNET_STUDENTS = {  # name: (units per block, ratio, bottleneck, millions of 1805.04770's table 5 at 100 classes)
    "resnet_student_pre14_05_cifar": (14, 0.5, True, 7.3),
    "resnet_student_pre14_1_cifar": (14, 1, True, 17.7),
    "resnet_student_wide1_1_cifar": (1, 1, False, 20.9),
    "resnet_student_wide2_1_cifar": (2, 1, False, 43.1),
    "resnet_student_wide4_05_cifar": (4, 0.5, False, 24.3),
    "resnet_student_wide4_1_cifar": (4, 1, False, 87.3),
}
TINY = ["test_densenet_cifar", "test_wide_resnet_cifar", "test_resnet_student_cifar"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _images(batch: int = 4, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 32, 32)


def _without_weights(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def _size(name: str, num_classes: int) -> int:
    network = _without_weights(name, num_classes=num_classes)
    return sum(parameter.numel() for parameter in network.parameters())


def _densenet_size(depth: int, k: int, third: bool, classes: int) -> int:
    n, c, total = (depth - 4) // 6, 2 * k, 27 * 2 * k
    for block in range(3):
        for _ in range(n):
            total += 2 * c + c * 4 * k + 2 * 4 * k + 9 * 4 * k * k
            c += k
        if block < 2 or third:
            total += 2 * c + c * (c // 2)
            c //= 2
    return total + 2 * c + (c + 1) * classes


def _wide_resnet_size(depth: int, width: int, stem: int, classes: int) -> int:
    c, total = stem, 27 * stem
    for out in (stem * width, 2 * stem * width, 4 * stem * width):
        for _ in range((depth - 4) // 6):
            total += 2 * c + 9 * c * out + 2 * out + 9 * out * out + (c * out if c != out else 0)
            c = out
    return total + 2 * c + (c + 1) * classes


@pytest.mark.parametrize("name", DENSENETS)
def test_densenet_parameter_count(name):
    depth, growth, third, expected = DENSENETS[name]
    assert _size(name, 10) == expected == _densenet_size(depth, growth, third, 10)
    assert _size(name, 100) == _densenet_size(depth, growth, third, 100)


@pytest.mark.parametrize("name", WIDE_RESNETS)
def test_wide_resnet_parameter_count(name):
    depth, width, stem, expected = WIDE_RESNETS[name]
    assert _size(name, 10) == expected == _wide_resnet_size(depth, width, stem, 10)
    assert _size(name, 100) == _wide_resnet_size(depth, width, stem, 100)


@pytest.mark.parametrize("name", RESNET_STUDENTS)
def test_resnet_student_parameter_count(name):
    units, ratio, bottleneck, millions = RESNET_STUDENTS[name]
    c, total = 120, 27 * 120
    for compressed in (480, 660, 750):  # of DenseNet-90-60
        for _ in range(units):
            inner = int(ratio * compressed / (4 if bottleneck else 1))
            out = int(0.75 * compressed) if bottleneck else inner
            if bottleneck:
                total += 2 * c + c * inner + 2 * inner + 9 * inner * inner + 2 * inner + inner * out
            else:
                total += 2 * c + 9 * c * out + 2 * out + 9 * out * out
            total += c * out if c != out else 0
            c = out
        total += 2 * c + c * compressed
        c = compressed
    total += 2 * c + (c + 1) * 100
    assert _size(name, 100) == total == pytest.approx(millions * 1e6, rel=0.01)


def test_resnet_students_have_the_ends_of_their_densenet():
    for student, teacher in (("resnet_student_wide4_05_cifar", "densenet90_60_cifar"), (TINY[2], TINY[0])):
        student, teacher = _without_weights(student).state_dict(), _without_weights(teacher).state_dict()
        for key in ("stem.weight", "norm.weight", "head.fc.weight", "head.fc.bias", "transition2.conv.weight"):
            assert student[key].shape[0] == teacher[key].shape[0]
        assert student["head.fc.weight"].shape == teacher["head.fc.weight"].shape


@pytest.mark.parametrize(("name", "classes", "millions", "tolerance"), PAPER)
def test_parameter_count_of_the_paper(name, classes, millions, tolerance):
    assert _size(name, classes) / 1e6 == pytest.approx(millions, rel=tolerance)


@pytest.mark.parametrize("name", [*DENSENETS, *WIDE_RESNETS, *RESNET_STUDENTS, TINY[2]])
def test_registered_configuration(name):
    assert timm.is_model(name)
    network = _without_weights(name)
    cfg = network.pretrained_cfg
    assert network.default_cfg is cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["num_classes"]) == ((3, 32, 32), 1.0, 10)
    assert "url" not in cfg and not timm.is_model_pretrained(name)
    assert isinstance(network.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert network.get_submodule(cfg["classifier"]) is network.get_classifier()


@pytest.mark.parametrize("module", ["cifar_network", "densenet_cifar", "wide_resnet_cifar", "resnet_students"])
def test_network_files_need_torch_and_timm_only(module):
    tree = ast.parse(Path(getattr(born_again.models, module).__file__).read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    stdlib = {"__future__", "collections", "contextlib", "functools", "typing"}
    beside = {"born_again.models.cifar_network"}  # which is published with them
    assert {name.split(".")[0] for name in imported - beside} <= stdlib | {"torch", "timm"}


def test_dense_block_feeds_every_layer_everything_before_it():
    block = DenseBlock(3, in_chans=6, growth_rate=4, dtype=torch.float64).eval()
    for parameter in block.parameters():  # scales and shifts of BatchNorm that a wrong order would show
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)

    features = [x]
    for layer in block:
        y = torch.cat(features, 1)
        for norm, conv in ((layer.norm1, layer.conv1), (layer.norm2, layer.conv2)):
            y = y / math.sqrt(1 + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]
            y = nn.functional.conv2d(y.clamp(min=0), conv.weight, padding=conv.padding)
        features.append(y)
    torch.testing.assert_close(block(x), torch.cat(features, 1))
    assert [feature.shape[1] for feature in features] == [6, 4, 4, 4]


@pytest.mark.parametrize(("out_chans", "stride"), [(6, 1), (8, 1), (6, 2)])
def test_wide_block_adds_the_raw_input_or_a_projection_of_the_activated_one(out_chans, stride):
    block = WideBlock(6, out_chans, stride, dtype=torch.float64).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)

    def activated(y: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        y = y / math.sqrt(1 + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]
        return y.clamp(min=0)

    first = activated(x, block.norm1)
    expected = nn.functional.conv2d(first, block.conv1.weight, padding=1, stride=stride)
    expected = nn.functional.conv2d(activated(expected, block.norm2), block.conv2.weight, padding=1)
    if (out_chans, stride) == (6, 1):
        assert block.shortcut is None
        expected = expected + x
    else:
        expected = expected + nn.functional.conv2d(first, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("out_chans", [6, 8])
def test_bottleneck_block_adds_the_raw_input_or_a_projection_of_the_activated_one(out_chans):
    block = BottleneckBlock(6, 4, out_chans, dtype=torch.float64).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    y, first = x, None
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2), (block.norm3, block.conv3)):
        y = y / math.sqrt(1 + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]
        y = y.clamp(min=0)
        first = y if first is None else first
        y = nn.functional.conv2d(y, conv.weight, padding=conv.padding)
    assert (block.shortcut is None) == (out_chans == 6)
    skip = x if block.shortcut is None else nn.functional.conv2d(first, block.shortcut.weight)
    torch.testing.assert_close(block(x), y + skip)


@pytest.mark.parametrize(("depth", "growth_rate"), [(46, 120), (172, 30), (256, 20), (340, 15)])
def test_densenets_of_another_depth_keep_the_hidden_sizes(depth, growth_rate):
    own = _without_weights("densenet90_60_cifar", depth=depth, growth_rate=growth_rate, stem_chans=120)
    teacher = _without_weights("densenet90_60_cifar")
    for i in (1, 2, 3):
        assert own.get_submodule(f"transition{i}.conv").weight.shape == (
            teacher.get_submodule(f"transition{i}.conv").weight.shape
        )


def test_transitions_halve_channels_and_only_the_first_two_pool():
    with_third = _without_weights("densenet90_60_cifar")
    assert [hasattr(getattr(with_third, f"transition{i}"), "pool") for i in (1, 2, 3)] == [True, True, False]
    assert with_third.num_features == with_third.transition3.norm.num_features // 2
    assert not hasattr(_without_weights("densenet112_33_cifar"), "transition3")


def test_initialisation_is_he_normal_over_fan_out():
    for network in (timm.create_model("wide_resnet28_2_cifar"), DenseNetCifar(depth=40, growth_rate=24)):
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
                fan_out = module.out_channels * module.kernel_size[0] ** 2
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)
                assert abs(module.weight.mean().item()) < 0.05 * math.sqrt(2 / fan_out)
            elif isinstance(module, nn.BatchNorm2d):
                assert module.weight.eq(1).all() and module.bias.eq(0).all()
        assert network.head.fc.bias.eq(0).all()
        assert network.head.fc.weight.abs().max() <= network.num_features**-0.5
        network.reset_classifier(7)
        assert network.head.fc.bias.eq(0).all()


@pytest.mark.parametrize("name", TINY)
def test_weights_follow_the_seed(name):
    torch.manual_seed(5)
    first = timm.create_model(name).state_dict()
    other = timm.create_model(name).state_dict()
    torch.manual_seed(5)
    again = timm.create_model(name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


@pytest.mark.parametrize("name", TINY)
def test_heads(name):
    network = timm.create_model(name, num_classes=7, in_chans=1).eval()
    assert network.in_chans == 1 and network.num_classes == 7
    features = network.forward_features(_images(2, channels=1))
    assert features.shape == (2, network.num_features, 8, 8)
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(network.forward_head(features), network.get_classifier()(pooled))
    network.reset_classifier(3)
    assert network.forward_head(features).shape == (2, 3) and network.num_classes == 3
    network.reset_classifier(3, "catavgmax")
    assert network.head_hidden_size == 2 * network.num_features
    assert network.forward_head(features).shape == (2, 3)
    network.reset_classifier(0)
    assert network.forward_head(features).shape == (2, network.head_hidden_size)
    network.reset_classifier(0, "")
    assert torch.equal(network.forward_head(features), features)


@pytest.mark.parametrize("name", TINY)
def test_features(name):
    network = timm.create_model(name).eval()
    extractor = timm.create_model(name, features_only=True).eval()
    extractor.load_state_dict(network.state_dict(), strict=False)  # the extractor has no head
    x = _images()
    maps = extractor(x)
    assert extractor.feature_info.reduction() == [1, 2, 4]
    assert [m.shape[1] for m in maps] == extractor.feature_info.channels()
    assert [m.shape[2] for m in maps] == [32, 16, 8]
    last, intermediates = network.forward_intermediates(x)
    assert torch.equal(last, network.forward_features(x))
    assert all(torch.equal(a, b) for a, b in zip(maps, intermediates, strict=True))
    assert torch.equal(intermediates[-1], last)
    for stop_early, end in ((False, last), (True, maps[0])):
        reached, (only,) = network.forward_intermediates(x, indices=[0], stop_early=stop_early)
        assert torch.equal(only, maps[0]) and torch.equal(reached, end)
    assert len(network.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
    assert len(timm.create_model(name, features_only=True, out_indices=(-1,))(x)) == 1
    with pytest.raises(ValueError, match="output_fmt='NLC' is not available .* give 'NCHW'"):
        network.forward_intermediates(x, output_fmt="NLC")
    for index in (2, 1, 0):  # each prunes what the one before has left
        network.prune_intermediate_layers([index], prune_head=index < 2)
        assert torch.equal(network.forward_features(x), maps[index])
    assert network.num_classes == 0 and not any("head" in key or "norm.weight" == key for key in network.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_parameter_groups_run_from_stem_to_head(name):
    network = timm.create_model(name)
    for coarse, blocks in ((True, 3), (False, 6)):
        groups = group_parameters(network, network.group_matcher(coarse), reverse=True)
        assert set(groups) == {key for key, _ in network.named_parameters()}
        assert groups["stem.weight"] == 0 and groups["head.fc.weight"] == blocks + 1 == max(groups.values())
        assert groups["norm.weight"] == blocks
        assert sorted(set(groups.values())) == list(range(blocks + 2))


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_changes_memory_and_nothing_else(name):
    options = {"proj_drop_rate": 0.3} if "wide" in name else {}
    network = timm.create_model(name, **options)
    results = []
    for enable in (False, True):
        twin = copy.deepcopy(network).train()
        twin.set_grad_checkpointing(enable)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            torch.manual_seed(1)
            loss = twin(_images()).square().sum()
        kept = sum(kept)  # what forward keeps, before backward recomputes
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
        results.append((loss.detach(), gradients, dict(twin.named_buffers()), kept))
    (loss, gradients, buffers, kept), (other_loss, other_gradients, other_buffers, other_kept) = results
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[key], other_gradients[key]) for key in gradients)
    assert all(gradient.isfinite().all() and gradient.ne(0).any() for gradient in gradients.values())
    assert all(torch.equal(buffers[key], other_buffers[key]) for key in buffers)
    assert buffers["norm.num_batches_tracked"] == 1
    assert other_kept < 0.5 * kept


@pytest.mark.parametrize("name", TINY)
def test_compile_and_export(name):
    x = _images()
    network = timm.create_model(name).train()
    compiled_twin = copy.deepcopy(network)
    compiled = torch.compile(compiled_twin, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))
    torch.testing.assert_close(dict(compiled_twin.named_buffers()), dict(network.named_buffers()))
    torch._dynamo.reset()
    network.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(x[:3]), network(x[:3]))


SMALL = [*TINY, "wide_resnet16_1_cifar"]
LARGE = [name for name in (*DENSENETS, *WIDE_RESNETS, *RESNET_STUDENTS) if name not in SMALL]


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_torchscript(name, tmp_path):
    network, x = timm.create_model(name).eval(), _images(2)
    expected = network(x)
    scripted = torch.jit.script(network)
    assert torch.equal(scripted(x), expected)
    scripted.save(tmp_path / "network.pt")
    assert torch.equal(torch.jit.load(tmp_path / "network.pt")(x), expected)


@pytest.mark.parametrize("name", TINY)
def test_torchscript_of_every_form_of_a_network(name):
    x = _images()
    headless = timm.create_model(name, num_classes=0, global_pool="", drop_rate=0.2).eval()
    assert torch.equal(torch.jit.script(headless)(x), headless(x))
    extractor = timm.create_model(name, features_only=True).eval()
    maps = torch.jit.script(extractor)(x)
    assert len(maps) == 3 and all(torch.equal(a, b) for a, b in zip(maps, extractor(x), strict=True))
    network = timm.create_model(name).train()
    network.set_grad_checkpointing()  # which a script leaves out
    twin = torch.jit.script(copy.deepcopy(network))
    for each in (network, twin):
        each(x).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad)
    assert all(torch.equal(value, network.get_buffer(key)) for key, value in twin.named_buffers())


@pytest.mark.parametrize("name", TINY)
def test_channels_last_and_bf16_go_through_the_whole_network(name):
    network = timm.create_model(name).to(memory_format=torch.channels_last)
    x = _images()
    expected = network(x)
    seen = []
    for module in network.modules():
        if not list(module.children()) and not isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    maps = [output for output in seen if output.ndim == 4]
    assert len(maps) > 20
    assert all(output.dtype == torch.bfloat16 for output in maps)
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in maps)


def test_dropout_between_convolutions_and_before_the_head():
    network = timm.create_model("test_wide_resnet_cifar", proj_drop_rate=0.3, drop_rate=0.2)
    drops = [module for module in network.modules() if isinstance(module, nn.Dropout) and module.p == 0.3]
    assert len(drops) == 6 and network.head.drop.p == network.drop_rate == 0.2
    inputs = []
    drops[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    network.group1[0].conv2.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    network(_images())
    before, after = inputs
    assert before.min() == 0  # after the ReLU
    kept = after.ne(0)
    torch.testing.assert_close(after[kept], before[kept] / 0.7)
    assert 0.65 < kept.sum() / before.ne(0).sum() < 0.75
    assert not any(isinstance(m, nn.Dropout) for m in timm.create_model("test_wide_resnet_cifar").group1.modules())


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (DenseNetCifar, {"depth": 9}, "depth=9 leaves a dense block without layers; give 10 or more"),
        (DenseNetCifar, {"growth_rate": 0}, "growth_rate=0 adds no channels; give 1 or more"),
        (DenseNetCifar, {"stem_chans": 0}, "stem_chans=0 counts channels; give 1 or more, or None for 2 x growth_ra"),
        (DenseNetCifar, {"compression": 1.5}, r"compression=1.5 .* give a number in \(0, 1\]"),
        (ResNetStudentCifar, {"units": 0}, "units=0 leaves a stack without residual units; give 1 or more"),
        (ResNetStudentCifar, {"ratio": 0.001}, "ratio=0.001 leaves a convolution without channels; give a larger"),
        (ResNetStudentCifar, {"depth": 9}, r"depth=9, growth_rate=60 and compression=0.5 describe no DenseNet; give"),
        (WideResNetCifar, {"depth": 27}, r"depth=27 is not 6n \+ 4 .* give 10, 16, 22"),
        (WideResNetCifar, {"depth": 4}, r"depth=4 is not 6n \+ 4"),
        (WideResNetCifar, {"width": 0}, "width=0 and base_width=16 count channels; give 1 or more"),
    ],
)
def test_impossible_sizes(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)
