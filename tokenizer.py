"""The RecTok tokenizer: the rectified flow, the model, its frozen teacher; then files, images and processes.

    from tokenizer import load_tokenizer
    tokenizer = load_tokenizer("RecTok.pth")        # ours or the authors' file -> eval mode, EMA weights
    mean, logvar = tokenizer.encode(images)         # (B, 3, H, W) in [-1, 1] -> (B, N, C) each
    images = tokenizer.decode(mean)                 # (B, N, C) -> (B, 3, H, W)

Letters: B images, N tokens (a square grid, row by row), K visible tokens, C latent channels, D teacher width,
W width of a network. Source: RecTok, arXiv 2512.13421. Where paper and released code differ, the code is
followed: it made the published weights.
"""
import argparse
import atexit
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import traceback
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm


# ---------------------------------------------------------------- the rectified flow, shared by both stages
# t = 1 is data, the latents z; t = 0 is noise:
#
#     z_t = t z + (1 - t) noise          velocity dz_t / dt = z - noise
#
# Stage 2 trains a DiT on z_t. So stage 1 trains the tokenizer on the same z_t, at the same t: that is RecTok.
# (Stage 2 normalises z channel by channel first; stage 1 leaves its scale to the KL.)

def latent_shift(N, C):
    """The timestep shift s for N tokens of C channels: a larger latent needs more noise to hide it."""
    return max(1.0, math.sqrt(N * C / 4096))


def sample_time(n, shift, u=None, schedule="shift", device=None):
    """n times (n,) in [0, 1]: t = 1 - s u / (1 + (s - 1) u) with u ~ U(0, 1), given or drawn here.

    s = 1 is uniform; s > 1 favours the noisy end. Other schedules are ablations of stage 1 alone: "uniform",
    and "lognormal", where the noise level 1 - t is the sigmoid of a standard normal variable.
    """
    if schedule == "lognormal":
        return 1 - torch.randn(n, device=device).sigmoid()
    if schedule == "uniform":
        shift = 1.0
    if u is None:
        u = torch.rand(n, device=device)
    return 1 - shift * u / (1 + (shift - 1) * u)


def flow(z, noise, t):
    """z_t = t z + (1 - t) noise. z, noise (B, ...), t (B,): one for all tokens of an image; or (1,)."""
    t = t.view(-1, *[1] * (z.ndim - 1))
    return t * z + (1 - t) * noise


def time_grid(steps, shift, device=None):
    """The sampler's times (steps + 1,), from noise to data: u from 1 to 0 through the same law.

    Raises ValueError where the law does not rise from noise to data. Both trainers call it at their start:
    such a law could be trained, but not sampled.
    """
    times = sample_time(steps + 1, shift, torch.linspace(1, 0, steps + 1, device=device))
    ends = abs(times[0]) < 1e-6 and abs(times[-1] - 1) < 1e-6
    if not (ends and times.diff().min() >= 0):
        raise ValueError(f"sample_time is {times[0]} at u = 1, {times[-1]} at u = 0: it must go from 0 to 1")
    return times.clamp(0, 1)


def flow_shift(shift, config):
    """s for latents of this config: as given, or by latent_shift where it is "auto"; checked by time_grid."""
    shift = latent_shift(config.grid ** 2, config.channels) if shift == "auto" else float(shift)
    time_grid(50, shift)
    return shift


def random_visible(B, N, hidden_share, noise=None, device=None):
    """Indices of the VISIBLE patches, (B, K) long: K = ceil(N (1 - hidden_share)).

    They are the places of the K smallest of noise (B, N), given or drawn here: another set for each image,
    in no order.
    """
    if noise is None:
        noise = torch.rand(B, N, device=device)
    K = math.ceil(N * (1 - hidden_share))
    return noise.argsort(dim=1)[:, :K].contiguous()


# ---------------------------------------------------------------- the tokenizer

SIZES = {  # width, layers, attention heads
    "nano":  (128, 2, 4),         # ours, for --tiny
    "tiny":  (192, 3, 4),
    "small": (512, 8, 8),
    "base":  (768, 12, 12),
    "large": (1024, 24, 16),
    "xl":    (1152, 28, 16),
    "huge":  (1280, 32, 16),
}


@dataclass
class TokenizerConfig:
    image_size: int = 256             # pixels, square
    patch_size: int = 16              # pixels a token
    channels: int = 128               # C, of a latent token
    encoder: str = "base"             # a row of SIZES
    decoder: str = "base"             # the pixel decoder: a row of SIZES
    semantic: str = "tiny"            # the semantic decoder: a row of SIZES, "mlp", or "none"
    teacher_dim: int | tuple = 1024   # D; several teachers: a tuple, with a semantic decoder for each

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not divisible by patch size {self.patch_size}")
        if isinstance(self.teacher_dim, int):
            self.teacher_dim = (self.teacher_dim,)

    @property
    def grid(self):
        """Tokens a side: N = grid^2."""
        return self.image_size // self.patch_size


class RecTok(nn.Module):
    """An encoder, a pixel decoder, and a semantic decoder for each teacher.

    `visible` (B, K) holds the indices of the visible patches, in any order; None: all are visible, K = N.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = PixelDecoder(config)
        for part in (self.encoder, self.decoder):
            width = part.positional_embedding.shape[-1]             # published: 0.02, at width 768
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.trunc_normal_(module.weight, std=0.02 * (768 / width) ** 0.5)
                    nn.init.zeros_(module.bias)
        # The semantic decoders, one a teacher, keep PyTorch's own initial values, as published.
        self.sem_decoders = nn.ModuleList()
        if config.semantic != "none":
            Decoder = SemanticMLP if config.semantic == "mlp" else SemanticDecoder
            self.sem_decoders.extend(Decoder(config, D) for D in config.teacher_dim)

    def encode(self, images, visible=None):
        """images (B, 3, H, W) in [-1, 1] -> mean and log-variance of the posterior, (B, K, C) each."""
        mean, logvar = self.encoder(images, visible).chunk(2, dim=-1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, visible=None):
        """z (B, K, C), clean or z_t -> images (B, 3, H, W), in [-1, 1] but for overshoot."""
        return self.decoder(z, visible)

    def predict(self, z, visible=None):
        """z (B, K, C), clean or z_t -> features (B, N, D) of ALL N patches; of several teachers, a list."""
        if not self.sem_decoders:
            raise ValueError("this tokenizer has no semantic decoder (none trained, or dropped by stage 1b)")
        features = [decoder(z, visible) for decoder in self.sem_decoders]
        return features[0] if len(features) == 1 else features


class Encoder(nn.Module):
    """Patches -> mean and log-variance of each token, (B, K, 2C)."""

    def __init__(self, config):
        super().__init__()
        width, depth, heads = SIZES[config.encoder]
        self.patch_size = config.patch_size
        self.patch_embed = nn.Sequential(nn.Conv2d(3, width, config.patch_size, config.patch_size))
        self.positional_embedding = learned_positions(config.grid, width)
        self.ln_pre = rms_norm(width)
        self.transformer = Transformer(width, depth, heads, config.grid)
        self.ln_post = rms_norm(width)
        self.latent_head = nn.Linear(width, 2 * config.channels)

    def forward(self, images, visible=None):
        patches = F.pixel_unshuffle(images, self.patch_size)        # (B, 3 p p, grid, grid)
        patches = patches.flatten(2).transpose(1, 2)                # (B, N, 3 p p)
        patches = take_tokens(patches, visible)                     # RAD: hidden pixels go no further
        x = linear_by_conv(patches, self.patch_embed[0])
        x = self.ln_pre(x + take_tokens(self.positional_embedding, visible))
        x = self.ln_post(self.transformer(x, visible))
        return self.latent_head(x)


class PixelDecoder(nn.Module):
    """Latents -> images."""

    def __init__(self, config):
        super().__init__()
        width, depth, heads = SIZES[config.decoder]
        self.grid = config.grid
        self.patch_size = config.patch_size
        self.mask_token = nn.Parameter(width ** -0.5 * torch.randn(1, 1, width))
        self.decoder_embed = nn.Linear(config.channels, width)
        self.positional_embedding = learned_positions(config.grid, width)
        self.ln_pre = rms_norm(width)
        self.transformer = Transformer(width, depth, heads, config.grid)
        self.ln_post = rms_norm(width)
        to_pixels = nn.Conv2d(width, 3 * config.patch_size ** 2, 1)
        self.ffn = nn.Sequential(nn.Identity(), to_pixels)          # published as ffn.1
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z, visible=None):
        x = fill_hidden(self.decoder_embed(z), visible, self.mask_token, self.grid ** 2)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.ln_post(self.transformer(x))
        x = linear_by_conv(x, self.ffn[1])                          # (B, N, p p 3)
        p = self.patch_size
        x = x.view(len(x), self.grid, self.grid, p, p, 3)           # (B, rows, columns, p, p, 3)
        x = x.permute(0, 5, 1, 3, 2, 4)                             # (B, 3, rows, p, columns, p)
        return self.conv_out(x.flatten(4, 5).flatten(2, 3))


class SemanticDecoder(nn.Module):
    """Latents -> features of a teacher. Light, so that the semantics must already be in the latents."""

    def __init__(self, config, teacher_dim):
        super().__init__()
        width, depth, heads = SIZES[config.semantic]
        self.N = config.grid ** 2
        self.mask_embedding = nn.Parameter(torch.zeros(1, 1, width))        # of hidden patches
        self.token_embedding = nn.Linear(config.channels, width)
        self.positional_embedding = learned_positions(config.grid, width)
        self.ln_pre = rms_norm(width)
        self.transformer = Transformer(width, depth, heads, config.grid)
        self.ln_post = rms_norm(width)
        self.out = nn.Linear(width, teacher_dim)

    def forward(self, z, visible=None):
        x = fill_hidden(self.token_embedding(z), visible, self.mask_embedding, self.N)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.ln_post(self.transformer(x))
        return self.out(x)


class SemanticMLP(nn.Module):
    """The same without attention. The learned latent of hidden patches is ours: theirs cannot be masked."""

    def __init__(self, config, teacher_dim):
        super().__init__()
        C = config.channels
        self.N = config.grid ** 2
        self.mask_embedding = nn.Parameter(torch.zeros(1, 1, C))
        self.mlp = nn.Sequential(
            nn.Linear(C, 4 * C),
            nn.GELU(),
            nn.Linear(4 * C, teacher_dim))

    def forward(self, z, visible=None):
        return self.mlp(fill_hidden(z, visible, self.mask_embedding, self.N))


# ---------------------------------------------------------------- what it is built of (partly also the DiT)

def rms_norm(width):
    return nn.RMSNorm(width, 1e-6)


def learned_positions(grid, width):
    return nn.Parameter(width ** -0.5 * torch.randn(1, grid ** 2, width))


def resize_positions(table, **options):
    """A table of positions (1, N, W), interpolated to another grid by the options of F.interpolate."""
    grid = math.isqrt(table.shape[1])
    table = table.unflatten(1, (grid, grid)).permute(0, 3, 1, 2).float()
    return F.interpolate(table, mode="bicubic", **options).flatten(2).transpose(1, 2)


def take_tokens(x, index):
    """x (B, N, W), or (1, N, W) for all images alike, and index (B, K) -> (B, K, W); index None: x itself."""
    if index is None:
        return x
    return torch.take_along_dim(x, index[..., None], dim=1)


def fill_hidden(x, visible, token, N):
    """x (B, K, W) at its places `visible` (B, K), the learned `token` (1, 1, W) elsewhere: (B, N, W)."""
    if visible is None:
        return x
    full = token.to(x.dtype).expand(len(x), N, -1)
    return full.scatter(1, visible[..., None].expand_as(x), x)


def linear_by_conv(x, conv):
    """Tokens (B, N, in) through a convolution that covers a token each: the same product as a linear map.

    The published weights have a convolution's shape; a linear map can leave out the hidden tokens.
    """
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Transformer(nn.ModuleList):
    """Blocks with 2-D RoPE. A list, so that its tensors are named transformer.0.norm1.weight as published."""

    def __init__(self, width, depth, heads, grid):
        super().__init__(Block(width, heads) for _ in range(depth))
        # The d/4 frequencies stand twice in a row, so the two channels of a pair turn at different speeds.
        # Not a rotation, strictly, but what the published weights were trained with.
        freqs = 2 * math.pi * 7.0 * (7.0 / 7e-4) ** torch.linspace(0, -1, width // heads // 4)
        rope = axial_rope(torch.linspace(0, 1, grid), freqs.repeat(2))
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, x, visible=None):
        """x (B, K, W), the tokens at places `visible` (B, K) or all N -> the same shape."""
        rope = self.rope                                            # (2, N, d)
        if visible is not None:
            rope = self.rope[:, visible]                            # (2, B, K, d)
            torch._dynamo.maybe_mark_dynamic(x, 1)                  # compiled: one graph for any K
            torch._dynamo.maybe_mark_dynamic(rope, 2)
        for block in self:
            x = block(x, rope)
        return x


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = rms_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = rms_norm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x, rope):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        norm = rms_norm if qk_norm else nn.Identity
        self.q_norm = norm(width // heads)
        self.k_norm = norm(width // heads)

    def forward(self, x, rope):
        """x (B, N, W), rope (2, N, d) or (2, B, N, d), or None -> (B, N, W)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))        # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, heads, N, d) each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def axial_rope(coords, freqs):
    """coords (grid,), freqs (d/2,) -> cos and sin, (2, N, d).

    The row turns the first d/2 channels, the column the rest. `rotate` turns adjacent channels (a, b) into
    (a cos - b sin, b cos + a sin); the minus is kept in the sine.
    """
    grid = len(coords)
    angle = coords[:, None] * freqs                                 # (grid, d/2)
    rows, columns = angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)     # of each token, (N, d/2)
    angle = torch.cat([rows, columns], dim=1)                       # (N, d)
    sin = angle.sin()
    sin[:, 0::2] *= -1
    return torch.stack([angle.cos(), sin])


def rotate(x, rope):
    """x cos + (x, adjacent channels swapped) sin, in float32. x (B, heads, N, d), rope of axial_rope."""
    cos, sin = rope.unsqueeze(-3)                                   # ([B,] 1, N, d)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


# ---------------------------------------------------------------- the teacher: a vision foundation model

class Normalize(nn.Module):
    """Images in [-1, 1] -> by ImageNet's mean and deviation, as most frozen networks were trained."""

    def __init__(self):
        super().__init__()
        mean_and_std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        self.register_buffer("mean_and_std", mean_and_std.view(2, 3, 1, 1), persistent=False)

    def forward(self, images):
        mean, std = self.mean_and_std
        return (images * 0.5 + 0.5 - mean) / std


class Teacher(nn.Module):
    """Images in [-1, 1] (B, 3, H, H) -> VFM features (B, N, D): frozen.

    stride: image pixels a token. DINOv2 (patch 14) sees the image at 14/16 of its size, so its grid is ours.
    """

    def __init__(self, net, stride, normalize):
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        self.stride = stride
        self.width = net.norm.normalized_shape[0]
        self.normalize = normalize

    def features(self, images):
        """-> class token (B, D), patch tokens (B, N, D), after the final norm."""
        height, width = images.shape[-2:]
        if height != width or height % self.stride:
            raise ValueError(f"a teacher of {self.stride} pixels a token has no grid for {height} x {width}")
        x = self.normalize(images)
        if self.net.patch != self.stride:
            x = F.interpolate(x, size=height // self.stride * self.net.patch, mode="bilinear")
        return self.net(x)

    def forward(self, images):
        return self.features(images)[1]


class DINO(nn.Module):
    """One ViT for DINOv2 (version 2), DINOv3 (3) and timm's SigLIP ("siglip").

    They differ in positions (2: a table with the class token's; "siglip": a table; 3: RoPE), class token and
    layer scale. Facts from facebookresearch/dinov2, facebookresearch/dinov3, transformers and timm.
    """

    def __init__(self, version, width, depth, heads, patch, image_size, registers=0):
        super().__init__()
        eps = 1e-5 if version == 3 else 1e-6
        self.version = version
        self.patch = patch
        self.heads = heads
        self.grid = image_size // patch                             # that of the table of positions
        self.classes = 0 if version == "siglip" else 1              # class tokens
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        if self.classes:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.registers = nn.Parameter(0.02 * torch.randn(1, registers, width)) if registers else None
        if version != 3:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.classes + self.grid ** 2, width))
        self.blocks = nn.ModuleList(DINOBlock(width, heads, eps, version != "siglip") for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, x):
        """x (B, 3, H, H) normalised -> class token (B, D) (SigLIP: the mean), patches (B, N, D), normed."""
        x = self.patch_embed(x)
        grid = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)                            # (B, N, W)
        if self.version != 3:
            x = x + self.patch_positions(grid)
        before = []                                                 # what stands before the patches
        if self.classes:
            before.append(self.cls_token if self.version == 3 else self.cls_token + self.pos_embed[:, :1])
        if self.registers is not None:
            before.append(self.registers)
        before = [token.expand(len(x), -1, -1) for token in before]
        x = torch.cat([*before, x], dim=1)
        first = x.shape[1] - grid ** 2                              # the first patch
        rope = self.rope(grid, first) if self.version == 3 else None
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x)
        cls = x[:, 0] if self.classes else x.mean(1)
        return cls, x[:, first:]

    def patch_positions(self, grid):
        """The table of positions for grid x grid patches, (1, N, W)."""
        table = self.pos_embed[:, self.classes:]
        if grid == self.grid:
            return table
        if self.version == "siglip":
            raise ValueError(f"SigLIP was trained at {self.grid * self.patch} px, not {grid * self.patch}")
        if self.registers is None:
            # The first models: a scale with an offset of 0.1, as they were trained.
            return resize_positions(table, scale_factor=(grid + 0.1) / self.grid)
        return resize_positions(table, size=grid, antialias=True)

    def rope(self, grid, first):
        """DINOv3: patch centres in [-1, 1], periods 100^(4i/d). The `first` tokens do not turn.

        -> cos and sin, (2, first + N, d).
        """
        device = self.patch_embed.weight.device
        d = self.patch_embed.out_channels // self.heads
        periods = 100 ** (torch.arange(d // 4, device=device) * 4 / d)
        centres = (torch.arange(grid, device=device) + 0.5) / grid * 2 - 1
        rope = axial_rope(centres, (2 * math.pi / periods).repeat_interleave(2))
        rope = F.pad(rope, (0, 0, first, 0))
        rope[0, :first] = 1                                         # cos 1, sin 0
        return rope

    def load_published(self, state, path="the teacher's file"):
        """Takes the published names; for DINOv3 also those of transformers and of timm. Returns itself."""
        def neighbours(w):
            """DINOv3's RoPE pairs channel i of a head with i + d/2, ours pairs neighbours: reordered once."""
            halves = w.unflatten(0, (self.heads, 2, -1))
            return halves.transpose(1, 2).flatten(0, 2)

        state = published_names(state)
        for name in [n for n in state if self.version == 3 and n.endswith("attn.qkv.weight")]:
            bias = name.replace("weight", "bias")
            state.setdefault(bias, torch.zeros(len(state[name])))   # timm's files have none
            for n in (name, bias):
                q, k, v = state[n].chunk(3)
                state[n] = torch.cat([neighbours(q), neighbours(k), v])
            state[bias].chunk(3)[1].zero_()                         # DINOv3 masks the bias of the keys
        return load_named(self, state, path)


class DINOBlock(nn.Module):
    def __init__(self, width, heads, eps, scaled):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width),
            act=nn.GELU(),
            fc2=nn.Linear(4 * width, width)))
        self.ls1 = self.ls2 = {"gamma": 1}                          # SigLIP has no layer scale
        if scaled:
            self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
            self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x, rope):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x), rope)
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))


RENAMED = [  # in a teacher's file -> here
    (r"^(model\.)?layer\.", "blocks."),                             # transformers
    (r"^embeddings\.patch_embeddings\.", "patch_embed."),
    (r"^embeddings\.", ""),
    (r"attention\.o_proj", "attn.proj"),
    (r"mlp\.up_proj", "mlp.fc1"),
    (r"mlp\.down_proj", "mlp.fc2"),
    (r"layer_scale(\d)\.lambda1$", r"ls\1.gamma"),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),                             # timm
    (r"^(storage_tokens|register_tokens|reg_token)$", "registers"),
    (r"^patch_embed\.proj\.", "patch_embed."),
]
UNUSED = r"mask_token|rope_embed\.|.*bias_mask|attn_pool\."         # not needed for clean features


def published_names(state):
    """A teacher's state dict under its publisher's names -> under ours; q, k and v in one tensor."""
    out = {}
    for name, w in state.items():
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        if not re.match(UNUSED, name):
            out[name] = w
    for name in [n for n in out if n.endswith("attention.q_proj.weight")]:
        block = name.removesuffix("attention.q_proj.weight")
        for kind in ("weight", "bias"):
            q = out.pop(f"{block}attention.q_proj.{kind}")
            v = out.pop(f"{block}attention.v_proj.{kind}")
            k = out.pop(f"{block}attention.k_proj.{kind}", torch.zeros_like(q))     # keys have no bias
            out[f"{block}attn.qkv.{kind}"] = torch.cat([q, k, v])
    return out


TEACHERS = {  # name: (version, width, depth, heads, patch, image size, registers) of DINO, and its files:
    # the publisher's own, and where that needs a form to be filled in, timm's, which downloads by itself
    "dinov3_vits16": ((3, 384, 12, 6, 16, 256, 4),
                      "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
                      "vit_small_patch16_dinov3.lvd1689m.safetensors"),
    "dinov3_vitb16": ((3, 768, 12, 12, 16, 256, 4),
                      "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
                      "vit_base_patch16_dinov3.lvd1689m.safetensors"),
    "dinov3_vitl16": ((3, 1024, 24, 16, 16, 256, 4),
                      "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
                      "vit_large_patch16_dinov3.lvd1689m.safetensors"),
    "dinov2_vits14": ((2, 384, 12, 6, 14, 518, 0), "dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14": ((2, 768, 12, 12, 14, 518, 0), "dinov2_vitb14_pretrain.pth"),
    "dinov2_vitl14": ((2, 1024, 24, 16, 14, 518, 0), "dinov2_vitl14_pretrain.pth"),
    "dinov2_vits14_reg": ((2, 384, 12, 6, 14, 518, 4), "dinov2_vits14_reg4_pretrain.pth"),
    "dinov2_vitb14_reg": ((2, 768, 12, 12, 14, 518, 4), "dinov2_vitb14_reg4_pretrain.pth"),
    "dinov2_vitl14_reg": ((2, 1024, 24, 16, 14, 518, 4), "dinov2_vitl14_reg4_pretrain.pth"),
    "siglip_vitl16_256": (("siglip", 1024, 24, 16, 16, 256, 0),
                          "vit_large_patch16_siglip_256.webli.safetensors"),
}


def teacher_file(name, weights):
    """Its file in the folder `weights`: the publisher's, transformers' as NAME.safetensors, or timm's."""
    _, *files = TEACHERS[name]
    for file in (files[0], f"{name}.safetensors"):
        if os.path.isfile(f"{weights}/{file}"):
            return file
    return files[-1]


def load_teacher(name, weights="weights"):
    """A Teacher: a row of TEACHERS, one of its files by path, or a teacher.pt of --tiny.

    weights: the folder of published files, where an absent one downloads; or "random" (timing and tests).
    """
    path = None
    if os.path.isfile(name):
        path = name
        known = {}
        for row, (_, *files) in TEACHERS.items():
            known |= dict.fromkeys([*files, f"{row}.safetensors"], row)
        name = known.get(os.path.basename(path))
    elif name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}: give a file of one, or one of {', '.join(TEACHERS)}")
    elif weights != "random":
        path = weight_file(teacher_file(name, weights), weights)
    if name is None:
        with naming(path, "a teacher: neither a teacher.pt of --tiny nor a published file by its own name"):
            file = read_weights(path)
            net = load_named(DINO(**file["config"]), file["model"], path)
        return Teacher(net, net.patch, nn.Identity())
    net = DINO(*TEACHERS[name][0])
    if path:
        with naming(path, name):
            net.load_published(read_weights(path), path)
    return Teacher(net, 16, nn.Identity() if net.version == "siglip" else Normalize())     # it wants [-1, 1]


# ---------------------------------------------------------------- loading tokenizers

def read_tokenizer(path, ema=True):
    """A checkpoint of ours or a RecTok*.pth of the authors -> its tensors under our names, and its config."""
    file, state = read_checkpoint(path, ema)
    with naming(path, "a RecTok tokenizer"):
        # Theirs also hold RoPE tables, DiT-style position tables and the teacher; `aux*` is an older name.
        computed = r"freqs_(cos|sin)$|(^|\.)pos_embed$|^(sem|aux)\w*foundation_models\."
        state = {re.sub(r"^aux\w*decoders\.", "sem_decoders.", n): w
                 for n, w in state.items() if not re.search(computed, n)}
        # Their semantic decoders go by the teacher's name ("dinov3"), ours by place (0, 1, ...).
        names = [n for n in state if n.startswith("sem_decoders.")]
        teachers = list(dict.fromkeys(n.split(".")[1] for n in names))
        for name in names:
            _, teacher, rest = name.split(".", 2)
            state[f"sem_decoders.{teachers.index(teacher)}.{rest}"] = state.pop(name)
        config = own_config(file, TokenizerConfig) or config_from_shapes(state)
    return state, config


def config_from_shapes(state):
    """The config of a file that has none, from the shapes of its tensors."""
    size_of = {width: name for name, (width, *_) in SIZES.items()}
    width, _, patch, _ = state["encoder.patch_embed.0.weight"].shape
    grid = math.isqrt(state["encoder.positional_embedding"].shape[1])
    outs = [w for n, w in state.items() if re.fullmatch(r"sem_decoders\.\d+\.(out|mlp\.2)\.weight", n)]
    semantic = "none"
    if outs:
        semantic = "mlp" if "sem_decoders.0.mlp.0.weight" in state else size_of[outs[0].shape[1]]
    return TokenizerConfig(
        image_size=grid * patch,
        patch_size=patch,
        channels=state["encoder.latent_head.weight"].shape[0] // 2,
        encoder=size_of[width],
        decoder=size_of[state["decoder.mask_token"].shape[-1]],
        semantic=semantic,
        teacher_dim=tuple(w.shape[0] for w in outs) or 1024)


def load_tokenizer(path, config=None, ema=True):
    """RecTok in eval mode, from our checkpoints or the authors' RecTok*.pth: EMA weights, or raw (ema=False).

    config: the shape to build (default: the file's own). Another image size interpolates the position
    embeddings; semantic="none" drops the semantic decoders, and others than the file's are fresh, with a
    warning. Anything else that is missing, surplus or of another shape raises ValueError.
    """
    state, own = read_tokenizer(path, ema)
    config = config or own
    if own.grid != config.grid:
        for name in [n for n in state if n.endswith("positional_embedding")]:
            state[name] = resize_positions(state[name], size=config.grid)
    model = RecTok(config)
    if (own.semantic, own.teacher_dim) != (config.semantic, config.teacher_dim):
        state = {n: w for n, w in state.items() if not n.startswith("sem_decoders.")}
        state |= model.sem_decoders.state_dict(prefix="sem_decoders.")
        if config.semantic != "none":
            warnings.warn(f"{path}: fresh semantic decoders ({config.semantic}, for teachers of width "
                          f"{config.teacher_dim}); the file's are {own.semantic}, {own.teacher_dim}")
    return load_named(model, state, path).eval()


def fingerprint(tokenizer):
    """What a DiT depends on: a hash of the encoder's weights (stage 1b keeps them, so both its files fit)."""
    return weights_hash(tokenizer.encoder)


def weights_hash(*nets):
    digest = hashlib.sha256()
    for net in nets:
        for name, w in sorted(net.state_dict().items()):
            digest.update(name.encode() + w.cpu().float().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- files

DOWNLOADS = {  # published file -> its address; torch.hub checks the hash that stands in a name
    "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg.pth": "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
    "convnext_small-0c510722.pth": "https://download.pytorch.org/models/convnext_small-0c510722.pth",
    "pt_inception-2015-12-05-6726825d.pth":
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
}


def download_address(name):
    """The address of a published file."""
    if name.startswith("dinov2_"):
        return f"https://dl.fbaipublicfiles.com/dinov2/{name[:len('dinov2_vitl14')]}/{name}"
    if name.startswith("vit_"):
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        return f"{hub}/timm/{name.removesuffix('.safetensors')}/resolve/main/model.safetensors"
    return DOWNLOADS[name]


def weight_file(name, weights):
    """Path of a published file: `weights` itself if it is a file, else weights/name, downloaded if absent.

    All processes must call it: the first one of each machine downloads, the others wait. Raises OSError
    that names the address and the place.
    """
    if os.path.isfile(weights):
        return weights
    path = f"{weights}/{name}"
    if not os.path.exists(path) and os.environ.get("LOCAL_RANK", "0") == "0":
        url = download_address(name)
        if "dinov3" in name:
            print(f"downloading {name}, under the DINOv3 licence: "
                  "ai.meta.com/resources/models-and-libraries/dinov3-license", flush=True)
        hashes = re.findall(r"-([0-9a-f]{8})\.", name)
        try:
            os.makedirs(weights, exist_ok=True)
            torch.hub.download_url_to_file(url, path, hash_prefix=hashes[-1] if hashes else None)
        except Exception as error:
            free = "; free of its form: --teacher dinov2_vitl14" if "dinov3" in name else ""
            raise OSError(f"could not download {name} ({one_line(error)}{free}); where there is internet:\n"
                          f"    curl -L --create-dirs -o {path} {url}") from error
    barrier()
    return path


def fetch_weights(names, weights):
    """weight_file of each. What cannot be downloaded is named at once, with the commands that fetch it."""
    problems = []
    for name in names:
        try:
            weight_file(name, weights)
        except OSError as error:
            problems.append(str(error))
    if problems:
        raise OSError("\n".join(problems))


def one_line(error):
    """The first line of an error's text: torch adds advice to the rest, and some of it is unsafe."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@contextlib.contextmanager
def naming(path, what):
    """Whatever is wrong inside a user's file becomes one line that names the file and what it is not."""
    try:
        yield
    except Exception as error:
        if str(path) in str(error):
            raise                                                   # says it already
        raise ValueError(f"{path} is not {what} ({one_line(error)})") from error


def read_weights(path):
    """The dict in a .pth, .pt or .safetensors file, tensors on the CPU; never runs code from it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of weights at {path!r}")
    with naming(path, "a file of tensors: truncated, of another kind, or refused because it holds code"):
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        try:
            mapped = os.name != "nt" and zipfile.is_zipfile(path)   # Windows cannot replace a mapped file
            file = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:                     # torch's text advises to run the code
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise ValueError(code[1] if code else "no tensors found") from None
        if not isinstance(file, dict):
            raise ValueError(f"a {type(file).__name__} instead of a dict")
        return file


SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Layout: the header's length in 8 bytes, the header in JSON, the tensors' bytes (little-endian)."""
    with open(path, "rb") as f:
        content = bytearray(f.read())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    data = torch.frombuffer(content, dtype=torch.uint8)[start:]
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[begin:end].clone()                               # a copy is aligned for any type
        tensors[name] = raw.view(SAFETENSORS_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_checkpoint(path, ema=True):
    """-> the file's dict, and the state dict in it: averaged weights, or raw ones with ema=False.

    Reads our files, the authors', bare state dicts, and the usual layouts of others.
    """
    file = read_weights(path)
    places = ["model_ema", "ema", "model", "state_dict"]
    if not ema:
        places.reverse()
    found = [place for place in places if isinstance(file.get(place), dict)]
    if ema and found and found[0] in ("model", "state_dict"):
        warnings.warn(f"{path} holds no averaged (EMA) weights: the raw ones are taken")
    state = file[found[0]] if found else file
    # Prefixes that DDP, Lightning and torch.compile leave.
    prefixes = r"^(module\.|model\.)+|_orig_mod\."
    state = {re.sub(prefixes, "", n): w for n, w in state.items()
             if isinstance(n, str) and torch.is_tensor(w)}
    return file, state


def own_config(file, kind):
    """The config of a checkpoint of ours, or None: other programs store something else under that name."""
    try:
        return kind(**file["config"])
    except (KeyError, TypeError):
        return None


def load_named(module, state, path):
    """load_state_dict whose ValueError names the file: tensors missing, surplus or of another shape."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problems = " ".join(str(error).split()[6:])                 # after "Error(s) in loading ... for X:"
        raise ValueError(f"{path} does not fit: {problems[:600]}") from None
    return module


@contextlib.contextmanager
def atomic(path):
    """A file to write, renamed to `path` at the end: a kill or a full disk leaves the old or the new one."""
    temporary = f"{path}.{os.getpid()}.tmp"                         # a name that no other run takes
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error
        if isinstance(error, RuntimeError):                         # torch speaks of positions in the file
            cause = f"is the disk full, or a quota or a size limit reached? ({type(error).__name__})"
        raise OSError(f"could not write {path}: {cause}; what was there before still is") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


# ---------------------------------------------------------------- images: uint8 (3, size, size), and a label

def center_crop(image, size):
    """PIL -> PIL, size x size: ADM's crop (halve by box while twice too large, bicubic, then the centre)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow to scale up")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


# Of the kinds that Pillow knows, those that it decodes itself: others start programs (PostScript), or are
# known to it by name alone (HDF5).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def to_rgb(image):
    """PIL of any mode -> RGB: 16-bit grey is scaled to 8 bits, and what is transparent lies on white."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, of unknown range")
    if image.mode.startswith("I;16"):                               # convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("RGB")


@dataclass
class ImageFolder:
    """root/class/**/*.jpg, where the label is the rank of the class's name, or a flat folder (label 0).

    A class is a visible folder in root: names that begin with `.`, `__` or `@` are no data (editors, macOS
    and network drives leave such), nor are files that begin with `.`. Every extension of FORMATS counts. A
    folder that links reach twice is walked once. Errors, since labels would move in silence: images beside
    class folders, a class without images or one that cannot be read, a root that holds train and val.

    [i] or [(epoch, i)] -> uint8 (3, size, size), label. EXIF orientation is ignored, as in the published
    pipeline. An unreadable image is replaced by the next readable one, with a warning that names it, and
    counted in `bad` (shared with loader processes).
    """
    root: str
    size: int                             # pixels, square; None keeps the image's own
    flip: bool = False                    # by a coin that depends on (seed, epoch, i) alone
    seed: int = 0

    def __post_init__(self):
        # One process walks the disks, so all have the same list.
        paths, self.labels, self.classes = from_rank_0(lambda: list_images(self.root))
        self.paths = np.array([os.fsencode(p) for p in paths])  # one buffer: forked loaders do not copy it
        self.bad = torch.zeros(1, dtype=torch.long).share_memory_()
        self.warned = set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        for place in range(index, index + 100):
            place = place % len(self)
            image = self.read(os.fsdecode(self.paths[place]))
            if image is not None:
                break
        else:
            raise ValueError(f"100 unreadable images in a row in {self.root!r}, from number {index} on")
        self.bad += place != index                                  # another one stands in
        if self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a view: collating makes it contiguous
        return pixels, int(self.labels[place])

    def read(self, path):
        """The image in RGB, cropped; None where it cannot be read."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd palettes are not worth a line each
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = to_rgb(Image.open(path, formats=FORMATS))
                return center_crop(image, self.size) if self.size else image
        except Exception as error:  # Pillow raises many kinds on hostile files
            if path not in self.warned:
                warnings.warn(f"skipped unreadable image {path!r} ({one_line(error)})")
            self.warned.add(path)
            return None


def list_images(root):
    """-> paths, labels, class names of a data folder, by the rule of ImageFolder."""
    def fail(error):
        raise ValueError(f"cannot read folder {error.filename!r}: {error.strerror}")

    if not os.path.isdir(root):
        raise FileNotFoundError(f"folder {root!r} does not exist: give root/class/*.jpg or a flat folder")
    found = {}                                                      # class: paths; ".": those of root itself
    seen = set()
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        name = os.path.relpath(folder, root).split(os.sep)[0]
        paths = found.setdefault(name, [])
        if os.path.realpath(folder) in seen:                        # links can lead in circles
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__", "@")))
        paths += [f"{folder}/{file}" for file in files if is_image(file)]
        lost = [file for file in files if not is_image(file) and not os.path.exists(f"{folder}/{file}")]
        if name == "." and lost:
            raise ValueError(f"{root}/{lost[0]} is a link to nothing: mend or remove it")
    flat = sorted(found.pop("."))
    classes = sorted(found)
    if flat and classes:
        raise ValueError(f"{root!r} holds images ({flat[0]}, ...) beside folders ({classes[0]}, ...): "
                         "give class folders alone, or images alone")
    if flat:
        return flat, np.zeros(len(flat), int), ["0"]
    splits = {"train", "training", "val", "valid", "validation", "test"}
    if len(splits & {name.lower() for name in classes}) > 1:
        raise ValueError(f"{root!r} holds {', '.join(classes)}: give {root + '/' + classes[0]!r}, say")
    empty = [f"{root}/{name}" for name in classes if not found[name]]
    if empty or not classes:
        raise ValueError(f"{(empty or [root])[0]!r} holds no image of its own ({', '.join(FORMATS)}): "
                         "fill or remove it (the labels depend on it)")
    paths = [path for name in classes for path in sorted(found[name])]
    return paths, np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes]), classes


def is_image(name):
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return not name.startswith(".") and kind in FORMATS


@dataclass
class Shapes:
    """Shapes drawn on the fly, anti-aliased; [i] depends on (seed, i) alone.

    Any place and hue, turned by up to 20 degrees, on a ground graded between two hues: neither colour nor
    place tells the class.
    """
    size: int                             # pixels, square
    length: int                           # images
    seed: int = 0

    DISTANCE = {  # signed distance from the outline, radius about 1, negative inside; v points down
        "circle": lambda u, v: np.hypot(u, v) - 0.95,
        "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.22,
        "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
        "bar": lambda u, v: np.maximum(np.abs(u) - 1, np.abs(v) - 0.35),
        "triangle": lambda u, v: np.maximum(v - 0.6, 0.87 * np.abs(u) - 0.5 * v - 0.55),
        "cross": lambda u, v: np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.3,
                                         np.maximum(np.abs(u), np.abs(v)) - 1),
        "flower": lambda u, v: np.hypot(u, v) - 0.5 - 0.5 * np.abs(np.cos(2.5 * np.arctan2(u, -v))),
        "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.7 - np.hypot(u - 0.55, v)),
    }
    classes = list(DISTANCE)
    num_classes = len(DISTANCE)

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.length:
            raise IndexError(index)
        label = index % self.num_classes
        rng = np.random.default_rng((self.seed, index))
        radius = rng.uniform(0.6, 0.8)
        angle = rng.uniform(-0.35, 0.35)
        ground_angle = rng.uniform(0, 2 * np.pi)
        center = rng.uniform(-0.2, 0.2, (2, 1))
        # Three saturated colours: red, green and blue peak at thirds of the wheel of hues, [0, 6).
        hues = rng.uniform(0, 6, (3, 1, 1, 1))
        from_peak = (hues + np.array([0, 4, 2])[:, None, None]) % 6
        fill, one_end, other_end = np.clip(np.abs(from_peak - 3) - 1, 0, 1)                 # (3, 1, 1) each
        place = (np.arange(self.size) + 0.5) / self.size * 2 - 1                          # of pixels, -1 to 1

        # The ground: from one end to the other along a direction.
        along = np.cos(ground_angle) * place + np.sin(ground_angle) * place[:, None]
        ground = 0.55 + 0.4 * (one_end + (other_end - one_end) * (0.5 + along / 8 ** 0.5))
        # The shape, turned about its centre.
        x, y = place - center
        u = (np.cos(angle) * x + np.sin(angle) * y[:, None]) / radius
        v = (np.cos(angle) * y[:, None] - np.sin(angle) * x) / radius
        distance = self.DISTANCE[self.classes[label]](u, v) * radius * self.size / 2        # pixels
        cover = np.clip(0.5 - distance, 0, 1)
        pixels = ground + cover * (0.1 + 0.65 * fill - ground)
        return torch.from_numpy(np.round(255 * pixels).astype(np.uint8)), label


def to_float(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float images in [-1, 1] (overshoot is clamped) -> uint8, rounded, not truncated."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def save_grid(path, images, columns):
    """uint8 images (n, 3, H, W) -> one picture, `columns` a row; small images are enlarged."""
    zoom = max(1, 96 // images.shape[-1])
    images = F.interpolate(images.cpu(), scale_factor=zoom)
    empty = -len(images) % columns                                  # white places at the end
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, empty), value=255)
    images = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, 3)
    Image.fromarray(images.flatten(2, 3).flatten(0, 1).numpy()).save(path)


def plot(path, panels, columns=5, width=230, height=150):
    """{title: {label: [(x, y), ...]}} -> a picture of small charts, with the range of each axis."""
    picture = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    draw = ImageDraw.Draw(picture)
    labels = dict.fromkeys(label for lines in panels.values() for label in lines)       # each has a colour
    colors = dict(zip(labels, ("steelblue", "crimson", "seagreen", "darkorange", "purple", "black")))
    for number, (title, lines) in enumerate(panels.items()):
        left, top = number % columns * width + 10, number // columns * height + 32
        right, bottom = left + width - 20, top + height - 40
        x, y = np.concatenate(list(lines.values())).T
        draw.rectangle((left, top, right, bottom), outline="lightgrey")
        text = f"{title}\n{y.min():.3g} to {y.max():.3g}, over {x.min():g} to {x.max():g}"
        draw.text((left, top - 28), text, "black")
        end = right
        for label, line in lines.items():
            line_x, line_y = np.array(line).T
            places = [*zip(np.interp(line_x, (x.min(), x.max()), (left, right)),
                           np.interp(line_y, (y.min(), y.max()), (bottom, top)))]
            draw.line(places, colors[label], 2)
            draw.text((end, top - 15), label, colors[label], anchor="ra")
            end -= draw.textlength(label) + 10
            if len(places) < 20:                                    # scores: dots
                for place in places:
                    draw.circle(place, 3, colors[label])
    picture.save(path)


# ---------------------------------------------------------------- processes, devices, seeds

def start():
    """-> device, rank, number of processes. torchrun's environment decides; without it, one process."""
    device = torch.device("cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                  # TF32 where nothing says otherwise
        torch.backends.cudnn.benchmark = True                       # input sizes hardly change
        options["device_id"] = device
    if sys.platform == "linux":                                     # not Python 3.14's default: a forked loader
        multiprocessing.set_start_method("fork", force=True)        # shares the data, and outlives a signal
    if world > 1 and not dist.is_initialized():
        # An hour: all others wait while rank 0 writes a checkpoint or scores.
        dist.init_process_group("nccl" if options else "gloo", timeout=timedelta(hours=1), **options)
    return device, this_rank(), world_size()


def this_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(*tensors):
    """Sums over all processes, in place."""
    if dist.is_initialized():
        for x in tensors:
            dist.all_reduce(x)


def from_rank_0(make):
    """The result of make() on rank 0, pickled, on all processes: all of them must call this.

    A user's mistake that rank 0 finds is raised on all.
    """
    result = [None]
    if this_rank() == 0:
        try:
            result = [make()]
        except (ValueError, OSError) as error:
            result = [error]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


WAYS_OUT = {  # of what a machine does not grant: words of the error, and what to do
    "Too many open files": "ulimit -n 65536, or fewer --workers",
    "shared memory": "/dev/shm is too small for loaders: docker run --shm-size 8g, or --workers 0",
    "out of memory": "a smaller --micro_batch; in stage 2 also --grad_checkpoint",
    "killed by signal": "main memory is full, perhaps: fewer --workers",
    "C compiler": "install gcc, or --no_compile",
    "equal size": "the images have different sizes: --image_size",
}


def run_script(main):
    """Runs a script's main, and ends the process whatever happens: status 0, or 1 and the error.

    Also 1 where main returns True, stopped by a signal: what a shell chains to it shall not begin. A user's
    mistake, or a limit of the machine, is one line and its place; anything else is a traceback. (argparse
    leaves by itself.)
    """
    status = 1
    try:
        stopped = main()
        if dist.is_initialized():
            dist.barrier()                                          # nobody leaves while others still talk
            dist.destroy_process_group()
        status = 1 if stopped else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except Exception as error:
        ways = [way for words, way in WAYS_OUT.items() if words in str(error)]
        if ways:
            print(f"\n{one_line(error)}; {ways[0]}", file=sys.stderr)
        elif isinstance(error, (ValueError, OSError, FloatingPointError)):
            places = [f"{os.path.basename(frame.filename)}:{frame.lineno}"
                      for frame in traceback.extract_tb(error.__traceback__)]
            print(f"\n{' > '.join(places[1:])}\n{type(error).__name__}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
    end_loaders()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: destructors of threads in C++ can abort a process whose work is done and saved.
    os._exit(status)


@atexit.register
def end_loaders():
    """Loader processes ignore SIGTERM (below), so an exit that waits for them would wait for ever."""
    for process in multiprocessing.active_children():
        process.kill()


# A job's end (SIGTERM), Ctrl-C, a closed terminal, a scheduler's warning. Windows has some of them.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
           if hasattr(signal, name)]


def ignore_signals(_):
    """In a loader process: signals go to the whole group, but the trainer still wants to finish its step."""
    for s in SIGNALS:
        signal.signal(s, signal.SIG_IGN)


def cores():
    """CPU cores for this process's loaders: what the machine grants, divided among its processes."""
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, granted // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def within(low, high, kind=float):
    """A type for argparse, which names the flag before any work: numbers in [low, high]."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    return number


COUNT = within(1, math.inf, int)
POSITIVE = within(1e-12, 1e12)
SHARE = within(0, 0.999999)                                         # of something; 1 would be all of it
SEED = within(0, 2 ** 32, int)
GUIDANCE = within(1, 1e6)


def print_once(text):
    """On rank 0; at once, also where the output is a file or a pipe."""
    if this_rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def progress_bar(*args, **options):
    """A progress bar on rank 0; where the output is a file, a line now and then."""
    return tqdm(*args, disable=this_rank() > 0, mininterval=0.5 if sys.stderr.isatty() else 20, **options)


def local_batches(data, batch=64, workers=0, desc="evaluate"):
    """Batches of this process's share of a data set: images rank, rank + world, and so on, in order."""
    if len(data) < world_size():
        raise ValueError(f"{len(data)} images for {world_size()} processes: too few")
    part = Subset(data, range(this_rank(), len(data), world_size()))
    return progress_bar(DataLoader(part, batch, num_workers=workers, worker_init_fn=ignore_signals),
                    desc=desc, leave=False)


def seed_of(*ids):
    """A seed from integers: every random draw of a run comes from (seed, rank or index, step)."""
    return int(np.random.SeedSequence(ids).generate_state(1, np.uint64)[0] >> 1)


def sample_noise(seed, indices, N, C):
    """Starting noise (len(indices), N, C): sample i depends on (seed, i) alone, not on batch or machine."""
    rows = []
    for i in indices:
        generator = torch.Generator().manual_seed(seed_of(seed, i, 0, 0, 1))  # five: a training step has four
        rows.append(torch.randn(N, C, generator=generator))
    return torch.stack(rows)


def training_precision(device, float32=False):
    """Autocast to bf16 on CUDA, unless `float32`; elsewhere none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not float32)


def compile_blocks(device, switched_off, *nets):
    """torch.compile of every transformer block (on CUDA), or of a net's forward where it has none.

    Blocks, since DDP would cut the graph of a whole network into many.
    """
    if device.type != "cuda" or switched_off:
        return
    torch._dynamo.config.optimize_ddp = False                       # a block is one graph: nothing to cut
    torch._inductor.config.compile_threads = cores()                # not the machine's for each process
    for net in nets:
        blocks = [m for m in net.modules() if type(m).__name__.endswith("Block")]
        for module in blocks or [net]:
            module.compile()
