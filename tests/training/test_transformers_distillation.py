"""Networks of transformers, from folders, with their tokenizer and padded batches, as a user of Trainer has them."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from helpers import CLASSES, WORDS, arguments, language_model, llama, sequence_classifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from born_again import BornAgainLMTrainer, BornAgainTrainer

# Every network of the helpers has room for so many positions.
LONGEST = 12
TASKS = {
    "bert": (sequence_classifier, AutoModelForSequenceClassification),
    "gpt2": (language_model, AutoModelForCausalLM),
    "llama": (llama, AutoModelForCausalLM),
}
LANGUAGE_MODELS = ["gpt2", "llama"]
OBJECTIVES = ["ban+l", "cwtm"]


def word_tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(2, words))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def corpus(task: str, tokenizer, rows: int, seed: int = 1) -> Dataset:
    """Sentences of 2 to 10 words that count upwards, so that a word tells the next; the first word tells the class."""
    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for _ in range(rows):
        length, first = (int(torch.randint(2, high, (), generator=generator)) for high in (11, WORDS))
        texts.append(" ".join(f"w{2 + (first + step) % (WORDS - 2)}" for step in range(length)))
        labels.append(first % CLASSES)
    columns = {"text": texts, "label": labels} if task == "bert" else {"text": texts}
    return Dataset.from_dict(columns).map(lambda batch: tokenizer(batch["text"]), batched=True)


def collator(task: str, tokenizer, padded_to: int | None = None):
    if task == "bert":
        return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=padded_to)
    return DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=padded_to)


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    """Of networks this small a second thread only waits for the first."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An untrained student and another network, not yet a good teacher, for each task; each beside its tokenizer."""
    folder = tmp_path_factory.mktemp("networks")
    for task, (build, _) in TASKS.items():
        for name, seed in (("student", 1), ("teacher", 2)):
            build(seed).save_pretrained(folder / task / name)
            word_tokenizer().save_pretrained(folder / task / name)
    return folder


def load(folder, task):
    return TASKS[task][1].from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def trainer(folders, task, out, rows=8, kind=BornAgainTrainer, taught=True, data=None, padded_to=None, **changes):
    student, tokenizer = load(folders / task / "student", task)
    data = corpus(task, tokenizer, rows) if data is None else data
    return kind(
        student,
        arguments(out, per_device_eval_batch_size=64, **changes),
        data_collator=collator(task, tokenizer, padded_to),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        teacher=load(folders / task / "teacher", task)[0] if taught else None,
    )


def items(model, row):
    """Rows of logits and targets of one sentence on its own, where nothing is padded."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    if "label" in row:
        return logits[None], torch.tensor([row["label"]])
    return logits[:-1], torch.tensor(row["input_ids"][1:])


def loss_by_hand(student, teacher, rows, objective="label"):
    """The paper's losses, sentence by sentence and item by item, in float64."""
    total = weight = 0.0
    for row in rows:
        z, targets = items(student, row)
        assert z.dtype == torch.float64
        if objective != "label":
            with torch.no_grad():
                t, _ = items(teacher, row)
        for index, target in enumerate(targets.tolist()):
            if target == -100:
                continue
            log_q = z[index].log_softmax(-1)
            share, item = 1.0, -log_q[target]
            if objective != "label":
                p = t[index].softmax(-1)
                soft = -(p * log_q).sum()
                share = p.max().item() if objective == "cwtm" else 1.0
                item = {"ban": soft, "ban+l": soft + item, "cwtm": item}[objective]
            total, weight = total + share * item, weight + share
    return total / weight


@pytest.mark.slow_but_for("bert-cwtm", "llama-ban+l")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("task", TASKS)
def test_padding_contributes_nothing_to_loss_and_gradient_of_a_step(folders, tmp_path, task, objective):
    """Padded to the longest of a batch, to all positions, and unevenly in the micro-batches of one step."""
    student, tokenizer = load(folders / task / "student", task)
    teacher = load(folders / task / "teacher", task)[0].eval()
    data = corpus(task, tokenizer, 8)
    assert len({len(ids) for ids in data["input_ids"]}) > 3
    if task == "bert":
        data = data.map(lambda row, index: {"label": -100 if index in (0, 5) else row["label"]}, with_indices=True)
    loss = loss_by_hand(student.train(), teacher, data, objective)
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for size, padded_to in ((8, None), (8, LONGEST), (2, None)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        ours = trainer(
            folders, task, tmp_path, data=data, padded_to=padded_to, objective=objective, max_steps=1, **changes
        )
        seen = {}

        def keep(optimizer, args, kwargs, ours=ours, seen=seen):
            seen.update({name: p.grad.clone() for name, p in ours.model.named_parameters() if p.grad is not None})

        ours.create_optimizer().register_step_pre_hook(keep)
        ours.train()
        assert ours.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert seen.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-12, msg=f"{name}, {size}, {padded_to}")


@pytest.mark.parametrize("task", LANGUAGE_MODELS)
def test_the_collator_marks_padding_and_every_other_word_but_the_first_counts(folders, tmp_path, task):
    """What the test above rests on: the batches are padded, and the padding is labelled -100."""
    ours = trainer(folders, task, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    batches, count = ours.get_batch_samples(iter(ours.get_train_dataloader()), 2, torch.device("cpu"))
    padded = [batch["labels"].eq(-100) for batch in batches]
    assert all(
        mask.any() and mask.equal(batch["attention_mask"] == 0) for mask, batch in zip(padded, batches, strict=True)
    )
    assert all("text" not in batch for batch in batches)
    assert count == sum(len(ids) - 1 for ids in ours.train_dataset["input_ids"])


@pytest.mark.parametrize("padded_to", [None, LONGEST])
@pytest.mark.parametrize("task", TASKS)
def test_evaluate_is_the_plain_cross_entropy_of_the_sentences(folders, tmp_path, task, padded_to):
    student, tokenizer = load(folders / task / "student", task)
    expected = loss_by_hand(student.eval(), None, corpus(task, tokenizer, 8)).item()
    for objective in OBJECTIVES:
        ours = trainer(folders, task, tmp_path, padded_to=padded_to, objective=objective)
        assert ours.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("task", LANGUAGE_MODELS)
def test_perplexity_weights_every_token_alike_whatever_the_padding(folders, tmp_path, task, taught):
    student, tokenizer = load(folders / task / "student", task)
    data = corpus(task, tokenizer, 8)
    nll = loss_by_hand(student.eval(), None, data).item()
    tokens = sum(len(ids) - 1 for ids in data["input_ids"])
    for padded_to in (None, LONGEST):
        ours = trainer(folders, task, tmp_path, kind=BornAgainLMTrainer, taught=taught, padded_to=padded_to)
        for size in (8, 3, 1):
            ours.args.per_device_eval_batch_size = size
            metrics = ours.evaluate()
            assert metrics["eval_tokens"] == tokens
            assert metrics["eval_loss"] == metrics["eval_nll"] == pytest.approx(nll, rel=1e-9)
            assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll), rel=1e-9)
    # A mean over batches, as Trainer's, is another number.
    by_batch = [loss_by_hand(student, None, data.select([row])).item() for row in range(8)]
    assert abs(sum(by_batch) / 8 - nll) > 1e-4


# ---- A whole distillation ----


@pytest.fixture(scope="module")
def distilled(folders, tmp_path_factory):
    """A teacher trained on labels and saved, then a student of its architecture taught by what is in the folder."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("distilled")
    results = {}
    for task, (_, auto) in TASKS.items():
        settings = {"optim": "adamw_torch", "learning_rate": 0.02, "max_steps": 30}
        first = trainer(folders, task, out / task / "teacher", rows=48, taught=False, **settings)
        first.train()
        first.save_model()
        files = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / task / "teacher").iterdir()}

        tokenizer = AutoTokenizer.from_pretrained(out / task / "teacher")
        teacher = auto.from_pretrained(out / task / "teacher")
        student = load(folders / task / "student", task)[0]
        data = corpus(task, tokenizer, 48)
        again = BornAgainTrainer(
            student,
            arguments(out / task / "student", objective="ban+l", logging_steps=10, **settings),
            data_collator=collator(task, tokenizer),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            teacher=teacher,
        )
        before = again.evaluate()["eval_loss"]
        again.train()
        after = again.evaluate()["eval_loss"]
        again.save_model()
        results[task] = {"trainer": again, "before": before, "after": after, "teacher": teacher, "files": files}
    return out, results


@pytest.mark.parametrize("task", TASKS)
def test_the_student_learns_and_comes_nearer_to_its_teacher(distilled, task):
    result = distilled[1][task]
    assert result["after"] < 0.7 * result["before"]
    logged = [entry for entry in result["trainer"].state.log_history if "kd_loss" in entry]
    assert len(logged) == 3
    assert logged[-1]["kd_loss"] < 0.7 * logged[0]["kd_loss"]
    assert logged[-1]["teacher_agreement"] > logged[0]["teacher_agreement"]


@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_and_its_folder_stay_as_they_were(distilled, task):
    folder, result = distilled[0] / task / "teacher", distilled[1][task]
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == result["files"]
    loaded = load(folder, task)[0].state_dict()
    assert loaded.keys() == result["teacher"].state_dict().keys()
    assert all(value.equal(loaded[name]) for name, value in result["teacher"].state_dict().items())


@pytest.mark.slow
def test_saved_students_load_by_plain_transformers_in_a_fresh_interpreter(distilled):
    out, results = distilled
    text = "w3 w4 w5 w6"
    code = f"""
import json, sys, torch, transformers
answers = {{}}
for task, auto in { ({task: auto.__name__ for task, (_, auto) in TASKS.items()})!r}.items():
    folder = {str(out)!r} + "/" + task + "/student"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    with torch.no_grad():
        answers[task] = model(**tokenizer({text!r}, return_tensors="pt")).logits.tolist()
assert "born_again" not in sys.modules
print(json.dumps(answers))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for task, result in results.items():
        inputs = word_tokenizer()(text, return_tensors="pt")
        with torch.no_grad():
            logits = result["trainer"].model.eval()(**inputs).logits
        torch.testing.assert_close(torch.tensor(answers[task], dtype=torch.float64), logits, rtol=1e-9, atol=1e-12)


def test_an_untrained_network_of_the_teacher_is_taught_by_the_lines_of_the_readme(distilled, tmp_path):
    folder = distilled[0] / "bert" / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(5)
    student = AutoModelForSequenceClassification.from_config(teacher.config)
    assert type(student) is type(teacher)
    assert not student.classifier.weight.equal(teacher.classifier.weight)
    data = corpus("bert", tokenizer, 48)
    ours = BornAgainTrainer(
        student,
        arguments(tmp_path, objective="ban+l", optim="adamw_torch", learning_rate=0.02, max_steps=30),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,  # Trainer then pads with it, DataCollatorWithPadding
        teacher=teacher,
    )
    before = ours.evaluate()["eval_loss"]
    ours.train()
    ours.save_model()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    nll = loss_by_hand(saved, None, data).item()
    assert nll == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-6)
    assert nll < 0.7 * before
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


# ---- Refusals ----


@pytest.mark.parametrize("kind", [BornAgainTrainer, BornAgainLMTrainer])
def test_a_teacher_with_another_vocabulary_is_refused(folders, tmp_path, kind):
    language_model(2, words=29).save_pretrained(tmp_path / "teacher")
    student, tokenizer = load(folders / "gpt2" / "student", "gpt2")
    teacher = load_model(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher: has 29 tokens, the student 23 .*expected the same number"):
        kind(student, arguments(tmp_path), teacher=teacher, processing_class=tokenizer)


def load_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_teacher_whose_tokenizer_calls_a_word_otherwise_is_refused(folders, tmp_path):
    student, tokenizer = load(folders / "gpt2" / "student", "gpt2")
    teacher = load_model(folders / "gpt2" / "teacher")
    other = word_tokenizer().backend_tokenizer.to_str().replace('"w7"', '"other"')
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(other), pad_token="<pad>", unk_token="<unk>")
    with pytest.raises(ValueError, match="teacher: its tokenizer has 'other' for id 7, the student's 'w7'"):
        BornAgainLMTrainer(
            student,
            arguments(tmp_path),
            teacher=teacher,
            processing_class=tokenizer,
            teacher_processing_class=other,
        )
