"""llama.cpp beside ours: the same weights, the same K and V, dense attention, one process."""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from decode.contenders import Filling, contender
from decode.models import make_model
from decode.steps import WARM_UP, race
from kvcomp.probe import bandwidth_probe
from ops.common import DTYPES

NAMES = {"qwen3": "QWEN3", "qwen2": "QWEN2"}  # of architectures, in gguf


@dataclass(frozen=True)
class PeerRow:
    part: str
    shape: str
    dtype: str
    batch: int
    tokens: int
    name: str
    ms: float
    ms_min: float
    full_ms: float  # of ours, in the same rounds
    full_ms_min: float
    ahead: float  # how many times faster ours is; below 1 it is slower
    ahead_min: float
    logit_error: float  # between the two, over the norm
    version: str

    def line(self) -> str:
        return (
            f"{self.shape} {self.dtype} B={self.batch} n={self.tokens:<6} {self.name}"
            f" {self.version} {self.ms:8.1f} ms (min {self.ms_min:7.1f})  full {self.full_ms:8.1f}"
            f" ms (min {self.full_ms_min:7.1f}), {self.ahead:.2f}x as fast"
            f" (min {self.ahead_min:.2f}x)  logits differ by {self.logit_error:.1%}"
        )


def bench_peer(options: argparse.Namespace) -> Iterator[PeerRow]:
    import llama_cpp

    model = make_model(options.shape, DTYPES[options.dtype], "cpu", options.seed)
    probe = bandwidth_probe("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path)
        for tokens in options.tokens:
            filling = Filling.make(model, 1, tokens, options.seed)
            room = WARM_UP + options.rounds + 8
            peers = [LlamaCpp(path, filling, room, flash) for flash in (False, True)]
            full = contender("full", model, filling, room, options)
            token = filling.ids[:, -1:]
            ours = full.step(token).flatten().float()
            apart = [(peer.step(token) - ours).norm() / ours.norm() for peer in peers]
            times, _ = race([full, *peers], probe, filling, options)
            full_ms, full_ms_min = (times["full"].mean(pick) * 1e3 for pick in (median, min))
            for peer, error in zip(peers, apart, strict=True):
                peer.close()
                ms, ms_min = (times[peer.name].mean(pick) * 1e3 for pick in (median, min))
                yield PeerRow(
                    part="peer",
                    shape=options.shape,
                    dtype=options.dtype,
                    batch=1,
                    tokens=tokens,
                    name=peer.name,
                    ms=ms,
                    ms_min=ms_min,
                    full_ms=full_ms,
                    full_ms_min=full_ms_min,
                    ahead=ms / full_ms,
                    ahead_min=ms_min / full_ms_min,
                    logit_error=error.item(),
                    version=llama_cpp.__version__,
                )
            full.close()


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """The weights as they are, norms and biases in fp32, without a vocabulary."""
    import gguf

    config, kind = model.config, model.config.model_type
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    dim = model.get_decoder().layers[0].self_attn.head_dim
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, NAMES[kind]), config.num_hidden_layers
    )
    stored = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[model.dtype]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor.ndim == 1:
            writer.add_tensor(known, tensor.float().numpy())
        else:
            raw = getattr(gguf.GGMLQuantizationType, stored)
            writer.add_tensor(known, tensor.view(torch.uint8).numpy(), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A context of llama.cpp that stands behind the filling; K and V in fp16, its default."""

    def __init__(self, path: Path, filling: Filling, room: int, flash: bool) -> None:
        import llama_cpp

        self.lib, tokens = llama_cpp, filling.keys.shape[2]
        self.name = f"llama.cpp, flash {'on' if flash else 'off'}"
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp {llama_cpp.__version__} does not load {path.name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = tokens + room, 1
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = getattr(
            llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if flash else 'DISABLED'}"
        )
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self._fill(filling, flash)

    def step(self, ids: Tensor) -> Tensor:
        """ids [1, 1] -> logits [vocabulary]."""
        token = (ctypes.c_int32 * 1)(int(ids))
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(token, 1)):
            raise RuntimeError("llama.cpp: llama_decode failed")
        logits = self.lib.llama_get_logits(self.context)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocabulary,)).copy())

    def counts(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def _fill(self, filling: Filling, flash: bool) -> None:
        """Through the state of a sequence: that of one token is the pattern for that of n."""
        get, put = self.lib.llama_state_seq_get_data, self.lib.llama_state_seq_set_data
        self.step(filling.ids[:, :1])
        one = np.empty(self.lib.llama_state_seq_get_size(self.context, 0), np.uint8)
        get(self.context, _pointer(one), len(one), 0)
        k, v = (
            x[0].transpose(0, 1).flatten(1).half().numpy() for x in (filling.keys, filling.values)
        )
        if not flash:  # which wants V as [Hkv * D, n]
            v = v.T.copy()
        tokens, row, parts = len(k), k[0].nbytes, 2 * self.lib.llama_model_n_layer(self.model)
        # Header and number of cells, the cells, 8 bytes about the data, the parts: K of all layers
        # and then V, each 12 bytes about it and its rows.
        behind = len(one) - parts * (12 + row) - 8
        cell, width = one[16:behind], 12 + k.nbytes
        state = np.empty(16 + tokens * len(cell) + 8 + parts * width, np.uint8)
        state[:12], state[12:16] = one[:12], np.array([tokens], np.uint32).view(np.uint8)
        cells, data = np.split(state[16:], [tokens * len(cell)])
        cells = cells.reshape(tokens, -1)
        cells[:] = cell
        cells[:, :4] = np.arange(tokens, dtype=np.int32).view(np.uint8).reshape(tokens, 4)
        data[:8], data = one[behind : behind + 8], data[8:].reshape(parts, width)
        data[:, :12] = one[behind + 8 :].reshape(parts, 12 + row)[:, :12]
        data[: parts // 2, 12:] = k.view(np.uint8).reshape(-1)
        data[parts // 2 :, 12:] = v.view(np.uint8).reshape(-1)
        if put(self.context, _pointer(state), len(state), 0) != len(state):
            raise RuntimeError("llama.cpp: its state has another layout than expected")


def _pointer(buffer: np.ndarray) -> object:
    return buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
