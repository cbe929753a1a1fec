"""Two readers of docstrings: a BERT that names the package, and a tagger of words with the outliers of larger ones.

Large trained encoders have channels with values hundreds of times those of the others, and masks that add the
lowest float32: both are what costs them points in int8. The tagger's outliers are planted behind its training without
changing its function: gains of layer norms are multiplied, and the weights that read them divided. So are rows of the
values in attention, and the columns of the projection that reads them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from bench.networks.task import Task, fit, trained
from bench.sentences import (
    TAGS,
    UNKNOWN,
    Sentence,
    Vocabulary,
    batched,
    encoded,
    filled,
    parts,
    sentences,
    tags,
)

DYNAMIC = {"input_ids": {1: "tokens"}, "attention_mask": {1: "tokens"}}
PACKAGES, IGNORED = 10, -100
OUTLIERS, FACTOR = 3, 100.0


class Classifier(nn.Module):
    """transformers' BERT with an own head: the mean over the tokens, then the packages' logits."""

    def __init__(self, vocabulary: int, classes: int, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=4 * width,
            max_position_embeddings=256,
            attn_implementation="eager",
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(mean(x, attention_mask))


class Layer(nn.Module):
    """Attention and two linear layers, each behind a layer norm, each with a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (self._heads(part(y)) for part in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def plant(self, channels: Sequence[int], factor: float) -> None:
        """Make these channels ``factor`` times as large where they are read by linear layers alone."""
        for norm, readers in ((self.norm1, (self.query, self.key, self.value)), (self.norm2, (self.fc1,))):
            norm.weight[channels] *= factor
            norm.bias[channels] *= factor
            for reader in readers:
                reader.weight[:, channels] /= factor
        self.value.weight[channels] *= factor
        self.value.bias[channels] *= factor
        self.out.weight[:, channels] /= factor


class Encoder(nn.Module):
    """Layers over embedded tokens and positions; what is masked gets the lowest float32 before the softmax."""

    def __init__(self, vocabulary: int, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(256, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(places)
        mask = (1.0 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def plant(self, count: int = OUTLIERS, factor: float = FACTOR, seed: int = 0) -> None:
        """Make ``count`` channels of each layer ``factor`` times as large without changing what is computed."""
        for index, layer in enumerate(self.layers):
            width = layer.norm1.normalized_shape[0]
            layer.plant(random.Random(seed + index).sample(range(width), count), factor)


class Tagger(nn.Module):
    """The encoder, and of every token the logits of its tag: (batch, tokens, tags)."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(vocabulary)
        self.head = nn.Linear(self.encoder.norm.normalized_shape[0], classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(input_ids, attention_mask))


class SentenceEncoder(nn.Module):
    """The mean of the encoder's tokens, length 1: (batch, width)."""

    def __init__(self, vocabulary: int, width: int = 192, layers: int = 6) -> None:
        super().__init__()
        self.encoder = Encoder(vocabulary, width, layers, heads=6)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(mean(self.encoder(input_ids, attention_mask), attention_mask), dim=-1)


def mean(x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, width) to (batch, width), over the tokens that are none of the padding."""
    kept = attention_mask[..., None].to(x.dtype)
    return (x * kept).sum(1) / kept.sum(1)


def classifier() -> Task:
    """Of which of the ten packages with the most sentences one is; the share of right answers."""
    everything = sentences()
    names = [name for name, _ in Counter(each.package for each in everything).most_common(PACKAGES)]
    training, calibration, test = parts([each for each in everything if each.package in names])
    vocabulary = Vocabulary(training)

    def labelled(some: Sequence[Sentence], size: int = 32) -> list:
        return [
            (encoded(vocabulary, batch), torch.tensor([names.index(each.package) for each in batch]))
            for batch in batched(some, size)
        ]

    def train(model: nn.Module) -> None:
        fit(model, lambda epoch: labelled(_alike(training, epoch)), F.cross_entropy, 6, 5e-4)

    return Task(
        trained("text-classifier", Classifier(vocabulary.size, PACKAGES), train),
        [inputs for inputs, _ in labelled(calibration)],
        hs.Accuracy(labelled(test)),
        DYNAMIC,
        "attention_mask",
        transformer=True,
        dynamic_peer=True,
    )


def tagger() -> Task:
    """What each word was before its case was taken away, with planted outliers; F1 of all but plain words."""
    training, calibration, test = parts(sentences())
    vocabulary = Vocabulary(training)

    def labelled(some: Sequence[Sentence], size: int = 32) -> list:
        return [
            (encoded(vocabulary, batch), filled([tags(each) for each in batch], IGNORED))
            for batch in batched(some, size)
        ]

    def loss(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)

    def train(model: nn.Module) -> None:
        fit(model, lambda epoch: labelled(_alike(training[:4000], epoch)), loss, 3, 1e-3)

    model = trained("tagger", Tagger(vocabulary.size, len(TAGS)), train)
    model.encoder.plant()
    return Task(
        model,
        [inputs for inputs, _ in labelled(calibration)],
        hs.SetMetric(labelled(test), counts, f1),
        DYNAMIC,
        "attention_mask",
        transformer=True,
        dynamic_peer=True,
    )


def sentence_encoder() -> tuple[SentenceEncoder, Vocabulary]:
    """An encoder with planted outliers, whose embeddings of two views of a sentence are near each other.

    A view lacks a random part of the words; the other sentences of the batch are what it should be far from.
    Source: Gao, Yao and Chen, SimCSE (2021), equation 1, with words left out in place of dropout.
    """
    training, _, _ = parts(sentences())
    vocabulary = Vocabulary(training)

    def views(epoch: int) -> list:
        generator = torch.Generator().manual_seed(epoch)
        found = []
        for batch in batched(_alike(training[:4096], epoch), 32):
            inputs = encoded(vocabulary, [*batch, *batch])
            gone = torch.rand(inputs["input_ids"].shape, generator=generator) < 0.25
            inputs["input_ids"][gone & (inputs["attention_mask"] == 1)] = UNKNOWN
            found.append((inputs, torch.arange(len(batch))))
        return found

    def loss(outputs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        one, other = outputs.chunk(2)
        return F.cross_entropy(one @ other.T / 0.05, places)

    model = trained(
        "sentence-encoder", SentenceEncoder(vocabulary.size), lambda model: fit(model, views, loss, 1, 5e-4)
    )
    assert isinstance(model, SentenceEncoder)
    model.encoder.plant()
    return model, vocabulary


def counts(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each sentence the hits, false alarms and misses of all tags but the first, (batch, 3)."""
    said = outputs.argmax(-1)
    real, right = wanted != IGNORED, said == wanted
    return torch.stack(
        [
            (real & (wanted > 0) & right).sum(1),
            (real & (said > 0) & ~right).sum(1),
            (real & (wanted > 0) & ~right).sum(1),
        ],
        1,
    ).double()


def f1(rows: torch.Tensor) -> torch.Tensor:
    hits, false, missed = rows.sum(0)
    return 2 * hits / (2 * hits + false + missed)


def _alike(training: Sequence[Sentence], epoch: int, size: int = 32) -> list[Sentence]:
    """Shuffled, sentences of like length side by side: less padding to compute."""
    order = list(training)
    random.Random(epoch).shuffle(order)
    order.sort(key=lambda each: len(each.text) // 20)
    groups = batched(order, size)
    random.Random(epoch).shuffle(groups)
    return [each for group in groups if len(group) == size for each in group]
