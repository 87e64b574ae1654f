"""Teacher and student read one batch: with one tokenizer, of a length that both know, over the tokens of both."""

import copy
import json
import logging

import pytest
import torch
from helpers import WORDS, arguments, language_model, sentences, sequence_classifier
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from born_again import BornAgainLMTrainer, BornAgainTrainer
from born_again.data.streams import TokenStreams, collate_windows
from born_again.data.text import word_tokenizer
from born_again.teacher import FrozenTeacher, positions
from born_again.teacher.tokenizers import check_same_tokenizer, differences_to_know

LETTERS = "abcdefghijklmnopqr"
TOKENS = ["<pad>", "<unk>", "<s>", "</s>", *LETTERS, "A"]  # WORDS of them


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tokenizer(tokens=TOKENS, lower=False, template=None, **options):
    backend = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    if template:
        ids = [(token, tokens.index(token)) for token in template.split() if token.startswith("<")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **options})


def sized(seed: int, tokens: int, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_positions": 12, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=tokens, **{**sizes, **dropout, **changes})).double()


def pair(folder, theirs, ours, kind=BornAgainTrainer, teacher=None, student=None, **changes):
    return kind(
        language_model(1) if student is None else student,
        arguments(folder, **changes),
        teacher=language_model(2) if teacher is None else teacher,
        train_dataset=sentences("next"),
        eval_dataset=sentences("next"),
        processing_class=ours,
        teacher_processing_class=theirs,
    )


# ---- One tokenizer ----


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"lower": True}, r"reads text otherwise than the student's: 'A' is \['a'\] for the teacher's .*\['A'\] for"),
        (
            {"template": "<s> $A </s>"},
            r"adds other special tokens than the student's: .*'<s>'.*'</s>'\] for the teach",
        ),
        ({"padding_side": "left"}, "pads on the left, the student's on the right.*set padding_side='left'"),
        ({"tokens": TOKENS[:-1]}, "has 22 tokens, the student's 23.*only one of them has 'A' .id 22"),
        ({"tokens": [*TOKENS[:4], "b", "a", *TOKENS[6:]]}, "has 'b' for id 4, the student's 'a'"),
    ],
)
def test_a_teacher_with_another_pipeline_is_refused_by_what_differs(tmp_path, theirs, message):
    student = language_model(1)
    with pytest.raises(ValueError, match=message):
        pair(tmp_path, tokenizer(**theirs), tokenizer(), student=student)
    assert all(parameter.requires_grad for parameter in student.parameters())
    pair(tmp_path, tokenizer(), tokenizer())


def test_the_tokenizer_beside_a_teacher_in_its_folder_is_compared(tmp_path):
    language_model(2).save_pretrained(tmp_path / "teacher")
    tokenizer(lower=True).save_pretrained(tmp_path / "teacher")
    teacher = GPT2LMHeadModel.from_pretrained(tmp_path / "teacher", dtype=torch.float64)
    with pytest.raises(
        ValueError,
        match=r"reads text otherwise .*\(.*teacher\).*give that as processing_class and as teacher_processing_class",
    ):
        pair(tmp_path, None, tokenizer(), teacher=teacher)
    # The user knows better; and a network of that configuration that was never in that folder is no such teacher.
    pair(tmp_path, tokenizer(), tokenizer(), teacher=teacher)
    pair(tmp_path, None, tokenizer(lower=True), teacher=teacher)


def test_the_students_tokenizer_is_found_in_its_collator_and_beside_its_weights(tmp_path):
    other = tokenizer(lower=True)
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    args, message = arguments(tmp_path), "reads text otherwise than the student's"
    with pytest.raises(ValueError, match=message):
        BornAgainTrainer(
            language_model(1), args, data_collator=collator, teacher=language_model(2), teacher_processing_class=other
        )
    for name, own in (("student", tokenizer()), ("teacher", other)):
        language_model(1).save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    student, teacher = (
        GPT2LMHeadModel.from_pretrained(tmp_path / name, dtype=torch.float64) for name in ("student", "teacher")
    )
    with pytest.raises(ValueError, match=rf"{message}.*/teacher\).*/student\)"):
        pair(tmp_path, None, None, student=student, teacher=teacher)
    pair(tmp_path, None, None, student=student)  # of whose teacher no tokenizer is known
    pair(tmp_path, other, other, student=student, teacher=teacher)


def test_every_teacher_has_its_own_tokenizer(tmp_path):
    teachers = [language_model(2), language_model(3)]
    pair(tmp_path, [tokenizer(), None], tokenizer(), teacher=teachers)
    with pytest.raises(ValueError, match="reads text otherwise than the student's"):
        pair(tmp_path, [tokenizer(), tokenizer(lower=True)], tokenizer(), teacher=teachers)
    with pytest.raises(ValueError, match="teacher_processing_class: got a list of 1 for 2 teachers, expected one for"):
        pair(tmp_path, [tokenizer()], tokenizer(), teacher=teachers)


def test_what_may_be_meant_is_only_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        pair(tmp_path, tokenizer(model_max_length=8), tokenizer(model_max_length=12, eos_token="<pad>"))
    said = [record.message for record in caplog.records if record.message.startswith("teacher: the")]
    assert len(said) == 2
    assert "eos_token of its tokenizer is '</s>', of the student's '<pad>'" in said[0]
    assert "model_max_length of its tokenizer is 8, of the student's 12" in said[1]


def test_a_padding_token_that_only_the_student_has_needs_a_row_in_the_teacher(tmp_path):
    ours = tokenizer()
    ours.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(
        ValueError, match=r"knows 23 tokens .*padded with '\[PAD\]', id 23; .*teacher.resize_token_emb"
    ):
        pair(tmp_path, tokenizer(pad_token="</s>"), ours, student=sized(1, WORDS + 1))
    pair(tmp_path, tokenizer(pad_token="</s>"), ours, student=sized(1, WORDS + 1), teacher=sized(2, WORDS + 1))


def test_a_classifier_with_another_padding_is_refused(tmp_path):
    def classifiers(padding):
        teacher = sequence_classifier(2)
        teacher.config.pad_token_id = padding
        return BornAgainTrainer(
            sequence_classifier(1),
            arguments(tmp_path),
            teacher=teacher,
            train_dataset=sentences("sequence"),
            processing_class=tokenizer(),
        )

    classifiers(0)
    with pytest.raises(ValueError, match="its config.pad_token_id is 3, and batches are padded with '<pad>', id 0"):
        classifiers(3)


# ---- Lengths ----


def test_a_text_longer_than_the_teacher_knows_is_refused_before_a_step(tmp_path):
    student, teacher = language_model(1), sized(2, WORDS, n_positions=9)
    ours = pair(tmp_path, None, None, student=student, teacher=teacher)
    with pytest.raises(ValueError, match="GPT2LMHeadModel was made for texts of 9 tokens .*and a batch has 10.*trunc"):
        ours.train()
    assert ours.state.global_step == 0


def test_positions_are_counted_as_networks_count_them():
    from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForCausalLM

    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    roberta = RobertaForCausalLM(
        RobertaConfig(**sizes, intermediate_size=4, max_position_embeddings=12, is_decoder=True)
    )
    assert positions(roberta) == 10  # two are lost behind the padding, id 1
    roberta(torch.full((1, 10), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 11), 5))
    with pytest.raises(ValueError, match="texts of 10 tokens"):
        FrozenTeacher(roberta)({"input_ids": torch.full((1, 11), 5)})
    assert positions(language_model(1)) == 12 and positions(nn.Linear(1, 1)) is None
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=4, max_position_embeddings=12))
    assert positions(llama) == 12


def test_rotary_positions_go_on_and_it_is_said_once(caplog):
    from helpers import llama

    teacher, long = FrozenTeacher(llama(1)), {"input_ids": torch.full((1, 13), 5)}
    with caplog.at_level(logging.WARNING):
        teacher(long), teacher(long)
    assert caplog.text.count("was made for texts of 12 tokens") == 1


# ---- Vocabularies that are padded ----


def widened(model: GPT2LMHeadModel, tokens: int) -> GPT2LMHeadModel:
    """The same network with rows for tokens that no text has, whose logits are what they happen to be."""
    config = copy.deepcopy(model.config)
    config.vocab_size = tokens
    wide = GPT2LMHeadModel(config).double()
    state = model.state_dict()
    with torch.no_grad():
        for name, value in wide.state_dict().items():
            value[: state[name].shape[0]].copy_(state[name]) if value.dim() else value.copy_(state[name])
    return wide


def grown(trained) -> torch.Tensor:
    return torch.cat([parameter.detach()[:WORDS].flatten() for parameter in trained.model.parameters()])


@pytest.mark.slow_but_for("full-ban+l", "chunked-cwtm")
@pytest.mark.parametrize("objective", ["ban", "ban+l", "cwtm", "dkpp"])
@pytest.mark.parametrize("implementation", ["full", "chunked"])
def test_a_teacher_with_padded_tokens_teaches_as_the_one_without(tmp_path, monkeypatch, objective, implementation):
    monkeypatch.setattr("born_again.training.step_loss.CHUNKED_FROM", 1 if implementation == "chunked" else 2**26)
    narrow = language_model(2)
    found = []
    for teacher in (narrow, widened(narrow, WORDS + 6)):
        changes = {"objective": objective, "loss_implementation": implementation}
        ours = pair(tmp_path, tokenizer(), tokenizer(), teacher=teacher, **changes)
        ours.train()
        assert ours._chunked is (implementation == "chunked")
        found.append((grown(ours), ours.evaluate_teacher()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-12)
    assert found[0][1] == found[1][1]


def test_several_padded_teachers_teach_as_those_without(tmp_path):
    """Each without its padding, however probable that is, before they are averaged."""
    found = []
    narrow = [language_model(2), language_model(3)]
    for teachers in (narrow, [widened(teacher, WORDS + 6) for teacher in narrow]):
        ours = pair(tmp_path, tokenizer(), tokenizer(), teacher=teachers)
        ours.train()
        found.append(grown(ours))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    assert ours.teacher.facts["columns"] == WORDS


@pytest.mark.slow_but_for("1-off", "2-memory")
@pytest.mark.parametrize("cache", ["off", "memory"])
@pytest.mark.parametrize("count", [1, 2])
def test_windows_of_a_padded_teacher_are_cached_as_they_are(tmp_path, cache, count):
    found = []
    narrow = [language_model(2), language_model(3)][:count]
    text = torch.randint(0, WORDS, (90,), generator=torch.Generator().manual_seed(3))
    for teacher in (narrow, [widened(network, WORDS + 6) for network in narrow]):
        ours = BornAgainLMTrainer(
            language_model(1),
            arguments(
                tmp_path, objective="ban+l", max_steps=12, per_device_train_batch_size=3, teacher_cache=cache,
                remove_unused_columns=False,
            ),
            teacher=teacher,
            train_dataset=TokenStreams(text, 3, 6, before=0),
            data_collator=collate_windows,
            processing_class=tokenizer(),
            teacher_processing_class=tokenizer(),
        )  # fmt: skip
        ours.train()
        found.append((grown(ours), ours.evaluate_teacher()["nll"]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["ban", "ban+l", "cwtm"])
def test_a_student_with_padded_tokens_learns_that_they_never_come(tmp_path, objective):
    """The loss is that of a teacher who gives them probability 0."""
    wide, teacher = sized(1, WORDS + 6), language_model(2)
    changes = {"objective": objective, "logging_steps": 1}
    ours = pair(tmp_path, tokenizer(), tokenizer(), student=wide, teacher=teacher, **changes)
    batch = ours.data_collator([ours.train_dataset[row] for row in range(8)])
    with torch.no_grad():
        loss = ours.compute_loss(wide.train(), dict(batch)).item()
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        log_student = wide(**ids).logits.log_softmax(-1)[:, :-1]
        target = nn.functional.pad(teacher(**ids).logits.softmax(-1), (0, 6))[:, :-1]
        labels = batch["labels"][:, 1:]
    counted = labels != -100
    hard = -log_student.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)[counted]
    soft = -(target * log_student).sum(-1)[counted]
    weight = target.amax(-1)[counted]
    expected = {"ban": soft.mean(), "ban+l": (soft + hard).mean(), "cwtm": (weight * hard).sum() / weight.sum()}
    assert loss == pytest.approx(expected[objective].item(), rel=1e-9)
    padding = wide.transformer.wte.weight[WORDS:].detach().clone()
    ours.train()
    assert (wide.transformer.wte.weight[WORDS:] - padding).abs().max() > 1e-6
    logged = [entry for entry in ours.state.log_history if "kd_loss" in entry]
    assert len(logged) == 4
    assert all(0 <= entry[name] < 20 for entry in logged for name in ("kd_loss", "teacher_entropy", "loss"))


def test_what_cannot_be_taught_across_sizes_is_refused_with_words_of_tokens(tmp_path):
    wide = sized(1, WORDS + 6)
    remedy = r"teacher: has 23 tokens, the student 29 .*not known.*teacher_processing_class.*resize_token_embeddings"
    for known in (None, tokenizer()):
        with pytest.raises(ValueError, match=remedy):
            pair(tmp_path, None, known, student=wide)
    with pytest.raises(ValueError, match="has 20 tokens, the student 23 .*one tokenizer, which has 23"):
        pair(tmp_path, tokenizer(), tokenizer(), teacher=sized(2, 20))
    with pytest.raises(ValueError, match="objective: got 'dkpp' for a student of 29 tokens and a teacher of 23"):
        pair(tmp_path, tokenizer(), tokenizer(), student=wide, objective="dkpp")
    with pytest.raises(ValueError, match="networks with vocabularies of 23 and 29 tokens.*on each"):
        pair(tmp_path, tokenizer(), tokenizer(), teacher=[language_model(2), sized(3, WORDS + 6)])
    chunked = pair(tmp_path, tokenizer(), tokenizer(), student=wide, loss_implementation="chunked")
    with pytest.raises(
        ValueError, match="loss_implementation: got 'chunked', but the student has more tokens than the teacher"
    ):
        chunked.train()


# ---- Ends of texts ----


def stories(rows: int = 16) -> list[dict[str, list[int]]]:
    """Texts of several lengths, each ended by </s>."""
    return [{"input_ids": [*range(4, 6 + row % 4), 3], "attention_mask": [1] * (3 + row % 4)} for row in range(rows)]


def reading(folder, kind, collator, teacher, data):
    return kind(
        language_model(1), arguments(folder, max_steps=3), teacher=teacher, train_dataset=data, data_collator=collator
    )


@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
@pytest.mark.parametrize("taught", [False, True])
def test_ends_of_texts_that_are_ignored_as_padding_are_warned_of_once(tmp_path, caplog, kind, taught):
    collator = DataCollatorForLanguageModeling(tokenizer(pad_token="</s>"), mlm=False)
    ours = reading(tmp_path, kind, collator, language_model(2) if taught else None, stories())
    with caplog.at_level(logging.WARNING):
        ours.train()
    (said,) = [record.message for record in caplog.records if record.message.startswith("data_collator")]
    assert "pads with '</s>', which also ends texts" in said and "8 ends of texts" in said
    assert "DataCollatorForSeq2Seq(tokenizer)" in said


def masked(story, ends: int = 0) -> dict[str, list[int]]:
    """With labels ignored where they are the padding, but for so many at the end."""
    ids = story["input_ids"]
    kept = len(ids) - ends
    return {**story, "labels": [-100 if token == 3 and place < kept else token for place, token in enumerate(ids)]}


def test_ends_that_were_ignored_by_hand_are_warned_of_where_none_counts(tmp_path, caplog):
    shared = tokenizer(pad_token="</s>")
    prompted = [
        {"input_ids": [4, 3, *story["input_ids"]], "attention_mask": [1, 1, *story["attention_mask"]]}
        for story in stories()
    ]
    for data, ends, many in ((stories(), 0, 64), (prompted, 0, 128), (prompted, 1, None)):
        rows = [masked(story, ends) for story in data]
        trainer = BornAgainTrainer(
            language_model(1),
            arguments(tmp_path, max_steps=9),
            teacher=language_model(2),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(shared),
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer.train()
        said = [record.message for record in caplog.records if record.message.startswith("labels: all ")]
        assert len(said) == (many is not None)
        assert all(f"all {many} ends of texts in the first 8 steps have the label -100" in one for one in said)
        assert all("'</s>', which ends texts, pads them too" in one for one in said)


def test_ends_that_are_taught_are_not(tmp_path, caplog):
    own = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    by_place = DataCollatorForSeq2Seq(tokenizer(pad_token="</s>"))  # the remedy
    labelled = [{**story, "labels": story["input_ids"]} for story in stories()]
    endless = [{name: values[:-1] for name, values in story.items()} for story in stories()]
    shared = DataCollatorForLanguageModeling(tokenizer(pad_token="</s>"), mlm=False)
    for collator, data in ((own, stories()), (by_place, labelled), (shared, endless)):
        ours = reading(tmp_path, BornAgainTrainer, collator, language_model(2), data)
        with caplog.at_level(logging.WARNING):
            ours.train()
        if data is not endless:
            batch = collator([dict(row) for row in data[:8]])
            assert batch["labels"].eq(3).sum() == 8
    assert "data_collator" not in caplog.text and "ends of texts" not in caplog.text


def test_word_tokenizers_of_lineages_begun_before_newlines_were_read_go_on():
    new = word_tokenizer(["<eos>", "<unk>", "Ab", "c"])
    content = json.loads(new.backend_tokenizer.to_str())
    assert content["normalizer"] is not None
    backend = Tokenizer.from_str(json.dumps({**content, "normalizer": None}))
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    old = PreTrainedTokenizerFast(tokenizer_object=backend, split_special_tokens=True, **special)
    assert old("c\nc")["input_ids"] != new("c\nc")["input_ids"]
    check_same_tokenizer(old, new)
    assert not list(differences_to_know(old, new))
