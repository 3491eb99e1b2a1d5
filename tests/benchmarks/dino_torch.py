"""The peer of bench_dino.py: a DINO step in plain PyTorch, for tiles and for grids of tile features."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as f

T_STUDENT, T_TEACHER = 0.1, 0.04


class Block(nn.Module):
    def __init__(self, wide: int, heads: int, drop_path: float):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(wide, 1e-6), nn.LayerNorm(wide, 1e-6)
        self.qkv, self.proj = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.mlp = nn.Sequential(nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, wide))

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        if not self.drop_path:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device, dtype=x.dtype) < 1 - self.drop_path
        return x * keep / (1 - self.drop_path)

    def forward(self, x: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = f.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=there)
        x = x + self.kept(self.proj(mixed.transpose(1, 2).reshape(b, n, d)))
        return x + self.kept(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Over patches of images [B, H, W, 3], or over grids [B, h, w, D + 1] whose last channel says where a tile is."""

    def __init__(self, sizes: dict[str, Any], drop_path: float):
        super().__init__()
        wide, count, heads = sizes["vit"]
        self.patch, side = sizes["patch"], sizes["large"] // sizes["patch"]
        self.embed: Any = (
            nn.Conv2d(3, wide, self.patch, self.patch)
            if self.patch > 1
            else nn.Sequential(nn.Linear(sizes["features"], wide), nn.GELU())
        )
        self.cls = nn.Parameter(torch.zeros(1, 1, wide))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + side * side, wide))
        self.blocks = nn.ModuleList(Block(wide, heads, drop_path * i / (count - 1)) for i in range(count))
        self.norm, self.side = nn.LayerNorm(wide, 1e-6), side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        there = None
        if self.patch > 1:
            x = self.embed(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        else:
            x, there = x[..., :-1].flatten(1, 2), x[..., -1].flatten(1) > 0.5
            there = f.pad(there, (1, 0), value=True)[:, None, None]
            x = self.embed(x)
        side = int(x.shape[1] ** 0.5)
        positions = self.positions
        if side != self.side:
            grid = positions[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            grid = f.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1).to(x.dtype), x], 1) + positions
        for block in self.blocks:
            x = block(x, there)
        return self.norm(x)[:, 0]


class Network(nn.Module):
    def __init__(self, sizes: dict[str, Any], drop_path: float):
        super().__init__()
        self.encoder = Transformer(sizes, drop_path)
        hidden, narrow, out = sizes["head"]
        layers = [nn.Linear(sizes["vit"][0], hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Linear(hidden, narrow))
        self.last = nn.Parameter(torch.randn(out, narrow) / narrow**0.5)

    def forward(self, groups: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.cat([self.encoder(x) for x in groups])
        z = f.normalize(self.head(rows).float(), dim=-1)
        return f.linear(z, f.normalize(self.last, dim=-1))


def objective(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor, batch: int) -> torch.Tensor:
    logs = [f.log_softmax(s.float() / T_STUDENT, -1) for s in student.split(batch)]
    targets = [f.softmax((t.float() - centre) / T_TEACHER, -1) for t in teacher.split(batch)]
    pairs = [(-t * s).sum(-1).mean() for i, t in enumerate(targets) for j, s in enumerate(logs) if i != j]
    return sum(pairs) / len(pairs)


def step(sizes: dict[str, Any], device: str, batch: int, eager: bool) -> tuple[Callable[[], None], Any, dict[str, Any]]:
    """(one step, what waits for it, facts)"""
    on_gpu, half = device == "gpu", device == "gpu"
    place = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    student, teacher = (Network(sizes, rate).to(place) for rate in (0.1, 0.0))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    params = list(student.parameters())
    decayed, plain = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.04}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, 5e-4, fused=on_gpu or None)
    centre = torch.zeros(sizes["head"][2], device=place)
    stored = images(sizes, batch, place)

    def loss(x: torch.Tensor, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(place, torch.bfloat16, enabled=half):
            x = (x.float() / 255 - 0.5) / 0.25 if sizes["patch"] > 1 else x
            large, small = (cropped(x, sizes[name], count) for name, count in (("large", 2), ("small", 8)))
            with torch.no_grad():
                targets = teacher([large])
            logits = student([large, small])
        return objective(logits, targets, centre, batch), targets.float().mean(0)

    compiled, held = loss if eager else torch.compile(loss), {}

    def run() -> None:
        adam.zero_grad(set_to_none=True)
        held["loss"], mean = compiled(stored, centre)
        held["loss"].backward()
        torch.nn.utils.clip_grad_norm_(params, 3.0)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), params, 0.004)
            centre.mul_(0.9).add_(mean, alpha=0.1)

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    start = time.perf_counter()
    run()
    wait()
    row = {"first_s": time.perf_counter() - start, "params": sum(p.numel() for p in params)}
    row |= {"version": f"torch {torch.__version__}", "loss": float(held["loss"].detach())}

    def after() -> dict[str, Any]:
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {}

    return run, wait, row | {"after": after}


def images(sizes: dict[str, Any], batch: int, place: str) -> torch.Tensor:
    side = sizes["stored"]
    if sizes["patch"] > 1:
        return torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=place)
    grid = torch.randn(batch, side, side, sizes["features"] + 1, device=place)
    grid[..., -1] = 1.0
    return grid


def cropped(x: torch.Tensor, side: int, count: int) -> torch.Tensor:
    """Views are left out: every crop is of the corner, each moved by as many cells as its number."""
    room = x.shape[1] - side
    return torch.cat([x[:, i % (room + 1) : i % (room + 1) + side, :side] for i in range(count)])
