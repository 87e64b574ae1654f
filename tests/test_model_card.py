"""The card of a language model says what the manifest holds, and its example runs."""

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from born_again.data.text import word_tokenizer
from born_again.model_card import image_classifier_card, language_model_card
from born_again.models.language_models import create_language_model

WORDS = ["the", "cat", "<eos>"]
SHA256 = "ab" * 32
HARM = "</td><script>alert(1)</script>\n---\nlicense: *boom\n# `![x](y)` _a_ | b"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def record(index, **changes):
    values = {
        "index": index,
        "status": "finished",
        "seed": 42 + index,
        "parent": index - 1 if index else None,
        "objective": "ban+l" if index else "label",
        "weights_sha256": SHA256,
        "metrics": {
            "validation": {"nll": 4.45, "perplexity": 85.62694, "tokens": 73_760},
            "test": {"nll": 4.4, "perplexity": 81.45087, "tokens": 82_430},
        },
        "seconds": 1234.4,
        "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
        "hardware": "CPU, 2 threads",
        "teacher_fit": {"nll": 3.7, "perplexity": 40.44730, "tokens": 5_000} if index else None,
    }
    return {**values, **changes}


def manifest(*records, name="lstm-small-ptb", **spec):
    values = {"model": "lstm-small", "dataset": "ptb", "training": {"learning_rate": 20.0}}
    data = {"tokens": {"train": 929_589, "validation": 73_760, "test": 82_430}, "vocabulary": 10_000}
    return {"name": name, "spec": {**values, **spec}, "data": data, "generations": list(records)}


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def test_front_matter_is_what_the_hub_reads():
    text = language_model_card(manifest(record(0), record(1)), 1)
    card = ModelCard(text)
    tags = ["born-again-networks", "knowledge-distillation", "text-generation", "transformers"]
    facts = {"generation": 1, "objective": "ban+l", "seed": 43, "weights_sha256": SHA256}
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags, "born_again": facts}
    assert card.data.to_dict() == expected == yaml.safe_load(text.split("---\n")[1])
    assert card.text.strip().startswith("# lstm-small-ptb-gen1\n")


def test_every_value_of_both_splits_is_shown_and_tokens_are_whole():
    results = section(language_model_card(manifest(record(0), record(1)), 1), "Results")
    assert [line for line in results.splitlines() if line.startswith("- ")] == [
        "- validation nll: 4.4500",
        "- validation perplexity: 85.6269",
        "- validation tokens: 73,760",
        "- test nll: 4.4000",
        "- test perplexity: 81.4509",
        "- test tokens: 82,430",
    ]
    assert "of the epoch that was best on validation" in results


def test_an_infinite_perplexity_is_shown():
    metrics = {"test": {"nll": 800.0, "perplexity": float("inf"), "tokens": 7}}
    assert "- test perplexity: inf\n" in language_model_card(manifest(record(0, metrics=metrics)), 0)


def test_a_student_names_its_teacher_and_how_well_that_one_fits():
    generations = [record(0), record(1), record(2, teacher_fit={"nll": 3.0, "perplexity": 20.0855, "tokens": 9})]
    cards = [language_model_card(manifest(*generations), index) for index in range(3)]
    assert "taught by generation" not in cards[0] and "on a sample" not in cards[0]
    assert "generation 0 of a born-again lineage, the teacher of generation 1" in cards[0]
    fit = "of the same architecture, whose perplexity on a sample of the training text is"
    assert f"taught by generation 0 {fit} 40.45. Objective: ban+l." in cards[1]
    assert f"taught by generation 1 {fit} 20.09. Objective: ban+l." in cards[2]


def test_a_teacher_whose_fit_is_not_known_has_none():
    card = language_model_card(manifest(record(0), record(1, teacher_fit=None)), 1)
    assert "taught by generation 0 of the same architecture. Objective" in card


def test_how_it_was_trained():
    training = section(language_model_card(manifest(record(0)), 0), "Training")
    assert training.strip().splitlines() == [
        "- data: ptb, {'train': 929589, 'validation': 73760, 'test': 82430}",
        "- learning_rate: 20.0",
        "- hardware: CPU, 2 threads; 1234 seconds",
        "- versions: torch 2.15.0, transformers 5.23.0",
    ]


@pytest.mark.parametrize("write_card", [language_model_card, image_classifier_card])
def test_text_of_users_stays_text(write_card):
    harm = manifest(
        record(0, hardware=HARM), name=HARM, model=HARM, dataset=HARM, training={"optim": HARM, "adam_epsilon": 1e-8}
    )
    card, plain = write_card(harm, 0), write_card(manifest(record(0), training={"optim": "", "adam_epsilon": 1e-8}), 0)
    assert ModelCard(card).data.to_dict() == ModelCard(plain).data.to_dict()
    # The only markup is the card's own: as many lines, titles, rules and code fences as without.
    assert len(card.splitlines()) == len(plain.splitlines())
    for own in ("\n#", "\n---", "\n```"):
        assert card.count(own) == plain.count(own)
    assert "<script" not in card and "</td" not in card
    # Name, model, hardware and one argument, and the dataset twice.
    assert card.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6
    assert card.count(r"\*boom # \`!\[x\](y)\` \_a\_ \| b") == 6


def test_the_example_of_the_card_loads_a_generation(tmp_path):
    model = create_language_model("test-lstm", WORDS).eval()
    model.save_pretrained(tmp_path)
    word_tokenizer(WORDS).save_pretrained(tmp_path)
    code = section(language_model_card(manifest(record(0)), 0), "Use").split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("FOLDER", str(tmp_path)), names)
    ids = names["tokenizer"]("the cat <eos>", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[0, 1, 2]]
    assert torch.equal(names["model"](ids).logits, model(ids).logits)


def test_images_are_measured_after_the_last_epoch():
    metrics = {"test": {"accuracy": 0.9, "error": 0.1, "nll": 0.5, "ece": 0.02}}
    card = image_classifier_card(manifest(record(0, metrics=metrics)), 0)
    assert "after the last epoch" in card and "best on validation" not in card
    assert ModelCard(card).data.pipeline_tag == "image-classification"
