"""What the command line says is the user's own words, and it says it whatever happens."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.table import Table

from halfstep.cli.config import commented
from halfstep.cli.console import err, out
from halfstep.errors import RunError
from halfstep.ladder.outcome import Outcome
from halfstep.live import Bars
from tests.cli.commands import halfstep, words_of

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def column():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

def error(outputs, wanted):
    return (outputs - wanted).square().mean(1)

def chat():
    raise RuntimeError("unknown token [/INST] in :warning: the tokenizer")

def hint():
    raise RuntimeError("pip install 'mine[vision]'")

def silent():
    raise KeyError
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "spoken.py").write_text(MODEL)
    namespace: dict = {}
    exec(MODEL, namespace)
    inputs = torch.randn(96, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels, numbers = namespace["net"]()(inputs).argmax(1), namespace["column"]()(inputs)
    inputs = inputs.numpy()
    np.savez(folder / "t.npz", inputs=inputs, labels=labels.numpy())
    np.savez(folder / "bare.npz", inputs=inputs)
    np.savez(folder / "double.npz", inputs=inputs.astype(np.float64), labels=labels.numpy())
    np.savez(folder / "bytes.npz", inputs=(inputs * 20 + 128).astype(np.uint8), labels=labels.numpy())
    np.savez(folder / "numbers.npz", inputs=inputs, labels=numbers.numpy())
    return folder


def quantize(folder, model, *more, data="t.npz"):
    given = (
        "--labelled",
        data,
        "--calibration",
        data,
        "--max-drop",
        "0.2",
        "--threads",
        "1",
        "--rungs",
        "ptq",
    )
    return halfstep(folder, "quantize", model, *given, *more)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("chat", "RuntimeError: unknown token [/INST] in :warning: the tokenizer"),
        ("hint", "RuntimeError: pip install 'mine[vision]'"),
        ("silent", "'spoken:silent': raised KeyError"),
    ],
)
def test_square_brackets_and_colons_are_no_markup(folder, model, words):
    done = quantize(folder, f"spoken:{model}")
    assert done.returncode == 2
    assert words in words_of(done)


def test_nothing_that_is_printed_is_markup(capsys):
    for words in ("pip install 'halfstep[openvino]'", "[/INST]", "[red]", ":smile:"):
        table = Table(title=words)
        table.add_column(words)
        table.add_row(words)
        out.print(table)
        Bars(SimpleNamespace(console=err)).say(words)
        printed = capsys.readouterr()
        assert printed.out.count(words) == 3 and printed.err.count(words) == 1


def test_a_metric_is_called_by_its_name(folder):
    more = ("--metric", "recall[val]=accuracy", "--metric", "[/sure]=accuracy", "--directory", "named")
    done = quantize(folder, "spoken:net", *more)
    assert done.returncode == 0, done.stderr
    assert "recall[val]" in done.stdout and "[/sure]" in done.stdout


# numbers that are none


def strict(text):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_command_speaks_strict_json_of_a_model_without_classes(folder):
    error = ("--metric", "spoken:error", "--lower-is-better", "--directory", "column", "--json")
    done = quantize(folder, "spoken:column", *error, data="numbers.npz")
    assert done.returncode == 0, done.stderr
    assert strict(done.stdout)["parity"]["top1"] is None
    strict((folder / "column" / "outcome.json").read_text())
    assert (folder / "column" / "report.html").exists()
    for command in (
        ("verify", "column"),
        ("compare", "column", "column"),
        ("inspect", "column/model.onnx"),
        ("calibrate", "column"),
        ("sensitivity", "column"),
    ):
        done = halfstep(folder, *command, "--json")
        assert done.returncode == 0, done.stderr
        strict(done.stdout)
        done = halfstep(folder, *command)
        assert done.returncode == 0 and "nan" not in done.stdout.lower()
    assert all(row["kl"] is None for row in strict(halfstep(folder, "calibrate", "column", "--json").stdout))


# data


def test_what_numpy_makes_by_default_is_converted_and_said_once(folder):
    done = quantize(folder, "spoken:net", "--directory", "double", data="double.npz")
    assert done.returncode == 0, done.stderr
    said = "double.npz: inputs are torch.float64: converted to torch.float32, which the model computes in"
    assert words_of(done).count(said) == 1


def test_bytes_for_a_model_of_floats_are_refused_at_the_start(folder):
    done = quantize(folder, "spoken:net", "--directory", "bytes", data="bytes.npz")
    assert done.returncode == 2 and not (folder / "bytes").exists()
    words = words_of(done)
    assert "calibration 'bytes.npz': the model does not take (2, 4) of torch.uint8: RuntimeError" in words
    assert "float32, scaled as in the training, for instance (inputs / 255 - mean) / std" in words
    done = halfstep(
        folder,
        "quantize",
        "spoken:net",
        "--labelled",
        "bytes.npz",
        "--calibration",
        "t.npz",
        "--directory",
        "bytes",
    )
    assert done.returncode == 2
    assert "labelled 'bytes.npz': got inputs of torch.uint8, needed torch.float32" in done.stderr.replace(
        "\n", " "
    )


def test_rungs_that_cannot_be_are_refused_before_anything_is_read(folder):
    done = halfstep(
        folder,
        "quantize",
        "no:where",
        "--labelled",
        "no.npz",
        "--calibration",
        "no.npz",
        "--rungs",
        "partial, qat",
    )
    assert done.returncode == 2
    assert "rungs: got 'partial', 'qat', needed 'ptq' first" in words_of(done)


def test_another_kind_of_recipe_by_a_flag_on_the_file_that_init_writes(folder):
    (folder / "halfstep.yaml").write_text(commented("spoken:net", "t.npz", "t.npz", ["0", "2"]))
    more = ("--recipe", "weight_only", "--group", "16", "--max-drop", "0.5", "--directory", "packed")
    done = halfstep(folder, "quantize", "halfstep.yaml", *more)
    assert done.returncode == 0, done.stderr
    assert (
        "kind: weight_only\n  weights: 4\n  activations: null"
        in (folder / "packed" / "config.yaml").read_text()
    )


# the end


@pytest.mark.parametrize(
    ("met", "code", "error"),
    [(True, 0, TypeError("None")), (False, 3, RunError("cannot write report.html: No space left"))],
)
def test_a_report_that_cannot_be_written_takes_nothing_away(folder, monkeypatch, met, code, error):
    def fail(self, path):
        raise error

    monkeypatch.setattr(Outcome, "report", fail)
    drop = "0.2" if met else "0"
    bits = () if met else ("--weight-bits", "2")
    for json_or_not in ((), ("--json",)):
        done = halfstep(
            folder,
            *(
                "quantize",
                "spoken:net",
                "--labelled",
                "t.npz",
                "--calibration",
                "t.npz",
                "--max-drop",
                drop,
                *bits,
            ),
            *("--threads", "1", "--rungs", "ptq", "--directory", f"kept{met}", *json_or_not),
        )
        assert done.returncode == code, done.stderr
        assert "deployed" in done.stdout and "the report:" not in done.stdout
        words = words_of(done)
        assert f"error: the report was not written: {type(error).__name__}: {error}" in words
        assert f"once that is cured: halfstep report kept{met}" in words


def test_an_unexpected_error_is_one_line_that_says_where(folder, monkeypatch):
    def fail(*_):
        raise LookupError("a b\nc")

    monkeypatch.setattr("halfstep.report.run.Run.read", fail)
    done = halfstep(folder, "report", "anywhere")
    words = words_of(done)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: unexpected LookupError: a b c, at " in words and "test_words.py:" in words
    assert "HALFSTEP_TRACEBACK=1" in words
    monkeypatch.setenv("HALFSTEP_TRACEBACK", "1")
    with pytest.raises(LookupError):
        halfstep(folder, "report", "anywhere")


def test_a_fresh_run_moves_the_earlier_one_aside(folder, monkeypatch):
    assert quantize(folder, "spoken:net", "--directory", "fresh").returncode == 0
    before = (folder / "fresh" / "journal.jsonl").read_bytes()
    done = quantize(folder, "spoken:net", "--directory", "fresh", "--target", "tensorrt")
    assert done.returncode == 2 and "begin anew in this one with fresh=True (--fresh)" in words_of(done)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("halfstep.ladder.quantize.ascend", interrupted)
    done = quantize(folder, "spoken:net", "--directory", "fresh", "--target", "tensorrt", "--fresh")
    assert done.returncode == 130
    assert "to go on where it stopped: halfstep quantize spoken:net" in words_of(done)
    assert "--fresh" not in done.stderr  # which would begin anew again
    assert (folder / "fresh" / "earlier-1" / "journal.jsonl").read_bytes() == before
    assert "target: tensorrt" in (folder / "fresh" / "config.yaml").read_text()


def test_a_fresh_demo_asks_the_climb_for_it(folder, monkeypatch):
    asked = []

    def climb(*_, **options):
        asked.append(options["fresh"])
        raise KeyboardInterrupt

    monkeypatch.setattr("halfstep.ladder.quantize.quantize", climb)
    monkeypatch.setattr("halfstep.demo.train_digits", lambda digits, **_: torch.nn.Linear(64, 10))
    assert halfstep(folder, "demo").returncode == halfstep(folder, "demo", "--fresh").returncode == 130
    assert asked == [False, True]


def test_goals_without_labels(folder):
    """Against the float model on inputs alone, or beside a metric that has labels."""
    (folder / "pairs.py").write_text(
        "import numpy as np, torch\n"
        "def batches():\n"
        "    file = np.load('t.npz')\n"
        "    return list(zip(*(torch.from_numpy(file[x]).split(32) for x in ('inputs', 'labels'))))\n"
    )
    common = ("--calibration", "t.npz", "--threads", "1", "--rungs", "ptq", "--json")
    for data, metric in (("bare.npz", "agreement"), ("pairs:batches", "cosine")):
        done = halfstep(
            folder, "quantize", "spoken:net", "--labelled", data, "--metric", metric, *common,
            "--max-drop", "0.2", "--directory", metric,
        )  # fmt: skip
        record = json.loads(done.stdout)
        assert done.returncode == 0 and record["float_score"] == 1, done.stderr
        assert 0.8 <= record["deployed_score"] <= 1
    several = ("--metric", "right=accuracy", "--metric", "noise=sqnr", "--max-drop", "right=0.2")
    done = halfstep(
        folder, "quantize", "spoken:net", "--labelled", "t.npz", *several, "--floor", "noise=12", *common,
        "--directory", "beside",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(m["metric"], m["met"]) for m in json.loads(done.stdout)["metrics"]] == [
        ("right", True),
        ("noise", True),
    ]
    done = halfstep(folder, "quantize", "spoken:net", "--labelled", "bare.npz", "--metric", "sqnr", *common)
    assert done.returncode == 2 and "needed the fewest dB allowed, such as floor=30" in words_of(done)
    done = halfstep(folder, "quantize", "spoken:net", "--labelled", "bare.npz", *common)
    assert done.returncode == 2 and "bare.npz: has no array 'labels'" in words_of(done)
    done = halfstep(folder, "quantize", "spoken:net", "--labelled", "bare.npz", "--metric", "cosin", *common)
    assert (
        done.returncode == 2
        and "needed accuracy, agreement, cosine, sqnr, or package.module:score" in words_of(done)
    )
