"""Sentences of the docstrings of Python's standard library, in words, batches as long as their longest sentence.

Nothing is imported: the sources are read. Other versions of Python have other sentences, and networks of their own.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.networks.task import CACHE

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
WORD = re.compile(r"[A-Za-z_]\w*|\d+|[^\w\s]")
PAD, UNKNOWN = 0, 1
TEST, CALIBRATION = 1000, 512
#: What a word may be, when its case and digits have been taken away.
TAGS = ("word", "capitalised first", "capitalised inside", "all capitals", "identifier", "number", "sign")


@dataclass(frozen=True)
class Sentence:
    """Text, and the package or module whose docstrings it is from."""

    text: str
    package: str

    @property
    def words(self) -> list[str]:
        return WORD.findall(self.text)


def sentences(seed: int = 0) -> list[Sentence]:
    """All different sentences of 25 to 200 characters, in an order that the seed decides."""
    version = sysconfig.get_python_version()
    file = CACHE / f"sentences-{version}.json"
    if not file.exists():
        CACHE.mkdir(exist_ok=True)
        file.write_text(json.dumps(read()))
    found = [Sentence(*pair) for pair in json.loads(file.read_text())]
    random.Random(seed).shuffle(found)
    return found


def read() -> list[tuple[str, str]]:
    """Sentences and packages from the sources of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not LEFT_OUT.isdisjoint(parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                for text in split(ast.get_docstring(node) or ""):
                    seen.setdefault(text, parts[0].removesuffix(".py"))
    return sorted(seen.items())


def split(docstring: str) -> list[str]:
    """Its sentences, without examples."""
    paragraphs = [part for part in re.split(r"\n\s*\n", docstring) if ">>>" not in part]
    lines = [line for part in paragraphs for line in re.split(r"(?<=[.!?])\s+", " ".join(part.split()))]
    return [
        line
        for line in lines
        if 25 <= len(line) <= 200 and line.isascii() and line[0].isupper() and line.endswith(".")
    ]


def parts(everything: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence], list[Sentence]]:
    """For training, calibration and test."""
    test, calibration = everything[:TEST], everything[TEST : TEST + CALIBRATION]
    return list(everything[TEST + CALIBRATION :]), list(calibration), list(test)


class Vocabulary:
    """Lower-case words without digits, by how often they are in the sentences that are trained on."""

    def __init__(self, training: Sequence[Sentence], size: int = 4000) -> None:
        counts = Counter(self.key(word) for sentence in training for word in sentence.words)
        self.ids = {word: index + 2 for index, (word, _) in enumerate(counts.most_common(size - 2))}
        self.size = size

    @staticmethod
    def key(word: str) -> str:
        return re.sub(r"\d", "0", word.lower())

    def encode(self, sentence: Sentence) -> list[int]:
        return [self.ids.get(self.key(word), UNKNOWN) for word in sentence.words]


def tags(sentence: Sentence) -> list[int]:
    """For each word its place in :data:`TAGS`."""
    words = sentence.words
    return [TAGS.index(_tag(word, index, words)) for index, word in enumerate(words)]


def _tag(word: str, index: int, words: list[str]) -> str:
    if not (word[0].isalnum() or word[0] == "_"):
        return "sign"
    if word.isdigit():
        return "number"
    behind = words[index + 1] if index + 1 < len(words) else ""
    if "_" in word or behind == "(" or re.search(r"[a-z][A-Z]", word):
        return "identifier"
    if len(word) > 1 and word.isupper():
        return "all capitals"
    if word[0].isupper():
        return "capitalised first" if index == 0 else "capitalised inside"
    return "word"


def filled(rows: Sequence[Sequence[int]], value: int = PAD) -> torch.Tensor:
    """Rows of different length as one tensor (rows, longest), filled up with ``value``."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def encoded(vocabulary: Vocabulary, some: Sequence[Sentence]) -> dict[str, torch.Tensor]:
    """A batch: token ids, and the mask of what is none of the padding, both (sentences, longest)."""
    rows = [vocabulary.encode(sentence) for sentence in some]
    return {"input_ids": filled(rows), "attention_mask": filled([[1] * len(row) for row in rows])}


def batched(some: Sequence[Sentence], size: int) -> list[Sequence[Sentence]]:
    return [some[start : start + size] for start in range(0, len(some), size)]
