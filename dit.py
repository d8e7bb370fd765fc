"""DiT-DH: the diffusion transformer trained on RecTok latents, its flow-matching loss, and the ODE sampler.

    from dit import load_dit, sample
    dit = load_dit("ditdhxl_epoch_0079.pth")  # ours or the authors' file -> eval mode, EMA weights
    z = sample(dit, noise, y, steps=49, shift=2.828)          # (B, N, C), in normalised latents

A deep narrow body sees the image once and conditions a shallow wide head, per token (DDT, arXiv 2504.05741;
RAE, arXiv 2510.11690). Letters: B images, N tokens, C latent channels, W width. t = 0: noise, t = 1: data.
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenizer import Attention, SwiGLU, axial_rope, flow, load_named, read_weights, sample_time, to_float

PRESETS = {  # body and head: width, depth, heads
    "nano": dict(width=(128, 256),   depth=(4, 2),  heads=(4, 4)),       # ours, for --tiny
    "S":    dict(width=(384, 2048),  depth=(12, 2), heads=(6, 16)),
    "B":    dict(width=(768, 2048),  depth=(12, 2), heads=(12, 16)),
    "L":    dict(width=(1024, 2048), depth=(24, 2), heads=(16, 16)),
    "XL":   dict(width=(1152, 2048), depth=(28, 2), heads=(16, 16)),
}


@dataclass
class DiTConfig:
    grid: int = 16                    # sqrt(N)
    channels: int = 128               # C, of a latent token
    width: tuple = (1152, 2048)       # body, head
    depth: tuple = (28, 2)            # blocks
    heads: tuple = (16, 16)           # of attention
    num_classes: int = 1000           # the null class has the index num_classes
    qk_norm: bool = False             # RMSNorm on q and k, against late instability

    def __post_init__(self):          # JSON and checkpoints give lists
        self.width, self.depth, self.heads = tuple(self.width), tuple(self.depth), tuple(self.heads)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """adaLN: c (B, 1, W) modulates all tokens alike (body), c (B, N, W) each by its own (head)."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, qk_norm), SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final, self.linear = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, s):
        shift, scale = self.adaLN_modulation(s).chunk(2, -1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimeEmbedder(nn.Module):
    """Gaussian Fourier features of t in [0, 1] through a small MLP: (B,) -> (B, W)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("W", torch.randn(256))                       # frozen frequencies
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = 2 * math.pi * t.float()[:, None] * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class Projection(nn.Module):
    """A linear map of tokens, stored as a 1x1 convolution, as published (proj.weight (W, C, 1, 1))."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)

    def forward(self, x):
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def sincos_positions(width, grid):
    """MAE's fixed table (1, grid^2, W): the column fills the first half of channels, the row the second."""
    angle = torch.arange(grid)[:, None] / 10000 ** (torch.arange(width // 4) / (width // 4))  # (grid, W / 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, W / 2)
    return torch.cat([axis.expand(grid, -1, -1), axis[:, None].expand(-1, grid, -1)], -1).flatten(0, 1)[None]


class DiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpoint = config, False
        (body, head), C = config.width, config.channels
        self.s_embedder, self.x_embedder = Projection(C, body), Projection(C, head)
        self.t_embedder = TimeEmbedder(body)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(config.num_classes + 1, body)  # the last: null
        self.s_projector = nn.Linear(body, head)
        self.blocks = nn.ModuleList(DiTBlock(w, h, config.qk_norm) for w, d, h
                                    in zip(config.width, config.depth, config.heads) for _ in range(d))
        self.final_layer = FinalLayer(head, C)
        self.register_buffer("positions", sincos_positions(body, config.grid), persistent=False)
        for name, width, heads in zip(("rope_body", "rope_head"), config.width, config.heads):
            d = width // heads                   # EVA's axial RoPE: integer places, a frequency for each pair
            freqs = 10000 ** (-torch.arange(d // 4) * 4 / d)
            rope = axial_rope(torch.arange(config.grid).float(), freqs.repeat_interleave(2))
            self.register_buffer(name, rope, persistent=False)
        self.initialize()

    def initialize(self):
        for embedder in (self.x_embedder, self.s_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight.view(embedder.proj.weight.shape[0], -1))
            nn.init.zeros_(embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight,
                       self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        for layer in [self.final_layer.linear,
                      *(m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer))]:
            nn.init.zeros_(layer.weight)         # every block starts as the identity, the output as zero
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y):
        """x = z_t (B, N, C), t (B,) in [0, 1], y (B,) classes -> velocity (B, N, C)."""
        def run(block, *inputs):
            return checkpoint(block, *inputs, use_reentrant=False) if self.grad_checkpoint else block(*inputs)
        time = self.t_embedder(t)[:, None]                                          # (B, 1, W_body)
        c = F.silu(time + self.y_embedder.embedding_table(y)[:, None])
        s = self.s_embedder(x) + self.positions
        for block in self.blocks[:self.config.depth[0]]:
            s = run(block, s, c, self.rope_body)
        s = self.s_projector(F.silu(time + s))                                      # (B, N, W_head)
        x = self.x_embedder(x)
        for block in self.blocks[self.config.depth[0]:]:
            x = run(block, x, s, self.rope_head)
        return self.final_layer(x, s)


@torch.no_grad()
def latent_statistics(tokenizer, batches):
    """Mean and std (C,) over tokens and images of the posterior MEANS: float64 sums, reduced over processes.

    batches: of (uint8 images (B, 3, H, W), labels), without flips, each process its own share.
    """
    device = next(tokenizer.parameters()).device
    sums = torch.zeros(3, tokenizer.config.channels, dtype=torch.float64, device=device)
    for images, _ in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z = tokenizer.encode(to_float(images.to(device)))[0].double().flatten(0, 1)             # (B N, C)
        sums += torch.stack([z.sum(0), (z ** 2).sum(0), torch.full_like(z[0], len(z))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    mean = sums[0] / sums[2]
    return mean.float(), (sums[1] / sums[2] - mean ** 2).clamp(min=1e-12).sqrt().float()


# ---------------------------------------------------------------- flow matching on the path of tokenizer.flow
# z_t = t z + (1 - t) noise, so dz_t / dt = z - noise: the network learns this velocity, the sampler follows
# it from noise (t = 0) to data (t = 1). `shift` is the same in training, in sampling and in the tokenizer.

def flow_loss(model, z, y, shift, noise=None, u=None):
    """Squared velocity error, mean over tokens and channels: latents z (B, N, C), classes y (B,) -> (B,)."""
    noise = torch.randn_like(z) if noise is None else noise
    t = sample_time(len(z), shift, torch.rand(len(z), device=z.device) if u is None else u)
    z_t = flow(z, noise, t)
    v = model(z_t, t, y)
    return ((v.float() - (z - noise)) ** 2).mean((1, 2))


@torch.no_grad()
def sample(model, noise, y, steps, shift, cfg=1.0, interval=(0, 1), guide=None, solver="euler",
           trajectory=None):
    """Follow the velocity from noise (B, N, C) to latents of classes y, in `steps` steps of the shifted grid.

    v = v_weak + cfg (v - v_weak) where t lies in the closed interval; v_weak is the model with the null class
    (CFG), or `guide`, a smaller, less trained DiT with the same classes (AutoGuidance). solver: "euler", or
    "heun" (two evaluations a step). trajectory: a list that gets (t, z_t) before each step and at the end.
    """
    if steps < 1 or not 1 <= cfg < math.inf or solver not in ("euler", "heun"):
        raise ValueError(f"need steps >= 1, finite cfg >= 1, euler or heun; got {steps}, {cfg}, {solver!r}")

    def velocity(z, t):
        at = t.expand(len(z))
        v = model(z, at, y).float()
        if cfg == 1 or not interval[0] <= t <= interval[1]:
            return v
        weak = guide(z, at, y) if guide else model(z, at, torch.full_like(y, model.config.num_classes))
        return weak.float() + cfg * (v - weak.float())

    grid = sample_time(steps + 1, shift, torch.linspace(1, 0, steps + 1, device=noise.device)).clamp(0, 1)
    z = noise
    for t, after in zip(grid[:-1], grid[1:]):
        if trajectory is not None:
            trajectory.append((t.item(), z))
        v = velocity(z, t)
        if solver == "heun":
            v = (v + velocity(z + (after - t) * v, after)) / 2
        z = z + (after - t) * v
    if trajectory is not None:
        trajectory.append((1.0, z))
    return z


def load_dit(path, config=None):
    """DiT in eval mode with EMA weights from our checkpoints or the authors' ditdh*.pth.

    The config comes from our file, or is inferred for the presets' widths; other files need `config`.
    `model.extras` keeps what else our file holds: latent statistics, tokenizer path and fingerprint, step.
    """
    file = read_weights(path)
    state = file.get("model_ema", file.get("model", file))
    state = {n: w for n, w in state.items() if not re.search(r"freqs_(cos|sin)$|^pos_embed$", n)}  # computed
    needed = ("s_embedder.proj.weight", "x_embedder.proj.weight", "y_embedder.embedding_table.weight")
    if absent := [n for n in needed if n not in state]:
        raise ValueError(f"{path} holds no DiT-DH: no {', '.join(absent)}")
    if config is None and isinstance(file.get("config"), dict):
        config = DiTConfig(**file["config"])
    if config is None:
        width = (state["s_embedder.proj.weight"].shape[0], state["x_embedder.proj.weight"].shape[0])
        heads = {p["width"]: p["heads"] for p in PRESETS.values()}.get(width)
        if heads is None:
            raise ValueError(f"{path}: widths {width} are no preset, pass config=DiTConfig(...)")
        norms = [len(w) for n, w in state.items() if re.fullmatch(r"blocks\.\d+\.norm1\.weight", n)]
        table = file.get("model_ema", file.get("model", file)).get("pos_embed")
        config = DiTConfig(
            math.isqrt(table.shape[1]) if table is not None else 16, state["s_embedder.proj.weight"].shape[1],
            width, tuple(norms.count(w) for w in width), heads,
            len(state["y_embedder.embedding_table.weight"]) - 1, "blocks.0.attn.q_norm.weight" in state)
    model = load_named(DiT(config), state, path).eval()
    big = ("model", "model_ema", "optimizer")
    model.extras = {k: v for k, v in file.items() if k not in big} if "config" in file else {}
    return model
