"""examples/demo.py: what it computes against plain transformers, what it says, and its page in a browser."""

import base64
import html
import re

import numpy as np
import pytest
import torch
from browser import DESKTOP, PHONE, chromium, opened
from example_scripts import load_example
from lineage_folders import LABELS, WORDS, copy, lineage, network
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from born_again import LineageEnsemble
from born_again.hub.publishing import publish_lineage
from born_again.lineage.manifest import LineageError, Manifest

demo = load_example("demo")
KNOWN = ["the", "cat", "<eos>", "sat", "mat", "on"]


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    networks = [network("image", 0, statistics=([0.2] * 3, [0.5] * 3)), network("image", 1), network("image", 2)]
    return lineage(tmp_path_factory.mktemp("images") / "out", networks)


@pytest.fixture(scope="module", params=["lstm", "gpt2"])
def texts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "out"
    return lineage(folder, [network(request.param, seed) for seed in range(2)], words=[WORDS] * 2)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def opened_lineage(folder):
    return demo.open_lineage(str(folder), folder / "unused")


def test_an_image_has_the_probabilities_of_plain_transformers_and_the_ensemble_is_their_mean(images, picture):
    found = demo.class_probabilities(opened_lineage(images), picture)
    for index, own in enumerate(found[:3]):
        folder = images / f"gen{index}"
        model = AutoModelForImageClassification.from_pretrained(folder).double()
        pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            torch.testing.assert_close(own, model(pixels.double()).logits[0].softmax(-1), rtol=0, atol=1e-5)
    # The students, which were trained on images prepared as the second processor does.
    ensemble = LineageEnsemble.from_lineage(images, "last 2")
    expected = ensemble(pixel_values=pixels).logits[0].double().softmax(-1)
    torch.testing.assert_close(found[3], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_text_has_the_probabilities_and_perplexity_of_plain_transformers(texts):
    found = demo.continuation(opened_lineage(texts), " the cat sat\n")
    words = [WORDS.index(word) for word in ("<eos>", "the", "cat", "sat")]
    of_words, following = [], []
    for index in range(2):
        model = AutoModelForCausalLM.from_pretrained(texts / f"gen{index}").double()
        with torch.no_grad():
            probabilities = model(torch.tensor([words])).logits[0].softmax(-1)
        of_words.append(torch.stack([probabilities[place, word] for place, word in enumerate(words[1:])]))
        following.append(probabilities[-1])
    of_words.append(torch.stack(of_words).mean(0))
    following.append(torch.stack(following).mean(0))
    for own, expected in zip(found.probabilities, following, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    perplexities = [own.log().mean().neg().exp().item() for own in of_words]
    assert found.perplexities == pytest.approx(perplexities, rel=1e-4) and found.unknown == []


def tiny_bert():
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        initializer_range=1.0,
    )


def test_a_text_has_the_class_probabilities_of_plain_transformers(tmp_path):
    networks = [BertForSequenceClassification(tiny_bert()).eval() for _ in range(2)]
    mine = opened_lineage(lineage(tmp_path / "out", networks, words=[WORDS] * 2))
    found = demo.class_probabilities(mine, "the cat sat")
    ids = torch.tensor([[WORDS.index(word) for word in ("the", "cat", "sat")]])
    with torch.no_grad():
        expected = [model.double()(ids).logits[0].softmax(-1) for model in networks]
    for own, plain in zip(found, [*expected, torch.stack(expected).mean(0)], strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)
    assert "LABEL_2" in demo.answer(mine, "the cat sat") and "text: got 9 tokens" in demo.answer(mine, "the " * 9)


def test_other_tasks_are_refused(tmp_path):
    folder = lineage(tmp_path / "out", [BertForTokenClassification(tiny_bert())], words=[WORDS])
    with pytest.raises(ValueError, match="one of BertForTokenClassification, expected classifiers of images or texts"):
        opened_lineage(folder)


def test_unknown_words_are_read_as_such_and_said(texts):
    found = demo.continuation(opened_lineage(texts), "the dog <unk> <b>")
    assert found.unknown == ["dog", "<b>"]
    shown = demo.answer(opened_lineage(texts), "the dog <b>")
    assert "Unknown, and read as such: &#39;dog&#39;, &#39;&lt;b&gt;&#39;." in shown and "<b>" not in shown
    same = demo.continuation(opened_lineage(texts), "the <unk> <unk> <unk>")
    assert same.perplexities == found.perplexities


def test_without_an_unknown_token_only_known_words_are_read(tmp_path):
    folder = lineage(tmp_path / "out", [network("lstm", seed) for seed in range(2)], words=[KNOWN] * 2)
    with pytest.raises(ValueError, match="text: 'Mats', 'in' not among the 6 words .* did you mean 'mat'?"):
        demo.continuation(opened_lineage(folder), "the Mats in")


@pytest.mark.parametrize(
    ("text", "message"), [(" \n", "text: got none"), ("the " * 1000, "text: got 1001 tokens, .*")]
)
def test_texts_that_cannot_be_read_are_refused(texts, text, message):
    limit = 8 if "gpt2" in str(texts) else 1000
    with pytest.raises(ValueError, match=message) as refused:
        demo.continuation(opened_lineage(texts), text)
    assert "none" in message or f"at most {limit};" in str(refused.value)
    assert html.escape(str(refused.value)).replace("&#x27;", "&#39;") in demo.answer(opened_lineage(texts), text)


def test_transparent_and_16_bit_images_are_read_as_in_training(images, tmp_path):
    values = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    alpha = np.zeros_like(values)
    Image.fromarray(np.stack([values] * 3 + [alpha], axis=-1)).save(tmp_path / "transparent.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "16bit.png")
    Image.fromarray(values).save(tmp_path / "8bit.png")
    mine = opened_lineage(images)
    for unusual, plain in (("transparent", "white"), ("16bit", "8bit")):
        found = [demo.class_probabilities(mine, tmp_path / f"{name}.png") for name in (unusual, plain)]
        assert all(map(torch.equal, *found)), unusual


def test_an_image_that_cannot_be_read_is_refused(images, picture, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:500])
    for path in (broken, images / "lineage.json"):
        with pytest.raises(ValueError, match="image: .*expected a picture such as PNG or JPEG"):
            demo.class_probabilities(opened_lineage(images), path)
        assert '<p role="alert">image: ' in demo.answer(opened_lineage(images), str(path))


def test_the_table_shows_every_network_and_its_record(images, picture):
    mine = opened_lineage(images)
    shown = demo.answer(mine, str(picture))
    rows = [re.findall(r"<(?:th|td)[^>]*>(.*?)</(?:th|td)>", row, re.S) for row in shown.split("<tr>")[1:]]
    assert [re.sub("<.*?>", " ", cell).split() for cell in rows[0][1:]] == [
        ["gen", "0", "teacher"],
        ["gen", "1"],
        ["gen", "2"],
        ["mean", "of", "1,", "2"],
    ]
    found = demo.class_probabilities(mine, picture)
    best_first = sorted(range(3), key=lambda label: -found[-1][label])
    assert [row[0] for row in rows[1:4]] == [LABELS[label] for label in best_first]
    for label, row in zip(best_first, rows[1:4], strict=True):
        shares = [float(re.sub("<.*?>", "", cell)) for cell in row[1:]]
        assert shares == [float(f"{100 * own[label].item():.1f}") for own in found]
    assert rows[4] == ["accuracy of the test data", "50.00", "50.00", "50.00", "–"]


def test_labels_are_escaped(tmp_path, picture):
    folder = lineage(tmp_path / "out", [network("image", 0, labels=["<script>", "b", "c"])])
    shown = demo.answer(opened_lineage(folder), str(picture))
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "mean" not in shown


def test_an_unfinished_lineage_shows_what_is_finished(images, tmp_path, picture):
    unfinished = copy(images, tmp_path / "unfinished")
    manifest = Manifest.read(unfinished)
    manifest.update(2, status="training")
    manifest.save()
    mine = opened_lineage(unfinished)
    assert mine.notes == ["2 of 3 generations are finished so far."] and list(mine.networks) == [0, 1]
    assert mine.averaged == [0, 1] and len(demo.class_probabilities(mine, picture)) == 3
    del manifest.generations[:]
    manifest.save()
    with pytest.raises(LineageError, match="none of the 3 generations of .* is finished"):
        opened_lineage(unfinished)


@pytest.mark.parametrize(
    ("name", "message"), [("gen1", "has no lineage.json.* give '.*out'"), ("missing", "is no folder here")]
)
def test_what_is_no_lineage_is_refused(images, name, message):
    with pytest.raises(FileNotFoundError, match=f"lineage: .*{message}"):
        demo.open_lineage(str(images / name), images)


def test_a_lineage_comes_from_the_hub(logged_in_hub, images, picture, tmp_path):
    published = copy(images, tmp_path / "published")
    assert publish_lineage(published, "born-again") == {}
    mine = demo.open_lineage("born-again/tiny-gen1", tmp_path / "new")
    found = demo.class_probabilities(mine, picture)
    assert all(map(torch.equal, found, demo.class_probabilities(opened_lineage(images), picture)))


def test_the_command_says_what_is_missing(images, monkeypatch, capsys):
    monkeypatch.delenv("LINEAGE", raising=False)
    assert demo.main([]) == 2 and "demo: lineage: got none, expected a folder" in capsys.readouterr().err
    monkeypatch.setenv("LINEAGE", str(images / "nowhere"))
    monkeypatch.setattr(demo, "gradio", None)
    assert demo.main([]) == 2 and 'pip install -e ".[demo]"' in capsys.readouterr().err
    monkeypatch.setattr(demo, "gradio", object())
    assert demo.main([]) == 2 and "nowhere' , which is no folder".replace(" ,", ",") in capsys.readouterr().err


def test_examples_are_of_the_test_data(tmp_path):
    digits = opened_lineage(lineage(tmp_path / "images", [network("image", 0)], dataset="digits"))
    shown = demo.examples(digits, tmp_path / "examples")
    assert len(shown) == 6 and len({label for _, label in shown}) > 1
    assert all(Image.open(path).size == (32, 32) and label.isdigit() for path, label in shown)
    folder = lineage(tmp_path / "texts", [network("lstm", 0)], words=[WORDS], dataset="grammar")
    assert all(len(text.split()) > 2 for text, _ in demo.examples(opened_lineage(folder), tmp_path / "examples"))
    elsewhere = opened_lineage(lineage(tmp_path / "elsewhere", [network("image", 0)], dataset="owner/name"))
    assert demo.examples(elsewhere, tmp_path / "examples") == []


# ---- In a browser ----

DROP = """([area, content]) => {
    const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "picture.png", {type: "image/png"}));
    area.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


@pytest.fixture(scope="module")
def address(images, tmp_path_factory):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install .[demo]")
    folder = tmp_path_factory.mktemp("page")
    digits = lineage(folder / "digits", [network("image", seed) for seed in range(2)], dataset="digits")
    networks = [network("lstm", seed) for seed in range(2)]
    words = lineage(folder / "words", networks, words=[KNOWN] * 2, dataset="grammar")
    page = demo.build_page([opened_lineage(digits), opened_lineage(words)], folder)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, **demo.launch_options())
    assert address.startswith("http://127.0.0.1:") and not page.share
    yield address, digits
    page.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def cells(page, row):
    """The numbers in a row of a table that is shown."""
    return page.get_by_role("row", name=row).get_by_role("cell").all_inner_texts()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "theme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_an_image_is_dropped_and_words_are_typed(address, browser, picture, size, theme):
    address, digits = address
    with opened(browser, f"{address}?__theme={theme}", size) as found:
        page = found.page
        page.set_default_timeout(60_000)
        area = page.get_by_role("button", name="Drop").element_handle()
        page.evaluate(DROP, [area, base64.b64encode(picture.read_bytes()).decode()])
        page.get_by_role("table").wait_for()
        expected = demo.class_probabilities(opened_lineage(digits), picture)
        for label, name in enumerate(LABELS):
            assert cells(page, re.compile(f"^{name} ")) == [f"{100 * own[label].item():.1f}" for own in expected]
        page.get_by_role("button", name="tiny, seed").nth(1).click()
        page.get_by_label("Text").fill("the cats")
        page.get_by_role("button", name="What comes next?").click()
        page.get_by_text("did you mean 'cat'?").wait_for()
        page.get_by_label("Text").fill("the cat")
        page.get_by_label("Text").press("Enter")
        page.get_by_role("row", name="perplexity of the text").wait_for()
        perplexities = demo.continuation(opened_lineage(digits.parent / "words"), "the cat").perplexities
        assert cells(page, "perplexity of the text") == [f"{value:.2f}" for value in perplexities]
        before = page.get_by_role("table").first.inner_text()
        page.get_by_role("button", name="Thumbnail 1").click()
        page.wait_for_function("before => document.querySelector('.members table').innerText != before", arg=before)
        assert not found.scrolls_sideways()
        # Of gradio's gallery, where the captions are the alternative texts too.
        assert found.accessibility_violations("image-redundant-alt") == []
        # gradio says the first wherever there is an image; the second ends when there is nothing to wait for.
        known = ("Method not implemented", "/gradio_api/queue/data")
        assert [problem for problem in found.problems if not any(own in problem for own in known)] == []
