"""The peer of bench_gpu.py: the same encoders, projectors, loss and optimiser in torch.compile."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from gpu_common import CHANNELS, GIB, RESNETS, VITS, Job, Phases, Row, at, timed
from torch import nn
from torch.nn import functional as f


def again(block: nn.Module, x: torch.Tensor, remat: bool) -> torch.Tensor:
    return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if remat else block(x)


def conv(a: int, b: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b)]


class Bottleneck(nn.Module):
    def __init__(self, last: int, wide: int, stride: int):
        super().__init__()
        relu, out = nn.ReLU(True), 4 * wide
        self.body = nn.Sequential(*conv(last, wide, 1), relu, *conv(wide, wide, 3, stride), relu, *conv(wide, out, 1))
        self.skip = nn.Identity() if last == out else nn.Sequential(*conv(last, out, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return f.relu(self.skip(x) + self.body(x))


class ResNet(nn.Module):
    def __init__(self, counts: tuple[int, ...], channels: int, remat: bool):
        super().__init__()
        blocks, last = [], 64
        for stage, count in enumerate(counts):
            for i in range(count):
                blocks.append(Bottleneck(last, 64 * 2**stage, 2 if stage and not i else 1))
                last = 256 * 2**stage
        self.stem = nn.Sequential(*conv(channels, 64, 7, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, 1))
        self.blocks, self.dim, self.remat = nn.ModuleList(blocks), last, remat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = again(block, x, self.remat)
        return x.mean((2, 3))


class Block(nn.Module):
    def __init__(self, wide: int, heads: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(wide, 1e-6), nn.LayerNorm(wide, 1e-6)
        self.qkv, self.proj = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.mlp = nn.Sequential(nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, wide))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(f.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, wide: int, count: int, heads: int, px: int, channels: int, remat: bool):
        super().__init__()
        self.patches, self.dim, self.remat = nn.Conv2d(channels, wide, 16, 16), wide, remat
        self.cls = nn.Parameter(torch.zeros(1, 1, wide))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (px // 16) ** 2, wide))
        self.blocks, self.norm = nn.ModuleList(Block(wide, heads) for _ in range(count)), nn.LayerNorm(wide, 1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = again(block, x, self.remat)
        return self.norm(x)[:, 0]


def tower(model: str, sizes: dict[str, Any], channels: int, remat: bool) -> nn.Module:
    if model in RESNETS:
        encoder: Any = ResNet(RESNETS[model], channels, remat)
    else:
        encoder = ViT(*VITS[model], sizes["px"], channels, remat)
    layers, last = [], encoder.dim
    for width in sizes["widths"][:-1]:
        layers += [nn.Linear(last, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(True)]
        last = width
    return nn.Sequential(encoder, *layers, nn.Linear(last, sizes["widths"][-1]))


def pair_loss(towers: list[nn.Module], device: str, batch: int) -> Callable[..., torch.Tensor]:
    right = torch.arange(batch, device=device)

    def loss(he: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            z = [t((x.float() / 255 - 0.5) / 0.25) for t, x in zip(towers, (he, partner), strict=True)]
        logits = f.normalize(z[0].float(), dim=-1) @ f.normalize(z[1].float(), dim=-1).T / 0.1
        return (f.cross_entropy(logits, right) + f.cross_entropy(logits.T, right)) / 2

    return loss


def clip_each(params: list[nn.Parameter]) -> None:
    grads = [p.grad for p in params]
    factors = [(1.0 / n.clamp(min=1e-12)).clamp(max=1.0) for n in torch._foreach_norm(grads)]
    torch._foreach_mul_(grads, factors)


def step(job: Job, sizes: Row) -> Phases:
    on_gpu, model = torch.cuda.is_available(), job.what
    device, remat = "cuda" if on_gpu else "cpu", "remat" in job.words
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    towers = [tower(model, sizes, CHANNELS[name], remat) for name in ("he", "if")]
    yield None
    at("moving to the device")
    towers = [t.to(device, memory_format=torch.channels_last).train() for t in towers]
    params = [p for t in towers for p in t.parameters()]
    adam = torch.optim.Adam(params, 1e-4, fused=on_gpu or None)
    sides = (sizes["px"], sizes["px"])
    images = [
        torch.randint(0, 256, (job.size, *sides, CHANNELS[name]), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        for name in ("he", "if")
    ]
    loss, held = pair_loss(towers, device, job.size), {}
    compiled = loss if "eager" in job.words else torch.compile(loss)

    def run() -> None:
        adam.zero_grad(set_to_none=True)
        held["loss"] = compiled(*images)
        held["loss"].backward()
        clip_each(params)
        adam.step()

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    at("compiling, with the first step")
    start = time.perf_counter()
    run()
    wait()
    row: Row = {"compile_s": time.perf_counter() - start, "params": sum(p.numel() for p in params)}
    if on_gpu:
        torch.cuda.empty_cache()  # another process may measure before us
        torch.cuda.reset_peak_memory_stats()
    yield None
    at("measuring")
    row |= timed(run, wait, sizes["calls"])
    row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB if on_gpu else None
    yield row | {"loss": float(held["loss"].detach()), "skipped": 0}
