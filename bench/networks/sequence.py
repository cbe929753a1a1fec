"""Sequence models, and models with several inputs or outputs."""

from __future__ import annotations

import torch
from torch import nn


class LSTMTagger(nn.Module):
    """Embedding, LSTM, linear: (batch, time) token ids -> (batch, time, classes)."""

    def __init__(self, vocabulary: int = 100, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.embedding(tokens))[0])


class GRUTagger(nn.Module):
    """Embedding, GRU, linear: (batch, time) token ids -> (batch, time, classes)."""

    def __init__(self, vocabulary: int = 100, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.gru(self.embedding(tokens))[0])


class TwoTowers(nn.Module):
    """Two inputs, two outputs: an image and a vector in, logits and their embedding out."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.vector = nn.Sequential(nn.Linear(12, 2 * width), nn.ReLU())
        self.mix = nn.Linear(4 * width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, image: torch.Tensor, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        embedding = torch.relu(self.mix(torch.cat([self.image(image), self.vector(vector)], 1)))
        return {"logits": self.head(embedding), "embedding": embedding}


def bert(width: int = 128, layers: int = 2, heads: int = 4, vocabulary: int = 1000) -> nn.Module:
    """transformers' BertModel with random weights; takes input_ids and attention_mask."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=128,
    )
    return BertModel(config)
