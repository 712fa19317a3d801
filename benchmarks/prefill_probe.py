"""INT8 prefill on a GPU: errors of the kernels against the definition, then times against torch's attention.

    python benchmarks/prefill_probe.py [--errors] [--times] [--head-dim 128] [--tokens 4096 16384 32768]

Error is relative RMS against attention over the same operands in float64 (`int8.int8_attention`). Times are medians of
CUDA events over rotating inputs; rates count 4 N^2 D operations a head, half of it when causal.
"""

# ruff: noqa: B023, D103, E501 - a script: closures are called before their loop goes on, names say what functions do

import argparse
import time

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from turboattention.bench.hard_data import harden
from turboattention.ops.prefill import int8, int8_prepass, int8_triton
from turboattention.ops.prefill.int8_prefill import int8_prefill
from turboattention.ops.prefill.sequences import Sequences

START = time.time()


def say(text: str) -> None:
    print(f"[{time.time() - START:5.1f} s] {text}", flush=True)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def data(kind: str, heads: int, kv_heads: int, rows: int, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, heads, rows, dim, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(2, kv_heads, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    if kind != "gaussian":
        harden(kind, q, k, v)
    return q, k, v


def kernels(dim: int) -> list[str]:
    hopper = torch.cuda.get_device_capability() == (9, 0) and dim <= 128
    return ["triton", "hopper"] if hopper else ["triton"]


def attend(kernel: str, q: Tensor, chunk: int8.Int8Chunk, out: Tensor, lse: Tensor, *, causal: bool) -> None:
    if kernel == "hopper":
        from turboattention.ops.prefill import hopper

        hopper.attention(q, chunk, out, lse, chunk.head_dim**-0.5, causal=causal)
    else:
        int8_triton.attention(chunk, out, lse, causal=causal)


def run(
    kernel: str, q: Tensor, chunk: int8.Int8Chunk, lse_shape: tuple[int, ...], causal: bool
) -> tuple[Tensor, Tensor]:
    out = torch.full_like(q, torch.nan)
    lse = torch.full(lse_shape, torch.nan, device="cuda")
    attend(kernel, q, chunk, out, lse, causal=causal)
    return out, lse


def check_errors() -> None:
    cases = [
        (kind, 4, 4, 1000, 1000, 128)
        for kind in ("gaussian", "outlier", "channel", "peaked", "flat", "falling", "constant")
    ]
    cases += [
        ("gaussian", 8, 2, rows, tokens, 128) for rows, tokens in ((1, 1), (63, 63), (111, 300), (300, 111), (1, 777))
    ]
    cases += [("gaussian", 8, 2, 777, 1111, dim) for dim in (64, 80, 256)]
    for kind, heads, kv_heads, rows, tokens, dim in cases:
        q, k, v = data(kind, heads, kv_heads, rows, tokens, dim)
        plain = int8.quantise_chunk(q, k, v, dim**-0.5)
        chunk = int8_prepass.quantise_chunk(q, k, v, dim**-0.5)
        codes = []
        for name in ("q", "k", "v"):
            a, b = getattr(plain, name), getattr(chunk, name)
            codes.append(f"{name} {int((a != b).sum())}/{int((a.int() - b.int()).abs().max())}")
        line = f"{kind:10} {heads}/{kv_heads} {rows}x{tokens} D={dim}: codes that differ/by at most {', '.join(codes)};"
        for causal in (False, True):
            want = int8.int8_attention(chunk, causal=causal)
            seen = torch.isfinite(want.lse)
            for kernel in kernels(dim):
                out, lse = run(kernel, q, chunk, tuple(q.shape[:3]), causal)
                shift = float((lse - want.lse)[seen].abs().max())
                blind = bool((lse[~seen] == -torch.inf).all()) and bool(torch.isfinite(out).all())
                line += f" {kernel}{' causal' * causal} {error(out, want.out):.4f} lse {shift:.4f}{'' if blind else ' WRONG'};"
        say(line)
    lengths = torch.tensor([0, 1, 64, 65, 500, 500, 901], dtype=torch.int32, device="cuda")
    q = torch.randn(901, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(901, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    chunk = int8_prepass.quantise_chunk(q, k, v, 128**-0.5, Sequences.packed(q, k, lengths))
    want = int8.int8_attention(chunk, causal=True)
    for kernel in kernels(128):
        out, lse = run(kernel, q, chunk, (8, 901), True)
        say(f"packed {kernel} {error(out, want.out):.4f} lse {float((lse - want.lse).abs().max()):.4f}")


def median_ms(call, rounds: int) -> float:
    for i in range(3):
        call(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for i, (begin, end) in enumerate(events):
        begin.record()
        call(i)
        end.record()
    torch.cuda.synchronize()
    return sorted(b.elapsed_time(e) for b, e in events)[rounds // 2]


def check_times(dims: list[int], sizes: list[int]) -> None:
    heads, kv_heads = 32, 8
    say(
        "D, N, causal | SDPA TFLOP/s: cuDNN, FA2 | pre-pass ms | kernel TOPS | with pre-pass: TOPS, x cuDNN, x FA2 | error"
    )
    for dim in dims:
        for tokens in sizes:
            batch = max(1, 16384 // tokens)
            q = [torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(2)]
            k, v = (
                [torch.randn(batch, kv_heads, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(2)]
                for _ in range(2)
            )
            wide_k, wide_v = ([x.repeat_interleave(heads // kv_heads, 1) for x in y] for y in (k, v))
            for causal in (True, False):
                work = 4 * batch * heads * tokens**2 * dim * (0.5 if causal else 1) * 1e-9
                rounds = 20 if tokens <= 16384 else 8
                bars = {}
                for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FA2", SDPBackend.FLASH_ATTENTION)):
                    with sdpa_kernel(backend):
                        bars[name] = median_ms(
                            lambda i: scaled_dot_product_attention(
                                q[i % 2], wide_k[i % 2], wide_v[i % 2], is_causal=causal
                            ),
                            rounds,
                        )
                pre = median_ms(lambda i: int8_prepass.quantise_chunk(q[i % 2], k[i % 2], v[i % 2], dim**-0.5), rounds)
                chunks = [int8_prepass.quantise_chunk(q[i], k[i], v[i], dim**-0.5) for i in range(2)]
                out, lse = torch.empty_like(q[0]), torch.empty(batch, heads, tokens, device="cuda")
                few = slice(0, 1), slice(0, 1), slice(-256, None)
                exact = scaled_dot_product_attention(
                    q[0][few].float(), k[0][:1, :1].float(), v[0][:1, :1].float(),
                    attn_mask=int8.visible(256, tokens, causal, None, q[0].device),
                )  # fmt: skip
                for kernel in kernels(dim):
                    alone = median_ms(
                        lambda i: attend(kernel, q[i % 2], chunks[i % 2], out, lse, causal=causal), rounds
                    )
                    whole = median_ms(
                        lambda i: int8_prefill(q[i % 2], k[i % 2], v[i % 2], causal=causal, implementation=kernel),
                        rounds,
                    )
                    attend(kernel, q[0], chunks[0], out, lse, causal=causal)
                    say(
                        f"{dim:3} {tokens:6} {'causal' if causal else 'full  '} {kernel:7}| {work / bars['cuDNN']:4.0f} "
                        f"{work / bars['FA2']:4.0f} | {pre:6.3f} | {work / alone:4.0f} | {work / whole:4.0f} "
                        f"{bars['cuDNN'] / whole:5.2f}x {bars['FA2'] / whole:5.2f}x | {error(out[few], exact):.4f} (to exact)"
                    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 4096, 32768])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    both = not arguments.errors and not arguments.times
    if arguments.errors or both:
        check_errors()
    if arguments.times or both:
        check_times(arguments.head_dim, arguments.tokens)


if __name__ == "__main__":
    main()
