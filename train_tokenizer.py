"""Stage 1: train the RecTok tokenizer. Stage 1b: fine-tune its pixel decoder.

    python train_tokenizer.py --tiny  # a laptop: no data, no downloads
    torchrun --nproc_per_node=8 train_tokenizer.py --data data/imagenet/train     # the published recipe
    torchrun --nproc_per_node=8 train_tokenizer.py --data ... --finetune_decoder out/tokenizer/last.pt
    torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_tokenizer.py

Running the same command again goes on from --out/last.pt. The same script runs with and without torchrun.
"""
import argparse
import contextlib
import csv
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from copy import copy, deepcopy
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fid import Features, Moments, frechet_distance, gather, inception_score, start
from tokenizer import (DINO, SIZES, ImageFolder, RecTok, Shapes, Teacher, TokenizerConfig, cores, flow,
                       latent_shift, load_named, load_teacher, load_tokenizer, random_keep, read_weights,
                       sample_time, to_float, to_uint8, weight_file)


# ---------------------------------------------------------------- losses (all reductions in float32)

class LPIPS(nn.Module):
    """LPIPS v0.1, VGG16 (Zhang et al. 2018): both images in [-1, 1] -> (B,); weights: folder or "random"."""
    LAYERS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)

    def __init__(self, weights="weights"):
        super().__init__()
        layers, width = [], 3
        for out in self.LAYERS:
            layers += [nn.MaxPool2d(2)] if out == "pool" else [nn.Conv2d(width, out, 3, padding=1),
                                                               nn.ReLU(inplace=True)]
            width = width if out == "pool" else out
        self.features = nn.Sequential(*layers)                   # torchvision's names, up to relu5_3
        self.heads = nn.ParameterList(torch.rand(1, c, 1, 1) / c for c in (64, 128, 256, 512, 512))
        if weights != "random":
            path = weight_file("vgg16-397923af.pth", weights)
            vgg = {n[9:]: w for n, w in read_weights(path).items() if n.startswith("features.")}
            load_named(self.features, vgg, path)
            path = weight_file("vgg.pth", weights)
            load_named(self.heads, {n[3]: w for n, w in read_weights(path).items()}, path)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def unit_features(self, images):
        x, out = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (3, 8, 15, 22, 29):                          # relu1_2, 2_2, 3_3, 4_3, 5_3
                out.append(x.float() / (x.float().norm(dim=1, keepdim=True) + 1e-10))
        return out

    def forward(self, target, prediction):
        with torch.no_grad():
            real = self.unit_features(target)
        fake = self.unit_features(prediction)
        with torch.autocast(target.device.type, enabled=False):  # heads are 1x1 convolutions (TF32 on CUDA)
            return sum(F.conv2d((a - b) ** 2, w).mean((1, 2, 3)) for a, b, w in zip(real, fake, self.heads))


class ConvNeXt(nn.Module):
    """ConvNeXt-S (Liu et al. 2022), torchvision names: ImageNet-normalised (B, 3, 224, 224) -> (B, 1000)."""

    def __init__(self):
        super().__init__()
        self.features, before = nn.ModuleList(), 3
        for i, (depth, width) in enumerate(zip((3, 3, 27, 3), (96, 192, 384, 768))):
            norm = nn.LayerNorm(before if i else width, eps=1e-6)
            conv = nn.Conv2d(before, width, 2 if i else 4, stride=2 if i else 4)
            self.features.append(nn.ModuleList([norm, conv] if i else [conv, norm]))
            self.features.append(nn.ModuleList(self.block(width) for _ in range(depth)))
            before = width
        self.classifier = nn.Sequential(nn.LayerNorm(768, eps=1e-6), nn.Identity(), nn.Linear(768, 1000))

    @staticmethod
    def block(width):
        block = nn.Module()
        block.layer_scale = nn.Parameter(torch.ones(width, 1, 1))
        block.block = nn.ModuleDict({"0": nn.Conv2d(width, width, 7, padding=3, groups=width),
                                     "2": nn.LayerNorm(width, eps=1e-6),
                                     "3": nn.Linear(width, 4 * width), "5": nn.Linear(4 * width, width)})
        return block

    def forward(self, x):
        def conv(layer, x):                                      # x is (B, h, w, c) throughout
            return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x.permute(0, 2, 3, 1)
        for stem, blocks in zip(self.features[::2], self.features[1::2]):
            for layer in stem:
                x = conv(layer, x) if isinstance(layer, nn.Conv2d) else layer(x)
            for b in blocks:
                f = b.block
                x = x + b.layer_scale.flatten() * f["5"](F.gelu(f["3"](f["2"](conv(f["0"], x)))))
        return self.classifier(x.mean((1, 2)))


class PerceptualLoss(nn.Module):
    """(1.0 LPIPS + 0.1 MSE of ConvNeXt-S logits) / 1.1 of (target, prediction) in [0, 1] -> scalar."""

    def __init__(self, weights="weights"):
        super().__init__()
        self.lpips, self.convnext = LPIPS(weights), ConvNeXt()
        if weights != "random":
            path = weight_file("convnext_small-0c510722.pth", weights)
            load_named(self.convnext, read_weights(path), path)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def logits(self, images):
        x = F.interpolate(images, size=224, mode="bilinear", antialias=True)
        return self.convnext((x - self.mean) / self.std).float()

    def forward(self, target, prediction):
        lpips = self.lpips(target * 2 - 1, prediction * 2 - 1).mean()
        with torch.no_grad():
            real = self.logits(target)
        convnext = F.mse_loss(self.logits(prediction), real)
        return (1.0 * lpips + 0.1 * convnext) / 1.1


class BatchNorm(nn.BatchNorm2d):
    """Always batch statistics, as published (D stays in train mode); running ones only carry their names."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


class PatchGAN(nn.Module):
    """Patch discriminator (Isola et al. 2017): [0, 1] images -> logits (B, 1, h, w). width: base channels."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), BatchNorm(2 * width),
                       nn.LeakyReLU(0.2)]
            width *= 2
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1)).to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.main(images)


def hinge_loss(real, fake):
    """Discriminator loss: half of mean relu(1 - D(real)) + mean relu(1 + D(fake))."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over the visible tokens and channels: (B, K, C) -> (B,)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2))


def semantic_loss(pred, target, kind="cosine", hidden=None):
    """1 - cosine (or l1, l2) of (B, N, D), mean over tokens, or hidden (B, N) ones if given (0 if none)."""
    pred, target = pred.float(), target.float()
    if kind == "cosine":
        loss = 1 - (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)           # (B, N)
    else:
        loss = ((pred - target).abs() if kind == "l1" else (pred - target) ** 2).mean(-1)
    return loss.mean() if hidden is None else (loss * hidden).sum() / hidden.sum().clamp(min=1)


def lr_at(progress, peak, warmup=0.25):
    """Learning rate at a fraction of training in [0, 1]: linear warm-up from 0, then cosine to 0."""
    if progress < warmup:
        return peak * progress / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * min(1, (progress - warmup) / (1 - warmup))))


# ---------------------------------------------------------------- one pass of training: the method

class RecTokPass(nn.Module):
    """What DDP wraps: images in [-1, 1] and the draws of a micro-batch -> all that the losses read."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.gamma = model, args.gamma
        self.read_flow, self.decode_noisy = args.distill == "flow", args.decode == "noisy"

    def forward(self, images, keep, eps, noise, t):
        mean, logvar = self.model.encode(images, keep)  # RAD: the encoder sees visible patches only
        z = mean + (logvar / 2).exp() * eps                         # posterior sample (B, K, C)
        z_t = flow(z, self.gamma * noise, t) if self.gamma else z   # the path that the DiT will walk
        predicted = []
        if self.model.config.semantic != "none":  # FSD: predict the VFM from z_t, of ALL patches
            predicted = self.model.predict(z_t if self.read_flow else z, keep)
        reconstruction = self.model.decode(z_t if self.decode_noisy else z, keep)
        return mean, logvar, predicted if isinstance(predicted, list) else [predicted], reconstruction


def draw(args, config, B, seed, device):
    """A micro-batch's draws, a function of `seed` alone: keep (B, K), eps and noise (B, K, C), t (B,)."""
    rng = torch.Generator(device).manual_seed(seed)
    ratio = np.random.default_rng(seed).uniform(args.mask_min, args.mask_max)        # one a micro-batch
    keep = random_keep(B, config.grid ** 2, max(0.0, ratio),
                       torch.rand(B, config.grid ** 2, generator=rng, device=device))
    eps, noise = torch.randn(2, *keep.shape, config.channels, generator=rng, device=device)
    if args.schedule == "lognormal":  # noise level sigmoid(N(0, 1))
        t = 1 - torch.randn(B, generator=rng, device=device).sigmoid()
    else:
        shift = 1.0 if args.schedule == "uniform" else args.shift
        t = sample_time(B, shift, torch.rand(B, generator=rng, device=device))
    return keep, eps, noise, t


# ---------------------------------------------------------------- shared with train_dit.py and sample.py

def key(*ids):
    """A seed from integers: every random draw of a run comes from (seed, rank or index, step)."""
    return int(np.random.SeedSequence(ids).generate_state(1, np.uint64)[0] >> 1)


def sample_noise(seed, indices, N, C):
    """Starting noise (len(indices), N, C): sample i depends on (seed, i) alone, not on batch or machine."""
    seeds = (key(seed, i, 0, 0, 1) for i in indices)  # five numbers: never the seed of a training step's four
    return torch.stack([torch.randn(N, C, generator=torch.Generator().manual_seed(s)) for s in seeds])


def batches(length, batch, micro, seed, first, last, rank=0, world=1):
    """Indices (epoch, i) of this rank's micro-batches for steps first..last-1.

    The epochs' permutations form one endless stream, cut into global batches: each image comes exactly once
    an epoch, nothing is padded or dropped, and a step's global batch is the same for any number of processes.
    """
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(length))
    for step in range(first, last):
        for m in range(batch // (micro * world)):
            at = step * batch + (m * world + rank) * micro
            yield [(p // length, int(order(p // length)[p % length])) for p in range(at, at + micro)]


def micro_batch(args):
    """Images a process and pass: --micro_batch, or the largest divisor of the process's share up to 64."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("batch", "micro_batch", "epochs", "steps", "stop_at", "save_every", "eval_every",
                 "sample_every", "sample_steps", "lr", "shift"):
        value = vars(args).get(name)
        if value not in (None, "auto") and float(value) <= 0:
            raise ValueError(f"--{name} {value}: must be positive")
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema {args.ema}: need 0 <= ema < 1")
    share, rest = divmod(args.batch, world)
    if rest:
        raise ValueError(f"--batch {args.batch} is not divisible among {world} processes")
    micro = args.micro_batch or max(m for m in range(1, min(64, share) + 1) if share % m == 0)
    if share % micro:
        raise ValueError(f"--micro_batch {micro} does not divide the {share} images of each process a step")
    return micro


def deaf(_):
    """Loader processes leave signals to their trainer, which still wants to finish a step and save."""
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)


def loader(data, args, first, last, rank, world, device):
    """Iterator over this rank's micro-batches (uint8 images, labels) of steps first..last-1."""
    order = batches(len(data), args.batch, args.micro_batch, args.seed, first, last, rank, world)
    return iter(DataLoader(data, batch_sampler=order, num_workers=args.workers, worker_init_fn=deaf,
                           pin_memory=device.type == "cuda"))


def catch_signals():
    """A list that fills on SIGTERM or Ctrl-C: finish the step, save, leave; a second one leaves at once."""
    stop = []
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda s, _: (stop.append(s), signal.signal(s, signal.SIG_DFL)))
    return stop


def clip_and_agree(nets, logs, stop, world, device):
    """A step's one fence: clip each (net, max norm) -> gradient norms; is a loss or gradient of any rank not
    finite; does any rank want to leave. All ranks get the same answers."""
    norms = [torch.nn.utils.clip_grad_norm_(net.parameters(), most) for net, most in nets]
    bad = ~torch.cat([torch.stack(norms), logs]).isfinite().all()
    fence = torch.stack([*norms, bad.float(), torch.tensor(float(bool(stop)), device=device)])
    if world > 1:
        dist.all_reduce(fence, dist.ReduceOp.MAX)     # the norms agree already: DDP averaged the gradients
    *norms, bad, leave = fence.tolist()
    return norms, bool(bad), bool(leave)


def guard(bad, streak, args, step, rank, terms):
    """Bad steps in a row, 0 after a good one (a bad one touches no weight); too many: FloatingPointError."""
    if not bad:
        return 0
    terms = ", ".join(f"{k} {float(v):.4g}" for k, v in terms.items())
    if rank == 0:
        tqdm.write(f"step {step}: non-finite loss or gradient, skipped; {terms}")
    if streak + 1 >= args.max_bad_steps:
        path = os.path.join(args.out, "last.pt")
        raise FloatingPointError(f"{streak + 1} non-finite steps in a row, the last one {step}: {terms}; " + (
            f"the last good checkpoint is {path}" if os.path.exists(path) else "nothing was saved before"))
    return streak + 1


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, for weights that train (stage 1b must keep the EMA encoder)."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


def save(path, file):
    """Atomic: a temporary name, flushed to disk, renamed; a kill any time leaves the old file or the new."""
    try:
        with open(path + ".tmp", "wb") as f:
            torch.save(file, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:         # a full disk, say
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise OSError(f"could not write {path} ({error}); the file before it is still there") from error


# Length, logging, scores and pictures leave a step's weights as they are; --micro_batch and the number of
# processes change its draws (masks, t, noise), which have the same distribution.
MAY_DIFFER = {
    "epochs", "steps", "stop_at", "save_every", "eval_every", "eval_num", "sample_every", "sample_steps",
    "cfg", "reference", "features", "val", "workers", "micro_batch", "grad_checkpoint", "no_compile",
    "max_bad_steps", "out", "weights", "tokenizer"}  # (stage 2 compares the tokenizer's fingerprint instead)


def resume(args, rank):
    """The checkpoint in --out, if any; refuses another configuration's folder; the log loses later rows."""
    path, log = os.path.join(args.out, "last.pt"), os.path.join(args.out, "log.csv")
    file = read_weights(path) if os.path.exists(path) else None
    if file:
        changed = {k: (v, vars(args).get(k)) for k, v in file["args"].items() if vars(args).get(k) != v}
        if wrong := [f"{k}: was {a}, now {b}" for k, (a, b) in changed.items() if k not in MAY_DIFFER]:
            raise ValueError(f"{args.out} belongs to another configuration ({'; '.join(wrong)}): "
                             "choose another --out")
        if rank == 0 and changed.keys() & {"epochs", "steps"}:
            print("notice: the length of training changed, and with it the learning rate schedule")
    if rank == 0 and os.path.exists(log):
        rows = list(csv.reader(open(log, errors="replace")))
        most = file["step"] if file else -1
        keep = [r for r in rows if r and (r[0] == "step" or r[0].isdigit() and int(r[0]) <= most)]
        with open(log + ".tmp", "w", newline="") as f:
            csv.writer(f).writerows(keep)
        os.replace(log + ".tmp", log)
    if dist.is_initialized():
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, file["step"] if file else 0)
        if len(set(steps)) > 1:
            raise ValueError(f"processes find different steps in {args.out} ({sorted(set(steps))}): "
                             "it must be one folder that all machines see")
    return file


def bf16_on_cuda(device, switched_off):
    """-> the autocast of training, to be called; --float32 also switches TF32 off."""
    if switched_off:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    enabled = device.type == "cuda" and not switched_off
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)


def compile_on_cuda(device, switched_off, *nets):
    """torch.compile of each net's forward, where it pays. A number of tokens that varies becomes a dynamic
    dimension: bucketed lengths would need fewer kernels, but change the distribution of mask ratios. Not
    before torch 2.9: 2.6 gave other gradients with it under DDP (seen with Inductor on a CPU)."""
    if device.type != "cuda" or switched_off:
        return
    if torch.__version__ < (2, 9):
        warnings.warn(f"torch {torch.__version__}: not compiled, which needs 2.9; slower, and more memory")
        return
    for net in nets:
        net.compile()


@torch.no_grad()
def flops(f, *inputs):
    """FLOPs of f(*inputs), by torch's formulas for matrix products, attention and convolutions."""
    with FlopCounterMode(display=False) as counter:
        f(*inputs)
    return counter.get_total_flops()


def matmul_rate(device, float32=False):
    """FLOP/s that this machine reaches on a large square product, in the type that training computes in."""
    cuda = device.type == "cuda"
    a = torch.randn(*(2 * [8192 if cuda else 1024]), device=device,
                    dtype=torch.bfloat16 if cuda and not float32 else torch.float32)
    for n in (3, 10):                                # the first round warms up
        began = time.time()
        for _ in range(n):
            b = a @ a
        b[0, 0].item()                               # waits for the device
    return 2 * len(a) ** 3 * n / (time.time() - began)


def speed_row(began, images, per_image, rate, world, device):
    """Log columns: images/s since the row before (a checkpoint, scores, compilation between count too), their
    share of the machine's matrix rate, peak memory of a device (GB)."""
    speed = images / (time.time() - began)
    memory = {"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
    return {"images_per_s": speed, "mfu": speed * per_image / (rate * world)} | memory


def progress(rank, *args, **kw):
    """A progress bar on rank 0; a line now and then where the output is a file."""
    return tqdm(*args, disable=rank > 0, mininterval=0.5 if sys.stderr.isatty() else 20, **kw)


def count_bad(data, device):
    """Unreadable images that this process met so far, (1,)."""
    return torch.tensor([float(getattr(data, "bad", 0))], device=device)


def log_row(out, columns, row):
    """Append the values of row {column: number} to out/log.csv; columns that it lacks stay empty."""
    path = os.path.join(out, "log.csv")
    new = not os.path.exists(path) or os.path.getsize(path) == 0
    values = [row[c] if isinstance(row.get(c), int) else f"{row[c]:.6g}" if c in row else "" for c in columns]
    with open(path, "a", newline="") as f:
        csv.writer(f).writerows(([columns] if new else []) + [values])


def save_grid(path, rows, columns):
    """uint8 or [-1, 1] images (rows * columns, 3, H, W) -> one PNG; small images are enlarged."""
    if rows.dtype != torch.uint8:
        rows = to_uint8(rows)
    zoom = max(1, 96 // rows.shape[-1])
    rows = rows.cpu().repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    rows = F.pad(rows, (1, 1, 1, 1, 0, 0, 0, -len(rows) % columns), value=255)  # white where none is left
    rows = rows.unflatten(0, (-1, columns))                                            # (R, columns, 3, H, W)
    Image.fromarray(rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()).save(path)


# ---------------------------------------------------------------- evaluation and pictures

def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of [0, 1] images, 11 x 11 Gaussian window, sigma 1.5: (B,)."""
    g = torch.exp(-(torch.arange(11, device=a.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2).expand(3, 1, 11, 11)
    mu_a, mu_b, aa, bb, ab = (F.conv2d(x, window, groups=3) for x in (a, b, a * a, b * b, a * b))
    va, vb, cov = aa - mu_a ** 2, bb - mu_b ** 2, ab - mu_a * mu_b
    map = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4) / ((mu_a ** 2 + mu_b ** 2 + 1e-4) * (va + vb + 9e-4))
    return map.mean((1, 2, 3))


def share(data, rank, world, batch=64, workers=0):
    """Batches of this process's part of a data set, in order."""
    part = Subset(data, range(rank, len(data), world))
    return progress(rank, DataLoader(part, batch, num_workers=workers, worker_init_fn=deaf),
                    desc="evaluate", leave=False)


@torch.no_grad()
def evaluate(model, data, device, rank, world, features=None, lpips=None, workers=0):
    """Reconstructions from posterior means, over the images of all ranks: mean PSNR (dB) and SSIM of clamped
    floats, LPIPS, and of the rounded images rFID against the originals (rFD for other features) and IS."""
    sums, logits = torch.zeros(4, dtype=torch.float64, device=device), []
    moments = [Moments(features.width, device) for _ in range(2)] if features else []
    for images, _ in share(data, rank, world, workers=workers):
        images = images.to(device)
        real = to_float(images) * 0.5 + 0.5
        fake = (model.decode(model.encode(to_float(images))[0]).float() * 0.5 + 0.5).clamp(0, 1)
        psnr = -10 * ((fake - real) ** 2).mean((1, 2, 3)).clamp(min=1e-10).log10()
        distance = lpips(real * 2 - 1, fake * 2 - 1) if lpips else torch.zeros_like(psnr)
        sums += torch.stack([psnr, ssim(real, fake), distance, torch.ones_like(psnr)]).double().sum(1)
        for x, m in zip((images, to_uint8(fake * 2 - 1)), moments):
            f, last = features(x)
            m.add(f)
        logits += [last.cpu()] if features and last is not None else []
    if world > 1:
        dist.all_reduce(sums)
    scores = dict(zip(("psnr", "ssim", "lpips"), (sums[:3] / sums[3]).tolist()))
    if not lpips:
        del scores["lpips"]
    if features:
        (mu, sigma, _), (fake_mu, fake_sigma, _) = (m.result() for m in moments)
        scores["r" + features.score] = frechet_distance(fake_mu, fake_sigma, mu, sigma)
    if features and features.inception and len(data) >= 10:
        scores["IS"] = inception_score(gather(logits, len(data), world))[0]
    return scores


PROBE_TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)


@torch.no_grad()
def linear_probe(model, train, held_out, seed, device, rank, world, workers=0, most=100_000):
    """Is the flow semantically rich? Accuracy of a linear classifier on token-averaged z_t, and on what the
    semantic decoder reads from z_t, for t from data to noise: {"probe_z_1.0": share of held-out images, ...}.

    The protocol is ours, not comparable with the paper's column: ridge regression on one-hot labels, solved
    from float64 sums over at most `most` training images, so it streams and splits over processes.
    """
    C, decoder = model.config.channels, model.config.semantic != "none"
    width = {"z": C} | ({"semantic": model.config.teacher_dim[0]} if decoder else {})
    names = [(kind, t) for t in PROBE_TIMES for kind in width]
    A, b = ({n: torch.zeros(width[n[0]] + 1, k or width[n[0]] + 1, dtype=torch.float64, device=device)
             for n in names} for k in (None, train.num_classes))           # the sums of x x^T and of x y^T

    def rows(images, k, offset):  # this rank's batch k -> features with a 1 appended, (B, D + 1), by name
        z = model.encode(to_float(images.to(device)))[0]
        indices = (offset + rank + world * (64 * k + j) for j in range(len(z)))        # of the data set
        noise = sample_noise(seed, indices, z.shape[1], C).to(device)
        for kind, t in names:
            x = flow(z, noise, torch.full((len(z),), t, device=device))
            if kind == "semantic":
                x = model.predict(x)
                x = x[0] if isinstance(x, list) else x
            yield (kind, t), F.pad(x.double().mean(1), (0, 1), value=1.0)

    train = Subset(train, range(0, len(train), math.ceil(len(train) / most)))
    for k, (images, labels) in enumerate(share(train, rank, world, workers=workers)):
        hot = F.one_hot(labels, b[names[0]].shape[1]).double().to(device)
        for name, x in rows(images, k, 0):
            A[name] += x.T @ x
            b[name] += x.T @ hot
    for name in names:
        if world > 1:
            dist.all_reduce(A[name])
            dist.all_reduce(b[name])
        ridge = 1e-3 * A[name].diagonal() + 1e-9     # relative to each feature's scale
        b[name] = torch.linalg.solve(A[name] + ridge.diag(), b[name])
    hits = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for k, (images, labels) in enumerate(share(held_out, rank, world, workers=workers)):
        right = [(x @ b[name]).argmax(1).cpu() == labels
                 for name, x in rows(images, k, 10 ** 8)]
        hits += torch.stack([*right, torch.ones_like(right[0])]).double().sum(1).to(device)
    if world > 1:
        dist.all_reduce(hits)
    return {f"probe_{kind}_{t}": h for (kind, t), h in zip(names, (hits[:-1] / hits[-1]).tolist())}


def assess(model, args, plain, held_out, name, features, lpips, device, rank, world):
    """All scores of a tokenizer, printed with their recipe. plain: the training images without flips."""
    scores, probed = evaluate(model, held_out, device, rank, world, features, lpips, args.workers), {}
    if held_out.classes == plain.classes and plain.num_classes > 1:     # a flat folder has no labels to probe
        probed = linear_probe(model, plain, held_out, args.seed, device, rank, world, args.workers)
    elif rank == 0:
        tqdm.write("no linear probe: it needs the same class folders in the training and the held-out images")
    if rank == 0:
        against = f", {features.name} features, against the originals" if features else ""
        tqdm.write(", ".join(f"{k} {v:.4f}" for k, v in scores.items())
                   + f" ({len(held_out)} {name}; EMA, posterior means{against})")
        if probed:
            tqdm.write("linear probe, % right (our own protocol)" + "".join(f"{t:8.2f}" for t in PROBE_TIMES))
        for kind, title in (("z", "on the flow z_t"), ("semantic", "on the semantic decoder's output")):
            if f"probe_{kind}_1.0" in probed:
                values = "".join(f"{100 * probed[f'probe_{kind}_{t}']:8.1f}" for t in PROBE_TIMES)
                tqdm.write(f"{title:>40}{values}")
    return scores | probed


@torch.no_grad()
def picture(path, model, images, teacher, noise):
    """Rows: original, reconstruction, and the first 3 principal components (as RGB; one basis, fitted on the
    teacher's features) of the teacher's features and of those predicted from z_t at t = 1, 0.5 and 0.25."""
    z = model.encode(images)[0]
    rows = [images, model.decode(z)]
    if teacher is not None and model.config.semantic != "none":
        def predicted(t):
            out = model.predict(flow(z, noise, torch.full((len(z),), t, device=z.device)))
            return F.normalize((out[0] if isinstance(out, list) else out).float(), dim=-1)
        real = F.normalize(teacher.forward(images).float(), dim=-1)            # not the compiled one
        center = real.mean((0, 1))
        basis = torch.linalg.svd((real - center).flatten(0, 1), full_matrices=False).Vh[:3].T      # (D, 3)
        spread = ((real - center) @ basis).std((0, 1))
        for features in (real, predicted(1.0), predicted(0.5), predicted(0.25)):
            rgb = ((features - center) @ basis / (2.5 * spread)).transpose(1, 2)                   # (B, 3, N)
            rgb = rgb.unflatten(2, (model.config.grid,) * 2)
            rows.append(F.interpolate(rgb, size=images.shape[-1], mode="nearest"))
    save_grid(path, torch.cat([row.float() for row in rows]), len(images))


def fit_teacher(path, size, steps=250, batch=64, seed=0):
    """--tiny's VFM: a small DINOv3 fitted to the shape classes on the spot, saved with its head."""
    torch.manual_seed(seed)
    config = dict(version=3, width=96, depth=3, heads=3, patch=8, image_size=size, registers=1)
    net, head = DINO(**config), nn.Linear(96, Shapes.num_classes)
    data = Shapes(size, steps * batch, seed=seed + 3)                      # held-out shapes have seed 1
    teacher, hit = Teacher(net, 8, (0.5,) * 3, (0.5,) * 3), 0
    params = list(net.requires_grad_(True).parameters()) + list(head.parameters())
    optimizer = torch.optim.AdamW(params, weight_decay=0.05)
    loader = DataLoader(data, batch)
    for step, (images, labels) in enumerate(progress(0, loader, desc="fit the tiny teacher")):
        for group in optimizer.param_groups:
            group["lr"] = lr_at((step + 1) / steps, 1e-3, 0.1)
        logits = head(net(to_float(images))[0])
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        hit = 0.9 * hit + 0.1 * (logits.argmax(1) == labels).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"tiny teacher: {100 * hit:.0f} % of the last shapes classified rightly -> {path}")
    save(path, {"config": config, "model": net.state_dict(), "head": head.state_dict()})
    return teacher


# ---------------------------------------------------------------- flags

TINY = dict(  # --tiny: other defaults, nothing else
    data="shapes", image_size=32, patch_size=8, channels=16, encoder="nano", decoder="nano", semantic="nano",
    gan_width=16, teacher="tiny", features="tiny", w_pixel=20.0, w_perceptual=0.0, w_gan=0.005, steps=1000,
    batch=64, lr=3e-3, warmup=0.1, ema=0.99, save_every=200, workers=0)
FINETUNE = dict(  # --finetune_decoder: stage 1b
    out="out/tokenizer_ft", distill="none", gamma=0.0, mask_min=0.0, mask_max=0.0, w_kl=0.0, w_semantic=0.0,
    gan_start=0.0, epochs=100, warmup=0.05)


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the default of each flag that has one."""

    def _get_help_string(self, action):
        absent = action.default in (None, argparse.SUPPRESS) or action.default is False       # 0 is a default
        silent = absent or "default" in action.help
        return action.help + ("" if silent else " [%(default)s]")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = p.add_argument_group("run").add_argument
    add("--tiny", action="store_true", help="drawn shapes, a small model and teacher: minutes on a laptop")
    add("--data", default="data/imagenet/train", help="root/class/*.jpg or root/*.jpg; 'shapes' draws them")
    add("--val", help="held-out images (default: the folder `val` beside --data, else --data itself)")
    add("--out", default="out/tokenizer", help="run folder; the same command again goes on from its last.pt")
    add("--finetune_decoder", metavar="CKPT", help="stage 1b: train only this checkpoint's pixel decoder")
    add("--eval_only", metavar="CKPT", help="no training: the scores of this checkpoint")
    add("--seed", type=int, default=0, help="of the weights, the data order and every draw")
    add = p.add_argument_group("model").add_argument
    add("--image_size", type=int, help="pixels, a multiple of the patch (default: 256, or the checkpoint's)")
    add("--patch_size", type=int, default=16, help="pixels a token")
    add("--channels", type=int, default=128, help="C, of a latent token")
    add("--encoder", default="base", choices=list(SIZES), help="size of the encoder")
    add("--decoder", default="base", choices=list(SIZES), help="size of the pixel decoder")
    add("--semantic", default="tiny", choices=[*SIZES, "mlp", "none"], help="the semantic decoder")
    add("--gan_width", type=int, default=64, help="base channels of the discriminator")
    add("--teacher", default="dinov3_vitl16", help="VFM, or several with commas: dinov3_vitl16,dinov2_vitl14")
    add("--weights", default="weights", help="folder of published files; free ones download into it")
    add("--random_weights", action="store_true", help="random VFM and perceptual nets: timing and tests only")
    add = p.add_argument_group("method").add_argument
    add("--distill", default="flow", choices=["flow", "latent", "none"], help="input of the semantic decoder")
    add("--target", default="all", choices=["all", "hidden"], help="patches it predicts: rec+align, or rec")
    add("--semantic_loss", default="cosine", choices=["cosine", "l1", "l2"], help="distance to VFM features")
    add("--decode", default="noisy", choices=["noisy", "clean"], help="input of the pixel decoder: z_t or z")
    add("--schedule", default="shift", choices=["shift", "uniform", "lognormal"], help="distribution of t")
    add("--shift", default="auto", help="timestep shift s (auto: max(1, sqrt(N C / 4096)))")
    add("--gamma", type=float, default=1.0, help="std of the noise; 0: no flow at all")
    add("--mask_min", type=float, default=-0.1, help="hidden share ~ max(0, U(mask_min, mask_max)): often 0")
    add("--mask_max", type=float, default=0.4, help="0 with --mask_min 0 switches RAD off")
    add("--w_pixel", type=float, default=1.0, help="weight of the MSE in [0, 1]")
    add("--w_perceptual", type=float, default=1.0, help="of (LPIPS + 0.1 ConvNeXt) / 1.1")
    # The authors' script says 0.5, but their loss builder does not pass it on: their code runs with 0.1.
    add("--w_gan", type=float, default=0.1, help="of -mean D(fake); 0: no discriminator")
    add("--w_kl", type=float, default=1e-6, help="of the KL summed over tokens and channels")
    add("--w_semantic", type=float, default=1.0, help="of the distillation")
    add("--gan_start", type=float, default=0.5, help="fraction of training without GAN")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=float, default=200, help="length of training")
    add("--steps", type=int, help="the same in steps, instead of --epochs")
    add("--stop_at", type=int, help="leave after this step; the same command without it goes on")
    add("--batch", type=int, default=1024, help="global batch, whatever the number of processes")
    add("--micro_batch", type=int, help="images a process and pass; the rest accumulates (default: up to 64)")
    add("--lr", type=float, help="peak (default: 1e-4 * batch / 256; stage 1b 5e-5 * batch / 256)")
    add("--warmup", type=float, default=0.25, help="fraction of training; cosine to 0 after it")
    add("--ema", type=float, default=0.999, help="decay of the averaged weights")
    add("--max_bad_steps", type=int, default=3, help="non-finite steps in a row, skipped before giving up")
    add = p.add_argument_group("machine").add_argument
    add("--save_every", type=int, default=5000, help="steps between last.pt and pictures; milestones: 10 x")
    add("--eval_every", type=int, default=12500, help="steps between evaluations (about 10 ImageNet epochs)")
    add("--workers", type=int, help="loader processes of each process (default: its share of the cores)")
    add("--features", default="inception", help="of rFID: inception, a teacher or its file (rFD), or none")
    add("--no_compile", action="store_true", help="no torch.compile (on CUDA it is on, from torch 2.9)")
    add("--float32", action="store_true", help="compute in float32 where CUDA otherwise takes bf16 and TF32")
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**(TINY if first.tiny else {}))
    if first.finetune_decoder:
        p.set_defaults(**(FINETUNE | (dict(steps=300, lr=1e-3) if first.tiny else {})))
    return resolve(p.parse_args(argv))


def resolve(args):
    """The flags with their automatic values filled in; the user's errors that need no file."""
    if "none" in (args.distill, args.semantic):
        args.distill = args.semantic = "none"
    config = TokenizerConfig(args.image_size or 256, args.patch_size, args.channels, args.encoder,
                             args.decoder, args.semantic)
    if args.shift != "auto":
        args.shift = float(args.shift)
    elif not (args.finetune_decoder or args.eval_only):      # those take it from their checkpoint's shape
        args.shift = latent_shift(config.grid ** 2, args.channels)
    if args.random_weights:
        args.weights = "random"
    if args.lr is None:
        args.lr = (5e-5 if args.finetune_decoder else 1e-4) * args.batch / 256
    args.micro_batch = None if args.eval_only else micro_batch(args)
    args.workers = cores() if args.workers is None else args.workers
    if not 0 <= args.mask_max < 1 or args.mask_min > args.mask_max:
        raise ValueError(f"--mask_min {args.mask_min} --mask_max {args.mask_max}: "
                         "need min <= max, and 0 <= max < 1")
    return args


def open_data(root, size, seed=0, val=None):
    """-> training images with flips, the same without, held-out images, and what to call the latter."""
    if root == "shapes":
        return (Shapes(size, 1_000_000, seed + 2), Shapes(size, 4096, seed + 2), Shapes(size, 1024, 1),
                "held-out shapes")
    train = ImageFolder(root, size, True, seed)
    plain = copy(train)                              # the folder is walked once
    plain.flip, plain.bad = False, torch.zeros_like(train.bad).share_memory_()
    beside = os.path.join(os.path.dirname(os.path.abspath(root)), "val")
    if val or os.path.isdir(beside) and not os.path.samefile(beside, root):
        return train, plain, ImageFolder(val or beside, size), f"images of {val or beside}"
    return train, plain, plain, "TRAINING images (no val folder)"


def open_teachers(args, device):
    """The frozen VFMs, in float32 weights; bf16 arithmetic comes from autocast."""
    if args.semantic == "none":
        return []
    names = [os.path.join(args.out, "teacher.pt")] if args.teacher == "tiny" else args.teacher.split(",")
    teachers = [load_teacher(name, args.weights).to(device) for name in names]
    for name, teacher in zip(names, teachers):
        if teacher.stride != args.patch_size:
            raise ValueError(f"teacher {name} has a token every {teacher.stride} pixels, the tokenizer every "
                             f"{args.patch_size}: their grids do not match")
    return teachers


def open_features(args, device, folder):
    """What rFID is measured on: Inception, a teacher, or ("tiny") the teacher.pt of `folder`; or None."""
    if args.features == "none":
        return None
    name = os.path.join(folder, "teacher.pt") if args.features == "tiny" else args.features
    return Features(name, args.weights, device)


def optimizer_for(model, lr):
    """AdamW, weight decay 1e-4 but none on 1-D tensors and on names with these parts (as published)."""
    free = ("ln", "bias", "embedding", "norm", "gamma", "embed", "token")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.ndim == 1 or any(part in n for part in free)]
    decay = [p for n, p in named if not (p.ndim == 1 or any(part in n for part in free))]
    return torch.optim.AdamW([dict(params=plain, weight_decay=0.0), dict(params=decay, weight_decay=1e-4)],
                             lr=lr, betas=(0.9, 0.95), fused=torch.cuda.is_available())


# ---------------------------------------------------------------- main

COLUMNS = ["step", "epoch", "lr", "loss", "pixel", "perceptual", "gan", "kl", "semantic", "d_loss",
           "logits_real", "logits_fake", "grad_norm", "d_grad_norm", "unreadable", "images_per_s", "mfu",
           "memory_gb"]
SCORES = ["psnr", "ssim", "lpips", "rFID", "rFD", "IS",
          *(f"probe_{kind}_{t}" for kind in ("z", "semantic") for t in PROBE_TIMES)]


def main(argv=None):
    args = parse(argv)
    device, rank, world = start()
    torch.manual_seed(args.seed)
    if args.random_weights and rank == 0:
        print("WARNING: --random_weights: teacher, perceptual loss and scores mean NOTHING; for timing only")

    # data
    source = args.eval_only or args.finetune_decoder
    config = load_tokenizer(source).config if source else None
    if source and args.image_size:                   # a 256 px checkpoint goes on at 512 px, say
        config = replace(config, image_size=args.image_size)
    if args.shift == "auto":
        args.shift = latent_shift(config.grid ** 2, config.channels)
    size = config.image_size if source else args.image_size or 256
    data, plain, held_out, held_out_name = open_data(args.data, size, args.seed, args.val)
    if args.eval_only:
        lpips = LPIPS(args.weights).to(device) if args.w_perceptual else None
        features = open_features(args, device, os.path.dirname(source))
        assess(load_tokenizer(source, config).to(device), args, plain, held_out, f"{held_out_name}, {source}",
               features, lpips, device, rank, world)
        return
    steps = args.steps or math.ceil(args.epochs * len(data) / args.batch)
    last = min(steps, args.stop_at or steps)
    os.makedirs(args.out, exist_ok=True)
    file = resume(args, rank)
    if file and file["step"] >= last:
        if rank == 0:
            print(f"{args.out} is at step {file['step']} of {steps}: nothing to do")
        return
    first, streak = file["step"] if file else 0, 0
    images_of = loader(data, args, first, last, rank, world, device)  # forks while the process is small

    # networks: frozen teachers and perceptual loss; RecTok, its EMA, the discriminator
    if args.tiny and rank == 0 and not os.path.exists(os.path.join(args.out, "teacher.pt")):
        if source:                                   # stage 1b: the teacher of stage 1, for the scores
            shutil.copy(os.path.join(os.path.dirname(source), "teacher.pt"), args.out)
        elif os.path.isfile(args.teacher.split(",")[0]):
            shutil.copy(args.teacher.split(",")[0], os.path.join(args.out, "teacher.pt"))
        else:
            fit_teacher(os.path.join(args.out, "teacher.pt"), size)
    if world > 1:
        dist.barrier()
    teachers, features = open_teachers(args, device), open_features(args, device, args.out)
    perceptual_loss = PerceptualLoss(args.weights).to(device) if args.w_perceptual else None
    if source:  # raw weights go on from the raw ones, the EMA from the EMA
        shape = replace(config, semantic="none")
        model, ema = (load_tokenizer(source, shape, ema=e).to(device).train() for e in (False, True))
        model.encoder.requires_grad_(False)
    else:
        dims = tuple(teacher.width for teacher in teachers) or 1024
        torch.manual_seed(args.seed)                 # whether or not a teacher was fitted just now
        model = RecTok(TokenizerConfig(size, args.patch_size, args.channels, args.encoder,
                                       args.decoder, args.semantic, dims)).to(device)
        ema = deepcopy(model)
    ema.requires_grad_(False)
    config, discriminator = model.config, PatchGAN(args.gan_width).to(device)
    optimizer, d_optimizer = optimizer_for(model, args.lr), optimizer_for(discriminator, args.lr)
    if file:
        for part, name in ((model, "model"), (ema, "model_ema"), (discriminator, "discriminator")):
            load_named(part, file[name], args.out)
        optimizer.load_state_dict(file["optimizer"])
        d_optimizer.load_state_dict(file["d_optimizer"])
        file = None
    if rank == 0:
        print(f"torch {torch.__version__}, {world} x {device.type}, "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(data)} images of "
              f"{size} px, steps {first} to {last} of {steps}, shift {args.shift:.3f}")
        with open(os.path.join(args.out, "config.json"), "w") as f:
            json.dump({"args": vars(args), "model": asdict(config), "torch": torch.__version__,
                       "world": world}, f, indent=1)
    step_pass, d_net = RecTokPass(model, args), discriminator
    # FLOPs an image: trained networks count 3 forwards, frozen ones that pass it a gradient 2, others 1.
    x = torch.zeros(1, 3, size, size, device=device)
    keep, *draws = draw(args, config, 1, 0, device)
    per_image = 3 * flops(step_pass, x, keep, *draws) - (2 * flops(model.encode, x) if source else 0) \
        + sum(flops(teacher, x) for teacher in teachers) \
        + (1.5 * flops(perceptual_loss, x, x) if perceptual_loss else 0)           # real image 1, fake 2
    per_image_gan, rate = (2 + 3 + 3) * flops(discriminator, x), matmul_rate(device, args.float32)
    if rank == 0:
        print(f"{per_image / 1e9:.1f} GFLOP an image, {per_image_gan / 1e9:.1f} more with the GAN; "
              f"matrix rate {rate / 1e12:.3g} TFLOP/s")
    compile_on_cuda(device, args.no_compile, step_pass, *teachers, *filter(None, [perceptual_loss]))
    if world > 1:
        step_pass, d_net = (DDP(net, gradient_as_bucket_view=True, broadcast_buffers=False)
                            for net in (step_pass, discriminator))       # their buffers are constant
    autocast = bf16_on_cuda(device, args.float32)

    accumulate = args.batch // (args.micro_batch * world)
    show = to_float(torch.stack([held_out[i][0] for i in range(min(8, len(held_out)))])).to(device)
    show_noise = torch.randn(len(show), config.grid ** 2, config.channels,
                             generator=torch.Generator().manual_seed(args.seed)).to(device)
    stop = catch_signals()
    bar, began, logged = progress(rank, total=last, initial=first, desc="stage 1"), time.time(), first

    for step in range(first, last):
        lr = lr_at(step / steps, args.lr, args.warmup)
        gan_on = args.w_gan > 0 and step >= args.gan_start * steps
        zero = torch.zeros((), device=device)
        logs = torch.zeros(9, device=device)
        for m in range(accumulate):
            images = to_float(next(images_of)[0].to(device, non_blocking=True))
            if world > 1:
                step_pass.require_backward_grad_sync = d_net.require_backward_grad_sync = m == accumulate - 1
            with autocast():
                targets = [teacher(images) for teacher in teachers]
                keep, eps, noise, t = draw(args, config, len(images), key(args.seed, step, rank, m), device)
                mean, logvar, predicted, reconstruction = step_pass(images, keep, eps, noise, t)
            hidden = None if args.target == "all" else torch.ones(  # 1 = hidden from the encoder
                len(images), config.grid ** 2, device=device).scatter(1, keep, 0.0)
            real, fake = images * 0.5 + 0.5, reconstruction.float() * 0.5 + 0.5

            pixel = F.mse_loss(fake, real)
            with autocast():
                perceptual = perceptual_loss(real, fake) if perceptual_loss else zero
                discriminator.requires_grad_(False)
                gan = -discriminator(fake).float().mean() if gan_on else zero
            kl = kl_loss(mean, logvar).mean()
            semantic = sum((semantic_loss(p, y, args.semantic_loss, hidden)
                            for p, y in zip(predicted, targets)), zero) / max(1, len(targets))
            loss = (args.w_pixel * pixel + args.w_perceptual * perceptual + args.w_gan * gan + args.w_kl * kl
                    + args.w_semantic * semantic)
            (loss / accumulate).backward()

            d_loss = logits_real = logits_fake = zero
            if gan_on:
                discriminator.requires_grad_(True)
                with autocast():
                    logits_real, logits_fake = d_net(real), d_net(fake.detach())  # own batch statistics
                d_loss = hinge_loss(logits_real, logits_fake)
                (d_loss / accumulate).backward()
            logs += torch.stack([loss, pixel, perceptual, gan, kl, semantic, d_loss,
                                 logits_real.float().mean(),
                                 logits_fake.float().mean()]).detach() / accumulate

        nets = [(model, 3.0), (discriminator, 3.0)][:1 + gan_on]
        norms, bad, leave = clip_and_agree(nets, logs, stop, world, device)
        streak = guard(bad, streak, args, step, rank, dict(zip(COLUMNS[3:12], logs)))
        if not bad:
            for o in (optimizer, d_optimizer)[:1 + gan_on]:
                for group in o.param_groups:
                    group["lr"] = lr
                o.step()
            update_ema(ema, model, args.ema)
        optimizer.zero_grad()
        d_optimizer.zero_grad()

        # below the fence: save first (what follows may take long), then scores and the log
        done = step + 1
        bar.update()
        scoring = done % args.eval_every == 0 or done == steps
        if rank == 0 and ((done % args.save_every == 0 or scoring) and not bad or done == last or leave):
            small = {"model": model.state_dict(), "model_ema": ema.state_dict(), "config": asdict(config),
                     "args": vars(args), "step": done}
            save(os.path.join(args.out, "last.pt"), small | {
                "discriminator": discriminator.state_dict(), "optimizer": optimizer.state_dict(),
                "d_optimizer": d_optimizer.state_dict()})
            if done % (10 * args.save_every) == 0 or done == last:
                save(os.path.join(args.out, f"step_{done}.pt"), small)
            if not leave:
                picture(os.path.join(args.out, f"step_{done}.png"), ema, show,
                        teachers[0] if teachers else None, show_noise)
        scores = {}
        if scoring and not leave:
            scores = assess(ema, args, plain, held_out, held_out_name, features,
                            perceptual_loss.lpips if perceptual_loss else None, device, rank, world)
        if done % 10 == 0 or scores:
            logs = torch.cat([logs / world, count_bad(data, device)])
            if world > 1:
                dist.all_reduce(logs)
            if rank == 0:
                *terms, unreadable = logs.tolist()
                values = [done, done * args.batch / len(data), lr, *terms, *(norms + [0.0])[:2],
                          int(unreadable)]
                speed = speed_row(began, (done - logged) * args.batch, per_image + gan_on * per_image_gan,
                                  rate, world, device)
                began, logged = time.time(), done
                log_row(args.out, COLUMNS + SCORES, dict(zip(COLUMNS, values)) | speed | scores)
                bar.set_postfix(refresh=False, loss=f"{terms[0]:.3f}", mse=f"{terms[1]:.4f}",
                                semantic=f"{terms[5]:.3f}")
        if leave:
            print(f"rank {rank}: stopped by a signal after step {done}; the same command goes on from there")
            break
    bar.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        sys.exit(f"{type(error).__name__}: {error}")
