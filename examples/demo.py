"""A page that shows what every generation of a lineage, and their ensemble, makes of an image or a text.

    pip install -e ".[demo]"
    python examples/demo.py outputs/wide-resnet-digits outputs/lstm-small-ptb
    python examples/demo.py NAMESPACE/densenet-cifar100

A lineage is the folder that it was trained into, or its name on the Hub; the repository of any of its generations does
too. The page is at http://127.0.0.1:7860, for this machine alone, and needs no network.

A Hub Space (SDK: gradio) is this file as app.py, with `born-again[demo]`, or where that is installed from, in
requirements.txt, and the name of the lineage in the Space's variable LINEAGE or in the constant below.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from born_again import LineageEnsemble
from born_again.data.decode import to_rgb
from born_again.data.images import load_images
from born_again.data.text import load_text
from born_again.hub.client import HubError
from born_again.hub.restoring import download_lineage
from born_again.lineage.manifest import MANIFEST_NAME, LineageError, Manifest, check_one_lineage, is_repo_id
from born_again.lineage.members import members_to_choose
from born_again.teacher import positions
from born_again.teacher.inputs import NetworkInputs
from born_again.teacher.loading import task_of
from born_again.teacher.tokenizers import has_tokenizer

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
try:
    import gradio
except ImportError:  # main says so; what computes does without
    gradio = None

LINEAGE = ""  # of a Space; several are separated by white space
LARGEST_ENSEMBLE = 3  # the paper's Ens*3
SHOWN = 5  # classes or words of each network
LONGEST = 1000  # tokens of a text, whose probabilities over the vocabulary have to fit into memory
EXAMPLES = 6
TASKS = ("image-classification", "text-classification", "text-generation")
DATA_ARGS = ("text_column", "image_column", "label_column", "image_size", "test_samples")

TABLE = jinja2.Environment(autoescape=True, trim_blocks=True).from_string("""
<div class="members" tabindex="0" role="group" aria-label="Probabilities"><table>
<caption>{{ caption }}</caption>
<thead><tr><td></td>
{% for name, what in columns %}<th scope="col">{{ name }}<small>{{ what }}</small></th>{% endfor %}
</tr></thead><tbody>
{% for name, shares in rows %}<tr><th scope="row">{{ name }}</th>
{% for share, is_first in shares %}<td style="--share: {{ share }}">
{% if is_first %}<strong>{{ "%.1f"|format(share) }}</strong>{% else %}{{ "%.1f"|format(share) }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody><tfoot>
{% for name, values in last.items() %}<tr><th scope="row">{{ name }}</th>
{% for value in values %}<td>{{ "–" if value is none else "%.2f"|format(value) }}</td>{% endfor %}</tr>
{% endfor %}</tfoot></table></div>
""")
ALERT = jinja2.Environment(autoescape=True).from_string('<p role="alert">{{ message }}</p>')
CSS = """
.gradio-container { --color-accent: #c2410c; --button-primary-background-fill: #c2410c }
.dark .gradio-container, .dark.gradio-container { --color-accent: #fb923c }
.members { overflow-x: auto; --bar: #fed7aa }
.dark .members { --bar: #7c2d12 }
.members :is(table, tr) { border: 0 !important }
.members table { border-collapse: collapse; table-layout: fixed; width: 100% }
.members td { font-variant-numeric: tabular-nums }
.members caption { text-align: left; padding-bottom: .5rem }
.members :is(th, td) { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: .35rem .4rem }
.members :is(thead th, td) { text-align: right }
.members :is(tbody, tfoot) th { text-align: left; font-weight: normal; overflow-wrap: anywhere }
.members thead td { width: 28% }
.members tbody td { background: linear-gradient(to right, var(--bar) calc(var(--share) * 1%), transparent 0) }
.members small { display: block; font-weight: normal }
p[role=alert] { border-left: 4px solid #dc2626; padding: .5rem .75rem }
@media (max-width: 640px) { .members table { font-size: .75rem } .members :is(th, td) { padding: .3rem .1rem } }
"""


@dataclass
class OpenLineage:
    """The finished generations of a lineage, in memory.

    Args:
        manifest: of its folder.
        networks: of each generation, by its index, in eval mode.
        readers: its image processor or tokenizer, likewise.
        averaged: the generations whose mean probability is the ensemble; none where only one is finished.
        task: "image-classification", "text-classification" or "text-generation".
        notes: what a reader has to know of the lineage.
    """

    manifest: Manifest
    networks: Mapping[int, nn.Module]
    readers: Mapping[int, Any]
    averaged: Sequence[int]
    task: str
    notes: list[str] = field(default_factory=list)

    def with_ensemble(self, values: Mapping[int, Tensor]) -> list[Tensor]:
        """Probabilities of each generation, and their mean over those of the ensemble, where there is one."""
        mean = [torch.stack([values[index] for index in self.averaged]).mean(0)] if self.averaged else []
        return [*values.values(), *mean]

    def columns(self) -> list[tuple[str, str]]:
        """Name and kind of each generation, and of the ensemble."""
        records = [self.manifest.generations[index] for index in self.networks]
        names = [(f"gen {own['index']}", "teacher" if own["parent"] is None else "") for own in records]
        return [*names, ("mean", f"of {', '.join(map(str, self.averaged))}")] if self.averaged else names

    def recorded(self) -> dict[str, list[float | None]]:
        """The accuracy in percent, or the perplexity, on the test split, as lineage.json has it."""
        metrics = [self.manifest.generations[index]["metrics"] for index in self.networks]
        if self.averaged:
            ensembles = self.manifest.content.get("ensembles", [])
            same = (own["metrics"] for own in ensembles if sorted(own["members"]) == self.averaged)
            metrics.append(next(same, {}))
        name, unit = ("perplexity", 1) if self.task == "text-generation" else ("accuracy", 100)
        values = [(own.get("test") or {}).get(name) for own in metrics]
        return {f"{name} of the test data": [None if value is None else unit * value for value in values]}

    def name_of(self, index: int) -> str:
        """Of a class or a token."""
        first = next(iter(self.networks))
        if self.task != "text-generation":
            return str(self.networks[first].config.id2label[index])
        return self.readers[first].decode([index]).strip() or self.readers[first].convert_ids_to_tokens(index)


def open_lineage(source: str, downloads: Path) -> OpenLineage:
    """Loads the finished generations of a lineage.

    Args:
        source: folder, or name on the Hub: NAMESPACE/NAME, or the repository of any generation.
        downloads: a new folder for one from the Hub.

    Raises:
        FileNotFoundError: there is no lineage.
        LineageError: no generation is finished, or a file is not what was recorded.
        HubError: the Hub cannot be reached.
        ValueError: a lineage of other networks than image classifiers and causal language models.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        if not is_repo_id(source):
            raise FileNotFoundError(
                f"lineage: got {source!r}, which is no folder here, expected one that a lineage was trained into, or "
                "its name on the Hub, NAMESPACE/NAME; check the spelling."
            )
        download_lineage(source, downloads)
        folder = downloads
    check_one_lineage("lineage", folder)
    if not (folder / MANIFEST_NAME).is_file():
        above = folder.absolute().parent
        remedy = f"give {str(above)!r}" if (above / MANIFEST_NAME).is_file() else "give the --output_dir of a training"
        raise FileNotFoundError(f"lineage: {source!r} has no {MANIFEST_NAME}, expected the folder of one; {remedy}.")
    manifest = Manifest.read(folder)
    finished = [record["index"] for record in manifest.generations if record["status"] == "finished"]
    planned = manifest.spec.generations + 1
    if not finished:
        raise LineageError(
            f"lineage: none of the {planned} generations of {source!r} is finished, expected at least one; run the "
            "command that trains it until the first one is."
        )
    # Verifies the weights, and that all have the same classes or vocabulary.
    networks = LineageEnsemble.from_lineage(folder, finished).networks
    task = task_of(networks[0])
    if task not in TASKS:
        raise ValueError(
            f"lineage: {source!r} is one of {type(networks[0]).__name__}, expected classifiers of images or texts, or "
            "causal language models; load its generations with born_again.load_generation."
        )
    is_text = task != "image-classification"
    if is_text and not has_tokenizer(folder / "gen0"):  # transformers would create an empty one
        raise ValueError(
            f"lineage: {folder / 'gen0'} has no tokenizer, expected the one it was trained with; save it there."
        )
    students = [index for index in members_to_choose(manifest) if index in finished][-LARGEST_ENSEMBLE:]
    averaged = students if len(students) > 1 else finished if len(finished) > 1 else []
    read = (AutoTokenizer if is_text else AutoImageProcessor).from_pretrained
    readers = {index: read(folder / f"gen{index}") for index in finished}
    notes = [] if len(finished) == planned else [f"{len(finished)} of {planned} generations are finished so far."]
    return OpenLineage(manifest, dict(zip(finished, networks, strict=True)), readers, averaged, task, notes)


def examples(lineage: OpenLineage, folder: Path) -> list[tuple[str, str]]:
    """A few items of the test data, where it is on this machine: paths in `folder` or texts, with their labels."""
    spec = lineage.manifest.spec
    if spec.dataset not in ("digits", "grammar") and not Path(spec.dataset).is_dir():
        return []
    options = {name: value for name, value in spec.data_args.items() if name in DATA_ARGS}
    try:
        if lineage.task == "text-generation":
            data = load_text(spec.dataset, **options)
            lines = data.tokenizer.decode(data.test[:2000]).split(data.tokenizer.eos_token)
            starts = [line.split()[: 3 + number % 4] for number, line in enumerate(lines)]
            texts = dict.fromkeys(" ".join(words) for words in starts if len(words) > 2)  # each once
            return [(text, "") for text in texts][:EXAMPLES]
        data = load_images(spec.dataset, max_eval_samples=EXAMPLES, **options)
    except (ValueError, OSError) as error:
        lineage.notes.append(f"Its data cannot be read for examples: {error}")
        return []
    shown = []
    folder.mkdir(parents=True, exist_ok=True)
    for row, (pixels, label) in enumerate(zip(data.test.pixels, data.test.labels, strict=True)):
        Image.fromarray(pixels.numpy()).save(folder / f"{row}.png")
        shown.append((str(folder / f"{row}.png"), data.label_names[label]))
    return shown


# ---- Computing ----


@torch.inference_mode()
def class_probabilities(lineage: OpenLineage, value: str | Path) -> list[Tensor]:
    """The class probabilities of an image or a text, which each generation reads with its own preprocessing.

    Args:
        lineage: of classifiers.
        value: path of an image of any mode and size, see `born_again.data.decode.to_rgb`; or a text.

    Returns:
        (classes,) float64 of each generation, and of the ensemble.

    Raises:
        ValueError: it cannot be read, or is too long.
    """
    is_image = lineage.task == "image-classification"
    read = _read_image(value) if is_image else _read_text(str(value))
    probabilities = {}
    for index, network in lineage.networks.items():
        inputs = lineage.readers[index](read, return_tensors="pt")  # of one item
        if not is_image:
            _check_length(lineage, index, inputs["input_ids"].shape[1])
        logits = network(**NetworkInputs(network, "student").of(inputs)).logits  # (1, classes)
        probabilities[index] = logits[0].double().softmax(-1)
    return lineage.with_ensemble(probabilities)


def _read_image(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = str(error).replace(str(path), Path(path).name)
        raise ValueError(f"image: {reason}; expected a picture such as PNG or JPEG, save it anew.") from error


def _read_text(text: str) -> str:
    if not text.strip():
        raise ValueError("text: got none, expected a few words; type some, or choose an example.")
    return text.strip()


def _check_length(lineage: OpenLineage, index: int, tokens: int) -> None:
    limit = min(LONGEST, lineage.readers[index].model_max_length, positions(lineage.networks[index]) or LONGEST)
    if tokens > limit:
        raise ValueError(
            f"text: got {tokens} tokens, those that begin or end a text among them, and generation {index} reads at "
            f"most {limit}; expected no more, shorten it."
        )


@dataclass
class Continuation:
    """What follows a text.

    Args:
        probabilities: (vocabulary,) float64 of the next token, of each generation, and of the ensemble.
        perplexities: of the text, likewise; per token as the tokenizer cuts it.
        unknown: words that are read as the unknown token.
    """

    probabilities: list[Tensor]
    perplexities: list[float]
    unknown: list[str]


@torch.inference_mode()
def continuation(lineage: OpenLineage, text: str) -> Continuation:
    """Next-token probabilities after a text, and its perplexity.

    Every token is predicted from all before it, and the first from an end of text, as in training.

    Args:
        lineage: of language models.
        text: white space at its ends does not count.

    Raises:
        ValueError: an empty text, one longer than a network reads, or of words that it cannot read.
    """
    text = _read_text(text)
    of_text, of_next, unknown = {}, {}, []
    for index, network in lineage.networks.items():
        tokenizer = lineage.readers[index]
        tokens, unknown = _tokens(tokenizer, text)
        _check_length(lineage, index, len(tokens))
        ids = torch.tensor(tokens)
        probabilities = network(input_ids=ids[None]).logits[0].double().softmax(-1)  # (tokens, vocabulary)
        of_next[index] = probabilities[-1, : len(tokenizer)]  # some networks have more outputs than there are tokens
        of_text[index] = probabilities[:-1].gather(1, ids[1:, None]).squeeze(1)  # (tokens - 1,)
    perplexities = [own.log().mean().neg().exp().item() for own in lineage.with_ensemble(of_text)]
    return Continuation(lineage.with_ensemble(of_next), perplexities, unknown)


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Token ids behind an end of text, and the words that became the unknown token."""
    try:
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception as error:  # tokenizers has no narrower one for a word of which it has neither whole nor parts
        known = tokenizer.get_vocab()
        words = [word for word in text.split() if word not in known]
        near = difflib.get_close_matches(words[0].lower(), known, n=1) if words else []
        raise ValueError(
            f"text: {_listed(words)} not among the {len(known)} words that the lineage was trained on, expected those "
            f"alone; {f'did you mean {near[0]!r}?' if near else 'take words of the examples.'}"
        ) from error
    unknown, ids = tokenizer.unk_token_id, read["input_ids"]
    spans = [span for token, span in zip(ids, read["offset_mapping"], strict=True) if token == unknown]
    written = [text[start:end] for start, end in spans if text[start:end] != tokenizer.unk_token]
    before = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return ([] if before is None else [before]) + ids, written


def _listed(words: Sequence[str], most: int = 5) -> str:
    different = list(dict.fromkeys(words))
    more = [f"{len(different) - most} more"] if len(different) > most else []
    return ", ".join([*(repr(word[:40]) for word in different[:most]), *more])


# ---- The page ----


def table(
    lineage: OpenLineage, caption: str, probabilities: Sequence[Tensor], last: Mapping[str, Sequence[float | None]]
) -> str:
    """HTML of the most probable classes of every network, in the order of the last one's probabilities.

    Args:
        lineage: that they are of.
        caption: of the table.
        probabilities: (classes,) of each network.
        last: rows at the end: a number of each network, by their names.
    """
    count = min(SHOWN, len(probabilities[0]))
    chosen = {index for own in probabilities for index in own.topk(count).indices.tolist()}
    rows = [
        (lineage.name_of(index), [(100 * own[index].item(), own.argmax() == index) for own in probabilities])
        for index in sorted(chosen, key=lambda index: -probabilities[-1][index])
    ]
    return TABLE.render(caption=caption, columns=lineage.columns(), rows=rows, last=last)


def answer(lineage: OpenLineage, value: str | None) -> str:
    """What the page shows for the path of an image, or for a text: a table, or what is wrong with it."""
    recorded = {name: values for name, values in lineage.recorded().items() if any(values)}
    try:
        if lineage.task == "text-generation":
            found = continuation(lineage, value or "")
            unread = f" Unknown, and read as such: {_listed(found.unknown)}." if found.unknown else ""
            last = {"perplexity of the text": found.perplexities, **recorded}
            return table(lineage, f"Probability of the next word, in percent.{unread}", found.probabilities, last)
        if value is None:
            return ""
        return table(lineage, "Probability of each class, in percent.", class_probabilities(lineage, value), recorded)
    except ValueError as error:
        return ALERT.render(message=error)


def build_page(lineages: Sequence[OpenLineage], folder: Path) -> Any:
    """The page, a gradio.Blocks, with a part for each lineage; images of examples are written into the folder."""
    with gradio.Blocks(title="born_again", analytics_enabled=False) as page:
        gradio.Markdown(f"# {lineages[0].manifest.spec.name if len(lineages) == 1 else 'Lineages'}")
        for number, lineage in enumerate(lineages):
            spec, shown = lineage.manifest.spec, examples(lineage, folder / f"examples{number}")
            title = f"{spec.name}, seed {spec.seed}"
            with contextlib.nullcontext() if len(lineages) == 1 else gradio.Accordion(title, open=number == 0):
                _add(lineage, shown)
    return page


def _add(lineage: OpenLineage, shown: Sequence[tuple[str, str]]) -> None:
    """The part of the page that is of one lineage."""
    spec = lineage.manifest.spec

    def show(value: str | None) -> str:
        return answer(lineage, value)

    def choose(event: gradio.SelectData) -> str:
        return shown[event.index][0]

    gradio.Markdown(f"{spec.model} on {spec.dataset}, objective {spec.objective}. {' '.join(lineage.notes)}")
    is_image, given = lineage.task == "image-classification", None
    with gradio.Row():
        with gradio.Column(scale=2, min_width=300):
            if is_image:
                kinds = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"]}
                source = gradio.Image(label="Image", height=240, **kinds)
                # Else Pillow's errors for damaged files, which answer() puts into words, would end the request.
                source.preprocess = lambda payload: None if payload is None else payload.path
            else:
                source = gradio.Textbox(label="Text", placeholder="Type some words", max_length=20_000)
                asks = "What comes next?" if lineage.task == "text-generation" else "Classify"
                button = gradio.Button(asks, variant="primary")
            if shown and is_image:
                gradio.Markdown("Test data, with labels")
                look = {"allow_preview": False, "buttons": [], "show_label": False}
                gallery = gradio.Gallery(list(shown), columns=EXAMPLES, height=140, **look)
                gallery.select(choose, None, source)
            elif shown:
                given = gradio.Examples([[text] for text, _ in shown], source, label="Test data")
        with gradio.Column(scale=3, min_width=300):
            result = gradio.HTML(label="Result")
    gradio.on([source.change] if is_image else [button.click, source.submit], show, source, result)
    if given is not None:
        given.load_input_event.then(show, source, result)


def launch_options() -> dict[str, Any]:
    """The look of the page: no font or style from elsewhere."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return {"theme": gradio.themes.Default(**fonts), "css": CSS, "footer_links": []}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lineages", nargs="*", metavar="OUTPUT_DIR_OR_HUB_ID")
    parser.add_argument("--port", type=int, help="of the page; the first free one from 7860 when not given")
    given = parser.parse_args(arguments)
    sources = given.lineages or (os.environ.get("LINEAGE") or LINEAGE).split()
    disable_progress_bar()  # of weights that load in milliseconds
    try:
        if not sources:
            raise ValueError("lineage: got none, expected a folder or a name on the Hub; give it, or set LINEAGE.")
        if gradio is None:
            raise ValueError('gradio: is not installed, expected it for the page; pip install -e ".[demo]".')
        with tempfile.TemporaryDirectory() as scratch:
            folders = [Path(scratch) / f"lineage{number}" for number in range(len(sources))]
            lineages = [open_lineage(source, folder) for source, folder in zip(sources, folders, strict=True)]
            build_page(lineages, Path(scratch)).launch(server_port=given.port, **launch_options())
    except (ValueError, LineageError, HubError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
