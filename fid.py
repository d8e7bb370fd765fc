"""FID, Inception Score, precision and recall, by hand, on torch-fidelity's conventions.

    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz  # gFID, IS, precision, recall
    python fid.py folder/ other_folder/ --json  # any two folders of images
    python fid.py --save_stats val256.npz data/imagenet/val --image_size 256  # a reference of your own
    torchrun --nproc_per_node=8 fid.py samples.npz reference.npz  # the same numbers, sooner
    python fid.py samples.npz reference/ --features dinov2_vitl14                     # FD-DINOv2

A score means nothing without its reference, N and features, so they are always printed beside it.
"""
import argparse
import contextlib
import json
import os
import re
import sys
import warnings
import zipfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from tokenizer import ImageFolder, cores, load_named, load_teacher, read_weights, to_float, weight_file

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


# ---------------------------------------------------------------- Inception-v3, as TensorFlow ran it in 2015

def _tower(*convs):
    """(name, in, out, kernel[, stride[, padding]]) ... -> convolutions, with BatchNorm folded into them."""
    return nn.ModuleDict({name: nn.Conv2d(*shape) for name, *shape in convs})


def _a(n, pool):
    return _tower(("branch1x1", n, 64, 1), ("branch5x5_1", n, 48, 1), ("branch5x5_2", 48, 64, 5, 1, 2),
                  ("branch3x3dbl_1", n, 64, 1), ("branch3x3dbl_2", 64, 96, 3, 1, 1),
                  ("branch3x3dbl_3", 96, 96, 3, 1, 1), ("branch_pool", n, pool, 1))


def _c(c):
    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return _tower(("branch1x1", 768, 192, 1), ("branch7x7_1", 768, c, 1), ("branch7x7_2", c, c, *row),
                  ("branch7x7_3", c, 192, *column), ("branch7x7dbl_1", 768, c, 1),
                  ("branch7x7dbl_2", c, c, *column), ("branch7x7dbl_3", c, c, *row),
                  ("branch7x7dbl_4", c, c, *column), ("branch7x7dbl_5", c, 192, *row),
                  ("branch_pool", 768, 192, 1))


def _e(n):
    row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    return _tower(("branch1x1", n, 320, 1), ("branch3x3_1", n, 384, 1), ("branch3x3_2a", 384, 384, *row),
                  ("branch3x3_2b", 384, 384, *column), ("branch3x3dbl_1", n, 448, 1),
                  ("branch3x3dbl_2", 448, 384, 3, 1, 1), ("branch3x3dbl_3a", 384, 384, *row),
                  ("branch3x3dbl_3b", 384, 384, *column), ("branch_pool", n, 192, 1))


def start():
    """-> device, rank, world size. torchrun's environment decides; without it, one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, nccl = int(os.environ.get("WORLD_SIZE", 1)), {}
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")
        nccl = dict(device_id=torch.device("cuda", torch.cuda.current_device()))
    if world > 1 and not dist.is_initialized():      # an hour: all wait while rank 0 writes a checkpoint
        dist.init_process_group("nccl" if nccl else "gloo", timeout=timedelta(hours=1), **nccl)
    return device, int(os.environ.get("RANK", 0)), world


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


def tf1_resize(x, size=299):
    """TensorFlow 1's bilinear resize of (B, 3, H, W): output i reads input i H / size, no half-pixel offset.

    Each axis is one small matrix with two entries a row: exact, and cheaper than gathering four neighbours.
    """
    def matrix(n):
        at = torch.arange(size, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
        low = at.long().clamp(max=n - 1)
        rows, m = torch.arange(size), torch.zeros(size, n)
        m[rows, low] = 1 - (at - low)
        m[rows, (low + 1).clamp(max=n - 1)] += at - low
        return m.to(x)
    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


class InceptionV3(nn.Module):
    """uint8 images (B, 3, H, W) -> pool (B, 2048), logits (B, 1008) without the bias.

    weights: the folder of published files, the file itself, or "random". Source of the names: pytorch-fid.
    """

    def __init__(self, weights="weights"):
        super().__init__()
        self.stem = _tower(("Conv2d_1a_3x3", 3, 32, 3, 2), ("Conv2d_2a_3x3", 32, 32, 3),
                           ("Conv2d_2b_3x3", 32, 64, 3, 1, 1), ("Conv2d_3b_1x1", 64, 80, 1),
                           ("Conv2d_4a_3x3", 80, 192, 3))
        self.mixed = nn.ModuleDict({
            "5b": _a(192, 32), "5c": _a(256, 64), "5d": _a(288, 64),
            "6a": _tower(("branch3x3", 288, 384, 3, 2), ("branch3x3dbl_1", 288, 64, 1),
                         ("branch3x3dbl_2", 64, 96, 3, 1, 1), ("branch3x3dbl_3", 96, 96, 3, 2)),
            "6b": _c(128), "6c": _c(160), "6d": _c(160), "6e": _c(192),
            "7a": _tower(("branch3x3_1", 768, 192, 1), ("branch3x3_2", 192, 320, 3, 2),
                         ("branch7x7x3_1", 768, 192, 1), ("branch7x7x3_2", 192, 192, (1, 7), 1, (0, 3)),
                         ("branch7x7x3_3", 192, 192, (7, 1), 1, (3, 0)), ("branch7x7x3_4", 192, 192, 3, 2)),
            "7b": _e(1280), "7c": _e(2048)})
        # Patch: 1008 outputs instead of torchvision's 1000, since the TensorFlow graph had them.
        self.fc = nn.Linear(2048, 1008)
        if weights != "random":
            path = weight_file(INCEPTION, weights)
            load_named(self, self.fold(read_weights(path), path), path)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def fold(self, state, path):
        """Published names -> ours: (w x - mean) / sqrt(var + 1e-3) gamma + beta is one biased convolution."""
        if "fc.weight" not in state or len(state["fc.weight"]) != 1008 or "AuxLogits.fc.weight" in state:
            raise ValueError(f"{path} is not the Inception of FID (torchvision's weights give other scores): "
                             f"{INCEPTION} is needed")
        out = {n: w for n, w in state.items() if n.startswith("fc.")}
        try:
            for name in [n[:-len(".conv.weight")] for n in state if n.endswith(".conv.weight")]:
                w, gamma, beta, mean, var = (state[f"{name}.{k}"].double() for k in (
                    "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"))
                ours = re.sub("^Mixed_", "mixed.", re.sub("^Conv2d", "stem.Conv2d", name))
                scale = gamma / (var + 1e-3).sqrt()
                out[ours + ".weight"] = (w * scale.view(-1, 1, 1, 1)).float()
                out[ours + ".bias"] = (beta - mean * scale).float()
        except KeyError as error:
            raise ValueError(f"{path}: missing {error}") from error
        return out

    def features(self, images):
        """The averaged activations at 64, 192, 768 and 2048 channels, as torch-fidelity names them."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"uint8 images (B, 3, H, W) expected, got {images.dtype} {tuple(images.shape)}")
        def pooled(x):
            return x.mean((2, 3))
        def run(tower, names, x):
            for name in names.split():
                x = F.relu(tower[name](x), inplace=True)
            return x
        # Patch: TensorFlow's resize and its (x - 128) / 128 instead of ImageNet's mean and std.
        x = ((tf1_resize(images.float()) - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(run(self.stem, "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3", x), 3, 2)
        f64 = pooled(x)
        x = F.max_pool2d(run(self.stem, "Conv2d_3b_1x1 Conv2d_4a_3x3", x), 3, 2)
        f192 = pooled(x)
        for name, m in self.mixed.items():
            if name == "7a":
                f768 = pooled(x)
            if name in ("6a", "7a"):
                pool = F.max_pool2d(x, 3, 2)
            elif name == "7c":           # Patch: the last block pools by maximum, where torchvision averages.
                pool = run(m, "branch_pool", F.max_pool2d(x, 3, 1, 1))
            else:                        # Patch: TensorFlow's average leaves the padding out of the count.
                pool = run(m, "branch_pool", F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
            if name[0] == "5":
                parts = [run(m, "branch1x1", x), run(m, "branch5x5_1 branch5x5_2", x),
                         run(m, "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", x)]
            elif name == "6a":
                parts = [run(m, "branch3x3", x), run(m, "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", x)]
            elif name[0] == "6":
                parts = [run(m, "branch1x1", x), run(m, "branch7x7_1 branch7x7_2 branch7x7_3", x),
                         run(m, " ".join(f"branch7x7dbl_{i}" for i in range(1, 6)), x)]
            elif name == "7a":
                parts = [run(m, "branch3x3_1 branch3x3_2", x),
                         run(m, " ".join(f"branch7x7x3_{i}" for i in range(1, 5)), x)]
            else:
                a, b = run(m, "branch3x3_1", x), run(m, "branch3x3dbl_1 branch3x3dbl_2", x)
                parts = [run(m, "branch1x1", x), run(m, "branch3x3_2a", a), run(m, "branch3x3_2b", a),
                         run(m, "branch3x3dbl_3a", b), run(m, "branch3x3dbl_3b", b)]
            x = torch.cat([*parts, pool], 1)
        return f64, f192, f768, pooled(x)

    @torch.inference_mode()
    def forward(self, images):
        with exact_float32():
            pool = self.features(images)[-1]
            return pool, pool @ self.fc.weight.T


# ---------------------------------------------------------------- scores

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
        """-> mu (D,), sigma (D, D), n, reduced over all processes."""
        if dist.is_initialized():
            for x in (self.n, self.sum, self.outer):
                dist.all_reduce(x)
        if not (self.outer.isfinite().all() and self.n >= 2):
            raise ValueError("non-finite features" if self.n >= 2 else f"{int(self.n)} images: 2 are needed")
        n, width = int(self.n), len(self.sum)
        if n < width and os.environ.get("RANK", "0") == "0":
            warnings.warn(f"{n} images for {width} features: the covariance is singular and the Frechet "
                          "distance biased upwards; use more images")
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy(), n


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), float64 (Heusel et al. 2017).

    With S1 = L L^T, S1 S2 has the eigenvalues of the symmetric L^T S2 L: real, non-negative, and cheap. A
    singular S1 (fewer samples than features) has no Cholesky factor; its eigenvectors give another L.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise ValueError(f"statistics of {len(mu1)} features against statistics of {len(mu2)}")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("non-finite statistics")
    factor, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:
        values, vectors = torch.linalg.eigh(sigma1)
        factor = vectors * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(factor.T @ sigma2 @ factor).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def inception_score(logits, splits=10, seed=2020):
    """exp of the mean KL(p(y|x) || p(y)) in `splits` parts of the shuffled logits (N, 1008) -> mean, std."""
    p = logits.double()[np.random.RandomState(seed).permutation(len(logits))].log_softmax(1)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits:(i + 1) * len(p) // splits]
        scores.append((part.exp() * (part - part.exp().mean(0).log())).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k=3, block=10000):
    """Kynkaanniemi et al. 2019, features (N, D), (M, D): the share of fakes inside the reals' k-NN balls, and
    the reverse. Blockwise: 50,000 against 10,000 needs 1 GB at a time, never the whole matrix."""
    def radii(x):  # k-th neighbour, itself left out
        return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(block // 5)])

    def inside(x, centers, radius):
        return torch.cat([(torch.cdist(part, centers) <= radius).any(1) for part in x.split(block // 5)])
    real, fake = real.float(), fake.float()
    precision, recall = inside(fake, real, radii(real)), inside(real, fake, radii(fake))
    return precision.float().mean().item(), recall.float().mean().item()


# ---------------------------------------------------------------- from images to features

class Arrays:
    """The images of an npz (arr_0, uint8 NHWC) as a data set."""

    def __init__(self, images, path):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"{path}: arr_0 must be uint8 (N, H, W, 3), not {images.dtype} {images.shape}")
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return torch.from_numpy(self.images[i].transpose(2, 0, 1).copy()), 0


def stored_array(path, name):
    """An array of an npz, mapped from disk where it is not compressed: 50,000 images are 10 GB a process."""
    with zipfile.ZipFile(path) as file:
        info = file.getinfo(name + ".npy")
        with file.open(info) as f:
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            header = f.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
        return np.load(path, allow_pickle=False)[name]
    with open(path, "rb") as f:                      # the local file header: 30 bytes, a name, an extra field
        f.seek(info.header_offset + 26)
        start = info.header_offset + 30 + sum(np.frombuffer(f.read(4), "<u2").tolist())
    return np.memmap(path, dtype, "r", start + header, shape)


def read(path, image_size=None):
    """Folder or npz -> {"images": data set or None, "image_size"}, and where given mu, sigma, n, features."""
    if os.path.isdir(path):
        data = ImageFolder(path, image_size)
        return {"images": data, "image_size": data[0][0].shape[1]}
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no folder or npz at {path!r}")
    try:
        with np.load(path, allow_pickle=False) as file:
            known = {"mu", "sigma", "arr_0", "n", "image_size", "features"} & set(file.files)
            out = {k: stored_array(path, k) if k == "arr_0" else file[k] for k in known}
    except Exception as error:
        raise ValueError(f"{path!r} is no npz free of pickled objects ({type(error).__name__})") from error
    if "arr_0" not in out and not {"mu", "sigma"} <= out.keys():
        raise ValueError(f"{path}: neither images (arr_0) nor statistics (mu, sigma) in it")
    out |= {k: out[k].item() for k in ("n", "image_size", "features") if k in out}     # our own files
    out["images"] = Arrays(out["arr_0"], path) if "arr_0" in out else None
    out.setdefault("image_size", out["arr_0"].shape[1] if "arr_0" in out else None)
    return out


class Features:
    """inception, a teacher's name or a teacher.pt: uint8 images -> features (B, D), logits or None."""

    def __init__(self, name, weights, device):
        self.name, self.inception = name, name == "inception"
        self.net = (InceptionV3(weights) if self.inception else load_teacher(name, weights)).to(device)
        self.width = 2048 if self.inception else self.net.width
        if weights == "random":
            warnings.warn(f"{name} with RANDOM weights: its scores mean nothing")
            self.name += " (RANDOM)"
        self.score = "FID" if self.inception else "FD"  # only Inception's Frechet distance is called FID

    @torch.inference_mode()
    def __call__(self, images):
        if self.inception:
            return self.net(images)
        with exact_float32():
            return self.net.features(to_float(images))[0], None


def extract(features, data, device, batch=64, keep=False, workers=0):
    """-> mu, sigma, n, logits (n, 1008) or None, features (n, D) if `keep`; each process takes its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    moments, logits, kept = Moments(features.width, device), [], []
    part = DataLoader(Subset(data, range(rank, len(data), world)), batch, num_workers=workers)
    try:
        for images, _ in tqdm(part, desc=features.name, disable=rank > 0, leave=False):
            f, l = features(images.to(device))
            moments.add(f)
            logits += [] if l is None else [l.cpu()]
            kept += [f.cpu()] if keep else []
    except RuntimeError as error:
        if "equal size" in str(error):
            raise ValueError(f"{data.root} holds images of different sizes: give --image_size") from error
        raise
    if getattr(data, "bad", 0):                      # a replaced image would count twice
        raise ValueError(f"{int(data.bad)} unreadable images in {data.root}, named above: remove them")
    return *moments.result(), gather(logits, len(data), world), gather(kept, len(data), world)


def gather(parts, n, world):
    """The rows of all processes, in the order of the data set."""
    rows = torch.cat(parts) if parts else None
    if world == 1:
        return rows
    everyone = [None] * world
    dist.all_gather_object(everyone, rows)           # a rank may have none, all of them take part
    some = [part for part in everyone if part is not None]
    out = torch.empty(n, some[0].shape[1]) if some else None
    for rank, part in enumerate(everyone):
        if part is not None:
            out[rank::world] = part
    return out


def check_statistics(features, side):
    """ValueError where the statistics of a read() result are not of these features."""
    kind, width = side.get("features", features.name), len(side.get("mu", range(features.width)))
    if (kind, width) != (features.name, features.width):
        raise ValueError(f"statistics of {width} {kind} features; {features.name} has {features.width}")


def compare(features, samples, reference, device, batch=64, workers=0):
    """Two results of read() -> scores, with what they were measured on. FID uses statistics where a file has
    them; precision and recall need images on both sides, IS those of the samples."""
    for side in (samples, reference):
        check_statistics(features, side)
    both, sides = samples["images"] is not None and reference["images"] is not None, []
    for side in (samples, reference):
        found = {"logits": None}
        if side["images"] is not None and ("mu" not in side or both):
            names = "mu", "sigma", "n", "logits", "rows"
            found = dict(zip(names, extract(features, side["images"], device, batch, both, workers)))
        sides.append(found | ({k: side.get(k) for k in ("mu", "sigma", "n")} if "mu" in side else {}))
    a, b = sides
    scores = {features.score: frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])}
    if a["logits"] is not None and len(a["logits"]) >= 10:
        scores["IS"], scores["IS_std"] = inception_score(a["logits"])
    if both:
        scores["precision"], scores["recall"] = precision_recall(b["rows"].to(device), a["rows"].to(device))
    sizes = samples["image_size"], reference["image_size"]
    if all(sizes) and sizes[0] != sizes[1]:
        warnings.warn(f"images of {sizes[0]} px against {sizes[1]} px")
    return scores | {"n": a["n"], "n_reference": b["n"], "features": features.name}


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("samples", help="npz with arr_0 (uint8 NHWC) or mu and sigma, or a folder of images")
    add("reference", nargs="?", help="the same kinds; ADM's VIRTUAL_imagenet256_labeled.npz for gFID")
    add("--save_stats", metavar="FILE.npz", help="write mu, sigma, n of the one input instead of comparing")
    add("--features", default="inception", help="inception (FID), or a teacher or teacher.pt (FD)")
    add("--weights", default="weights", help="folder of published files, or the one file; free ones download")
    add("--image_size", type=int, help="centre-crop the images of folders to this size")
    add("--batch", type=int, default=64, help="images at a time")
    add("--json", action="store_true", help="one line of JSON instead of the table")
    args = p.parse_intermixed_args(argv)
    if not args.save_stats and not args.reference:
        p.error("two inputs are needed: SAMPLES REFERENCE")
    return args


def main(argv=None):
    args = parse(argv)
    device, rank, world = start()
    samples = read(args.samples, args.image_size)
    reference = None if args.save_stats else read(args.reference, args.image_size)
    features = Features(args.features, args.weights, device)
    workers = cores()
    if args.save_stats:
        if samples["images"] is None:
            raise ValueError(f"{args.samples} holds statistics already")
        mu, sigma, n, *_ = extract(features, samples["images"], device, args.batch, workers=workers)
        if rank == 0:
            size = samples["image_size"]
            np.savez(args.save_stats, mu=mu, sigma=sigma, n=n, image_size=size, features=features.name)
            print(f"wrote {args.save_stats}: {n} images of {size} px, {args.features} features")
    else:
        scores = compare(features, samples, reference, device, args.batch, workers)
        scores |= {"samples": args.samples, "reference": args.reference}
        if rank == 0 and args.json:
            print(json.dumps(scores))
        elif rank == 0:
            print("\n".join(f"{name:>12}  {value if not isinstance(value, float) else f'{value:.4f}'}"
                            for name, value in scores.items()))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"{type(error).__name__}: {error}")
