"""Names, labels and settings of users in a card: shown as what they are, and never obeyed."""

import ast
import re

import pytest
from card_manifests import HUB, IMAGE_METRICS, TEXT_METRICS, codes, data_of, ensemble, manifest, record
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from born_again.hub.model_card import (
    _environment,
    ensemble_card,
    image_classifier_card,
    language_model_card,
    one_line,
    plain,
)

HARM = [
    "</td><script>alert(1)</script>",
    "*anchor",
    "&a [*a,*a,*a]",
    "---",
    "a\n---\nlicense: mit\n---\n# Title",
    "line\r\nbreaks\u2028and\x85more\x00\x1b[31m\u202e",
    "{{ jinja }} {% raw %} ${title} $title $$x$$",
    "key: value # no comment",
    "!!python/object/apply:os.system ['true']",
    "```\n# Out of the fence\n```",
    "| a | b |\n|---|---|",
    "[text](javascript:alert(1)) ![x](https://example.com/x.png)",
    "<https://example.com> https://example.com www.example.com",
    "# Title",
    "1. item",
    "- item",
    "\N{FAMILY} \N{PILE OF POO}",
    "lone \ud800 surrogate",
    "x" * 10_000,
    "'\"\\",
    " ",
]


def harmed(text: str, kind: str = "image") -> dict:
    """A manifest with a text in every place where it may come from a user."""
    content = manifest(
        *(
            record(
                index,
                kind,
                objective=text if index else "label",
                hardware=text,
                versions={text: text},
                metrics={text: {text: 0.5}, **(IMAGE_METRICS if kind == "image" else TEXT_METRICS)},
                hub={"repo": text, "commit": text},
            )
            for index in range(2)
        ),
        kind=kind,
        hub={**HUB, "namespace": text, "pattern": text, "branch": text, "license": text, "newest": text},
    )
    content["name"] = text
    content["data"] = {"rows": {"test": 10, text: 5}, "revision": text}
    arguments = {text: text, "nested": {text: [text]}}
    content["spec"] |= {"model": text, "dataset": text, "training": arguments}
    content["spec"] |= {"model_args": arguments, "data_args": {**arguments, "max_eval_samples": text}}
    return content


def check_harmless(text: str) -> None:
    for kind, write in (("image", image_classifier_card), ("text", language_model_card)):
        content = harmed(text, kind)
        usual = harmed("no harm", kind)
        pairs = [(write(content, index), write(usual, index)) for index in range(2)]
        pairs.append(tuple(ensemble_card(held, ensemble(0, 1, average=held["name"])) for held in (content, usual)))
        for card, expected in pairs:
            check_card(card, expected)


def check_card(card: str, usual: str) -> None:
    """Of a card with a text of a user, and the same card with harmless words in its place."""
    card.encode()
    held, expected = data_of(card), data_of(usual)
    assert ModelCard(str(ModelCard(card))).data.to_dict() == held  # also as the Hub's library writes it
    matter = card.split("\n---\n")[0]
    assert set(expected) - {"license"} <= set(held) and "&id" not in matter and "<" not in matter
    body, usual_body = (ModelCard(text).text for text in (card, usual))
    # The only structure is the card's own: titles, fences, rules, items, tables and code are as many and as they were.
    for form in (r"^#+ ", r"^```", r"^---", r"^- ", r"^\|", r"^\d+[.)]\s", r"^!\[", r"^[+=>]"):
        assert len(re.findall(form, body, re.MULTILINE)) == len(re.findall(form, usual_body, re.MULTILINE)), form
    for code in codes(card):
        ast.parse(code)
    assert "FOLDER" not in card or codes(card) == codes(usual)
    outside = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside and not re.search(r"(?<!\\)\$|(?<!\\)\{|(?<!\\)~", outside)
    assert len(body) < 20_000 and not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\u2028\x85]", card)
    assert not re.search(r"(?<!\\)\]\((?!https://huggingface.co/)", outside)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1


@pytest.mark.parametrize("text", HARM, ids=lambda text: ascii(text[:20]))
def test_text_of_users_stays_text(text):
    check_harmless(text)


@settings(max_examples=25, deadline=None)
@given(st.text("\\`*_{}[]()<>#+-=.!|~&$'\": \n\t%@/ab1é\u2028\U0001f600", min_size=1, max_size=40))
def test_any_text_of_users_stays_text(text):
    check_harmless(text)


def test_a_template_cannot_show_what_is_not_there_nor_leave_a_value_as_it_is():
    template = _environment().from_string("{{ 'a' if held else held }}{{ held }}{% if not lost.deeper %}!{% endif %}")
    assert template.render(held="|") == r"a\|!"
    with pytest.raises(UndefinedError, match="uses a value that its manifest lacks: held"):
        template.render()


def test_front_matter_holds_the_text_itself():
    name = "</td><script> \\x3C: *a '\" {{b}} \N{PILE OF POO}"
    held = data_of(image_classifier_card(manifest(record(0, objective=name)), 0))
    assert held["born_again"]["objective"] == name
    numbers = ["1e3", "0o17", "12345", "1_0", ".inf", "yes", "null", "2026-01-01", "~"]
    versions = {f"v{place}": text for place, text in enumerate(numbers)}
    card = image_classifier_card(manifest(record(0, versions=versions)), 0)
    assert data_of(card)["born_again"]["versions"] == versions
    assert all(re.search(rf"v{place}: [\"']{re.escape(text)}[\"']", card) for place, text in enumerate(numbers))


def test_text_is_shown_as_it_is():
    assert plain("wide-resnet (3.5 + 1) é \N{PILE OF POO}") == "wide-resnet (3.5 + 1) é \N{PILE OF POO}"
    assert plain("</td><script>") == "&lt;/td&gt;&lt;script&gt;"
    assert plain("# a *b* [c](d) `e` | $f") == r"\# a \*b\* \[c\](d) \`e\` \| \$f"
    assert one_line("a\n b\x00c") == "a b c" and len(one_line("x" * 10_000)) == 300


@pytest.mark.parametrize(
    "value",
    [
        "/home/someone/deep/file.json",
        "config=/home/someone/deep/file.json,b=1",
        "file:///home/someone/deep/file.json",
        "~/someone/deep/file.json",
        "C:\\Users\\someone\\file.json",
        ["/home/someone/file.json"],
        {"/home/someone/key": {"path": "../someone/file.json"}},
    ],
)
def test_no_path_of_this_machine_is_published(value):
    content = manifest(
        record(0, hardware=f"CPU of {value}", versions={"torch": f"2 @ {value}"}),
        training={"deepspeed": value},
        model_args={"weights": value},
        data_args={"files": value},
        model="/home/someone/models/mine",
        hub=HUB,
    )
    for card in (image_classifier_card(content, 0), ensemble_card(content, ensemble(0))):
        assert "someone" not in card and "deep/" not in card and "Users" not in card
    assert "file.json" in card or "file.json" in image_classifier_card(content, 0)
    assert "https://huggingface.co/x/y" in one_line("see https://huggingface.co/x/y and a/b")
