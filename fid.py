"""Every score: FID, Inception Score, precision, recall; PSNR, SSIM, rFID and linear probe of a tokenizer.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz          # gFID, IS, precision, recall
    python fid.py folder/ other_folder/ --json                         # any two folders of images
    python fid.py --save_stats val256.npz data/imagenet/val --image_size 256     # a reference of your own
    torchrun --nproc_per_node=8 fid.py samples.npz reference.npz       # the same numbers, sooner
    python fid.py samples.npz reference/ --features dinov2_vitl14      # FD-DINOv2

Conventions: torch-fidelity's. A score means nothing without its reference, N and features, so they are
always printed beside it.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import warnings
import zipfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Subset

from tokenizer import (ImageFolder, Shapes, atomic, cores, flow, load_named, load_teacher, local_batches,
                       naming, print_once, rank_and_world, read_weights, run_script, sample_noise, start,
                       to_float, to_uint8, weight_file)

# ---------------------------------------------------------------- scores of two sets of images

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), in float64 (Heusel et al. 2017). mu (D,), sigma (D, D).

    With S1 = L L^T, S1 S2 has the eigenvalues of the symmetric L^T S2 L: real, non-negative, and cheap. A
    singular S1 (fewer samples than features) has no Cholesky factor; its eigenvectors give another L.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"statistics of {len(mu1)} features against statistics of {len(mu2)}")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("non-finite statistics")
    L, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:                                                      # singular
        values, vectors = torch.linalg.eigh(sigma1)
        L = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(L.T @ sigma2 @ L).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def inception_score(logits, splits=10, seed=2020):
    """exp of the mean KL(p(y|x) || p(y)) in `splits` parts of the shuffled logits (N, 1008) -> mean, std."""
    order = np.random.RandomState(seed).permutation(len(logits))    # torch-fidelity's shuffle
    log_p = logits.double()[order].log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits:(i + 1) * len(log_p) // splits]
        marginal = part.exp().mean(0).log()                         # log p(y) of this part
        kl = (part.exp() * (part - marginal)).sum(1)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3, block=2000):
    """Kynkaanniemi et al. 2019, on features (N, D), (M, D), both more than k rows -> precision: the share of
    fakes inside the reals' k-NN balls; recall: the reverse. Blockwise: never all distances at once."""

    def radii(x):  # to the k-th neighbour, itself left out
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(block)])

    def inside(x, centres, radius):
        return torch.cat([(torch.cdist(part, centres) <= radius).any(1) for part in x.split(block)])

    real, fake = real.float(), fake.float()
    with exact_float32():                                           # a distance decides which ball is hit
        precision = inside(fake, real, radii(real))
        recall = inside(real, fake, radii(fake))
    return precision.float().mean().item(), recall.float().mean().item()


class Moments:
    """Running mean and covariance of features (n, D), in float64 sums: never all features in memory."""

    def __init__(self, width, device="cpu"):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features):
        features = features.double()
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def result(self):
        """-> {mu (D,), sigma (D, D), n}, over all processes."""
        add_up(self.n, self.sum, self.outer)
        n, width = int(self.n), len(self.sum)
        if n < 2:
            raise ValueError(f"{n} images: 2 are needed")
        if not self.outer.isfinite().all():
            raise ValueError("non-finite features")
        rank, _ = rank_and_world()
        if n < width and rank == 0:
            warnings.warn(f"{n} images for {width} features: the covariance is singular and the Frechet "
                          "distance biased upwards; use more images")
        mu = self.sum / self.n
        # Unbiased, as np.cov.
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return {"mu": mu.cpu().numpy(), "sigma": sigma.cpu().numpy(), "n": n}


def add_up(*tensors):
    """Sums over all processes, in place."""
    if dist.is_initialized():
        for x in tensors:
            dist.all_reduce(x)


@contextlib.contextmanager
def exact_float32():
    """No TF32 on CUDA: it would move FID in the third digit."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- scores of a tokenizer

def score_tokenizer(model, train, held_out, title, features=None, reference=None, lpips=None, seed=0,
                    workers=0):
    """All of them -> {name: number}, printed with their recipe. train: the training images without flips."""
    scores = evaluate(model, held_out, features, reference, lpips, workers)
    against = f"; {features.name} features, against the originals" if features else ""
    line = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print_once(f"{line} ({len(held_out)} {title}; EMA, posterior means{against})")
    if reference:
        print_once(f"r{features.score}_reference: against {reference['name']}{reference['resized']}")
    if held_out.classes != train.classes or len(train.classes) < 2:      # a flat folder has no labels
        print_once("no linear probe: it needs the same class folders in the training and the held-out images")
        return scores
    probed = linear_probe(model, train, held_out, seed, workers)
    print_once("linear probe, % right (our own protocol)" + "".join(f"{t:8.2f}" for t in PROBE_TIMES))
    for kind, what in (("z", "on the flow z_t"), ("semantic", "on the semantic decoder's output")):
        values = [f"{100 * value:8.1f}" for name, value in probed.items()
                  if name.startswith(f"probe_{kind}_")]
        if values:
            print_once(f"{what:>40}{''.join(values)}")
    return scores | probed


@torch.no_grad()
def evaluate(model, data, features=None, reference=None, lpips=None, workers=0):
    """Reconstructions from posterior means, over the images of all processes: mean PSNR (dB), SSIM and LPIPS
    of clamped floats; of rounded images rFID against the originals (rFD for other features), the same
    against `reference` (of open_reference), and IS."""
    device = next(model.parameters()).device
    count = torch.zeros((), dtype=torch.float64, device=device)
    sums = {name: torch.zeros_like(count) for name in ("psnr", "ssim", "lpips")}
    if lpips is None:
        del sums["lpips"]
    moments = []                            # of the originals, the reconstructions, and those resized
    if features:
        moments = [Moments(features.width, device) for _ in range(3)]
    logits = []
    for images, _ in local_batches(data, workers=workers):
        images = images.to(device)                                  # uint8 (B, 3, H, W)
        real = to_float(images) * 0.5 + 0.5                         # [0, 1]
        mean, _ = model.encode(to_float(images))
        fake = (model.decode(mean).float() * 0.5 + 0.5).clamp(0, 1)
        count += len(images)
        sums["psnr"] += psnr(real, fake).double().sum()
        sums["ssim"] += ssim(real, fake).double().sum()
        if lpips is not None:
            sums["lpips"] += lpips(real * 2 - 1, fake * 2 - 1).double().sum()
        if features:
            # What a file of the image would hold.
            rounded = to_uint8(fake * 2 - 1)
            moments[0].add(features(images)[0])
            found, last = features(rounded)
            moments[1].add(found)
            if last is not None:
                logits.append(last.cpu())
            if reference:
                moments[2].add(features(resize(rounded, reference["image_size"]))[0])
    add_up(count, *sums.values())
    scores = {name: (total / count).item() for name, total in sums.items()}
    if features:
        original, decoded = moments[0].result(), moments[1].result()
        name = "r" + features.score
        scores[name] = frechet(decoded, original)
        if reference:
            scores[f"{name}_reference"] = frechet(moments[2].result(), reference)
        if features.inception and len(data) >= 10:
            scores["IS"], _ = inception_score(in_order(logits, len(data)))
    return scores


def frechet(one, other):
    return frechet_distance(one["mu"], one["sigma"], other["mu"], other["sigma"])


def psnr(a, b):
    """Peak signal-to-noise ratio of [0, 1] images (B, 3, H, W), in dB: (B,)."""
    return -10 * ((a - b) ** 2).mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of [0, 1] images of at least 11 px, 11 x 11 Gaussian window,
    sigma 1.5: (B,)."""
    g = torch.exp(-(torch.arange(11, device=a.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2).expand(3, 1, 11, 11)

    def blur(x):
        return F.conv2d(x, window, groups=3)

    # Local means, variances and covariance; C1 = 0.01^2, C2 = 0.03^2.
    mu_a, mu_b = blur(a), blur(b)
    var_a = blur(a * a) - mu_a ** 2
    var_b = blur(b * b) - mu_b ** 2
    cov = blur(a * b) - mu_a * mu_b
    luminance = (2 * mu_a * mu_b + 1e-4) / (mu_a ** 2 + mu_b ** 2 + 1e-4)
    contrast = (2 * cov + 9e-4) / (var_a + var_b + 9e-4)
    return (luminance * contrast).mean((1, 2, 3))


def resize(images, size):
    """uint8 images (B, 3, H, W) -> size x size by Lanczos: the released evaluation brings 512 px to 256."""
    if size in (None, images.shape[-1]):
        return images
    small = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        image = Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS)
        small.append(torch.from_numpy(np.array(image)))
    return torch.stack(small).permute(0, 3, 1, 2).to(images.device)


PROBE_TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)


@torch.no_grad()
def linear_probe(model, train, held_out, seed, workers=0, max_images=100_000):
    """Is the flow semantically rich? Accuracy of a linear classifier on token-averaged z_t, and on what the
    semantic decoder reads from z_t, for t from data to noise: {"probe_z_1.0": share of held-out images, ...}.

    Ours: ridge regression on one-hot labels, solved from float64 sums over at most `max_images` training
    images, EMA weights. The protocol behind the paper's columns is in the released code's history only: one
    linear layer on every token, its logits averaged over tokens (so it is linear in the token mean too),
    cross-entropy, Adam, one epoch, raw weights. Another fit, so the numbers are not comparable.
    """
    device = next(model.parameters()).device
    rank, world = rank_and_world()
    step = math.ceil(len(train) / max_images)
    train_part = Subset(train, range(0, len(train), step))
    if min(len(train_part), len(held_out)) < world:
        raise ValueError(f"the linear probe needs an image for each of {world} processes in both sets")

    def batches(data, first, size=64):
        """This process's share -> {name: inputs (B, D + 1)}, labels. first: keeps the noise of sets apart."""
        for number, (images, labels) in enumerate(local_batches(data, size, workers)):
            places = [first + rank + world * (size * number + j) for j in range(len(labels))]  # in the set
            yield probe_inputs(model, to_float(images.to(device)), places, seed), labels.to(device)

    # The sums of x x^T and of x y^T, for x the inputs and y the one-hot labels.
    xx, xy = {}, {}
    for inputs, labels in batches(train_part, 0):
        one_hot = F.one_hot(labels, len(train.classes)).double()
        for name, x in inputs.items():
            xx[name] = xx.get(name, 0) + x.T @ x
            xy[name] = xy.get(name, 0) + x.T @ one_hot
    add_up(*xx.values(), *xy.values())
    solution = {}                                                   # (D + 1, classes) by name
    for name in xx:
        ridge = 1e-3 * xx[name].diagonal() + 1e-9                   # relative to each feature's scale
        solution[name] = torch.linalg.solve(xx[name] + ridge.diag(), xy[name])
    hits = {name: torch.zeros((), dtype=torch.float64, device=device) for name in xx}
    for inputs, labels in batches(held_out, 10 ** 8):
        for name, x in inputs.items():
            hits[name] += ((x @ solution[name]).argmax(1) == labels).sum()
    add_up(*hits.values())
    return {name: (count / len(held_out)).item() for name, count in hits.items()}


def probe_inputs(model, images, places, seed):
    """What the classifiers of linear_probe read: token means with a 1 appended, {name: (B, D + 1)}."""
    z, _ = model.encode(images)
    noise = sample_noise(seed, places, *z.shape[1:]).to(z.device)
    found = {}
    for t in PROBE_TIMES:
        z_t = flow(z, noise, torch.full((len(z),), t, device=z.device))     # (B, N, C)
        read = {"z": z_t}
        if model.config.semantic != "none":
            read["semantic"] = model.predict_all(z_t)[0]
        for kind, x in read.items():
            found[f"probe_{kind}_{t}"] = F.pad(x.double().mean(1), (0, 1), value=1.0)
    return found


# ---------------------------------------------------------------- from images to features

class Features:
    """inception, a teacher's name or its file: uint8 images -> features (B, D), logits (B, 1008) or None."""

    def __init__(self, name, weights, device):
        self.inception = name == "inception"
        self.net = (InceptionV3(weights) if self.inception else load_teacher(name, weights)).to(device)
        self.width = 2048 if self.inception else self.net.width
        self.device = device
        self.score = "FID" if self.inception else "FD"  # only Inception's distance is called FID
        self.name = name
        if os.path.isfile(name):  # known by its content, not by its path
            self.name = f"{os.path.basename(name)} {hashlib.sha256(open(name, 'rb').read()).hexdigest()[:8]}"
        if weights == "random":
            warnings.warn(f"{name} with RANDOM weights: its scores mean nothing")
            self.name += " (RANDOM)"

    @torch.inference_mode()
    def __call__(self, images):
        if self.inception:
            return self.net(images)
        with exact_float32():
            cls, _ = self.net.features(to_float(images))            # FD on the class token
            return cls, None


def extract(features, batches, total, keep=False):
    """Batches of uint8 images, each process its share of `total` -> {mu, sigma, n, logits (total, 1008) or
    None, rows: the features (total, D) if `keep`}."""
    moments = Moments(features.width, features.device)
    logits, rows = [], []
    for images in batches:
        found, last = features(images.to(features.device))
        moments.add(found)
        if last is not None:
            logits.append(last.cpu())
        if keep:
            rows.append(found.cpu())
    return moments.result() | {"logits": in_order(logits, total), "rows": in_order(rows, total)}


def extract_data(features, data, batch=64, workers=0, keep=False):
    """The same of a data set."""
    try:
        batches = local_batches(data, batch, workers, features.name)
        found = extract(features, (images for images, _ in batches), len(data), keep)
    except RuntimeError as error:
        if "equal size" in str(error):
            raise ValueError(f"{data.root} holds images of different sizes: give --image_size") from error
        raise
    if hasattr(data, "bad"):                                        # a replaced image would count twice
        bad = data.bad.double().to(features.device)
        add_up(bad)
        if bad:
            raise ValueError(f"{int(bad)} unreadable images in {data.root}, named above: remove them")
    return found


def in_order(parts, n):
    """The rows that the processes found for their shares, in the order of the data set, (n, ...); or None."""
    rows = torch.cat(parts) if parts else None
    _, world = rank_and_world()
    if world == 1:
        return rows
    everyone = [None] * world
    dist.all_gather_object(everyone, rows)  # a process may have none, all take part
    some = [part for part in everyone if part is not None]
    if not some:
        return None
    out = torch.empty(n, some[0].shape[1])
    for rank, part in enumerate(everyone):                          # it had images rank, rank + world, ...
        if part is not None:
            out[rank::world] = part
    return out


# ---------------------------------------------------------------- Inception-v3, as TensorFlow ran it in 2015

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W) -> pool (B, 2048), logits (B, 1008) without the bias.

    weights: the folder of published files, the file itself, or "random". Source of the names: pytorch-fid.
    """

    def __init__(self, weights="weights"):
        super().__init__()
        self.stem = convolutions(
            ("Conv2d_1a_3x3", 3, 32, 3, 2),
            ("Conv2d_2a_3x3", 32, 32, 3),
            ("Conv2d_2b_3x3", 32, 64, 3, 1, 1),
            ("Conv2d_3b_1x1", 64, 80, 1),
            ("Conv2d_4a_3x3", 80, 192, 3))
        self.mixed = nn.ModuleDict({
            "5b": block_a(192, 32), "5c": block_a(256, 64), "5d": block_a(288, 64),
            "6a": block_b(),
            "6b": block_c(128), "6c": block_c(160), "6d": block_c(160), "6e": block_c(192),
            "7a": block_d(),
            "7b": block_e(1280), "7c": block_e(2048)})
        # Patch: 1008 outputs instead of torchvision's 1000, since the TensorFlow graph had them.
        self.fc = nn.Linear(2048, 1008)
        if weights != "random":
            path = weight_file(INCEPTION, weights)
            load_named(self, fold_batch_norm(read_weights(path), path), path)
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(self, images):
        with exact_float32():
            pool = self.features(images)[-1]
            return pool, pool @ self.fc.weight.T

    def features(self, images):
        """The averaged activations at 64, 192, 768 and 2048 channels, as torch-fidelity names them."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"uint8 images (B, 3, H, W) expected, got {images.dtype} {tuple(images.shape)}")
        # Patch: TensorFlow's resize, and its (x - 128) / 128 instead of ImageNet's mean and std.
        x = (tf1_resize(images.float()) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = chain(self.stem, ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"], x)
        x = F.max_pool2d(x, 3, 2)                                   # (B, 64, 73, 73)
        found = [x.mean((2, 3))]
        x = chain(self.stem, ["Conv2d_3b_1x1", "Conv2d_4a_3x3"], x)
        x = F.max_pool2d(x, 3, 2)                                   # (B, 192, 35, 35)
        found.append(x.mean((2, 3)))
        for name, block in self.mixed.items():
            if name == "7a":
                found.append(x.mean((2, 3)))                        # of (B, 768, 17, 17)
            x = torch.cat(branches(block, x) + [pooled(name, block, x)], dim=1)
        found.append(x.mean((2, 3)))                                # of (B, 2048, 8, 8)
        return found


def pooled(name, block, x):
    """The pooling branch of a block."""
    if name in ("6a", "7a"):
        return F.max_pool2d(x, 3, 2)
    if name == "7c":        # Patch: the last block pools by maximum, where torchvision averages.
        return chain(block, ["branch_pool"], F.max_pool2d(x, 3, 1, 1))
    # Patch: TensorFlow's average leaves the padding out of the count.
    return chain(block, ["branch_pool"], F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def branches(block, x):
    """The other branches: names of a common stem form a chain, and a chain may end in a fork (_2a, _2b)."""
    chains = {}
    for name in block:
        if name != "branch_pool":
            chains.setdefault(name.rpartition("_")[0] or name, []).append(name)
    out = []
    for names in chains.values():
        fork = [name for name in names if name[-1] in "ab"]
        end = chain(block, [name for name in names if name not in fork], x)
        out += [chain(block, [name], end) for name in fork] or [end]
    return out


def chain(block, names, x):
    for name in names:
        x = F.relu(block[name](x), inplace=True)
    return x


def convolutions(*rows):
    """Rows of (name, in, out, kernel[, stride[, padding]]). BatchNorm is folded into each convolution."""
    return nn.ModuleDict({name: nn.Conv2d(*shape) for name, *shape in rows})


def block_a(n, pool):
    return convolutions(
        ("branch1x1", n, 64, 1),
        ("branch5x5_1", n, 48, 1),
        ("branch5x5_2", 48, 64, 5, 1, 2),
        ("branch3x3dbl_1", n, 64, 1),
        ("branch3x3dbl_2", 64, 96, 3, 1, 1),
        ("branch3x3dbl_3", 96, 96, 3, 1, 1),
        ("branch_pool", n, pool, 1))


def block_b():
    return convolutions(
        ("branch3x3", 288, 384, 3, 2),
        ("branch3x3dbl_1", 288, 64, 1),
        ("branch3x3dbl_2", 64, 96, 3, 1, 1),
        ("branch3x3dbl_3", 96, 96, 3, 2))


def block_c(c):
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return convolutions(
        ("branch1x1", 768, 192, 1),
        ("branch7x7_1", 768, c, 1),
        ("branch7x7_2", c, c, *row),
        ("branch7x7_3", c, 192, *column),
        ("branch7x7dbl_1", 768, c, 1),
        ("branch7x7dbl_2", c, c, *column),
        ("branch7x7dbl_3", c, c, *row),
        ("branch7x7dbl_4", c, c, *column),
        ("branch7x7dbl_5", c, 192, *row),
        ("branch_pool", 768, 192, 1))


def block_d():
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return convolutions(
        ("branch3x3_1", 768, 192, 1),
        ("branch3x3_2", 192, 320, 3, 2),
        ("branch7x7x3_1", 768, 192, 1),
        ("branch7x7x3_2", 192, 192, *row),
        ("branch7x7x3_3", 192, 192, *column),
        ("branch7x7x3_4", 192, 192, 3, 2))


def block_e(n):
    row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    return convolutions(
        ("branch1x1", n, 320, 1),
        ("branch3x3_1", n, 384, 1),
        ("branch3x3_2a", 384, 384, *row),
        ("branch3x3_2b", 384, 384, *column),
        ("branch3x3dbl_1", n, 448, 1),
        ("branch3x3dbl_2", 448, 384, 3, 1, 1),
        ("branch3x3dbl_3a", 384, 384, *row),
        ("branch3x3dbl_3b", 384, 384, *column),
        ("branch_pool", n, 192, 1))


def fold_batch_norm(state, path):
    """Published names -> ours: (w x - mean) / sqrt(var + 1e-3) gamma + beta is a convolution with a bias."""
    if "fc.weight" not in state or len(state["fc.weight"]) != 1008 or "AuxLogits.fc.weight" in state:
        raise ValueError(f"{path} is not the Inception of FID (torchvision's weights give other scores): "
                         f"{INCEPTION} is needed")
    out = {n: w for n, w in state.items() if n.startswith("fc.")}
    with naming(path, INCEPTION):
        for name in [n.removesuffix(".conv.weight") for n in state if n.endswith(".conv.weight")]:
            weight = state[f"{name}.conv.weight"].double()
            gamma = state[f"{name}.bn.weight"].double()
            beta = state[f"{name}.bn.bias"].double()
            mean = state[f"{name}.bn.running_mean"].double()
            var = state[f"{name}.bn.running_var"].double()
            scale = gamma / (var + 1e-3).sqrt()
            ours = name.replace("Conv2d", "stem.Conv2d").replace("Mixed_", "mixed.")
            out[ours + ".weight"] = (weight * scale.view(-1, 1, 1, 1)).float()
            out[ours + ".bias"] = (beta - mean * scale).float()
    return out


def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize of (B, 3, H, W): output i reads input i H / size, no half-pixel offset.

    Each axis is one small matrix with two entries a row: exact, and cheaper than gathering four neighbours.
    """
    def matrix(n):
        place = torch.arange(size, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
        low = place.long().clamp(max=n - 1)                         # the neighbours, and how far from each
        high = (low + 1).clamp(max=n - 1)
        rows = torch.arange(size)
        m = torch.zeros(size, n)
        m[rows, low] = 1 - (place - low)
        m[rows, high] += place - low
        return m.to(x)

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


# ---------------------------------------------------------------- reading samples and references

class Arrays:
    """The images of an npz (arr_0, uint8 NHWC) as a data set; each process that reads it opens the path."""

    def __init__(self, path):
        self.root = path
        self.images = None                                          # mapped at first use, in each process
        images = stored_array(path, "arr_0")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 3), not {images.dtype} {images.shape}")
        self.shape = images.shape

    def __len__(self):
        return self.shape[0]

    def __getstate__(self):                                         # a copy for a loader is the path alone
        return self.__dict__ | {"images": None}

    def __getitem__(self, i):
        if self.images is None:
            self.images = stored_array(self.root, "arr_0")
        return torch.from_numpy(self.images[i].transpose(2, 0, 1).copy()), 0


def stored_array(path, name):
    """An array of an npz, mapped from disk where it is not compressed: 50,000 images are 10 GB a process."""
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(name + ".npy")
        if info.compress_type != zipfile.ZIP_STORED:                # np.savez_compressed
            return np.load(path, allow_pickle=False)[name]
        with file.open(info) as f:
            version = np.lib.format.read_magic(f)
            read_header = (np.lib.format.read_array_header_2_0 if version == (2, 0)
                           else np.lib.format.read_array_header_1_0)
            shape, fortran, dtype = read_header(f)
            header = f.tell()
    if dtype.hasobject:
        raise ValueError(f"{path} holds pickled objects")
    with open(path, "rb") as f:  # the local file header: 30 bytes, a name, an extra field
        f.seek(info.header_offset + 26)
        name_and_extra = np.frombuffer(f.read(4), "<u2").sum()
    start_of_array = info.header_offset + 30 + int(name_and_extra) + header
    return np.memmap(path, dtype, "r", start_of_array, shape, "F" if fortran else "C")


def read(path, image_size=None):
    """Folder or npz -> {"images": data set or None, "image_size"}, and where given mu, sigma, n, features."""
    if os.path.isdir(path):
        data = ImageFolder(path, image_size)
        return {"images": data, "image_size": data[0][0].shape[1]}
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no folder or npz at {path!r}")
    if path.endswith(".npy"):
        raise ValueError(f"{path} is one array (.npy); an .npz is needed: np.savez(path, arr_0=images)")
    found = {"images": None, "image_size": None, "path": path}
    with naming(path,
                "an npz of images (arr_0) or statistics (mu, sigma): truncated, or of another kind"):
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            for name in names & {"n", "image_size", "features"}:    # in our own files
                found[name] = file[name].item()
            if {"mu", "sigma"} <= names:
                found["mu"], found["sigma"] = file["mu"].squeeze(), file["sigma"]
                check_moments(found["mu"], found["sigma"], path)
            elif "arr_0" not in names:
                raise ValueError(f"{path}: neither images (arr_0) nor statistics (mu, sigma) in it")
        if "arr_0" in names:
            found["images"] = Arrays(path)
            found["image_size"] = found["images"].shape[1]
    return found


def check_moments(mu, sigma, path):
    """ValueError where they cannot be the mean (D,) and covariance (D, D) of features."""
    width = mu.size
    if mu.shape != (width,) or sigma.shape != (width, width):
        raise ValueError(f"{path}: mu {mu.shape} and sigma {sigma.shape} are no mean and covariance")
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        raise ValueError(f"{path}: mu is {mu.dtype}, sigma {sigma.dtype}: floating-point numbers expected")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: non-finite statistics")
    if not np.allclose(sigma, sigma.T) or (sigma.diagonal() < 0).any():
        raise ValueError(f"{path}: sigma is no covariance: not symmetric, or negative on its diagonal")


def check_statistics(features, side):
    """ValueError where the statistics of a read() result are not of these features."""
    if "mu" not in side:
        return
    width, kind = len(side["mu"]), side.get("features", "unknown")
    same = "features" not in side or kind.split()[-1] == features.name.split()[-1] # hash or name
    if not same or width != features.width:
        raise ValueError(f"{side['path']}: statistics of {width} features ({kind}); {features.name} has "
                         f"{features.width}")


def open_reference(path, features, image_size, workers=0):
    """What FID is measured against: an npz, a folder of images, "shapes" (held-out drawn ones), or None.

    -> {mu, sigma, name, image_size, resized: what is said of images of another size}, or None.
    """
    if path is None or features is None:
        return None
    if path == "shapes":
        side = {"images": Shapes(image_size, 1024, seed=1)}
    else:
        side = read(path, image_size)
    check_statistics(features, side)
    if "mu" not in side:
        side |= extract_data(features, side["images"], workers=workers)
    size = side.get("image_size") or known_size(path)
    resized = ""
    if size not in (None, image_size):
        resized = f", images brought from {image_size} to {size} px by Lanczos"
    return {"mu": side["mu"], "sigma": side["sigma"], "name": path, "image_size": size, "resized": resized}


def known_size(path):
    """Published statistics hold no image size, but their names do (val_fid_statistics_file_256.npz)."""
    sizes = re.findall(r"(?<!\d)(64|128|256|512)(?!\d)", os.path.basename(path))
    return int(sizes[0]) if sizes else None


def compare(features, samples, reference, batch=64, workers=0):
    """Two results of read() -> scores, with what they were measured on. FID uses statistics where a file has
    them; precision and recall need images on both sides, IS those of the samples."""
    for side in (samples, reference):
        check_statistics(features, side)
    both = samples["images"] is not None and reference["images"] is not None
    found = []
    for side in (samples, reference):
        measured = {"logits": None}
        if side["images"] is not None and (both or "mu" not in side):
            measured = extract_data(features, side["images"], batch, workers, keep=both)
        if "mu" in side:                                            # a file's own statistics count
            measured |= {"mu": side["mu"], "sigma": side["sigma"], "n": side.get("n")}
        found.append(measured)
    one, other = found
    scores = {features.score: frechet(one, other)}
    if one["logits"] is not None and len(one["logits"]) >= 10:
        scores["IS"], scores["IS_std"] = inception_score(one["logits"])
    if both and min(len(one["rows"]), len(other["rows"])) > 3:
        real, fake = other["rows"].to(features.device), one["rows"].to(features.device)
        scores["precision"], scores["recall"] = precision_recall(real, fake)
    elif both:
        warnings.warn("no precision and recall: they need 4 images on both sides")
    # Another size is another task, but the user may mean it.
    sizes = samples["image_size"], reference["image_size"]
    if all(sizes) and sizes[0] != sizes[1]:
        warnings.warn(f"images of {sizes[0]} px against {sizes[1]} px")
    return scores | {"n": one["n"], "n_reference": other["n"], "features": features.name}


# ---------------------------------------------------------------- command line

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("samples", help="npz with arr_0 (uint8 NHWC) or mu and sigma, or a folder of images")
    add("reference", nargs="?", help="the same kinds; ADM's VIRTUAL_imagenet256_labeled.npz for gFID")
    add("--save_stats", metavar="FILE.npz",
        help="write mu, sigma, n of the one input instead of comparing")
    add("--features", default="inception", help="inception (FID), or a teacher or its file (FD)")
    add("--weights", default="weights",
        help="folder of published files, or the one file; absent ones download")
    add("--image_size", type=int, help="centre-crop the images of folders to this size")
    add("--batch", type=int, default=64, help="images at a time")
    add("--json", action="store_true", help="one line of JSON instead of the table")
    args = p.parse_intermixed_args(argv)
    if bool(args.save_stats) == bool(args.reference):
        p.error("two inputs are needed: SAMPLES REFERENCE; or one and --save_stats FILE.npz")
    return args


def main(argv=None):
    args = parse(argv)
    device, rank, _ = start()
    target = args.save_stats
    if target:
        target = target if target.endswith(".npz") else target + ".npz"
        check_writable(target)
        if os.path.realpath(target) == os.path.realpath(args.samples) or os.path.basename(target) == ".npz":
            raise ValueError(f"--save_stats {target}: give it a name of its own")
    samples = read(args.samples, args.image_size)
    if target:
        if samples["images"] is None:
            raise ValueError(f"{args.samples} holds statistics already")
        features = Features(args.features, args.weights, device)
        found = extract_data(features, samples["images"], args.batch, cores())
        if rank == 0:
            with atomic(target) as f:
                np.savez(f, mu=found["mu"], sigma=found["sigma"], n=found["n"],
                         image_size=samples["image_size"], features=features.name)
            size = samples["image_size"]
            print(f"wrote {target}: {found['n']} images of {size} px, {args.features} features")
        return
    reference = read(args.reference, args.image_size)
    features = Features(args.features, args.weights, device)
    scores = compare(features, samples, reference, args.batch, cores())
    scores |= {"samples": args.samples, "reference": args.reference}
    if rank == 0 and args.json:
        print(json.dumps(scores))
    elif rank == 0:
        for name, value in scores.items():
            print(f"{name:>12}  {f'{value:.4f}' if isinstance(value, float) else value}")


def check_writable(path):
    """Before hours of work."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: its folder does not exist or is read-only")


if __name__ == "__main__":
    run_script(main)
