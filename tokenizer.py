"""The RecTok tokenizer: images, the rectified flow of both stages, the frozen teacher, the model, loading.

    from tokenizer import load_tokenizer
    tokenizer = load_tokenizer("RecTok.pth")  # ours or the authors' file -> eval mode, EMA weights
    mean, logvar = tokenizer.encode(images)                 # (B, 3, H, W) in [-1, 1] -> (B, N, C) each
    images = tokenizer.decode(mean)                         # (B, N, C) -> (B, 3, H, W)

Letters: B images, N tokens (row-major, a square grid), K visible tokens, C latent channels, D teacher width.
METHOD: RecTok, arXiv 2512.13421. Where paper and code differ, the code made the weights and is followed.
"""
import glob
import hashlib
import json
import math
import os
import pickle
import re
import time
import warnings
import zipfile
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image


# ---------------------------------------------------------------- images: uint8 (3, size, size), and a label

def center_crop(image, size):
    """PIL -> PIL, size x size: ADM's crop (halve by box while twice too large, bicubic, then the centre)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow to scale up")
    left, top = (width - size) // 2, (height - size) // 2
    # Pillow scales along x, rounds, then along y: cropping in between gives the same pixels sooner.
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.crop((left, 0, left + size, image.height))
    return image.resize((size, height), Image.Resampling.BICUBIC).crop((0, top, size, top + size))


class ImageFolder:
    """root/class/**/*.jpg (label = rank of the class name), or a flat folder (label 0), in sorted order.

    [i] or [(epoch, i)] -> uint8 (3, size, size), label. The coin of flip depends on (seed, epoch, i) alone.
    EXIF orientation is ignored, as in the published pipeline. An unreadable file is replaced by the next
    readable one, with a warning that names it, and counted in `bad` (shared with loader processes).
    """
    EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

    def __init__(self, root, size, flip=False, seed=0):
        if not os.path.isdir(root):
            raise FileNotFoundError(f"folder {root!r} does not exist: give root/class/*.jpg or a flat folder")
        self.root, self.size, self.flip, self.seed = root, size, flip, seed
        paths, labels, self.classes = [], [], []
        for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
            found = [os.path.join(folder, f)
                     for folder, _, files in os.walk(os.path.join(root, name), followlinks=True)
                     for f in files if f.lower().endswith(self.EXTENSIONS)]
            if found:
                paths += sorted(found)
                labels += [len(self.classes)] * len(found)
                self.classes.append(name)
        if not paths:
            paths = sorted(e.path for e in os.scandir(root) if e.name.lower().endswith(self.EXTENSIONS))
            labels, self.classes = [0] * len(paths), ["0"]
        if not paths:
            raise ValueError(f"folder {root!r} holds no image (extensions {', '.join(self.EXTENSIONS)})")
        self.paths = np.array([os.fsencode(p) for p in paths])  # one buffer: forked loaders do not copy it
        self.labels, self.num_classes = np.array(labels), len(self.classes)
        self.bad, self.named = torch.zeros(1, dtype=torch.long).share_memory_(), set()

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, i = key if isinstance(key, tuple) else (0, key)
        for j in range(100):
            path = os.fsdecode(self.paths[i if j == 0 else (i + j) % len(self)])
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # odd palettes or EXIF blocks are not worth a line each
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    image = Image.open(path).convert("RGB")
                    image = center_crop(image, self.size) if self.size else image
                break
            except Exception as error:                           # PIL raises many kinds on hostile files
                self.bad += j == 0
                if path not in self.named:
                    warnings.warn(f"skipped unreadable image {path!r} ({type(error).__name__}: {error})")
                self.named.add(path)
        else:
            raise ValueError(f"100 unreadable images in a row in {self.root!r}, the last one {path!r}")
        if self.flip and np.random.default_rng((self.seed, epoch, i)).random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a view: collating makes it contiguous
        return pixels, int(self.labels[(i + j) % len(self)])


class Shapes:
    """Plainly coloured shapes, drawn on the fly, anti-aliased; [i] depends on (seed, i) alone."""
    DISTANCE = {  # signed distance from the outline, radius about 1, negative inside; v points down
        "circle": lambda u, v: np.hypot(u, v) - 0.95,
        "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.22,
        "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
        "diamond": lambda u, v: (np.abs(u) + np.abs(v) - 1.1) / 2 ** 0.5,
        "triangle": lambda u, v: np.maximum(v - 0.6, 0.87 * np.abs(u) - 0.5 * v - 0.55),
        "cross": lambda u, v: np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.3,
                                        np.maximum(np.abs(u), np.abs(v)) - 1),
        "flower": lambda u, v: np.hypot(u, v) - 0.7 - 0.3 * np.cos(5 * np.arctan2(u, -v)),
        "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.7 - np.hypot(u - 0.55, v)),
    }
    classes, num_classes = list(DISTANCE), len(DISTANCE)

    def __init__(self, size, length, seed=0):
        self.size, self.length, self.seed = size, length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        i = key[1] if isinstance(key, tuple) else key
        if not 0 <= i < self.length:
            raise IndexError(i)
        rng, label = np.random.default_rng((self.seed, i)), i % self.num_classes
        radius, angle = rng.uniform(0.7, 0.85), rng.uniform(-0.12, 0.12)
        x, y = (np.arange(self.size) + 0.5) / self.size * 2 - 1 - rng.uniform(-0.1, 0.1, (2, 1))
        u = (np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]) / radius
        v = (np.cos(angle) * y[:, None] - np.sin(angle) * x[None, :]) / radius
        cover = np.clip(0.5 - self.DISTANCE[self.classes[label]](u, v) * radius * self.size / 2, 0, 1)
        hue = rng.uniform(0, 6) + np.array([0, 4, 2])[:, None, None]     # a plain colour, on light grey
        shape = 0.15 + 0.6 * np.clip(np.abs(hue % 6 - 3) - 1, 0, 1)
        ground = rng.uniform(0.75, 0.95)
        return torch.from_numpy(np.round(255 * (ground + cover * (shape - ground))).astype(np.uint8)), label


def cores():
    """CPU cores for this process's loaders: what the machine grants, divided among its processes."""
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, granted // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def to_float(images):
    """uint8 (B, 3, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float images in [-1, 1] (overshoot is clamped) -> uint8, rounded, not truncated."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------- the rectified flow, shared by both stages
# t = 0 is noise, t = 1 is data:   z_t = t z + (1 - t) noise,   velocity dz_t / dt = z - noise.
# The tokenizer is trained on z_t at the same t that the DiT will be: that is the point of RecTok.

def latent_shift(N, C):
    """The timestep shift s for N tokens of C channels: more dimensions need more noise to hide a signal."""
    return max(1.0, math.sqrt(N * C / 4096))


def sample_time(n, shift, u=None):
    """n times (n,): t = 1 - s u / (1 + (s - 1) u), u ~ U(0, 1), given or drawn. s > 1 moves mass to noise."""
    u = torch.rand(n) if u is None else u
    return 1 - shift * u / (1 + (shift - 1) * u)


def flow(z, noise, t):
    """z_t = t z + (1 - t) noise, with one t (B,) an image."""
    t = t.view(-1, *[1] * (z.ndim - 1))
    return t * z + (1 - t) * noise


def random_keep(B, N, ratio, noise=None):
    """Indices of VISIBLE patches, (B, K) long, K = ceil(N (1 - ratio)): the K smallest of noise (B, N)."""
    noise = torch.rand(B, N) if noise is None else noise
    return noise.argsort(dim=1)[:, :math.ceil(N * (1 - ratio))]


def gather_tokens(x, index):
    """x (B, N, W), index (B, K) -> (B, K, W)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


# ---------------------------------------------------------------- transformer parts (also used by dit.py)

def axial_rope(coords, freqs):
    """coords (grid,), freqs (d/2,) -> cos, sin (2, grid^2, d): rows turn the first d/2, columns the rest.

    The sine carries the sign of rotate: adjacent channels (a, b) become (a cos - b sin, b cos + a sin).
    """
    angle = (coords[:, None] * freqs).expand(len(coords), -1, -1)  # (grid, grid, d/2), varies along dim 1
    angle = torch.cat([angle.transpose(0, 1), angle], -1).flatten(0, 1)     # (N, d)
    sign = torch.tensor([-1.0, 1.0], device=angle.device).repeat(angle.shape[1] // 2)
    return torch.stack([angle.cos(), sign * angle.sin()])


def rotate(x, rope):
    """x cos + (x, adjacent channels swapped) sin, in float32. x (B, N, 2, heads, d), rope from axial_rope."""
    cos, sin = rope[..., None, None, :]                                     # ([B,] N, 1, 1, d), float32
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        if width % heads or width // heads % 4:
            raise ValueError(f"width {width} over {heads} heads: the head width must be a multiple of 4")
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x, rope=None):
        """x (B, N, W), rope (2, N, d) or (2, B, N, d) -> (B, N, W)."""
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).split((2, 1), 2)  # (B, N, 2 or 1, heads, d)
        if not isinstance(self.q_norm, nn.Identity):
            qk = torch.stack((self.q_norm(qk[:, :, 0]), self.k_norm(qk[:, :, 1])), 2)
        qk = qk if rope is None else rotate(qk, rope)
        q, k, v = qk[:, :, 0].transpose(1, 2), qk[:, :, 1].transpose(1, 2), v[:, :, 0].transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.RMSNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.RMSNorm(width, eps=1e-6), SwiGLU(width)

    def forward(self, x, rope):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------- files of weights

WEIGHTS = {  # published file -> where it downloads from (torch.hub checks the hash that stands in a name)
    "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg.pth": "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
    "convnext_small-0c510722.pth": "https://download.pytorch.org/models/convnext_small-0c510722.pth",
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/"
                                            "fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "vit_large_patch16_siglip_256.webli.safetensors":
        "https://huggingface.co/timm/vit_large_patch16_siglip_256.webli/resolve/main/model.safetensors",
}


def weight_file(name, weights="weights"):
    """Path of a published file: `weights` itself if it is a file, else weights/name, downloaded if absent."""
    if os.path.isfile(weights):
        return weights
    found = glob.glob(os.path.join(glob.escape(weights), "**", name), recursive=True)       # subfolders too
    if len(found) > 1:
        raise ValueError(f"several files of that name, keep one: {', '.join(sorted(found))}")
    path = found[0] if found else os.path.join(weights, name)
    if not found:
        url = WEIGHTS.get(name)
        if not url:
            raise FileNotFoundError(f"{path} is missing and cannot be downloaded freely: accept its licence "
                                    "at ai.meta.com (resources, dinov3-downloads) and put the file there, "
                                    "or use the free --teacher dinov2_vitl14")
        os.makedirs(weights, exist_ok=True)
        while os.environ.get("LOCAL_RANK", "0") != "0" and not os.path.exists(path):
            time.sleep(1)  # one process a machine downloads; if it fails, torchrun ends the others
        try:                                                     # to a temporary file first, then renamed
            if not os.path.exists(path):
                hashes = re.findall(r"-([0-9a-f]{8})\.", name)
                torch.hub.download_url_to_file(url, path, hash_prefix=hashes[-1] if hashes else None)
        except Exception as error:
            raise OSError(f"could not download {url} ({error}); put it at {path} yourself") from error
    return path


def read_weights(path):
    """Tensors (or our checkpoint dict) from .pth, .pt or .safetensors, on the CPU; never runs its code."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of weights at {path!r}")
    try:
        if path.endswith(".safetensors"):  # u64 length, JSON header, raw little-endian bytes
            with open(path, "rb") as f:
                header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
                data = bytearray(f.read())
            types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                     "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
            header.pop("__metadata__", None)
            return {name: torch.frombuffer(data, dtype=types[t["dtype"]], count=math.prod(t["shape"]),
                                           offset=t["data_offsets"][0]).view(t["shape"])
                    for name, t in header.items()}
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(file, dict):
            raise ValueError(f"a {type(file).__name__}, no dict of tensors")
        return file
    except pickle.UnpicklingError as error:
        why = str(error).strip().splitlines()[-1 if len(str(error)) < 200 else 0]
        raise ValueError(f"{path!r} holds more than tensors (code?) or none and is refused: {why}") from error
    except Exception as error:
        raise ValueError(f"{path!r} is corrupt, truncated or no .pt, .pth or .safetensors file of weights "
                         f"({type(error).__name__}: {error})") from error


def load_named(module, state, path):
    """load_state_dict that says, for a person, which names are missing, surplus or of another shape."""
    own = module.state_dict()
    wrong = [f"{n}: file {tuple(state[n].shape)}, model {tuple(own[n].shape)}" for n in own
             if n in state and state[n].shape != own[n].shape]
    for title, names in (("missing", own.keys() - state.keys()), ("surplus", state.keys() - own.keys()),
                         ("of another shape", wrong)):
        if names:
            listed = ", ".join(sorted(names)[:8]) + ", ..." * (len(names) > 8)
            raise ValueError(f"{path}: {len(names)} tensors {title}: {listed}")
    module.load_state_dict(state)
    return module


# ---------------------------------------------------------------- the teacher (vision foundation model, VFM)

class DINO(nn.Module):
    """One ViT for DINOv2 (version 2), DINOv3 (3) and timm's SigLIP ("siglip"): images -> cls, patches.

    Facts from facebookresearch/dinov2, facebookresearch/dinov3 and timm. RoPE channels are stored in adjacent
    pairs (load_published permutes DINOv3's halves once), so that the Attention above serves.
    """

    def __init__(self, version, width, depth, heads, patch, image_size, registers=0):
        super().__init__()
        eps, grid = 1e-5 if version == 3 else 1e-6, image_size // patch
        self.version, self.patch, self.heads, self.grid = version, patch, heads, grid
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        if version != "siglip":
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        if registers:
            self.registers = nn.Parameter(0.02 * torch.randn(1, registers, width))
        if version != 3:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, grid ** 2 + (version == 2), width))
        self.blocks = nn.ModuleList(DINOBlock(width, heads, eps, version != "siglip") for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def positions(self, grid):
        """Position embedding of a grid x grid input, (1, [1 +] grid^2, W)."""
        pos = self.pos_embed
        if grid == self.grid:
            return pos
        if self.version == "siglip":
            raise ValueError(f"SigLIP was trained at {self.grid * self.patch} px, not {grid * self.patch}")
        table = pos[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2).float()
        if hasattr(self, "registers"):        # the register models: exact size, antialiased
            table = F.interpolate(table, size=(grid, grid), mode="bicubic", antialias=True)
        else:  # the first models: scale with an offset of 0.1, as they were trained
            table = F.interpolate(table, scale_factor=(grid + 0.1) / self.grid, mode="bicubic")
        return torch.cat([pos[:, :1], table.flatten(2).transpose(1, 2)], 1)

    def rope(self, grid, prefix, device):
        """DINOv3: coords in [-1, 1], periods 100^(4i/d); prefix tokens do not turn. (2, prefix + N, d)."""
        d = self.blocks[0].attn.qkv.in_features // self.heads
        periods = 100 ** (torch.arange(d // 4, device=device) * 4 / d)
        coords = (torch.arange(grid, device=device) + 0.5) / grid * 2 - 1
        rope = axial_rope(coords, (2 * math.pi / periods).repeat_interleave(2))
        still = torch.tensor([1.0, 0.0], device=device).view(2, 1, 1).expand(2, prefix, d)
        return torch.cat([still, rope], 1)

    def forward(self, x):
        """x (B, 3, H, H) normalised -> class token (B, D) (SigLIP: mean), patches (B, N, D), both normed."""
        x = self.patch_embed(x)
        B, _, grid, _ = x.shape
        x, rope = x.flatten(2).transpose(1, 2), None
        if self.version != "siglip":
            x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1)
        if self.version != 3:
            x = x + self.positions(grid)
        if hasattr(self, "registers"):
            x = torch.cat([x[:, :1], self.registers.expand(B, -1, -1), x[:, 1:]], 1)
        prefix = x.shape[1] - grid ** 2
        if self.version == 3:
            rope = self.rope(grid, prefix, x.device)
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x)
        return x[:, 0] if prefix else x.mean(1), x[:, prefix:]

    def load_published(self, state, path="the teacher's file"):
        """Takes the published names (DINOv3 also Hugging Face's); anything missing or surplus is an error."""
        state = dict(state)
        if any("layer.0." in name for name in state):
            state = _from_hugging_face(state)
        drop = re.compile(r"mask_token|rope_embed\.|.*bias_mask|attn_pool\.")  # not used for clean features
        state = {n: w for n, w in state.items() if not drop.match(n)}
        state = {re.sub(r"^(storage|register)_tokens", "registers", n)
                 .replace("patch_embed.proj", "patch_embed"): w for n, w in state.items()}
        for n in [n for n in state if self.version == 3 and "attn.qkv" in n]:
            w = state[n].unflatten(0, (3, self.heads, 2, -1)).clone()  # halves (2, d/2) of each head
            if n.endswith("bias"):
                w[1] = 0                                                           # DINOv3 masks the key bias
            w[:2] = w[:2].transpose(2, 3).reshape(w[:2].shape)  # -> adjacent pairs, for q and k
            state[n] = w.flatten(0, 3)
        return load_named(self, state, path)


class DINOBlock(nn.Module):
    def __init__(self, width, heads, eps, scaled=True):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        self.ls1.gamma = nn.Parameter(torch.ones(width)) if scaled else 1  # layer scale; SigLIP has none
        self.ls2.gamma = nn.Parameter(torch.ones(width)) if scaled else 1

    def forward(self, x, rope):
        x = x + self.ls1.gamma * self.attn(self.norm1(x), rope)
        return x + self.ls2.gamma * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


def _from_hugging_face(state):
    """transformers' DINOv3 names -> the published ones, q, k and v in one tensor (k has no bias)."""
    out, table = {}, {"attention.o_proj": "attn.proj", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2",
                      "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
                      "embeddings.patch_embeddings": "patch_embed.proj",
                      "embeddings.register_tokens": "storage_tokens"}
    for name, w in state.items():
        name = re.sub(r"^(model\.)?layer\.", "blocks.", name)
        for old, new in table.items():
            name = name.replace(old, new)
        out[name.replace("embeddings.", "")] = w
    for name in [n for n in out if n.endswith("attention.q_proj.weight")]:
        block = name[:-len("attention.q_proj.weight")]
        for kind in ("weight", "bias"):
            q, v = out.pop(f"{block}attention.q_proj.{kind}"), out.pop(f"{block}attention.v_proj.{kind}")
            k = out.pop(f"{block}attention.k_proj.{kind}", torch.zeros_like(q))
            out[f"{block}attn.qkv.{kind}"] = torch.cat([q, k, v])
    return out


TEACHERS = {"siglip_vitl16_256": ("siglip", 1024, 24, 16, 16, 256, 0,
                                  "vit_large_patch16_siglip_256.webli.safetensors")}
for _size, _width, _depth, _heads, _hash in (("s", 384, 12, 6, "08c60483"), ("b", 768, 12, 12, "73cec8be"),
                                             ("l", 1024, 24, 16, "8aa4cbdd")):
    TEACHERS[f"dinov3_vit{_size}16"] = (3, _width, _depth, _heads, 16, 256, 4,
                                        f"dinov3_vit{_size}16_pretrain_lvd1689m-{_hash}.pth")
    for _name, _registers in (("", 0), ("_reg", 4)):
        _file = f"dinov2_vit{_size}14{'_reg4' if _registers else ''}_pretrain.pth"
        TEACHERS[f"dinov2_vit{_size}14{_name}"] = (2, _width, _depth, _heads, 14, 518, _registers, _file)
        WEIGHTS[_file] = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{_size}14/{_file}"


class Teacher(nn.Module):
    """The one way from images in [-1, 1] (B, 3, H, H) to VFM features (B, N, D): always eval, no gradient.

    stride: image pixels a token. DINOv2 (patch 14) sees the image at 14/16 of its size, so its grid is ours.
    """

    def __init__(self, net, stride=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.net, self.stride, self.width = net.requires_grad_(False), stride, net.norm.normalized_shape[0]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        super().train(False)

    def train(self, mode=True):
        return self                                      # a frozen teacher has no training mode

    @torch.no_grad()
    def features(self, images):
        """-> class token (B, D), patch tokens (B, N, D), after the final norm."""
        grid, rest = divmod(images.shape[-1], self.stride)
        if rest or images.shape[-1] != images.shape[-2]:
            raise ValueError(f"teacher of stride {self.stride}: {tuple(images.shape[-2:])} has no such grid")
        x = (images * 0.5 + 0.5 - self.mean) / self.std
        if self.net.patch != self.stride:
            x = F.interpolate(x, size=grid * self.net.patch, mode="bilinear", align_corners=False)
        cls, patches = self.net(x)
        assert patches.shape[1] == grid ** 2
        return cls, patches

    def forward(self, images):
        return self.features(images)[1]


def load_teacher(name, weights="weights"):
    """A Teacher by name (TEACHERS) or by the path of a teacher.pt of ours.

    weights: the folder of published files, one such file, or "random" (timing and tests). DINOv3 may also lie
    there as NAME.safetensors, with the Hugging Face names.
    """
    if name not in TEACHERS:
        if not os.path.isfile(name):
            raise ValueError(f"unknown teacher {name!r}: choose from {', '.join(sorted(TEACHERS))}, "
                             "or give a teacher.pt")
        file = read_weights(name)
        net = load_named(DINO(**file["config"]), file["model"], name)
        return Teacher(net, net.patch, (0.5,) * 3, (0.5,) * 3)
    *shape, file = TEACHERS[name]
    net = DINO(*shape)
    if weights != "random":
        face = os.path.join(weights, f"{name}.safetensors")
        path = face if os.path.isfile(face) else weight_file(file, weights)
        net.load_published(read_weights(path), path)
    return Teacher(net, 16, (0.5,) * 3, (0.5,) * 3) if name.startswith("siglip") else Teacher(net)


# ---------------------------------------------------------------- the model

SIZES = {  # width, layers, heads
    "nano":  (96, 3, 3),          # ours, for --tiny
    "tiny":  (192, 3, 4),
    "small": (512, 8, 8),
    "base":  (768, 12, 12),
    "large": (1024, 24, 16),
    "xl":    (1152, 28, 16),
    "huge":  (1280, 32, 16),
}


@dataclass
class TokenizerConfig:
    image_size: int = 256         # pixels, square
    patch_size: int = 16          # pixels a token
    channels: int = 128           # C, of a latent token
    encoder: str = "base"         # a row of SIZES
    decoder: str = "base"         # the pixel decoder
    semantic: str = "tiny"        # the semantic decoder: a row of SIZES, "mlp", or "none"
    teacher_dim: tuple = 1024     # D, or a tuple of them: one semantic decoder for each teacher

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"size {self.image_size} is not divisible by the patch size {self.patch_size}")
        for part, extra in (("encoder", ()), ("decoder", ()), ("semantic", ("mlp", "none"))):
            if (size := getattr(self, part)) not in (*SIZES, *extra):
                raise ValueError(f"unknown {part} size {size!r}: choose from {', '.join((*SIZES, *extra))}")
        dims = self.teacher_dim
        self.teacher_dim = tuple(dims) if isinstance(dims, (list, tuple)) else (dims,)

    @property
    def grid(self):
        return self.image_size // self.patch_size


class Trunk(nn.Module):
    """Position embedding, RMSNorm, blocks with 2-D RoPE, RMSNorm: the body of encoder and both decoders."""

    def __init__(self, size, grid):
        super().__init__()
        width, depth, heads = SIZES[size]
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(1, grid ** 2, width))
        self.ln_pre, self.ln_post = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.transformer = nn.ModuleList(Block(width, heads) for _ in range(depth))
        # The list of d/4 frequencies stands twice in a row, so the two channels of a rotated pair turn at
        # different speeds. Not a rotation, strictly, but what the published weights were trained with.
        freqs = 2 * math.pi * 7.0 * (7.0 / 7e-4) ** torch.linspace(0, -1, width // heads // 4)
        rope = axial_rope(torch.linspace(0, 1, grid), freqs.repeat(2))
        self.register_buffer("rope", rope, persistent=False)

    def run(self, x, keep=None):
        """x (B, N, W), or with keep its visible tokens (B, K, W) -> the same shape."""
        pos, rope = self.positional_embedding, self.rope
        if keep is not None:
            pos, rope = pos[0][keep], rope[:, keep]                               # (B, K, W), (2, B, K, d)
        x = self.ln_pre(x + pos)
        for block in self.transformer:
            x = block(x, rope)
        return self.ln_post(x)


def fill_hidden(x, keep, token, N):
    """Visible x (B, K, W) at places keep (B, K), the learned `token` (1, 1, W) at hidden ones: (B, N, W)."""
    if keep is None:
        return x
    full = token.to(x.dtype).expand(len(x), N, -1)
    return full.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x)


def linear_1x1(x, conv):
    """A patch-sized or 1x1 convolution of tokens (B, N, in): the same product, without layout changes."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Encoder(Trunk):
    def __init__(self, config):
        super().__init__(config.encoder, config.grid)
        width = SIZES[config.encoder][0]
        self.patch_embed = nn.Sequential(nn.Conv2d(3, width, config.patch_size, config.patch_size))
        self.latent_head = nn.Linear(width, 2 * config.channels)                  # mean and log-variance

    def forward(self, images, keep=None):
        patches = F.pixel_unshuffle(images, self.patch_embed[0].stride[0]).flatten(2).transpose(1, 2)
        if keep is not None:
            patches = gather_tokens(patches, keep)  # (B, K, 3 p p): hidden pixels go no further
        return self.latent_head(self.run(linear_1x1(patches, self.patch_embed[0]), keep))


class PixelDecoder(Trunk):
    def __init__(self, config):
        super().__init__(config.decoder, config.grid)
        width, self.patch = SIZES[config.decoder][0], config.patch_size
        self.mask_token = nn.Parameter(width ** -0.5 * torch.randn(1, 1, width))
        self.decoder_embed = nn.Linear(config.channels, width)
        self.ffn = nn.Sequential(nn.Identity(), nn.Conv2d(width, 3 * self.patch ** 2, 1))  # published: ffn.1
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, z, keep=None):
        N, p = self.positional_embedding.shape[1], self.patch
        x = self.run(fill_hidden(self.decoder_embed(z), keep, self.mask_token, N))
        x = linear_1x1(x, self.ffn[1]).view(len(z), math.isqrt(N), -1, p, p, 3)      # (B, g, g, p1, p2, c)
        return self.conv_out(x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))  # (B, 3, H, W)


class SemanticDecoder(Trunk):
    def __init__(self, config, teacher_dim):
        super().__init__(config.semantic, config.grid)
        width = SIZES[config.semantic][0]
        self.mask_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.token_embedding, self.out = nn.Linear(config.channels, width), nn.Linear(width, teacher_dim)

    def forward(self, z, keep=None):
        N = self.positional_embedding.shape[1]
        return self.out(self.run(fill_hidden(self.token_embedding(z), keep, self.mask_embedding, N)))


class SemanticMLP(nn.Module):
    def __init__(self, config, teacher_dim):
        super().__init__()
        C, self.N = config.channels, config.grid ** 2
        self.mask_embedding = nn.Parameter(torch.zeros(1, 1, C))  # ours: theirs cannot be masked
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, teacher_dim))

    def forward(self, z, keep=None):
        return self.mlp(fill_hidden(z, keep, self.mask_embedding, self.N))


class RecTok(nn.Module):
    """Encoder, pixel decoder, one semantic decoder a teacher. keep: visible patch indices (B, K), or None."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), PixelDecoder(config)
        for module in self.modules():  # the semantic decoders keep PyTorch's defaults, as published
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if config.semantic != "none":
            kind = SemanticMLP if config.semantic == "mlp" else SemanticDecoder
            self.sem_decoders = nn.ModuleList(kind(config, dim) for dim in config.teacher_dim)

    def encode(self, images, keep=None):
        """images (B, 3, H, W) in [-1, 1] -> posterior mean, logvar (B, K, C); hidden patches are not seen."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"images of {tuple(images.shape[-2:])} given to a tokenizer of {size} x {size}")
        mean, logvar = self.encoder(images, keep).chunk(2, -1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z, keep=None):
        """z (B, K, C) -> images (B, 3, H, W), in [-1, 1] but for overshoot."""
        return self.decoder(z, keep)

    def predict(self, z, keep=None):
        """z (B, K, C), clean or z_t -> features of ALL N patches (B, N, D); a list for several teachers."""
        if self.config.semantic == "none":
            raise ValueError("this tokenizer has no semantic decoder (trained without one or after stage 1b)")
        predicted = [decoder(z, keep) for decoder in self.sem_decoders]
        return predicted if len(predicted) > 1 else predicted[0]


def _infer_config(state):
    """The config of an authors' file, from its shapes."""
    sizes = {width: name for name, (width, *_) in SIZES.items()}
    width, _, patch, _ = state["encoder.patch_embed.0.weight"].shape
    outs = [state[n] for n in state if re.fullmatch(r"sem_decoders\.\d+\.(out|mlp\.2)\.weight", n)]
    mlp = any(".mlp.0." in n for n in state)
    return TokenizerConfig(
        image_size=math.isqrt(state["encoder.positional_embedding"].shape[1]) * patch, patch_size=patch,
        channels=state["encoder.latent_head.weight"].shape[0] // 2, encoder=sizes[width],
        decoder=sizes[state["decoder.mask_token"].shape[-1]],
        semantic="none" if not outs else "mlp" if mlp else sizes[outs[0].shape[1]],
        teacher_dim=tuple(w.shape[0] for w in outs) or 1024)


def load_tokenizer(path, config=None, ema=True):
    """RecTok in eval mode from our checkpoints or the authors' RecTok*.pth (EMA weights; raw with ema=False).

    config: the shape to build (default: the file's). Another image size interpolates the position embeddings
    (bicubic); semantic="none" drops the semantic decoders. Other missing or surplus tensors raise ValueError.
    """
    file = read_weights(path)
    state = file.get("model_ema" if ema else "model", file.get("model", file))
    # Also in the authors' files: RoPE tables, DiT-style position tables, the teacher; `aux*`, an older name.
    state = {re.sub(r"^aux\w*decoders\.", "sem_decoders.", n): w for n, w in state.items()
             if not re.search(r"freqs_(cos|sin)$|(^|\.)pos_embed$|^(sem|aux)\w*foundation_models\.", n)}
    teachers = list(dict.fromkeys(n.split(".")[1] for n in state if n.startswith("sem_decoders.")))
    for k, name in enumerate(teachers):                  # published by name ("dinov3"), here by place
        state = {n.replace(f"sem_decoders.{name}.", f"sem_decoders.{k}."): w for n, w in state.items()}
    if absent := [n for n in ("encoder.patch_embed.0.weight", "encoder.positional_embedding",
                              "encoder.latent_head.weight", "decoder.mask_token") if n not in state]:
        raise ValueError(f"{path} holds no RecTok tokenizer: no {', '.join(absent)}")
    own = TokenizerConfig(**file["config"]) if isinstance(file.get("config"), dict) else _infer_config(state)
    config = replace(config) if config else own
    if not teachers:
        config = replace(config, semantic="none")        # stage 1b leaves no semantic decoder in its files
    if config.semantic == "none":
        state = {n: w for n, w in state.items() if not n.startswith("sem_decoders.")}
    for n in [n for n in state if n.endswith("positional_embedding") and own.grid != config.grid]:
        table = state[n].unflatten(1, (own.grid, own.grid)).permute(0, 3, 1, 2)
        state[n] = F.interpolate(table, size=(config.grid,) * 2, mode="bicubic").flatten(2).transpose(1, 2)
    return load_named(RecTok(config), state, path).eval()


def fingerprint(tokenizer):
    """What a DiT depends on: a hash of the encoder's weights (stage 1b keeps them, so both its files fit)."""
    digest = hashlib.sha256()
    for name, w in sorted(tokenizer.encoder.state_dict().items()):
        digest.update(name.encode() + w.cpu().float().numpy().tobytes())
    return digest.hexdigest()
