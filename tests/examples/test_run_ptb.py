"""The command for language models: one subprocess as a user starts it, the rest in this process, without a network."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from example_scripts import EXAMPLES, load_example
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from born_again.data.grammar import grammar_corpus, grammar_entropy, sample_grammar
from born_again.data.text import load_text
from born_again.lineage.machine import has_fast_bf16
from born_again.lineage.manifest import LineageError
from born_again.lineage.reevaluation import reevaluate
from born_again.lineage.runner import Generation
from born_again.models.language_configs import LstmLMConfig

SCRIPT = EXAMPLES / "run_ptb.py"
EVALUATED = 600
# 4 streams of 1,000 words, so 100 windows an epoch. One thread, since two wait for each other beside other work.
TINY = [
    "--smoke",
    "--dataset",
    "grammar",
    "--max_train_samples",
    "4000",
    "--max_eval_samples",
    str(EVALUATED),
    "--num_train_epochs",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--window",
    "10",
    "--threads",
    "1",
    "--disable_tqdm",
    "True",
]
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def command(*words, launcher=()):
    return [sys.executable, *launcher, str(SCRIPT), *map(str, words)]


def run(*words, launcher=()):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command(*words, launcher=launcher), capture_output=True, text=True, env=environment)


@pytest.fixture(autouse=True)
def one_thread(two_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def script():
    return load_example("run_ptb")


@pytest.fixture(scope="module")
def lineage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    done = run(*TINY, "--generations", 1, "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done


def records(folder):
    return json.loads((folder / "lineage.json").read_text())["generations"]


def hashes(folder):
    return [record["weights_sha256"] for record in records(folder)]


def everything(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def table(printed):
    return [line for line in printed.splitlines() if line.startswith("|")]


def test_one_command_trains_teacher_and_student_and_prints_the_table_and_the_floor(lineage):
    folder, done = lineage
    assert sorted(path.name for path in folder.iterdir()) == [
        *("gen0", "gen1", "lineage.json", "report.html", "report.png")
    ]
    teacher, student = records(folder)
    assert (teacher["objective"], student["objective"], student["parent"]) == ("label", "ban+l", 0)
    for index, record in enumerate((teacher, student)):
        assert record["status"] == "finished" and record["metrics"].keys() == {"validation", "test"}
        for metrics in record["metrics"].values():
            assert metrics.keys() == {"nll", "perplexity", "tokens"}
            assert metrics["tokens"] == EVALUATED
            assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]), rel=1e-12)
        files = {path.name for path in (folder / f"gen{index}").iterdir()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
        assert f"# test-lstm-grammar-gen{index}" in (folder / f"gen{index}" / "README.md").read_text()
    # On the first windows only.
    assert student["teacher_fit"]["tokens"] == 4 * 60 * 10
    rows = table(done.stdout)
    assert len(rows) == 4 and rows[0].split()[1] == "generation"
    assert f"{student['metrics']['test']['perplexity']:.2f}" in rows[3]
    entropy = grammar_entropy()
    assert f"Floor: the grammar has {entropy:.4f} nats per word, perplexity {math.exp(entropy):.2f}" in done.stdout


def test_the_same_command_says_that_all_is_done_and_changes_no_file(lineage, script, capsys):
    folder, first = lineage
    before = everything(folder)
    # A flag that decides no weight makes no other lineage.
    script.start([*TINY, "--generations", "1", "--output_dir", str(folder), "--logging_steps", "7"])
    printed = capsys.readouterr().out
    assert "Every generation is trained already; nothing is left to do." in printed
    assert table(printed) == table(first.stdout)
    assert everything(folder) == before


def test_unknown_tokens_are_printed_and_recorded_and_old_lineages_without_them_go_on(
    lineage, script, tmp_path, capsys
):
    folder, first = lineage
    coverage = json.loads((folder / "lineage.json").read_text())["data"]["coverage"]
    assert coverage.keys() == {"train", "validation", "test"}
    assert all(own["unknown"] == 0 for own in coverage.values())
    shown = " + ".join(f"{100 * own['untrained']:.2f}" for own in coverage.values())
    assert f"151 words; known but not in what is trained on {shown} % of tokens)" in first.stdout.splitlines()[0]
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "lineage.json"
    content = json.loads(path.read_text())
    del content["data"]["coverage"]
    path.write_text(json.dumps(content))
    script.start([*TINY, "--generations", "1", "--output_dir", str(tmp_path / "old")])
    assert "nothing is left to do" in capsys.readouterr().out
    content["data"]["tokens"]["test"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(LineageError, match=r"not what the lineage .* was trained on \(other tokens\)"):
        script.start([*TINY, "--generations", "1", "--output_dir", str(tmp_path / "old")])


def test_the_tokenizer_of_a_generation_reads_the_text_as_it_was_trained_on(lineage):
    text = "".join(f"{line}\n" for line in grammar_corpus()["test"])
    for generation in ("gen0", "gen1"):
        tokenizer = AutoTokenizer.from_pretrained(lineage[0] / generation)
        assert tokenizer.encode(text) == load_text("grammar").test.tolist()


@pytest.mark.slow
def test_more_generations_go_on_as_if_they_had_been_asked_for_at_once(lineage, script, tmp_path):
    folder, _ = lineage
    shutil.copytree(folder, tmp_path / "grown")
    for name in ("grown", "at_once"):
        script.start([*TINY, "--generations", "2", "--output_dir", str(tmp_path / name)])
    grown = hashes(tmp_path / "grown")
    assert len(set(grown)) == 3 and grown[:2] == hashes(folder)
    # Trained in another process than the fixture's: two runs of one command give equal weights.
    assert hashes(tmp_path / "at_once") == grown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "10"], "training.learning_rate: 10.0 here, 20.0 there"),
        (["--window", "5"], "data_args.window: 5 here, 10 there"),
        # The learning rate hangs on the validation, and each of its streams begins without a state.
        (["--per_device_eval_batch_size", "2"], "training.per_device_eval_batch_size: 2 here, 4 there"),
        (["--max_eval_samples", "500"], "data_args.max_eval_samples: 500 here, 600 there"),
        (["--dropout", "0.3"], "model_args.dropout: 0.3 here, 'default' there"),
        (["--objective", "ban", "--seed", "1"], "objective: 'ban' here, 'ban.l' there; seed: 1 here, 42 there"),
    ],
)
def test_another_flag_that_decides_weights_is_refused_by_its_name(lineage, script, words, message):
    folder, _ = lineage
    before = everything(folder)
    with pytest.raises(LineageError, match=f"another experiment .{message}"):
        script.start([*TINY, "--generations", "2", "--output_dir", str(folder), *words])
    assert everything(folder) == before


def nll_word_by_word(model, ids):
    state, total = None, 0.0
    for before, word in pairwise(ids):
        output = model(torch.tensor([[before]]), state=state)
        state = output.state
        total -= output.logits[0, -1].double().log_softmax(-1)[word].item()
    return total / (len(ids) - 1)


def nll_without_a_state(model, ids):
    logits = model(torch.tensor(ids[:-1])[:, None]).logits[:, -1]  # (words, vocabulary), every word for itself
    return F.cross_entropy(logits.double(), torch.tensor(ids[1:])).item()


@torch.no_grad()
def test_the_measured_perplexity_is_that_of_a_plain_loop_over_the_saved_folder(lineage):
    folder, _ = lineage
    corpus, of_the_state = grammar_corpus(), []
    for index, record in enumerate(records(folder)):
        tokenizer = AutoTokenizer.from_pretrained(folder / f"gen{index}")
        model = AutoModelForCausalLM.from_pretrained(folder / f"gen{index}").eval()
        for split, metrics in record["metrics"].items():
            text = [word for line in corpus[split] for word in (*line.split(), "<eos>")]
            ids = tokenizer.convert_tokens_to_ids(["<eos>", *text[:EVALUATED]])
            nll = nll_word_by_word(model, ids)
            assert metrics["nll"] == pytest.approx(nll, rel=1e-6)
            assert metrics["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
            of_the_state.append(abs(nll_without_a_state(model, ids) - nll))
    assert max(of_the_state) > 2e-4, of_the_state  # a state that was not carried would be seen


def write_text(folder, train, valid, test):
    folder.mkdir()
    for name, lines in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def test_a_folder_of_text_files_is_a_dataset_and_another_text_in_it_is_refused(script, tmp_path, capsys):
    train = [*sample_grammar(500, 1), "the <unk> of the harbour"]
    # As many streams of the validation as of the training: 4, of a window each at least.
    data = write_text(tmp_path / "mine", train, [*sample_grammar(60, 2), "the zebra"], ["the zebra again"])
    words = [*TINY, "--dataset", data, "--generations", "0", "--output_dir", str(tmp_path / "out")]
    script.start(words)
    printed = capsys.readouterr().out
    assert printed.startswith("test-lstm-mine: ") and "Floor" not in printed
    (record,) = records(tmp_path / "out")
    assert record["metrics"]["test"]["tokens"] == 4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "gen0")
    assert tokenizer.convert_tokens_to_ids("zebra") == tokenizer.unk_token_id
    write_text(tmp_path / "other", [*train, "the sailor"], ["the"], ["the"])
    shutil.copy(tmp_path / "other" / "train.txt", tmp_path / "mine")
    with pytest.raises(LineageError, match="the data is not what the lineage in .* was trained on .other sha256, tok"):
        script.start(words)


def test_a_word_that_the_training_text_lacks_is_refused_before_anything_is_written(script, tmp_path):
    data = write_text(tmp_path / "data", ["a b", "b a"], ["a b"], ["b a", "a c b"])
    with pytest.raises(ValueError, match="the word 'c' in line 2 of the split 'test' is not in the training split"):
        script.start([*TINY, "--dataset", data, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "EMPTY"], "is a folder that holds nothing; expected train.txt"),
        (["--dataset", "gramar"], "--dataset is 'gramar'; expected 'grammar'"),
        (["--model", "lstm-smal"], "model: got 'lstm-smal'.* did you mean 'lstm-small'"),
        (["--push_to_hub", "True"], "push_to_hub: got True without --hub_namespace"),
        (["--window", "1001"], "streams is 4 and window is 1001 for a corpus of 4000 tokens"),
        (["--generations", "-1"], "generations: got -1, expected 0 or more students"),
        (["--window", "5", "--droput", "0"], "'--droput' is no flag; did you mean '--dropout'"),
        (["--eval_strategy", "no"], "lr_plateau_factor: got 0.25 with eval_strategy 'no'"),
    ],
)
def test_bad_input_is_answered_before_anything_is_made(script, tmp_path, words, message):
    (tmp_path / "EMPTY").mkdir()
    words = [str(tmp_path / word) if word == "EMPTY" else word for word in words]
    with pytest.raises(ValueError, match=message):
        script.start([*TINY, "--output_dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_a_teacher_whose_tokenizer_has_other_words_is_refused(lineage, script, tmp_path):
    folder, _ = lineage
    out = tmp_path / "out"
    shutil.copytree(folder / "gen0", out / "gen0")
    content = json.loads((folder / "lineage.json").read_text())
    content["generations"] = content["generations"][:1]
    (out / "lineage.json").write_text(json.dumps(content))
    path = out / "gen0" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    by_id = {number: word for word, number in words.items()}
    words[by_id[9]], words[by_id[5]] = 5, 9
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=f"its tokenizer has '{by_id[9]}' for id 5, the student's '{by_id[5]}'"):
        script.start([*TINY, "--generations", "1", "--output_dir", str(out)])
    assert not (out / "gen1").exists()


def test_a_teacher_trained_elsewhere_with_other_words_is_refused_and_not_kept(lineage, script, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(lineage[0] / "gen1", elsewhere)
    path = elsewhere / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(words, key=words.get)[5:7]
    words[first], words[second] = 6, 5
    path.write_text(json.dumps(tokenizer))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"its tokenizer has '{second}' for id 5, the student's '{first}'"):
        script.start([*TINY, "--generations", "1", "--output_dir", str(out), "--teacher", str(elsewhere)])
    assert not (out / "gen0").exists()


@pytest.fixture
def elsewhere(tmp_path):
    """A teacher trained elsewhere on the same text: an untrained GPT-2 with 16 positions and its tokenizer."""
    data = load_text("grammar")

    def make(name, size=0, positions=16):
        tokens = len(data.tokenizer)
        config = GPT2Config(vocab_size=tokens + size, n_positions=positions, n_embd=8, n_layer=1, n_head=2)
        torch.manual_seed(1)
        network = GPT2LMHeadModel(config)
        network.save_pretrained(tmp_path / name)
        data.tokenizer.save_pretrained(tmp_path / name)
        return network, [*TINY, "--generations", "1", "--teacher", str(tmp_path / name)]

    return make


def test_a_teacher_with_fewer_positions_than_the_window_is_refused_by_both_numbers(elsewhere, script, tmp_path):
    _, words = elsewhere("short", positions=9)
    with pytest.raises(ValueError, match="was made for texts of 9 tokens, and the window is 10.*give --window 9"):
        script.start([*words, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "gen0").exists()


def test_a_teacher_without_a_tokenizer_is_refused_as_such(elsewhere, script, tmp_path):
    _, words = elsewhere("bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="bare' has no tokenizer .*save it there with save_pretrained"):
        script.start([*words, "--output_dir", str(tmp_path / "out")])


def test_a_teacher_whose_vocabulary_is_padded_teaches_without_its_padding(elsewhere, script, tmp_path):
    network, words = elsewhere("padded", size=41)
    script.start([*words, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "out")])
    taken = load_file(tmp_path / "out" / "gen0" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(taken, network.transformer.wte.weight[: len(load_text("grammar").tokenizer)])
    teacher, student = records(tmp_path / "out")
    assert teacher["status"] == student["status"] == "finished"
    # It is measured as it teaches, on windows of 10 words, though its students read the whole text.
    assert reevaluate(tmp_path / "out" / "gen0", tolerance=1e-6)["agrees"]


# ---- Recipes ----


def parsed(script, *words):
    arguments = (script.LineageArguments, script.BornAgainTrainingArguments)
    return script.parse_arguments(arguments, script.recipe, list(words))


@pytest.mark.parametrize("model", ["lstm-small", "lstm-medium", "lstm-large", "char-cnn-lstm"])
def test_recipe_of_a_recurrent_model_reaches_the_arguments(script, model):
    lineage, training = parsed(script, "--model", model)
    assert (lineage.dataset, lineage.name, lineage.window) == ("ptb", f"{model}-ptb", 35)
    assert training.output_dir == f"outputs/{model}-ptb"
    own = {name: value for name, value in script.RECIPES[model].items() if name != "window"}
    assert own.keys() >= {"learning_rate", "lr_plateau_factor", "max_grad_norm", "num_train_epochs"}
    assert {name: getattr(training, name) for name in own} == own
    plateau = training.lr_scheduler_kwargs
    assert training.lr_scheduler_type == "reduce_lr_on_plateau"
    assert (plateau["factor"], plateau["threshold"]) == (training.lr_plateau_factor, training.lr_plateau_gain)
    assert (training.objective, training.bf16) == ("ban+l", has_fast_bf16())
    assert training.accelerator_config.split_batches is True
    assert training.load_best_model_at_end and training.metric_for_best_model == "perplexity"


def test_recipes_written_for_a_sum_over_the_window_are_turned_into_a_mean(script):
    """The paper's CNN-LSTM: learning rate 2, clipped at 5, halved below a gain of 0.5; windows of 35 steps."""
    lineage, training = parsed(script, "--model", "char-cnn-lstm")
    assert training.learning_rate == 2 * lineage.window
    assert training.max_grad_norm == 5 / lineage.window
    assert (training.lr_plateau_factor, training.lr_plateau_gain) == (0.5, 0.5)
    _, small = parsed(script)
    assert (small.optim, small.learning_rate, small.max_grad_norm, small.lr_plateau_factor) == ("sgd", 20, 0.25, 0.25)
    assert small.per_device_train_batch_size == 20
    assert parsed(script, "--model", "lstm-large")[1].per_device_train_batch_size == 32


def test_recipe_of_a_transformer(script):
    lineage, training = parsed(script, "--model", "gpt2-small", "--dataset", "grammar")
    assert (lineage.window, lineage.name) == (256, "gpt2-small-grammar")
    assert (training.optim, training.learning_rate, training.weight_decay) == ("adamw_torch", 3e-4, 0.1)
    assert (training.max_grad_norm, training.lr_plateau_factor) == (1.0, None)
    assert (training.lr_scheduler_type, training.warmup_steps) == ("cosine", 100)
    assert (training.per_device_train_batch_size, training.num_train_epochs) == (16, 20.0)


def test_recipe_and_length_follow_the_network_and_not_the_name_of_its_folder(script, tmp_path):
    GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=64).save_pretrained(tmp_path / "better-than-lstm")
    LstmLMConfig(hidden_size=8).save_pretrained(tmp_path / "mine")
    data = ["--dataset", "grammar", "--output_dir", str(tmp_path / "o")]
    for name, optim, window, length in (("better-than-lstm", "adamw_torch", 32, 32), ("mine", "sgd", 35, 10**9)):
        words = ["--model", str(tmp_path / name), *data, *(["--window", "32"] if window == 32 else [])]
        lineage, training = parsed(script, *words)
        assert (training.optim, lineage.window) == (optim, window)
        corpus = load_text("grammar")
        script.build_runner(script.lineage_spec(lineage, training), corpus, training, lineage)
        assert corpus.tokenizer.model_max_length == length


def test_flags_win_over_the_recipe(script):
    lineage, training = parsed(script)
    assert (lineage.model, lineage.dataset, lineage.generations, training.seed) == ("lstm-small", "ptb", 1, 42)
    words = "--window 7 --learning_rate 3 --max_grad_norm 1 --lr_plateau_factor 0.5 --per_device_train_batch_size 5"
    lineage, training = parsed(
        script, "--smoke", *words.split(), "--model", "lstm-large", "--objective", "cwtm", "--name", "mine"
    )
    assert (lineage.model, lineage.dataset, lineage.window, lineage.name) == ("lstm-large", "grammar", 7, "mine")
    assert (training.learning_rate, training.max_grad_norm, training.lr_plateau_factor) == (3.0, 1.0, 0.5)
    assert (training.objective, training.num_train_epochs, training.output_dir) == ("cwtm", 30.0, "outputs/mine")
    # Streams of the validation are as many as of the training, unless they are given.
    assert training.per_device_eval_batch_size == training.per_device_train_batch_size == 5
    assert parsed(script, "--per_device_eval_batch_size", "3")[1].per_device_eval_batch_size == 3


@pytest.mark.parametrize(
    ("words", "kind", "sizes"),
    [
        (["lstm-small"], "LstmLMForCausalLM", {"hidden_size": 200, "dropout": 0.2}),
        (["lstm-large", "--dropout", "0.4"], "LstmLMForCausalLM", {"hidden_size": 1500, "dropout": 0.4}),
        (["char-cnn-lstm"], "CharCnnLstmForCausalLM", {"hidden_size": 650, "highway_layers": 2}),
        (["gpt2-small"], "GPT2LMHeadModel", {"n_embd": 768, "n_layer": 12}),
    ],
)
def test_students_are_the_named_networks_with_the_words_of_the_corpus(script, tmp_path, words, kind, sizes):
    """On the meta device: the sizes of the paper without their memory."""
    data = load_text("grammar")
    lineage, training = parsed(script, "--model", *words, "--dataset", "grammar", "--output_dir", str(tmp_path / "o"))
    runner = script.build_runner(script.lineage_spec(lineage, training), data, training, lineage)
    with torch.device("meta"):
        student = runner.build_student(Generation(0, 42, "label", None, tmp_path))
    assert type(student).__name__ == kind
    assert {name: getattr(student.config, name) for name in sizes} == sizes
    assert student.get_output_embeddings().weight.shape[0] == student.config.vocab_size == len(data.tokenizer)
    assert student.config.eos_token_id == student.config.bos_token_id == data.tokenizer.eos_token_id


# ---- Whole trainings ----


@pytest.mark.slow
def test_the_command_of_the_readme_comes_near_the_floor(tmp_path):
    launcher = ("-m", "accelerate.commands.launch")
    words = ["--generations", 1, "--dataset", "grammar", "--smoke", "--output_dir", tmp_path / "out"]
    done = run(*words, "--threads", 1, "--disable_tqdm", "True", launcher=launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    floor = math.exp(grammar_entropy())
    for record in records(tmp_path / "out"):
        for metrics in record["metrics"].values():
            # Below the floor only by the luck of a short text.
            assert 0.97 * floor < metrics["perplexity"] < 1.25 * floor


@pytest.mark.slow
def test_kill_in_the_middle_of_an_epoch_and_the_same_command_give_the_same_weights(script, tmp_path):
    """Dropout, carried states of both networks, the plateau and the best weights so far must come back from disk."""
    words = [*TINY, "--generations", "1", "--save_strategy", "steps", "--save_steps", "5"]  # an epoch has 100 steps
    words += ["--eval_strategy", "steps", "--eval_steps", "5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert script.start([*words, "--output_dir", str(whole)]) == 0
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command(*words, "--output_dir", cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    checkpoints = cut / "checkpoints" / "gen1"
    while not any((checkpoints / f"checkpoint-{step}" / "trainer_state.json").exists() for step in (15, 20, 25)):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert records(cut)[1]["status"] == "training"
    done = run(*words, "--output_dir", cut)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed from checkpoint-" in done.stderr
    assert hashes(cut) == hashes(whole)
    assert [record["metrics"] for record in records(cut)] == [record["metrics"] for record in records(whole)]


@pytest.mark.slow
def test_two_processes_train_the_lineage_of_one(script, tmp_path):
    words = [*TINY, "--generations", 1, "--bf16", "False", "--dropout", 0, "--num_train_epochs", 2]
    words += ["--learning_rate", 4]  # at 20 the last digits of float32 grow from step to step
    done = run(*words, "--output_dir", tmp_path / "two", launcher=TWO_PROCESSES)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(table(done.stdout)) == 4
    script.start([*map(str, words), "--output_dir", str(tmp_path / "one")])
    content = json.loads((tmp_path / "two" / "lineage.json").read_text())
    assert content["spec"]["training"]["world_size"] == 2
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one["steps"] == two["steps"] == 200
        for split, metrics in one["metrics"].items():
            assert two["metrics"][split] == pytest.approx(metrics, rel=1e-4)
        expected, seen = (
            load_file(tmp_path / name / f"gen{one['index']}" / "model.safetensors") for name in ("one", "two")
        )
        for name, weight in expected.items():
            torch.testing.assert_close(seen[name], weight, rtol=1e-4, atol=1e-4, msg=name)
    # One process takes the same batch, so it goes on where the two stopped.
    assert script.start([*map(str, words), "--generations", "2", "--output_dir", str(tmp_path / "two")]) == 0
    assert [record["computation"]["processes"] for record in records(tmp_path / "two")] == [2, 2, 1]
