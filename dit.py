"""DiT-DH: the diffusion transformer trained on RecTok latents, its flow-matching loss, and the sampler.

    from dit import load_dit, sample
    dit = load_dit("ditdhxl_epoch_0079.pth")        # ours or the authors' file -> eval mode, EMA weights
    z = sample(dit, noise, y, steps=49, shift=2.828)           # (B, N, C), in normalised latents

A deep, narrow body sees the image once and conditions a shallow, wide head, token by token (DDT, arXiv
2504.05741; RAE, arXiv 2510.11690). Letters: B images, N tokens, C latent channels, W width.
"""
import math
import re
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tokenizer import (Attention, SwiGLU, all_reduce, axial_rope, flow, linear_by_conv, load_named, naming,
                       own_config, read_checkpoint, rms_norm, sample_noise, sample_time, time_grid, to_float,
                       training_precision)

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


@torch.no_grad()
def sample_path(model, noise, y, steps, shift, cfg=1.0, interval=(0, 1), guide=None, solver="euler"):
    """From noise (B, N, C), for classes y (B,), along the velocity: yields each (t, z_t) of the shifted time
    grid of `steps` steps.

    v = v_weak + cfg (v - v_weak) where t lies in the closed interval. v_weak is the model's for the null
    class (classifier-free guidance), or that of `guide`, a smaller, less trained DiT (AutoGuidance). solver:
    "euler", or "heun" (order 2, two evaluations a step). The authors' "50 steps" are 50 points: 49 here.
    """
    def velocity(z, t):
        times = t.expand(len(z))
        v = model(z, times, y).float()
        if cfg == 1 or not interval[0] <= t <= interval[1]:
            return v
        if guide:
            weak = guide(z, times, y)
        else:
            weak = model(z, times, torch.full_like(y, model.config.num_classes))
        return weak + cfg * (v - weak)                              # float32, as v

    times = time_grid(steps, shift, noise.device)                   # from 0, noise, to 1, data
    z = noise
    for t, t_next in zip(times[:-1], times[1:]):
        yield t.item(), z
        v = velocity(z, t)
        if solver == "heun":
            ahead = z + (t_next - t) * v
            v = (v + velocity(ahead, t_next)) / 2
        z = z + (t_next - t) * v
    yield 1.0, z


def sample(*args, **options):
    """What sample_path takes -> its end: latents (B, N, C), normalised."""
    for _, z in sample_path(*args, **options):
        pass
    return z


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
    sums = torch.zeros(3, tokenizer.config.channels, dtype=torch.float64, device=device)
    for images, _ in batches:
        with training_precision(device):
            mean, logvar = tokenizer.encode(to_float(images.to(device)))
        mean, variance = mean.double(), logvar.double().exp()
        squares = mean ** 2 if of_means else mean ** 2 + variance   # the expected square of a sample
        sums += torch.stack([torch.ones_like(mean), mean, squares]).sum((1, 2))
    all_reduce(sums)
    count, total, squares = sums
    mean = total / count
    variance = squares / count - mean ** 2
    return mean.float(), variance.clamp(min=1e-12).sqrt().float()


# ---------------------------------------------------------------- the network

PRESETS = {  # of body and head: width, depth, attention heads
    "nano": dict(width=(160, 192),   depth=(4, 1),  heads=(4, 4)),      # ours, for --tiny
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


class DiT(nn.Module):
    """z_t, t, class -> velocity."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False
        body, head = config.width
        # z_t for the body and for the head: linear maps of tokens, published as 1x1 convolutions.
        self.s_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, body, 1)})
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.channels, head, 1)})
        self.t_embedder = TimeEmbedder(body)
        # The last class is the null class.
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, body)})
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

        # Initial values
        for embedder in (self.x_embedder, self.s_embedder):
            nn.init.xavier_uniform_(embedder["proj"].weight.flatten(1))
            nn.init.zeros_(embedder["proj"].bias)
        for layer in (self.y_embedder["embedding_table"], self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # Every block starts as the identity, and the output as zero.
        modulations = [module.adaLN_modulation[1] for module in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y):
        """x = z_t (B, N, C), t (B,) in [0, 1], y (B,) classes -> velocity (B, N, C)."""
        time = self.t_embedder(t)[:, None]                              # (B, 1, W_body)
        c = F.silu(time + self.y_embedder["embedding_table"](y)[:, None])
        s = linear_by_conv(x, self.s_embedder["proj"]) + self.positions
        for block in self.blocks[:self.config.depth[0]]:
            s = self.run(block, s, c, self.rope_body)                   # c modulates all tokens alike
        s = self.s_projector(F.silu(time + s))                          # (B, N, W_head)
        x = linear_by_conv(x, self.x_embedder["proj"])
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
        self.norm1 = rms_norm(width)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = rms_norm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = rms_norm(width)
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


def axial_rope_eva(grid, d):
    """EVA's axial RoPE: integer places, and a frequency for each pair of adjacent channels."""
    freqs = 10000 ** (-torch.arange(d // 4) * 4 / d)
    return axial_rope(torch.arange(grid).float(), freqs.repeat_interleave(2))


def sincos_positions(width, grid):
    """MAE's fixed table (1, N, W): the column fills the first half of the channels, the row the second."""
    freqs = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * freqs                         # (grid, W / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                 # (grid, W / 2)
    rows, columns = axis.repeat_interleave(grid, 0), axis.repeat(grid, 1)       # of each token
    return torch.cat([columns, rows], dim=1)[None]


# ---------------------------------------------------------------- loading

def load_dit(path, config=None, ema=True):
    """DiT in eval mode, from our checkpoints or the authors' ditdh*.pth: EMA weights, or raw (ema=False).

    The config comes from our file, or is inferred where the widths are a preset's; other files need `config`.
    A class table of another length is fresh, but for the null class. `model.extras` is what else our file
    holds: latent statistics, tokenizer path and fingerprint, class names, step.
    """
    file, state = read_checkpoint(path, ema)
    with naming(path, "a DiT-DH"):
        config = config or own_config(file, DiTConfig) or config_from_shapes(state)
        model = DiT(config)
        computed = r"freqs_(cos|sin)$|^pos_embed$"
        state = {n: w for n, w in state.items() if not re.search(computed, n)}
        table = "y_embedder.embedding_table.weight"
        if len(state[table]) != config.num_classes + 1:
            warnings.warn(f"{path}: {len(state[table]) - 1} classes, here {config.num_classes}: "
                          "a fresh class table, with the null class of the file")
            fresh = model.state_dict()[table].clone()
            fresh[-1] = state[table][-1]
            state[table] = fresh
    model = load_named(model, state, path).eval()
    model.extras = {}
    if "latent_mean" in file:                                       # ours
        model.extras = {k: v for k, v in file.items() if k not in ("model", "model_ema", "optimizer")}
    return model


def config_from_shapes(state):
    """The config of a file that has none, from the shapes of its tensors."""
    width = (len(state["s_embedder.proj.weight"]), len(state["x_embedder.proj.weight"]))
    heads = [preset["heads"] for preset in PRESETS.values() if preset["width"] == width]
    if not heads:
        raise ValueError(f"widths {width} are no preset: pass config=DiTConfig(...)")
    norms = [len(w) for n, w in state.items() if re.fullmatch(r"blocks\.\d+\.norm1\.weight", n)]
    return DiTConfig(
        grid=math.isqrt(state["pos_embed"].shape[1]) if "pos_embed" in state else 16,
        channels=state["s_embedder.proj.weight"].shape[1],
        width=width,
        depth=tuple(map(norms.count, width)),
        heads=heads[0],
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        qk_norm="blocks.0.attn.q_norm.weight" in state)
