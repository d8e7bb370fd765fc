"""DiT-DH: the diffusion transformer trained on RecTok latents, its flow-matching loss, and the sampler.

    from dit import load_dit, sample
    dit = load_dit("ditdhxl_epoch_0079.pth")        # ours or the authors' file -> eval mode, EMA weights
    z = sample(dit, noise, y, steps=49, shift=2.828)           # (B, N, C), in normalised latents

A deep, narrow body sees the image once and conditions a shallow, wide head, token by token (DDT, arXiv
2504.05741; RAE, arXiv 2510.11690). Letters: B images, N tokens, C latent channels, W width.
"""
import math
import os
import re
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenizer import (Attention, SwiGLU, atomic, axial_rope, fingerprint, flow, from_rank_0, load_named,
                       local_batches, naming, own_config, print_once, rank_and_world, read_checkpoint,
                       sample_noise, sample_time, to_float)

# ---------------------------------------------------------------- flow matching on the path of tokenizer.flow
# z_t = t z + (1 - t) noise, so dz_t / dt = z - noise. The network learns this velocity; the sampler follows
# it from noise (t = 0) to data (t = 1). `shift` is the same in training, sampling and in the tokenizer.

def flow_loss(model, z, y, shift, noise=None, u=None):
    """Squared error of the velocity, mean over tokens and channels: z (B, N, C), classes y (B,) -> (B,).

    noise (B, N, C), normal, and u (B,), uniform in [0, 1], are drawn here where they are not given.
    """
    if noise is None:
        noise = torch.randn_like(z)
    t = sample_time(len(z), shift, u, device=z.device)
    z_t = flow(z, noise, t)
    v = model(z_t, t, y)
    return ((v.float() - (z - noise)) ** 2).mean((1, 2))


def sample(model, noise, y, steps, shift, cfg=1.0, interval=(0, 1), guide=None, solver="euler"):
    """noise (B, N, C), classes y (B,) -> latents (B, N, C), normalised: the end of sample_path."""
    for _, z in sample_path(model, noise, y, steps, shift, cfg, interval, guide, solver):
        pass
    return z


@torch.no_grad()
def sample_path(model, noise, y, steps, shift, cfg=1.0, interval=(0, 1), guide=None, solver="euler"):
    """Follows the velocity in `steps` steps of the shifted time grid, and yields each (t, z_t).

    v = v_weak + cfg (v - v_weak) where t lies in the closed interval. v_weak is the model's for the null
    class (classifier-free guidance), or that of `guide`, a smaller, less trained DiT (AutoGuidance). solver:
    "euler", or "heun" (order 2, two evaluations a step). The authors' "50 steps" are 50 points: 49 here.
    """
    if steps < 1 or not 1 <= cfg < math.inf or solver not in ("euler", "heun"):
        raise ValueError(f"need steps >= 1, finite cfg >= 1, euler or heun; got {steps}, {cfg}, {solver!r}")

    def velocity(z, t):
        times = t.expand(len(z))
        v = model(z, times, y).float()
        if cfg == 1 or not interval[0] <= t <= interval[1]:
            return v
        if guide is not None:
            weak = guide(z, times, y).float()
        else:
            weak = model(z, times, torch.full_like(y, model.config.num_classes)).float()
        return weak + cfg * (v - weak)

    u = torch.linspace(1, 0, steps + 1, device=noise.device)
    times = sample_time(steps + 1, shift, u).clamp(0, 1)             # from 0, noise, to 1, data
    assert times[0] == 0 and times[-1] == 1, "sample_time must give t = 0 at u = 1, and t = 1 at u = 0"
    z = noise
    for t, t_next in zip(times[:-1], times[1:]):
        yield t.item(), z
        v = velocity(z, t)
        if solver == "heun":
            ahead = z + (t_next - t) * v
            v = (v + velocity(ahead, t_next)) / 2
        z = z + (t_next - t) * v
    yield 1.0, z


@torch.no_grad()
def generate(model, tokenizer, stats, seed, indices, y, precision, **options):
    """Images (B, 3, H, W) of the samples `indices` of classes y (B,): noise -> sample -> decode.

    stats: mean and std (C,) of the latents. precision: the autocast of the DiT; pixels are decoded in
    float32, since bf16 is coarser than a grey level. options: those of `sample`.
    """
    noise = sample_noise(seed, indices, model.config.grid ** 2, model.config.channels).to(y.device)
    with precision:
        z = sample(model, noise, y, **options)
    return decode_normalised(tokenizer, stats, z)


@torch.no_grad()
def decode_normalised(tokenizer, stats, z):
    """Latents as the DiT knows them (B, N, C) -> images (B, 3, H, W) in [-1, 1] but for overshoot."""
    mean, std = stats
    images = tokenizer.decode(z * std + mean)
    if not images.isfinite().all():
        raise FloatingPointError("samples are not finite: weights or latent statistics hold NaN or infinity")
    return images


@torch.no_grad()
def latent_statistics(tokenizer, batches, of_means=False):
    """Mean and std (C,) of posterior SAMPLES over images and tokens: float64 sums over all processes.

    The DiT's targets are samples, so their deviation is what brings them to 1. The released code, and so its
    DiTs, takes that of the posterior MEANS (of_means); where the KL has emptied a channel, this would blow
    its noise up a hundredfold.
    batches: of (uint8 images (B, 3, H, W), labels), without flips; each process has its own share.
    """
    device = next(tokenizer.parameters()).device
    C = tokenizer.config.channels
    count = torch.zeros(C, dtype=torch.float64, device=device)
    total, squares, posterior = torch.zeros(3, C, dtype=torch.float64, device=device)
    for images, _ in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, logvar = tokenizer.encode(to_float(images.to(device)))
        mean = mean.double().flatten(0, 1)                          # (B N, C)
        count += len(mean)
        total += mean.sum(0)
        squares += (mean ** 2).sum(0)
        posterior += logvar.double().flatten(0, 1).exp().sum(0)
    if dist.is_initialized():
        for x in (count, total, squares, posterior):
            dist.all_reduce(x)
    mean = total / count
    variance_of_means = (squares / count - mean ** 2).clamp(min=0)
    variance = variance_of_means + posterior / count                # the law of total variance
    empty = int((variance_of_means < 0.01 * variance).sum())
    if empty:
        print_once(f"notice: {empty} of {C} latent channels carry nothing (more than 99 % of their variance "
                   "is the posterior's noise): the KL has emptied them; a smaller --w_kl fills them")
    if of_means:
        variance = variance_of_means
    return mean.float(), variance.clamp(min=1e-12).sqrt().float()


def kept_statistics(path, tokenizer, data, batch=64, workers=0, of_means=False):
    """latent_statistics of a data set: read from the npz at `path`, or computed and written there."""
    device = next(tokenizer.parameters()).device
    mark = fingerprint(tokenizer)
    stats = from_rank_0(lambda: read_statistics(path, tokenizer.config.channels, mark))
    if stats is None:
        batches = local_batches(data, batch, workers, desc="latent statistics")
        stats = latent_statistics(tokenizer, batches, of_means)
        rank, _ = rank_and_world()
        if rank == 0:
            mean, std = (x.cpu().numpy() for x in stats)
            try:
                with atomic(path) as f:
                    np.savez(f, mean=mean, std=std, fingerprint=mark)
            except OSError as error:
                warnings.warn(f"latent statistics are not kept: {error}")
    return stats[0].to(device), stats[1].to(device)


def read_statistics(path, channels, mark):
    """-> mean, std (C,) of an npz, or None where there is no file."""
    if not os.path.exists(path):
        return None
    with naming(path, "an npz with the mean and std of latents"):
        with np.load(path, allow_pickle=False) as file:
            mean, std = (torch.from_numpy(file[k]).float().flatten() for k in ("mean", "std"))
            other = "fingerprint" in file.files and str(file["fingerprint"]) != mark
    if not (mean.isfinite().all() and (std > 0).all()):
        raise ValueError(f"{path}: the mean must be finite and the std positive")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"{path} has statistics of {len(mean)} channels, the tokenizer has {channels}")
    if other:
        warnings.warn(f"{path} has statistics of another tokenizer (other encoder weights)")
    return mean, std


# ---------------------------------------------------------------- the network

PRESETS = {  # of body and head: width, depth, attention heads
    "nano": dict(width=(128, 256),   depth=(4, 2),  heads=(4, 4)),      # ours, for --tiny
    "S":    dict(width=(384, 2048),  depth=(12, 2), heads=(6, 16)),
    "B":    dict(width=(768, 2048),  depth=(12, 2), heads=(12, 16)),
    "L":    dict(width=(1024, 2048), depth=(24, 2), heads=(16, 16)),
    "XL":   dict(width=(1152, 2048), depth=(28, 2), heads=(16, 16)),
}


@dataclass
class DiTConfig:
    grid: int = 16                      # tokens a side: N = grid^2
    channels: int = 128                 # C, of a latent token
    width: tuple = (1152, 2048)         # of body and head
    depth: tuple = (28, 2)              # blocks
    heads: tuple = (16, 16)             # of attention
    num_classes: int = 1000             # the null class has the index num_classes
    qk_norm: bool = False               # RMSNorm on q and k, against late instability

    def __post_init__(self):            # JSON and checkpoints give lists
        self.width = tuple(self.width)
        self.depth = tuple(self.depth)
        self.heads = tuple(self.heads)


class DiT(nn.Module):
    """z_t, t, class -> velocity."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False
        body, head = config.width
        self.s_embedder = Projection(config.channels, body)             # z_t for the body
        self.x_embedder = Projection(config.channels, head)             # z_t for the head
        self.t_embedder = TimeEmbedder(body)
        self.y_embedder = ClassEmbedder(config.num_classes, body)
        self.s_projector = nn.Linear(body, head)
        blocks = []
        for width, depth, heads in zip(config.width, config.depth, config.heads):
            blocks += [DiTBlock(width, heads, config.qk_norm) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(head, config.channels)
        self.register_buffer("positions", sincos_positions(body, config.grid), persistent=False)
        self.register_buffer("rope_body", axial_rope_eva(config.grid, body // config.heads[0]),
                             persistent=False)
        self.register_buffer("rope_head", axial_rope_eva(config.grid, head // config.heads[1]),
                             persistent=False)
        self.initialize()

    def initialize(self):
        for embedder in (self.x_embedder, self.s_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))
            nn.init.zeros_(embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight,
                       self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        # Every block starts as the identity, and the output as zero.
        modulations = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y):
        """x = z_t (B, N, C), t (B,) in [0, 1], y (B,) classes -> velocity (B, N, C)."""
        time = self.t_embedder(t)[:, None]                              # (B, 1, W_body)
        c = F.silu(time + self.y_embedder(y)[:, None])
        s = self.s_embedder(x) + self.positions
        for block in self.blocks[:self.config.depth[0]]:
            s = self.run(block, s, c, self.rope_body)                   # c modulates all tokens alike
        s = self.s_projector(F.silu(time + s))                          # (B, N, W_head)
        x = self.x_embedder(x)
        for block in self.blocks[self.config.depth[0]:]:
            x = self.run(block, x, s, self.rope_head)  # s modulates each token by its own
        return self.final_layer(x, s)

    def run(self, block, *inputs):
        if self.grad_checkpoint:  # recomputed in backward: less memory
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class DiTBlock(nn.Module):
    """Attention and SwiGLU, each modulated by c, (B, 1, W) or (B, N, W): adaLN (DiT, arXiv 2212.09748)."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, s):
        shift, scale = self.adaLN_modulation(s).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class TimeEmbedder(nn.Module):
    """Gaussian Fourier features of t in [0, 1], through a small MLP: (B,) -> (B, W)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("W", torch.randn(256))                     # frozen frequencies
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = 2 * math.pi * t.float()[:, None] * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))


class ClassEmbedder(nn.Module):
    """Classes (B,) -> (B, W); the last row is the null class."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class Projection(nn.Module):
    """A linear map of tokens, stored as a 1x1 convolution, as published (proj.weight (W, C, 1, 1))."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 1)

    def forward(self, x):
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def axial_rope_eva(grid, d):
    """EVA's axial RoPE: integer places, and a frequency for each pair of adjacent channels."""
    freqs = 10000 ** (-torch.arange(d // 4) * 4 / d)
    return axial_rope(torch.arange(grid).float(), freqs.repeat_interleave(2))


def sincos_positions(width, grid):
    """MAE's fixed table (1, N, W): the column fills the first half of the channels, the row the second."""
    freqs = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * freqs                         # (grid, W / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                 # (grid, W / 2)
    columns = axis[None].expand(grid, grid, -1)
    rows = axis[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None]


# ---------------------------------------------------------------- loading

def load_dit(path, config=None, ema=True, init=False):
    """DiT in eval mode, from our checkpoints or the authors' ditdh*.pth: EMA weights, or raw (ema=False).

    The config comes from our file, or is inferred where the widths are a preset's; other files need `config`.
    With `init`, a class table that does not fit is left fresh, but for the null class. `model.extras` is what
    else our file holds: latent statistics, tokenizer path and fingerprint, class names, step.
    """
    file, state = read_checkpoint(path, ema)
    with naming(path, "a DiT-DH"):
        config = config or own_config(file, DiTConfig) or config_from_shapes(state)
        model = DiT(config)
        computed = r"freqs_(cos|sin)$|^pos_embed$"
        state = {n: w for n, w in state.items() if not re.search(computed, n)}
        table = "y_embedder.embedding_table.weight"
        if init and len(state[table]) != config.num_classes + 1:
            warnings.warn(f"{path}: {len(state[table]) - 1} classes, here {config.num_classes}: "
                          "a fresh class table, with the null class of the file")
            fresh = model.state_dict()[table].clone()
            fresh[-1] = state[table][-1]
            state[table] = fresh
    model = load_named(model, state, path).eval()
    ours = {"fingerprint", "latent_mean", "latent_std", "args"} <= file.keys()
    model.extras = ({k: v for k, v in file.items() if k not in ("model", "model_ema", "optimizer")}
                    if ours else {})
    return model


def config_from_shapes(state):
    """The config of a file that has none, from the shapes of its tensors."""
    width = (len(state["s_embedder.proj.weight"]), len(state["x_embedder.proj.weight"]))
    heads = {}
    for preset in PRESETS.values():
        heads.setdefault(preset["width"], preset["heads"])
    if width not in heads:
        raise ValueError(f"widths {width} are no preset: pass config=DiTConfig(...)")
    norms = [len(w) for n, w in state.items() if re.fullmatch(r"blocks\.\d+\.norm1\.weight", n)]
    grid = 16
    if "pos_embed" in state:
        grid = math.isqrt(state["pos_embed"].shape[1])
    return DiTConfig(
        grid=grid,
        channels=state["s_embedder.proj.weight"].shape[1],
        width=width,
        depth=(norms.count(width[0]), norms.count(width[1])),
        heads=heads[width],
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in state)
