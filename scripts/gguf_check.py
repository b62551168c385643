"""Reads what `bitnet convert` wrote with llama.cpp's own gguf package, and encodes it again with that package.

    python scripts/gguf_check.py target/debug/bitnet MODEL

MODEL is what `bitnet convert` takes: a model whose linear layers have a multiple of 256 inputs. Writes it in every GGUF form
and as dense values, and compares names, shapes, metadata and tokens; every TQ1_0 and TQ2_0 tensor byte by byte with what the
package makes of the dense values, heads dequantised with it, and I2_S, which the package does not know, by the formula.
"""

import json
import subprocess
import sys
import tempfile
from enum import IntEnum
from pathlib import Path

import gguf
import gguf.gguf_reader
import numpy as np

program, model = sys.argv[1:]
I2_S = 36


def with_i2_s():
    """The package refuses whole files that hold a type it does not know."""
    known = {kind.name: kind.value for kind in gguf.GGMLQuantizationType}
    kinds = IntEnum("GGMLQuantizationType", {**known, "I2_S": I2_S})
    gguf.gguf_reader.GGMLQuantizationType = kinds
    gguf.GGML_QUANT_SIZES[kinds.I2_S] = (4, 1)


def convert(form, out, *flags):
    subprocess.run([program, "convert", model, "--to", form, "--out", str(out), *flags], check=True, stdout=subprocess.DEVNULL)
    return out


def safetensors(path):
    """Tensors of a file of f32 and bf16."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    for name, t in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        raw = data[8 + size + t["data_offsets"][0] : 8 + size + t["data_offsets"][1]]
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[t["dtype"]]
        values = np.frombuffer(raw, kind)
        if t["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        yield name, values.astype(np.float32).reshape(t["shape"])


def i2_s(tensor, data):
    """Codes of 128 values in 32 bytes, high bits first; then the scale."""
    count = int(np.prod(tensor.shape))
    start = int(tensor.data_offset)
    raw = np.frombuffer(data[start : start + count // 4], np.uint8).reshape(-1, 32)
    codes = np.stack([raw >> shift & 3 for shift in (6, 4, 2, 0)], 1).reshape(-1)
    scale = np.frombuffer(data[start + count // 4 :][:4], np.float32)[0]
    return (codes.astype(np.float32) - 1) * scale


LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def interleaved(values, heads):
    """llama.cpp's order of the rows of q and k in architecture llama (`LlamaModel.permute` of its converter)."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def main():
    with_i2_s()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        dense = dict(safetensors(convert("dense-f32", out / "dense") / "model.safetensors"))
        compared = 0
        for form in ("i2_s", "tq2_0", "tq1_0"):
            path = convert(form, out / f"{form}.gguf")
            reader = gguf.GGUFReader(path)
            field = lambda key: reader.fields[key].contents()
            arch = field("general.architecture")
            heads = {"attn_q": field(f"{arch}.attention.head_count"), "attn_k": field(f"{arch}.attention.head_count_kv")}
            scales = {t.name: t.data[0] for t in reader.tensors if t.name.endswith(".scale")}
            for tensor in reader.tensors:
                parts = tensor.name.split(".")
                if len(parts) != 4 or parts[2] not in LINEAR or parts[3] != "weight":
                    continue
                want = dense[f"model.layers.{parts[1]}.{LINEAR[parts[2]]}.weight"]
                assert [int(n) for n in tensor.shape] == list(want.shape[::-1]), tensor.name
                if arch == "llama" and parts[2] in heads:
                    want = interleaved(want, heads[parts[2]])
                if form == "i2_s":
                    assert np.array_equal(i2_s(tensor, path.read_bytes()), want.reshape(-1)), tensor.name
                else:
                    scale = scales.get(tensor.name.replace(".weight", ".scale"), np.float32(1))
                    # The package stores the largest magnitude of a block as f16.
                    again = gguf.quants.quantize(want / scale, tensor.tensor_type)
                    assert np.array_equal(again, tensor.data), tensor.name
                compared += 1
            tokens = field("tokenizer.ggml.tokens")
            assert len(tokens) == dense["model.embed_tokens.weight"].shape[0] == field(f"{arch}.vocab_size")
            assert len(field("tokenizer.ggml.token_type")) == len(tokens)
        for head, limit in (("f16", 1e-3), ("q8_0", 0.01), ("q6_k", 0.03), ("q4_0", 0.15)):
            reader = gguf.GGUFReader(convert("tq2_0", out / f"{head}.gguf", "--head", head))
            tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
            assert tensor.tensor_type.name == head.upper(), tensor.tensor_type
            kind = gguf.GGMLQuantizationType[head.upper()]
            values, want = gguf.quants.dequantize(tensor.data, kind), dense["model.embed_tokens.weight"]
            error = np.sqrt(np.mean((values - want) ** 2) / np.mean(want**2))
            assert error < limit, (head, error)
        print(f"{compared} ternary tensors and 4 heads of {model} are as the package has them")


main()
