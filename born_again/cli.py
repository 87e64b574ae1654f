"""The command born-again: what can be done with lineages after their training; also python -m born_again.cli.

    born-again train cifar --dataset digits --generations 3
    born-again status OUTPUT_DIR
    born-again evaluate OUTPUT_DIR/gen2
    born-again card OUTPUT_DIR
    born-again report OUTPUT_DIR
    born-again compare OUTPUT_DIR OTHER_DIR
    born-again publish OUTPUT_DIR --namespace NAME
    born-again plan --model densenet90_60_cifar --batch 128 --processes 8

Exit status: 0; 1 if evaluate finds a difference to the record, or publish leaves something unpublished; 2 for invalid
arguments or files, 130 after an interrupt. `eval "$(born-again completion bash)"` completes commands and options.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Column -> split, metric, factor and format; shown if a generation has the metric.
_METRICS = {
    "accuracy": ("test", "accuracy", 100, ".2f"),
    "valid. ppl": ("validation", "perplexity", 1, ".2f"),
    "test ppl": ("test", "perplexity", 1, ".2f"),
    "NLL": ("test", "nll", 1, ".4f"),
    "ECE": ("test", "ece", 100, ".2f"),
}


_EXIT_STATUS = {
    "train": "0 when the lineage is finished, else that of the script, see its --help",
    "evaluate": "0 if the result agrees with the record, or there is none to compare with; 1 if it differs",
    "publish": "0 if everything that is finished is published; 1 if something is not",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments after the program's name; None reads sys.argv.

    Returns:
        The exit status.

    Raises:
        SystemExit: after --help and --version.
    """
    # Imports are in the functions, so that every command loads only what it needs.
    from born_again.lineage.manifest import LineageError

    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        arguments = _parser().parse_args(argv)
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if isinstance(error, RuntimeError) and not (isinstance(error, LineageError) or _is_hub_error(error)):
            raise
        if debug:
            traceback.print_exc()
        print(f"born-again: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _is_hub_error(error: RuntimeError) -> bool:
    from born_again.hub.client import HubError

    return isinstance(error, HubError)


class _Parser(argparse.ArgumentParser):
    """Raises its errors, so that they are printed as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the options.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "born-again",
        description="Trains and manages lineages of born-again networks.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_status(commands)
    _add_evaluate(commands)
    _add_card(commands)
    _add_report(commands)
    _add_publish(commands)
    _add_compare(commands)
    _add_plan(commands)
    _add_completion(commands)
    parser.add_argument("--version", action=_Version)
    parser.epilog = "born-again COMMAND --help lists the options and exit status of a command."
    for name, command in commands.choices.items():
        command.add_argument("--debug", action="store_true", help="Show where an error was raised.")
        command.epilog = f"Exit status: {_EXIT_STATUS.get(name, '0')}; 2 after an error, which is one line on stderr."
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="Print the version.")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"born-again {version('born-again')}")
        parser.exit()


def _examples() -> Path:
    """Where the training scripts and recipes are: in the installed package, or beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parent / "examples"


def _add_train(commands: Any) -> None:
    folder = _examples()
    description = "Runs a training script, which needs no checkout of the repository."
    parser = commands.add_parser(
        "train",
        help=description,
        description=f"{description} The scripts, and recipes for --config, are in {folder}. On several devices: "
        "accelerate launch -m born_again.cli train SCRIPT ...",
        allow_abbrev=False,
    )
    scripts = sorted(path.stem.removeprefix("run_") for path in folder.glob("run_*.py"))
    parser.add_argument("script", choices=scripts, help="born-again train SCRIPT --help lists its flags.")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="Flags of the script.")
    parser.set_defaults(run=_train)


def _add_status(commands: Any) -> None:
    description = "Shows results, progress and next step of a lineage; read-only, also during a run."
    parser = commands.add_parser("status", help=description, description=description, allow_abbrev=False)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder of the lineage, or of several seeds.")
    parser.add_argument("--verify", action="store_true", help="Also verify the hashes of the weights.")
    parser.add_argument("--json", action="store_true", help="Print the facts as one JSON object.")
    parser.set_defaults(run=_status)


def _add_evaluate(commands: Any) -> None:
    description = "Evaluates a generation or an ensemble again, and compares with its record."
    parser = commands.add_parser("evaluate", help=description, description=description, allow_abbrev=False)
    parser.add_argument(
        "path", metavar="PATH_OR_HUB_ID", help="OUTPUT_DIR/gen2, OUTPUT_DIR/ensemble, or a Hub repository."
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the Hub repository.")
    parser.add_argument("--dataset", help="Dataset to evaluate on; the lineage's when not given.")
    parser.add_argument("--dataset_revision", help="Branch, tag or commit of a Hub dataset.")
    for name in ("image_column", "label_column", "text_column"):
        parser.add_argument(f"--{name}", help="The lineage's, or found by its type.")
    parser.add_argument("--image_size", type=int, metavar="N", help="The lineage's, or that of config.json.")
    parser.add_argument("--max_eval_samples", type=int, metavar="N", help="Evaluate on at most N items.")
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        help="Images per batch, or streams of a stateless language model.",
    )
    parser.add_argument("--device", help="cpu, cuda:0 ...; the accelerator if there is one.")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="Allowed absolute or relative difference to the record; 0.0001 when not given.",
    )
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON object.")
    parser.set_defaults(run=_evaluate)


def _add_card(commands: Any) -> None:
    description = "Renders the cards of a lineage's generations and ensemble again, from lineage.json."
    parser = commands.add_parser("card", help=description, description=description, allow_abbrev=False)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder of the lineage.")
    parser.add_argument("--json", action="store_true", help="Print the paths as one JSON object.")
    parser.set_defaults(run=_card)


def _add_report(commands: Any) -> None:
    description = "Writes report.html and report.png of a lineage: results, curves, calibration, what changed."
    parser = commands.add_parser("report", help=description, description=description, allow_abbrev=False)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder of the lineage, or of several seeds.")
    parser.add_argument("--json", action="store_true", help="Print the written files as one JSON object.")
    parser.set_defaults(run=_report)


def _add_publish(commands: Any) -> None:
    description = "Publishes finished generations, ensemble and collection that are not on the Hub."
    parser = commands.add_parser("publish", help=description, description=description, allow_abbrev=False)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="Folder of the lineage.")
    parser.add_argument("--namespace", help="User or organisation; that of the lineage when not given.")
    parser.add_argument("--name_pattern", help="Pattern of the repository names, such as '{name}-gen{index}'.")
    parser.add_argument("--private", action="store_true", default=None, help="Make new repositories private.")
    parser.add_argument("--branch", help="Commit to this branch.")
    parser.add_argument("--license", help="License in the cards, such as apache-2.0.")
    parser.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        help="Whether report.png is published too, and shown in the cards; report.html never is.",
    )
    parser.add_argument("--json", action="store_true", help="Print what is not published, and why, as JSON.")
    parser.set_defaults(run=_publish)


def _add_compare(commands: Any) -> None:
    description = "Compares finished lineages of the same data: seeds, objectives, controls."
    parser = commands.add_parser("compare", help=description, description=description, allow_abbrev=False)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="Folder of a lineage, or of several seeds.")
    parser.add_argument(
        "--against",
        metavar="DIR",
        help="Differences from its last generation of the same seed, not the teacher; or from DIR/gen1, DIR/ensemble.",
    )
    parser.add_argument(
        "--select_on_validation", action="store_true", help="Also show the student that was best on validation."
    )
    parser.add_argument(
        "--allow_unfinished", action="store_true", help="Take what is finished of unfinished lineages."
    )
    parser.add_argument("--csv", metavar="FILE", help="Also write the table as CSV, with every number.")
    parser.add_argument("--figure", metavar="FILE", help="Also draw the differences, as a .png, .svg or .pdf.")
    parser.add_argument("--json", action="store_true", help="Print the comparison as one JSON object.")
    parser.set_defaults(run=_compare)


def _add_plan(commands: Any) -> None:
    description = (
        "Computes what a training step needs on so many processes: memory of each, bytes that each sends, hours."
    )
    parser = commands.add_parser("plan", help=description, description=description, allow_abbrev=False)
    parser.add_argument(
        "--model",
        required=True,
        help="A timm architecture, lstm-large and so on, a transformers model type such as llama, a folder or Hub id.",
    )
    parser.add_argument("--batch", type=int, required=True, help="Rows of an optimisation step, of all processes.")
    for name, text in {
        "processes": "One for each GPU; 1 when not given.",
        "accumulation": "Micro-batches of a step; 1 when not given.",
        "classes": "Of an image network; 10 when not given.",
        "image_size": "Side in pixels, of an image network; 32 when not given.",
        "vocabulary": "Tokens that a language model knows; 10000 when not given.",
        "window": "Tokens of a row, of a language model; 35 when not given.",
    }.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    for name, text in {
        "engine": "ddp (when not given), fsdp2, zero2 or zero3; a lineage may not serve all, see its refusals.",
        "precision": "bf16 (when not given) or float32.",
        "optimizer": "sgd, sgd-momentum (when not given) or adamw.",
        "objective": "ban (when not given) and so on, or label for generation 0.",
        "teacher_precision": "inference (when not given), autocast or float32.",
        "teacher_placement": "replicated (when not given) or sharded.",
        "device": "gpu (when not given) or cpu.",
    }.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--model_args", help="Arguments of the architecture: hidden_size=2048,num_hidden_layers=16.")
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", default=None, help="Compute activations twice, keep none."
    )
    parser.add_argument(
        "--step_seconds", type=float, metavar="X", help="Measured time of a student's step, for hours."
    )
    parser.add_argument("--label_step_seconds", type=float, metavar="X", help="Likewise, of generation 0.")
    parser.add_argument("--samples", type=int, metavar="N", help="Rows of the training set, for hours.")
    parser.add_argument("--epochs", type=float, metavar="X", help="Of each generation, for hours.")
    parser.add_argument("--generations", type=int, default=3, metavar="N", help="Students, for hours; 3.")
    parser.add_argument("--json", action="store_true", help="Print the plan as one JSON object, in bytes.")
    parser.set_defaults(run=_plan)


def _add_completion(commands: Any) -> None:
    description = "Prints a script that completes commands, options and paths of born-again in a shell."
    parser = commands.add_parser("completion", help=description, description=description, allow_abbrev=False)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help='As in eval "$(born-again completion bash)".')
    parser.set_defaults(run=_completion)


# ---- train ----


def _train(arguments: argparse.Namespace) -> int:
    import runpy

    script = str(_examples() / f"run_{arguments.script}.py")
    sys.argv = [script, *arguments.flags]
    runpy.run_path(script, run_name="__main__")  # ends with its own exit status
    return 0


# ---- status ----


def _status(arguments: argparse.Namespace) -> int:
    from born_again.lineage.status import lineage_status, lineages_in

    folders = lineages_in(arguments.output_dir)
    found = [lineage_status(folder, arguments.verify) for folder in folders]
    is_one = folders == [Path(arguments.output_dir)]
    if arguments.json:
        content = found[0] if is_one else {"output_dir": arguments.output_dir, "lineages": found}
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        print(_printable(_status_text(found[0]) if is_one else _seeds_text(arguments.output_dir, found)))
    return 0


def _seeds_text(output_dir: str, found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each lineage of a folder with several seeds."""
    rows = [["lineage", "seed", "finished", "last", "running", "next"]]
    for facts in found:
        finished = [own for own in facts["generations"] if own["status"] == "finished"]
        metrics = finished[-1]["metrics"] if finished else {}
        last = [f"{column} {text}" for column, own in _METRICS.items() if (text := _metric(metrics, *own))]
        rows.append(
            [
                os.path.basename(facts["output_dir"]),
                "" if facts["seed"] is None else str(facts["seed"]),
                f"{len(finished)} of {len(facts['generations']) or '?'}",
                ", ".join(last),
                "no" if facts["running"] is None else _holder(facts["running"]),
                facts["next"]["text"],
            ]
        )
    return "\n".join(
        [f"{output_dir}: {len(found)} lineage{'s' if len(found) > 1 else ''}, one a seed", *_aligned(rows)]
    )


def _status_text(facts: Mapping[str, Any]) -> str:
    running, lines = facts["running"], []
    if facts["name"] is None:
        lines.append(f"{facts['output_dir']}: no generation has begun")
    else:
        students = "" if facts["student_model"] is None else f" ({facts['student_model']})"
        trained = f"teacher + {facts['students']}{students} by {facts['objective']}"
        if facts["control"] is not None:
            trained = f"control {facts['control']}, {len(facts['generations'])} on labels"
        lines.append(f"{facts['name']}: {facts['model']} on {facts['dataset']}, {trained}, seed {facts['seed']}")
        lines += _generation_lines(facts["generations"], facts["control"])
    lines += [_ensemble_line(entry) for entry in facts["ensembles"]]
    lines += [f"* {generation['worse']}" for generation in facts["generations"] if generation["worse"]]
    if running is not None:
        lines.append(f"running: {_holder(running)}")
    wait = "" if running is None else "wait for that run; after it, "
    lines.append(f"next: {wait}{facts['next']['text']}")
    for name in ("unpublished", "missing_weights", "changed_weights"):
        if facts[name]:
            lines.append(f"{name.replace('_', ' ')}: {', '.join(f'gen{index}' for index in facts[name])}")
    if facts["set_aside"]:
        lines.append(f"set aside: {', '.join(facts['set_aside'])}")
    return "\n".join(lines)


def _generation_lines(generations: Sequence[Mapping[str, Any]], control: str | None = None) -> list[str]:
    columns = {
        column: shown
        for column, shown in _METRICS.items()
        if any(shown[1] in facts["metrics"].get(shown[0], {}) for facts in generations)
    }
    rows = [["generation", "status", "objective", "seed", *columns, "gain", "seconds", "published"]]
    for facts in generations:
        rows.append(
            [
                f"{facts['index']} (teacher)" if facts["parent"] is None and not control else str(facts["index"]),
                _progress(facts),
                facts["objective"],
                "" if facts["seed"] is None else str(facts["seed"]),
                *(_metric(facts["metrics"], *shown) for shown in columns.values()),
                "" if facts["gain"] is None else f"{facts['gain']:+.2f}",
                "" if facts["status"] == "waiting" else f"{facts['seconds']:.0f}",
                "" if facts["status"] != "finished" else "yes" if facts["published"] else "no",
            ]
        )
    return _aligned(rows)


def _progress(facts: Mapping[str, Any]) -> str:
    checkpoint = facts["checkpoint"]
    if facts["status"] not in ("training", "interrupted") or checkpoint is None:
        return facts["status"]
    of = "" if checkpoint["max_steps"] is None else f" of {checkpoint['max_steps']}"
    return f"{facts['status']}, saved at step {checkpoint['step']}{of}"


def _metric(metrics: Mapping[str, Any], split: str, name: str, factor: float, form: str) -> str:
    if name not in metrics.get(split, {}):
        return ""
    value = metrics[split][name]
    return "inf" if value is None else f"{factor * value:{form}}"


def _ensemble_line(entry: Mapping[str, Any]) -> str:
    shown = [f"{column} {text}" for column, own in _METRICS.items() if (text := _metric(entry["metrics"], *own))]
    members = ", ".join(map(str, entry["members"]))
    return f"ensemble of {members} (mean of {entry['average']}): {', '.join(shown) or 'not measured'}"


def _holder(running: Mapping[str, Any]) -> str:
    who = "another process" if running["pid"] is None else f"process {running['pid']}"
    where = "" if running["host"] is None else f" on {running['host']}"
    since = "" if running["since"] is None else f" since {running['since']}"
    command = f" ({running['command']})" if running["command"] else ""
    doubt = "" if running["certain"] else "; perhaps: this system has no locks, so that process may have ended"
    return f"{who}{where}{since}{command}{doubt}"


# ---- evaluate ----


def _evaluate(arguments: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from born_again.lineage.machine import set_threads
    from born_again.lineage.reevaluation import TOLERANCE, reevaluate

    set_threads(None)  # as in a training, so that sums have the same order
    disable_progress_bar()
    names = ("dataset_revision", "image_column", "label_column", "image_size", "text_column", "max_eval_samples")
    result = reevaluate(
        arguments.path,
        revision=arguments.revision,
        dataset=arguments.dataset,
        data_args={name: getattr(arguments, name) for name in names},
        batch_size=arguments.batch_size,
        device=arguments.device,
        tolerance=TOLERANCE if arguments.tolerance is None else arguments.tolerance,
    )
    print(json.dumps(result, indent=2, allow_nan=False) if arguments.json else _printable(_evaluation_text(result)))
    return 1 if result["agrees"] is False else 0


def _evaluation_text(result: Mapping[str, Any]) -> str:
    what = result["path"]
    if result["kind"] == "ensemble":
        what += f" (generations {', '.join(map(str, result['generations']))}, mean of {result['average']})"
    of = "" if result["lineage"] is None else f" of {result['lineage']}"
    items = ", ".join(f"{count:,} in {split}" for split, count in result["items"].items()) or "nothing measured"
    if result["test_split"] != "test":
        items += f", which is its split {result['test_split']!r}"
    limits = "".join(f", {name} {value}" for name, value in result["data_args"].items() if name.startswith("max_"))
    model = "" if result["model"] is None else f", {result['model']},"
    lines = [f"{what}{of}{model} on {result['dataset']} ({items}{limits}), {result['device']}"]
    rows = [["split", "metric", "measured", "recorded", "difference"]]
    for split, metrics in result["splits"].items():
        for metric, pair in metrics.items():
            difference = (
                "" if pair["difference"] is None else f"{pair['difference']:+.1e}" if pair["difference"] else "0"
            )
            recorded = _value(pair["recorded"]) if pair["agrees"] is not None else ""
            mark = "  differs" if pair["agrees"] is False else ""
            rows.append([split, metric, _value(pair["measured"]), recorded, f"{difference}{mark}"])
    if len(rows) > 1:
        lines += _aligned(rows)
    for entry in result["weights"]:
        if entry["sha256"] is None:
            lines.append(f"{entry['file']}: is missing")
        else:
            verb = "matches" if entry["agrees"] else "does not match"
            lines.append(f"{entry['file']}: {verb} the recorded hash ({entry['recorded'][:12]}...)")
    if result["note"] is not None:
        lines.append(f"not compared: {result['note']}")
    else:
        verdict = "agrees with" if result["agrees"] else "differs from"
        lines.append(f"{verdict} the record, tolerance {result['tolerance']:g}")
    return "\n".join(lines)


def _value(value: float | None) -> str:
    return "not finite" if value is None else str(value) if isinstance(value, int) else f"{value:.6f}"


# ---- card, report, publish ----


def _card(arguments: argparse.Namespace) -> int:
    from born_again.hub.files import render_cards

    paths = [str(path) for path in render_cards(arguments.output_dir)]
    print(json.dumps({"cards": paths}, indent=2) if arguments.json else "\n".join(paths))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from born_again.lineage.status import lineages_in
    from born_again.report.page import write_report

    written = [str(path) for folder in lineages_in(arguments.output_dir) for path in write_report(folder)]
    print(json.dumps({"reports": written}, indent=2) if arguments.json else "\n".join(written))
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from born_again.hub.publishing import publish_lineage

    names = ("namespace", "name_pattern", "private", "branch", "license", "report")
    left = publish_lineage(arguments.output_dir, **{name: getattr(arguments, name) for name in names})
    if arguments.json:
        print(json.dumps({"unpublished": left}, indent=2))
        return 1 if left else 0
    for what, why in left.items():
        print(_printable(f"not published: {what}: {why}"))
    if not left:
        print("everything that is finished is published")
    return 1 if left else 0


# ---- compare ----


def _compare(arguments: argparse.Namespace) -> int:
    from born_again._files import write_atomically
    from born_again.report.comparison import compare_lineages
    from born_again.report.comparison_table import comparison_csv, comparison_markdown
    from born_again.report.figures import draw_comparison, figure_format

    if arguments.figure is not None:
        figure_format(arguments.figure)
    for name in ("csv", "figure"):
        path = getattr(arguments, name)
        if path is not None and os.path.isdir(path):
            raise ValueError(f"{name}: got {path!r}, which is a folder, expected a file; give one in it.")
    comparison = compare_lineages(
        arguments.folders,
        against=arguments.against,
        select_on_validation=arguments.select_on_validation,
        allow_unfinished=arguments.allow_unfinished,
    )
    if arguments.csv is not None:
        write_atomically(arguments.csv, comparison_csv(comparison))
    if arguments.figure is not None and not draw_comparison(comparison, Path(arguments.figure)):
        print(f"{arguments.figure} is not written: there is no number to draw", file=sys.stderr)
    text = json.dumps(comparison, indent=2, allow_nan=False) if arguments.json else comparison_markdown(comparison)
    print(_printable(text))
    return 0


# ---- plan ----


def _plan(arguments: argparse.Namespace) -> int:
    import dataclasses

    from born_again.lineage.arguments import parse_mapping
    from born_again.report.plan import PlannedStep, hours, plan

    names = [field.name for field in dataclasses.fields(PlannedStep)]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "model_args" in given:
        given["model_args"] = parse_mapping("model_args", given["model_args"])
    step, time = PlannedStep(**given), None
    timing = ("samples", "epochs", "step_seconds")
    if missing := [name for name in timing if getattr(arguments, name) is None]:
        if len(missing) < len(timing):
            raise ValueError(
                f"{missing[0]}: got none, expected it with {', '.join({*timing} - {*missing})}, for hours."
            )
    else:
        time = hours(
            step,
            generations=arguments.generations,
            label_step_seconds=arguments.label_step_seconds,
            **{name: getattr(arguments, name) for name in timing},
        )
    content = {"step": dataclasses.asdict(step), **plan(step), "hours": time}
    print(json.dumps(content, indent=2, allow_nan=False) if arguments.json else _printable(_plan_text(content)))
    return 0


def _plan_text(content: Mapping[str, Any]) -> str:
    step, time = content["step"], content["hours"]
    lines = [
        f"{step['model']}: {content['parameters']:,} parameters, {step['processes']} x {step['engine']}, "
        f"{step['batch']} rows a step, {step['precision']}, {step['optimizer']}, {step['objective']}, "
        f"{content['loss_implementation']} loss; computed, not measured"
    ]
    for what, parts in (
        ("memory of a process, MiB", content["memory"]),
        ("sent by a process in a step, MiB", content["communication"]),
    ):
        lines += _aligned([[what, ""], *([f"  {name}", f"{size / 2**20:,.0f}"] for name, size in parts.items())])
    if time is not None:
        lines.append(
            f"hours: {time['lineage']:.1f} (teacher {time['teacher']:.1f}, each student {time['student']:.1f}; "
            f"{time['steps']:,} steps each)"
        )
    lines.append("Not counted: libraries and CUDA context, data, workspaces, what the allocator leaves unused.")
    return "\n".join(lines)


# ---- completion ----


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise ImportError("completion: shtab is not installed; pip install 'born-again[completion]'.") from None

    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action.choices, dict))
    paths: dict[Any, Any] = dict.fromkeys(("OUTPUT_DIR", "DIR", "PATH_OR_HUB_ID"), shtab.DIRECTORY)
    for command in commands.choices.values():
        for action in command._actions:
            if (kind := {**paths, "FILE": shtab.FILE}.get(action.metavar)) is not None:
                action.complete = kind
    print(shtab.complete(parser, arguments.shell))
    return 0


# ---- all ----


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _printable(text: str) -> str:
    """Replaces control characters: a folder from someone else must not control the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


if __name__ == "__main__":
    sys.exit(main())
