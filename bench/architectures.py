"""Architectures of transformers with random weights: are they captured with a length that varies, and quantized?

Tiny configurations (width 64, two layers), seed 0; W8A8 with max ranges of four batches of different lengths, padding
left out. Of each: layers on integer kernels of ONNX Runtime, the file against its simulation and the simulation
against float, in dB, on a length that was never seen.

python -m bench.architectures [--only bert gpt2] [--target openvino]
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import halfstep as hs
from halfstep.fidelity.compare import compare
from halfstep.graph.shapes import Dynamic

WIDTH, LAYERS, HEADS, VOCABULARY = 64, 2, 4, 200
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "vocab_size": VOCABULARY,
}
SEEN, NEW, BATCH = (12, 17, 9, 24), 31, 4


class Hidden(nn.Module):
    """What the model calls its last hidden state, and nothing else."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs, **self.options)[0]


class Text(Hidden):
    """Of token ids and a mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self.options)[0]


class Pixels(Hidden):
    """Of images (batch, 3, height, width)."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.model(pixel_values=pixel_values, **self.options)[0]


class Sound(Hidden):
    """Of a waveform (batch, samples)."""

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.model(input_values=input_values, **self.options)[0]


class Features(Hidden):
    """Of log-mel features (batch, mels, frames)."""

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.model(input_features=input_features, **self.options)[0]


class Cached(nn.Module):
    """A decoder step: new tokens, the keys and values of those before, (layers, 2, batch, heads, past, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache([(layer[0], layer[1]) for layer in past])
        found = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        layers = [torch.stack([layer.keys, layer.values]) for layer in found.past_key_values.layers]
        return found[0], torch.stack(layers)


@dataclass(frozen=True)
class Architecture:
    """How to build it; its inputs by length, which None says is fixed; what varies."""

    build: Callable[[Any], nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    dynamic: Dynamic | None
    padding: str | None = None


def tokens(length: int) -> dict[str, torch.Tensor]:
    """Ids and a mask; the first sentence is as long as the batch."""
    ends = torch.randint(length // 2, length + 1, (BATCH, 1))
    ends[0] = length
    mask = (torch.arange(length) < ends).long()
    return {"input_ids": torch.randint(4, VOCABULARY, (BATCH, length)) * mask, "attention_mask": mask}


def steps(length: int) -> dict[str, torch.Tensor]:
    past = torch.randn(LAYERS, 2, BATCH, HEADS, length, WIDTH // HEADS)
    return {"input_ids": torch.randint(4, VOCABULARY, (BATCH, 3)), "past": past}


def text(kind: str, name: str, **options: Any) -> Architecture:
    """A model of token ids: its class, its configuration's, and what differs from :data:`SIZES`, None to leave out."""
    call = options.pop("call", {})

    def build(transformers: Any) -> nn.Module:
        sizes = {key: value for key, value in {**SIZES, **options}.items() if value is not None}
        config = getattr(transformers, f"{name}Config")(**sizes)
        return Text(getattr(transformers, kind)(config), **call)

    dynamic = {"input_ids": {1: "tokens"}, "attention_mask": {1: "tokens"}}
    return Architecture(build, tokens, dynamic, "attention_mask")


def of(face: type[Hidden], make: Callable[[Any], nn.Module], **inputs: Any) -> Architecture:
    return Architecture(lambda transformers: face(make(transformers)), **inputs)


def t5(transformers: Any) -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    return Text(transformers.T5EncoderModel(transformers.T5Config(vocab_size=VOCABULARY, **sizes)))


def bart(transformers: Any) -> nn.Module:
    sizes = {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "decoder_layers": LAYERS,
        "encoder_ffn_dim": 2 * WIDTH,
    }
    sizes |= {
        "decoder_ffn_dim": 2 * WIDTH,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
    }
    config = transformers.BartConfig(vocab_size=VOCABULARY, **sizes)
    return Text(transformers.BartModel(config).encoder)


def vit(transformers: Any) -> nn.Module:
    sizes = {**SIZES, "image_size": 32, "patch_size": 8}
    return transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)


def wav2vec2(transformers: Any) -> nn.Module:
    sizes = {
        "conv_dim": (32, 32),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_conv_pos_embeddings": 16,
    }
    sizes |= {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SIZES, **sizes))


def whisper(transformers: Any) -> nn.Module:
    sizes = {
        "d_model": WIDTH,
        "encoder_layers": LAYERS,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH,
    }
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": HEADS, "decoder_ffn_dim": WIDTH}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        num_mel_bins=16, max_source_positions=40, vocab_size=VOCABULARY, **sizes
    )
    return transformers.WhisperModel(config).encoder


def gpt2_cached(transformers: Any) -> nn.Module:
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCABULARY)
    return Cached(transformers.GPT2Model(config))


NO_CACHE = {"use_cache": False}
GROUPED = {"num_key_value_heads": 2, "call": NO_CACHE}
ARCHITECTURES: dict[str, Architecture] = {
    "bert": text("BertModel", "Bert"),
    "roberta": text("RobertaModel", "Roberta"),
    "distilbert": text(
        "DistilBertModel", "DistilBert", dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=128
    ),
    "electra": text("ElectraModel", "Electra", embedding_size=32),
    "albert": text("AlbertModel", "Albert", embedding_size=32),
    "mpnet": text("MPNetModel", "MPNet"),
    "deberta-v2": text("DebertaV2Model", "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "modernbert": text(
        "ModernBertModel",
        "ModernBert",
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "xlm-roberta": text("XLMRobertaModel", "XLMRoberta"),
    "funnel": text(
        "FunnelBaseModel",
        "Funnel",
        d_model=WIDTH,
        n_head=HEADS,
        d_head=16,
        d_inner=128,
        block_sizes=[1, 1],
        num_hidden_layers=None,
    ),
    "gpt2": text("GPT2Model", "GPT2", n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, call=NO_CACHE),
    "gpt2 with a cache": Architecture(
        gpt2_cached, steps, {"input_ids": {0: "batch"}, "past": {2: "batch", 4: "past"}}
    ),
    "opt": text("OPTModel", "OPT", ffn_dim=128, word_embed_proj_dim=WIDTH, call=NO_CACHE),
    "llama": text("LlamaModel", "Llama", **GROUPED),
    "qwen2": text("Qwen2Model", "Qwen2", **GROUPED),
    "mistral": text("MistralModel", "Mistral", **GROUPED),
    "t5 encoder": Architecture(
        t5, tokens, {"input_ids": {1: "tokens"}, "attention_mask": {1: "tokens"}}, "attention_mask"
    ),
    "bart encoder": Architecture(
        bart, tokens, {"input_ids": {1: "tokens"}, "attention_mask": {1: "tokens"}}, "attention_mask"
    ),
    "clip text": text("CLIPTextModel", "CLIPText", eos_token_id=3),
    "vit": of(
        Pixels, vit, inputs=lambda length: {"pixel_values": torch.randn(BATCH, 3, 32, 32)}, dynamic=None
    ),
    "wav2vec2": of(
        Sound,
        wav2vec2,
        inputs=lambda length: {"input_values": torch.randn(BATCH, 40 * length)},
        dynamic={"input_values": {1: "samples"}},
    ),
    "whisper encoder": of(
        Features,
        whisper,
        inputs=lambda length: {"input_features": torch.randn(BATCH, 16, 80)},
        dynamic=None,
    ),
}


@dataclass(frozen=True)
class Found:
    """What came of one: layers, those on integer kernels, and dB; or why it was refused."""

    layers: int = 0
    integer: int = 0
    file: float = 0.0
    simulation: float = 0.0
    refused: str = ""


def try_one(architecture: Architecture, target: str, folder: Path) -> Found:
    import transformers

    torch.manual_seed(0)
    model = architecture.build(transformers).eval()
    batches = [architecture.inputs(length) for length in SEEN]
    try:
        q = hs.prepare(
            model, batches[0], target=target, dynamic=architecture.dynamic, padding=architecture.padding
        )
        hs.observe(q, batches)
        hs.calibrate(q)
        path = hs.export_onnx(q, folder / "model.onnx")
        new = architecture.inputs(NEW)
        proof = hs.verify(path, q, [new], rounds=3)
    except hs.HalfstepError as error:
        return Found(refused=str(error))
    simulation = compare(q, model, [new]).sqnr
    assert proof.parity.sqnr is not None and simulation is not None
    return Found(len(proof.layers), proof.integer_layers, proof.parity.sqnr, simulation)


def rows(names: list[str], target: str) -> Iterator[tuple[str, Found]]:
    for name in names:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield name, try_one(ARCHITECTURES[name], target, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--target", default="onnxruntime")
    options = parser.parse_args()
    table = Table(title=f"W8A8 on {options.target}, lengths {SEEN} seen, {NEW} new", width=150)
    for column in ("architecture", "layers", "integer", "file, dB", "simulation, dB", "or refused because"):
        table.add_column(
            column, justify="left" if column in ("architecture", "or refused because") else "right"
        )
    works = 0
    for name, found in rows(options.only, options.target):
        print(f"{name}: {found}", flush=True)
        if found.refused:
            table.add_row(name, "", "", "", "", found.refused)
            continue
        works += 1
        table.add_row(
            name, str(found.layers), str(found.integer), f"{found.file:.1f}", f"{found.simulation:.1f}", ""
        )
    Console(width=150).print(table)
    print(f"{works} of {len(options.only)} work")


if __name__ == "__main__":
    main()
