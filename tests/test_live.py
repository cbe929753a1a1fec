"""What a call shows of itself: bars on a terminal, lines in the log elsewhere, nothing where it is not wanted."""

import io
import logging

import pytest
import torch
from rich.console import Console

import halfstep as hs
from halfstep import live
from halfstep.live import shown
from halfstep.progress import heard, listening, say, track


def work():
    for _ in track([1, 2, 3], "counting"):
        pass
    say("it is [done]")


def test_away_from_a_terminal_it_is_logged_and_nothing_printed(caplog, capfd):
    caplog.set_level(logging.DEBUG, "halfstep")
    with shown():
        work()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("DEBUG", "counting (3 steps)"),
        ("INFO", "it is [done]"),
    ]
    assert capfd.readouterr() == ("", "") and not heard()


def test_on_a_terminal_bars_are_drawn_and_sentences_stand_above_them(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "halfstep")
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, markup=False, highlight=False, width=80)
    monkeypatch.setattr(live, "error_stream", lambda: terminal)
    with shown():
        for index in track([1, 2], "counting"):
            say(f"it is [done] {index}")
            say("once only")
    assert "it is [done] 1" in written.getvalue() and written.getvalue().count("once only") == 1
    assert not caplog.records and not heard()


def test_it_is_silent_where_not_wanted_or_where_somebody_listens(caplog):
    caplog.set_level(logging.DEBUG, "halfstep")
    with shown(False):
        assert not heard()
        work()

    said = []

    class Listener(live.Log):
        def say(self, sentence):
            said.append(sentence)

        def start(self, what, total):
            said.append(what)

    with listening(Listener()), shown():
        work()
    assert said == ["counting", "it is [done]"] and not caplog.records


@pytest.mark.parametrize("progress", [True, False])
def test_quantize_tells_unless_it_is_told_not_to(caplog, capfd, progress):
    caplog.set_level(logging.INFO, "halfstep")
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Linear(4, 2)
    metric = hs.Accuracy([(x, network(x).argmax(1))])
    hs.quantize(
        network, x[:2], [x + 1e-3], metric, 1.0, hs.Recipe.uniform(7, 8), rungs=("ptq",), progress=progress
    )
    assert any("PTQ with" in message for message in caplog.messages) == progress
    assert capfd.readouterr() == ("", "")
