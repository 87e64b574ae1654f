"""Every family of transformers that the trainer could be given: what it does with labels, beside their cross-entropy.

A class is served where its loss is the cross-entropy of its logits and of an auxiliary loss that the trainer adds too,
and its logits are the same without labels; otherwise it is refused by a sentence. A family of a later transformers
that is neither turns this red: see what its forward does with labels, and enter it.
"""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_families import TASKS, batch_for, build, networks

from born_again.teacher.inputs import decoder_inputs
from born_again.training.network_loss import NetworkLoss, network_loss

# Half a minute for 550 classes on two idle cores, a few minutes beside other work.
pytestmark = pytest.mark.slow

UNSHIFTED = NetworkLoss(False)
SHIFTED = NetworkLoss(True)
UNKNOWN = NetworkLoss(None)  # takes no labels
USUAL = {task: SHIFTED if task == "CAUSAL_LM" else UNSHIFTED for task in TASKS}

# Causal language models whose labels are the targets position by position.
ALIGNED = """
    BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM CpmAntForCausalLM
    MBartForCausalLM MarianForCausalLM MvpForCausalLM PLBartForCausalLM PegasusForCausalLM TrOCRForCausalLM
    WhisperForCausalLM XLMWithLMHeadModel XLNetLMHeadModel
""".split()
# Mixtures of experts, which add the balance of their routers with `output_router_logits`, by its weight.
EXPERTS = {
    0.0005: ["FlintForCausalLM"],
    0.001: """
        DeepseekV4ForCausalLM Ernie4_5_MoeForCausalLM GptOssForCausalLM GraniteMoeForCausalLM
        GraniteMoeHybridForCausalLM GraniteMoeSWAForCausalLM
        GraniteMoeSharedForCausalLM JambaForCausalLM LagunaForCausalLM LaraMiniForCausalLM
        MellumForCausalLM MiniMaxForCausalLM MiniMaxM2ForCausalLM MiniMaxM3VLForCausalLM MixtralForCausalLM
        PhimoeForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5MoeForCausalLM
    """.split(),
    0.01: ["DbrxForCausalLM", "FlexOlmoForCausalLM", "JetMoeForCausalLM", "OlmoeForCausalLM"],
}
# Decoders that read sound beside text, and are in transformers' list of encoder-decoders.
SHIFTED_THERE = """
    AudioFlamingo3ForConditionalGeneration GlmAsrForConditionalGeneration GraniteSpeechForConditionalGeneration
    GraniteSpeechPlusForConditionalGeneration MossTranscribeDiarizeForConditionalGeneration
    MusicFlamingoForConditionalGeneration Nemotron3_5TranscribeForConditionalGeneration OmniASRForConditionalGeneration
    Qwen2AudioForConditionalGeneration Qwen3ASRForConditionalGeneration VoxtralForConditionalGeneration
""".split()
OTHER_LOSS = r"model: \w+ computes a loss of .* it adds something to it, or scales it"
OTHER_LOGITS = r"model: \w+ gives other logits when it is given labels"
OTHER_SHAPE = r"labels: shape .* for logits of shape"
NO_LOGITS = "model output: got the keys .* expected 'logits'"
SPECIAL = {
    "CAUSAL_LM": {
        **dict.fromkeys(ALIGNED, UNSHIFTED),
        **{name: NetworkLoss(True, weight) for weight, names in EXPERTS.items() for name in names},
        "GitForCausalLM": "model: GitForCausalLM fails when it is given labels",  # without an image, as with Trainer
        "ProphetNetForCausalLM": OTHER_LOSS,  # of several next tokens, smoothed
    },
    "SEQ_TO_SEQ_CAUSAL_LM": {
        **dict.fromkeys(SHIFTED_THERE, SHIFTED),
        "FSMTForConditionalGeneration": OTHER_LOGITS,  # its decoder reads the source where it is given no inputs
        "NllbMoeForConditionalGeneration": OTHER_LOSS,  # with the balance of two routers
        "ProphetNetForConditionalGeneration": OTHER_LOSS,
    },
    "MASKED_LM": {"PerceiverForMaskedLM": OTHER_SHAPE},  # it takes bytes, padded to one length
    "IMAGE_CLASSIFICATION": {
        "DeiTForImageClassificationWithTeacher": UNKNOWN,
        "LevitForImageClassificationWithTeacher": UNKNOWN,
        "PPLCNetForImageClassification": NO_LOGITS,
    },
}
# Those that defaults do not make tiny, that want a library or an input of their own; of all tasks together.
MOST_NOT_BUILT = 20


def expected(task, name):
    return SPECIAL.get(task, {}).get(name, USUAL[task])


def outcome(network, batch, labels):
    """What is found, or the sentence by which the trainer refuses the network."""
    try:
        found = network_loss(network, batch, labels)
    except ValueError as error:
        return str(error)
    with torch.no_grad():
        outputs = network.eval()(**batch, **decoder_inputs(network, batch, labels))
        if outputs.logits.shape[:-1] != labels.shape:
            return f"labels: shape {tuple(labels.shape)} for logits of shape {tuple(outputs.logits.shape)}"
        if found == UNKNOWN:
            return found
        own = network(**batch, labels=labels).loss.item()
    logits, targets = outputs.logits, labels
    if found.shifts_labels:
        logits, targets = logits[:, :-1], labels[:, 1:]
    ours = F.cross_entropy(logits.flatten(0, -2), targets.flatten()).item()
    if found.auxiliary_weight:
        ours += found.auxiliary_weight * outputs.aux_loss.item()
    assert ours == pytest.approx(own, rel=2e-4), type(network).__name__
    return found


def fits(found, wanted):
    return (
        re.match(wanted, found) is not None if isinstance(wanted, str) and isinstance(found, str) else found == wanted
    )


@pytest.fixture(scope="module")
def scanned():
    transformers.logging.set_verbosity_error()
    found, not_built = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in TASKS:
            for name, kind in networks(task).items():
                try:
                    network = build(kind)
                    batch = batch_for(network, task)
                    labels = batch.pop("labels")
                    if not network.config.is_encoder_decoder:
                        with torch.no_grad():
                            network.eval()(**batch)
                except Exception as error:
                    not_built[task, name] = f"{type(error).__name__}: {error}"
                    continue
                found[task, name] = outcome(network.train(), batch, labels)
    return found, not_built


@pytest.mark.parametrize("task", TASKS)
def test_every_family_is_served_or_refused_by_a_sentence(scanned, task):
    found = {name: value for (of, name), value in scanned[0].items() if of == task}
    assert found
    wrong = {name: value for name, value in found.items() if not fits(value, expected(task, name))}
    assert not wrong
    refused = [name for name, value in found.items() if isinstance(value, str)]
    print(f"{task}: {len(found) - len(refused)} served, {len(refused)} refused ({', '.join(refused)})")


def test_few_families_cannot_be_built_and_none_of_the_special_ones(scanned):
    found, not_built = scanned
    print("\n".join(f"{task} {name}: {why:.100}" for (task, name), why in not_built.items()))
    assert len(not_built) <= MOST_NOT_BUILT, not_built
    known = {(task, name) for task in TASKS for name in networks(task)}
    special = {(task, name) for task, names in SPECIAL.items() for name in names} & known
    assert special <= found.keys(), special - found.keys()
