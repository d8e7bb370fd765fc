"""Every score: FID, Inception Score, precision, recall; PSNR, SSIM, rFID and linear probe of a tokenizer.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz          # gFID, IS, precision, recall
    python fid.py folder/ other_folder/ --json                         # any two folders of images
    python fid.py --save_stats val256.npz data/imagenet/val --image_size 256     # a reference of your own
    torchrun --nproc_per_node=8 fid.py samples.npz reference.npz       # the same numbers, sooner
    python fid.py samples.npz reference/ --features dinov2_vitl14      # FD on DINOv2's features

Conventions: torch-fidelity's. A score means nothing without its reference, N and features, so they are
always printed beside it. Each process holds an npz of images in memory.
"""
import argparse
import contextlib
import json
import math
import os
import warnings
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.data import Subset

from tokenizer import (COUNT, ImageFolder, Shapes, all_reduce, atomic, cores, flow, load_named, load_teacher,
                       local_batches, naming, print_once, read_weights, run_script, sample_noise, start,
                       this_rank, to_float, to_uint8, weight_file, weights_hash, world_size)

# ---------------------------------------------------------------- scores of two sets of images

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), in float64 (Heusel et al. 2017). mu (D,), sigma (D, D).

    With S1 = L L^T, S1 S2 has the eigenvalues of the symmetric L^T S2 L: real and non-negative, also where
    there are fewer samples than features.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"statistics of {len(mu1)} features against statistics of {len(mu2)}")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("non-finite statistics")
    values, vectors = torch.linalg.eigh(sigma1)
    L = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(L.T @ sigma2 @ L).clamp(min=0).sqrt().sum()
    means = (mu1 - mu2).square().sum()
    return (means + sigma1.trace() + sigma2.trace() - 2 * root).item()


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


@exact_float32()                                    # TF32 would move samples across the edge of a ball
def precision_recall(real, fake, k=3, block=2000):
    """Kynkaanniemi et al. 2019, on features (N, D), (M, D), both more than k rows -> precision: the share of
    fakes inside the reals' k-NN balls; recall: the reverse. Blockwise: never all distances at once."""

    def radii(x):  # to the k-th neighbour, itself left out
        found = []
        for part in x.split(block):
            distances = torch.cdist(part, x)
            found.append(distances.kthvalue(k + 1).values)
        return torch.cat(found)

    def inside(x, centres, radius):
        found = []
        for part in x.split(block):
            distances = torch.cdist(part, centres)
            found.append((distances <= radius).any(1))
        return torch.cat(found)

    real, fake = real.float(), fake.float()
    precision = inside(fake, real, radii(real))
    recall = inside(real, fake, radii(fake))
    return precision.float().mean().item(), recall.float().mean().item()


def moments(features):
    """This process's features (n, D) -> {mu (D,), sigma (D, D), n} of those of all, in float64."""
    n, width = features.shape
    number = features.new_tensor(n, dtype=torch.float64)
    total = features.new_zeros(width, dtype=torch.float64)
    outer = features.new_zeros(width, width, dtype=torch.float64)
    for part in features.split(5000):                               # never all of them in float64
        part = part.double()
        total += part.sum(0)
        outer.addmm_(part.T, part)
    all_reduce(number, total, outer)
    n = int(number)
    if n < 2 or not outer.isfinite().all():
        raise ValueError(f"{n} images: two with finite features are needed")
    if n < width and this_rank() == 0:
        warnings.warn(f"{n} images for {width} features: the covariance is singular and the Frechet distance "
                      "biased upwards; use more images")
    mu = total / n
    sigma = (outer - n * torch.outer(mu, mu)) / (n - 1)             # unbiased, as np.cov
    return {"mu": mu.cpu(), "sigma": sigma.cpu(), "n": n}


# ---------------------------------------------------------------- scores of a tokenizer

def score_tokenizer(model, train, held_out, title, features=None, reference=None, lpips=None, seed=0,
                    workers=0):
    """All of them -> {name: number}, printed with their recipe. train: the training images without flips."""
    scores = evaluate(model, held_out, features, reference, lpips, workers)
    if held_out.classes == train.classes and len(train.classes) > 1:            # a flat folder has no labels
        scores |= linear_probe(model, train, held_out, seed, workers)
    else:
        print_once("no linear probe: it needs the same class folders in the training and the held-out images")
    line = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    kind = "TRAINING images (no val folder)" if held_out is train else "held-out images"
    against = f"; {features.name} features, against the originals" if features else ""
    if reference:
        against += f", and for _reference against {reference['name']}"
    print_once(f"{line} ({len(held_out)} {kind}, {title}; EMA, posterior means{against})")
    return scores


@torch.no_grad()
def evaluate(model, data, features=None, reference=None, lpips=None, workers=0):
    """Reconstructions from posterior means, over the images of all processes: mean PSNR (dB), SSIM and LPIPS
    of clamped floats; of rounded images rFID against the originals (rFD for other features), the same
    against `reference` (of open_reference), and IS."""
    device = next(model.parameters()).device
    measures = {"psnr": psnr, "ssim": ssim}
    if lpips is not None:
        measures["lpips"] = lambda real, fake: lpips(real * 2 - 1, fake * 2 - 1)
    sums = torch.zeros(len(measures), dtype=torch.float64, device=device)
    originals, decoded = [], []                                     # features, batch by batch
    for images, _ in local_batches(data, workers=workers):
        images = images.to(device)                                  # uint8 (B, 3, H, W)
        real = to_float(images) * 0.5 + 0.5                         # [0, 1]
        mean, _ = model.encode(to_float(images))
        fake = (model.decode(mean).float() * 0.5 + 0.5).clamp(0, 1)
        sums += torch.stack([measure(real, fake).double().sum() for measure in measures.values()])
        if features:
            originals.append(features(images))
            decoded.append(features(to_uint8(fake * 2 - 1)))        # what a file of the image would hold
    all_reduce(sums)
    scores = dict(zip(measures, (sums / len(data)).tolist()))
    if features:
        found = collect(decoded)
        scores[f"r{features.score}"] = frechet(found, collect(originals))
        if reference:
            scores[f"r{features.score}_reference"] = frechet(found, reference)
        scores |= inception_scores(features, found["logits"], len(data))
    return scores


def inception_scores(features, logits, n):
    """IS of n images, from each process's share of their logits; {} below ten, or not Inception's."""
    if not features.inception or n < 10:
        return {}
    mean, std = inception_score(in_order(logits, n))
    return {"IS": mean, "IS_std": std}


def frechet(one, other):
    return frechet_distance(one["mu"], one["sigma"], other["mu"], other["sigma"])


def psnr(a, b):
    """Peak signal-to-noise ratio of [0, 1] images (B, 3, H, W), in dB: (B,)."""
    mse = ((a - b) ** 2).mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of [0, 1] images of at least 11 px, 11 x 11 Gaussian window,
    sigma 1.5: (B,)."""
    distance = torch.arange(11, device=a.device) - 5.0              # from the window's centre
    g = torch.exp(-distance ** 2 / (2 * 1.5 ** 2))
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


PROBE_TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)


@torch.no_grad()
def linear_probe(model, train, held_out, seed, workers=0):
    """Is the flow semantically rich? Accuracy of a linear classifier on token-averaged z_t, and on what the
    semantic decoder reads from z_t, for t from data to noise: {"probe_z_1.0": share of held-out images, ...}.

    Ours: ridge regression on one-hot labels, solved from float64 sums over at most 100,000 training
    images, EMA weights. The protocol behind the paper's columns is in the released code's history only: one
    linear layer on every token, its logits averaged over tokens (so it is linear in the token mean too),
    cross-entropy, Adam, one epoch, raw weights. Another fit, so the numbers are not comparable.
    """
    device = next(model.parameters()).device
    train_part = Subset(train, range(0, len(train), math.ceil(len(train) / 100_000)))

    def batches(data, first, size=64):
        """Its share -> {kind: inputs (T, B, D + 1)}, one-hot labels. first: keeps the noise of sets apart."""
        for number, (images, labels) in enumerate(local_batches(data, size, workers)):
            places = first + this_rank() + world_size() * (size * number + np.arange(len(labels)))
            inputs = probe_inputs(model, to_float(images.to(device)), places, seed)
            yield inputs, F.one_hot(labels.to(device), len(train.classes)).double()

    xx, xy, hits = defaultdict(float), defaultdict(float), defaultdict(float)
    for inputs, y in batches(train_part, 0):
        for kind, x in inputs.items():
            xx[kind] += x.mT @ x
            xy[kind] += x.mT @ y
    all_reduce(*xx.values(), *xy.values())
    solution = {}
    for kind in xx:
        ridge = 1e-3 * xx[kind].diagonal(dim1=1, dim2=2) + 1e-9     # relative to each feature's scale
        solution[kind] = torch.linalg.solve(xx[kind] + ridge.diag_embed(), xy[kind])    # (T, D + 1, classes)
    for inputs, y in batches(held_out, 10 ** 8):
        for kind, x in inputs.items():
            right = (x @ solution[kind]).argmax(-1) == y.argmax(-1)                     # (T, B)
            hits[kind] += right.double().sum(1)
    all_reduce(*hits.values())
    return {f"probe_{kind}_{t}": (count / len(held_out)).item()
            for kind in hits for t, count in zip(PROBE_TIMES, hits[kind])}


def probe_inputs(model, images, places, seed):
    """What the classifiers of linear_probe read: token means with a 1 appended, (T, B, D + 1) by kind, for
    the T times of PROBE_TIMES."""
    z, _ = model.encode(images)
    noise = sample_noise(seed, places, *z.shape[1:]).to(z.device)
    flows = [flow(z, noise, z.new_tensor([t])) for t in PROBE_TIMES]
    read = {"z": flows}                                             # (B, N, C) each
    if model.config.semantic != "none":
        read["semantic"] = [model.sem_decoders[0](z_t) for z_t in flows]
    inputs = {}
    for kind, tokens in read.items():
        means = torch.stack(tokens).double().mean(2)                # (T, B, D)
        inputs[kind] = F.pad(means, (0, 1), value=1.0)
    return inputs


# ---------------------------------------------------------------- from images to features

class Features:
    """inception, a teacher or its file: uint8 images -> features (B, D), logits (B, 1008) or (B, 0)."""

    def __init__(self, name, weights, device):
        self.inception = name == "inception"
        self.net = (InceptionV3(weights) if self.inception else load_teacher(name, weights)).to(device)
        self.device = device
        self.score = "FID" if self.inception else "FD"              # only Inception's distance is called FID
        self.name = name
        self.head = None                                            # a teacher.pt has one, for Shapes
        if os.path.isfile(name):                                    # known by its weights, not by its path
            self.name = f"{os.path.basename(name)} {weights_hash(self.net)[:8]}"
            self.head = read_weights(name).get("head")
        elif weights == "random":
            warnings.warn(f"{name} with RANDOM weights: its scores mean nothing")
            self.name = f"RANDOM_{name}"

    @exact_float32()
    def __call__(self, images):
        images = images.to(self.device)
        if self.inception:
            return self.net(images)
        cls, _ = self.net.features(to_float(images))                # FD on the class token
        return cls, cls[:, :0]


def collect(batches):
    """What Features gave for this process's batches -> its rows (n, D) and logits; mu, sigma, n of all."""
    if not batches:
        raise ValueError("fewer images than processes")
    rows, logits = (torch.cat(parts) for parts in zip(*batches))
    return moments(rows) | {"rows": rows, "logits": logits}


def extract_data(features, data, batch, workers):
    """collect() of a data set."""
    if not isinstance(data, ImageFolder):                           # no files to decode
        workers = 0
    found = [features(images) for images, _ in local_batches(data, batch, workers, features.name)]
    if hasattr(data, "bad"):                                        # a replaced image would count twice
        bad = data.bad.double().to(features.device)
        all_reduce(bad)
        if bad:
            raise ValueError(f"unreadable images in {data.root}, named above: remove them")
    return collect(found)


def in_order(rows, n):
    """The rows of all processes, (n, ...): each had the images rank, rank + world, ... of the data set."""
    if world_size() == 1:
        return rows
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, rows.cpu())
    out = torch.empty(n, rows.shape[1])
    for rank, part in enumerate(everyone):
        out[rank::world_size()] = part
    return out


# ---------------------------------------------------------------- Inception-v3, as TensorFlow ran it in 2015

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W) -> pool (B, 2048), logits (B, 1008) without the bias.

    weights: the folder of published files, the file itself, or "random". Source of the names: pytorch-fid.
    """
    width = 2048

    def __init__(self, weights="weights"):
        super().__init__()
        self.stem = convolutions(
            ("Conv2d_1a_3x3", 3, 32, 3, 2, 0),
            ("Conv2d_2a_3x3", 32, 32, 3, 1, 0),
            ("Conv2d_2b_3x3", 32, 64, 3),
            ("Conv2d_3b_1x1", 64, 80, 1),
            ("Conv2d_4a_3x3", 80, 192, 3, 1, 0))
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

    @exact_float32()
    def forward(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"uint8 images (B, 3, H, W) expected, got {images.dtype} {tuple(images.shape)}")
        # Patch: TensorFlow's resize, and its (x - 128) / 128 instead of ImageNet's mean and std.
        x = (tf1_resize(images.float()) - 128) / 128
        x = x.contiguous(memory_format=torch.channels_last)
        x = chain(self.stem, ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"], x)
        x = F.max_pool2d(x, 3, 2)                                   # (B, 64, 73, 73)
        x = chain(self.stem, ["Conv2d_3b_1x1", "Conv2d_4a_3x3"], x)
        x = F.max_pool2d(x, 3, 2)                                   # (B, 192, 35, 35)
        for name, block in self.mixed.items():
            x = torch.cat(branches(block, x) + [pooled(name, block, x)], dim=1)
        pool = x.mean((2, 3))                                       # of (B, 2048, 8, 8)
        return pool, pool @ self.fc.weight.T


def pooled(name, block, x):
    """The pooling branch of a block."""
    if name in ("6a", "7a"):
        return F.max_pool2d(x, 3, 2)
    if name == "7c":        # Patch: the last block pools by maximum, where torchvision averages.
        return chain(block, ["branch_pool"], F.max_pool2d(x, 3, 1, 1))
    # Patch: TensorFlow's average leaves the padding out of the count.
    return chain(block, ["branch_pool"], F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def branches(block, x):
    """The other branches. Names of a common stem form a chain, which may end in a fork: branch3x3_1, _2a, _2b
    of 7b are a chain of one, then a fork of two; branch1x1 is a chain of its own."""
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
    """Rows of (name, in, out, kernel[, stride, padding]); else the size stays. BatchNorm is folded in."""
    block = nn.ModuleDict()
    for name, channels_in, channels_out, kernel, *more in rows:
        stride, padding = more or (1, "same")
        block[name] = nn.Conv2d(channels_in, channels_out, kernel, stride, padding)
    return block


def block_a(n, pool):
    return convolutions(
        ("branch1x1", n, 64, 1),
        ("branch5x5_1", n, 48, 1),
        ("branch5x5_2", 48, 64, 5),
        ("branch3x3dbl_1", n, 64, 1),
        ("branch3x3dbl_2", 64, 96, 3),
        ("branch3x3dbl_3", 96, 96, 3),
        ("branch_pool", n, pool, 1))


def block_b():
    return convolutions(
        ("branch3x3", 288, 384, 3, 2, 0),
        ("branch3x3dbl_1", 288, 64, 1),
        ("branch3x3dbl_2", 64, 96, 3),
        ("branch3x3dbl_3", 96, 96, 3, 2, 0))


def block_c(c):
    return convolutions(
        ("branch1x1", 768, 192, 1),
        ("branch7x7_1", 768, c, 1),
        ("branch7x7_2", c, c, (1, 7)),
        ("branch7x7_3", c, 192, (7, 1)),
        ("branch7x7dbl_1", 768, c, 1),
        ("branch7x7dbl_2", c, c, (7, 1)),
        ("branch7x7dbl_3", c, c, (1, 7)),
        ("branch7x7dbl_4", c, c, (7, 1)),
        ("branch7x7dbl_5", c, 192, (1, 7)),
        ("branch_pool", 768, 192, 1))


def block_d():
    return convolutions(
        ("branch3x3_1", 768, 192, 1),
        ("branch3x3_2", 192, 320, 3, 2, 0),
        ("branch7x7x3_1", 768, 192, 1),
        ("branch7x7x3_2", 192, 192, (1, 7)),
        ("branch7x7x3_3", 192, 192, (7, 1)),
        ("branch7x7x3_4", 192, 192, 3, 2, 0))


def block_e(n):
    return convolutions(
        ("branch1x1", n, 320, 1),
        ("branch3x3_1", n, 384, 1),
        ("branch3x3_2a", 384, 384, (1, 3)),
        ("branch3x3_2b", 384, 384, (3, 1)),
        ("branch3x3dbl_1", n, 448, 1),
        ("branch3x3dbl_2", 448, 384, 3),
        ("branch3x3dbl_3a", 384, 384, (1, 3)),
        ("branch3x3dbl_3b", 384, 384, (3, 1)),
        ("branch_pool", n, 192, 1))


def fold_batch_norm(state, path):
    """Published names -> ours: (w x - mean) / sqrt(var + 1e-3) gamma + beta is a convolution with a bias."""
    if len(state.get("fc.weight", ())) != 1008:
        raise ValueError(f"{path} is not the Inception of FID (torchvision's weights give other scores): "
                         f"{INCEPTION} is needed")
    out = {n: w for n, w in state.items() if n.startswith("fc.")}
    with naming(path, INCEPTION):
        for name in [n.removesuffix(".conv.weight") for n in state if n.endswith(".conv.weight")]:
            gamma, beta, mean, var = (state[f"{name}.bn.{kind}"] for kind in
                                      ("weight", "bias", "running_mean", "running_var"))
            ours = name.replace("Conv2d", "stem.Conv2d").replace("Mixed_", "mixed.")
            out[ours + ".weight"], out[ours + ".bias"] = fuse_conv_bn_weights(
                state[f"{name}.conv.weight"], None, mean, var, 1e-3, gamma, beta)
    return out


def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize of (B, 3, H, W): output i reads input i H / size, no half-pixel offset.

    Each axis is one small matrix with two entries a row: exact, and cheaper than gathering four neighbours.
    """
    def matrix(n):
        place = (torch.arange(size) * (n / size)).clamp(max=n - 1)  # where each output reads
        distance = (place[:, None] - torch.arange(n)).abs()         # (size, n)
        return (1 - distance).clamp(min=0).to(x)

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


# ---------------------------------------------------------------- reading samples and references

class Arrays:
    """The images of an npz (arr_0, uint8 NHWC) as a data set, in memory; pickled as its path."""

    def __init__(self, path):
        self.root = path
        self.images = np.load(path)["arr_0"]
        kind, shape = self.images.dtype, self.images.shape
        if kind != np.uint8 or shape[3:] != (3,):
            raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 3), not {kind} {shape}")

    def __reduce__(self):
        return Arrays, (self.root,)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i]).permute(2, 0, 1), 0


def read(path, image_size=None):
    """Folder or npz -> {"path", "images": data set or None, "image_size"}, and where given mu, sigma, n and
    the name of the features."""
    if os.path.isdir(path):
        data = ImageFolder(path, image_size)
        return {"path": path, "images": data, "image_size": data[0][0].shape[1]}
    found = {"path": path, "images": None, "image_size": None}
    with naming(path, "an npz of images (arr_0) or statistics (mu, sigma)"):
        with np.load(path) as file:
            for name in {"n", "image_size", "features"} & set(file.files):      # in our own files
                found[name] = file[name].item()
            if "mu" in file:
                mu, sigma = file["mu"].squeeze(), file["sigma"]
                finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
                if sigma.shape != (mu.size, mu.size) or not finite:
                    raise ValueError(f"mu {mu.shape}, sigma {sigma.shape}: no finite mean and covariance")
                found |= {"mu": mu, "sigma": sigma}
            if "arr_0" in file or "mu" not in file:
                found["images"] = Arrays(path)
                found["image_size"] = found["images"].images.shape[1]
    return found


def measure(features, side, batch, workers, images=False):
    """mu, sigma, n of a result of read(): the file's own, or those of its images. With `images`, also what
    collect() finds in these."""
    given = {}
    if "mu" in side:
        kind = side.get("features", features.name)
        # Networks are known by their hash, or else by their name: the last word.
        other_network = kind.split()[-1] != features.name.split()[-1]
        if other_network or len(side["mu"]) != features.net.width:
            raise ValueError(f"{side['path']}: statistics of {len(side['mu'])} features ({kind}), where "
                             f"{features.name} has {features.net.width}")
        given = {"mu": side["mu"], "sigma": side["sigma"], "n": side.get("n")}
    if images or not given:
        return extract_data(features, side["images"], batch, workers) | given
    return given


def open_reference(path, features, image_size, workers):
    """What FID is measured against: an npz, a folder of images, "shapes" (held-out drawn ones), or None.

    -> {mu, sigma, n, name}, or None. At 512 px the released evaluation first shrinks its images to the 256 px
    of its statistics; here Inception sees them as they are.
    """
    if path is None:
        return None
    side = {"images": Shapes(image_size, 1024, seed=1)} if path == "shapes" else read(path, image_size)
    found = measure(features, side, 64, workers)
    return {k: found[k] for k in ("mu", "sigma", "n")} | {"name": path}         # not the features themselves


def compare(features, samples, reference, batch, workers):
    """Two results of read() -> scores, with what they were measured on. FID uses statistics where a file has
    them; precision and recall need images on both sides, IS those of the samples."""
    both = samples["images"] is not None and reference["images"] is not None
    other = measure(features, reference, batch, workers, images=both)
    one = measure(features, samples, batch, workers, images=both)
    scores = {features.score: frechet(one, other)}
    if "logits" in one:
        scores |= inception_scores(features, one["logits"], len(samples["images"]))
    if both:
        fake = in_order(one["rows"], len(samples["images"])).to(features.device)
        real = in_order(other["rows"], len(reference["images"])).to(features.device)
        if min(len(real), len(fake)) > 3:                           # there must be a third neighbour
            scores["precision"], scores["recall"] = precision_recall(real, fake)
    # Another size is another task, but the user may mean it.
    size, reference_size = samples["image_size"], reference["image_size"]
    if size and reference_size and size != reference_size:
        warnings.warn(f"images of {size} px against {reference_size} px")
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
    add("--image_size", type=COUNT, help="centre-crop the images of folders to this size")
    add("--batch", type=COUNT, default=64, help="images at a time")
    add("--json", action="store_true", help="one line of JSON instead of the table")
    args = p.parse_intermixed_args(argv)
    if bool(args.save_stats) == bool(args.reference):
        p.error("two inputs are needed: SAMPLES REFERENCE; or one and --save_stats FILE.npz")
    return args


def main(argv=None):
    args = parse(argv)
    device, rank, _ = start()
    samples = read(args.samples, args.image_size)
    if args.save_stats:
        target = args.save_stats.removesuffix(".npz") + ".npz"
        check_writable(target)
        if os.path.exists(target) and os.path.samefile(target, args.samples):
            raise ValueError(f"--save_stats {target}: that is the input")
        if samples["images"] is None:
            raise ValueError(f"{args.samples} holds statistics already")
        features = Features(args.features, args.weights, device)
        found = extract_data(features, samples["images"], args.batch, cores())
        size = samples["image_size"]
        if rank == 0:
            with atomic(target) as f:
                np.savez(f, mu=found["mu"], sigma=found["sigma"], n=found["n"], image_size=size,
                         features=features.name)
        print_once(f"wrote {target}: {found['n']} images of {size} px, {features.name} features")
        return
    reference = read(args.reference, args.image_size)
    features = Features(args.features, args.weights, device)
    scores = compare(features, samples, reference, args.batch, cores())
    scores |= {"samples": args.samples, "reference": args.reference}
    if args.json:
        print_once(json.dumps(scores))
    else:
        for name, value in scores.items():
            print_once(f"{name:>12}  {f'{value:.4f}' if isinstance(value, float) else value}")


def check_writable(path):
    """Before hours of work."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK):
        raise ValueError(f"cannot write {path}: its folder does not exist or is read-only")


if __name__ == "__main__":
    run_script(main)
