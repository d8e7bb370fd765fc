"""Images from a DiT and its tokenizer: a grid to look at, or many for the metrics.

    python sample.py --dit out/dit/last.pt --classes 207 360 387 --cfg 1.29  # writes grid.png
    python sample.py --dit out/dit/last.pt --guide out/dit_s/last.pt --cfg 1.29                # AutoGuidance
    torchrun --nproc_per_node=8 sample.py --num_samples 50000 --save samples.npz   # class-balanced, for FID

Sample i depends on (seed, i) alone: not on the batch, the number of processes, or where a run was resumed.
"""
import argparse
import json
import math
import os
import shutil
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Subset

from dit import latent_statistics, load_dit, sample
from fid import start
from tokenizer import ImageFolder, cores, fingerprint, latent_shift, load_tokenizer, to_uint8
from train_tokenizer import Help, compile_on_cuda, progress, sample_noise, save_grid

CHUNK = 128          # about so many samples a file of an unfinished --save: what an interrupted run can lose


def parse(argv=None):
    # --num_samples: a newer torchrun takes --num as short for its own --numa-binding, and refuses it.
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = p.add_argument
    add("--dit", default="out/dit/last.pt", help="checkpoint of stage 2, or the authors' ditdh*.pth")
    add("--tokenizer", help="checkpoint of stage 1 or 1b (default: the one the DiT was trained with)")
    add("--guide", help="a smaller, less trained DiT: AutoGuidance instead of the null class")
    add("--classes", type=int, nargs="+", help="classes, one a column (default: 8 of them; all for --save)")
    add("--num", "--num_samples", type=int,
        help="number of samples; sample i has class classes[i %% len(classes)]")
    add("--cfg", type=float, default=1.0, help="guidance w >= 1 in v = v_weak + w (v - v_weak); 1: none")
    add("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="guided range of t")
    add("--steps", type=int, default=49, help="grid intervals (the authors' 50 points are 49, 150 are 149)")
    add("--solver", default="euler", choices=["euler", "heun"], help="heun: order 2, two evaluations a step")
    add("--seed", type=int, default=0, help="of the starting noise")
    add("--batch", type=int, default=64, help="samples at a time")
    add("--out", default="grid.png", help="the picture")
    add("--save", help="instead: FILE.npz (ADM layout: arr_0 uint8 NHWC, and labels) or a folder of PNG")
    add("--trajectory", action="store_true", help="one row a sample, decoded at growing t")
    add("--stats", help="npz: latent mean and std, if the DiT file has none; written from --data if absent")
    add("--data", help="training images, to compute --stats from")
    add("--no_compile", action="store_true",
        help="no torch.compile for --save (on CUDA, from torch 2.9, it is on)")
    return p.parse_args(argv)


def load(args, device, rank, world):
    """-> DiT, guide or None, tokenizer, (mean, std), shift; everything that can be wrong is found here."""
    if args.steps < 1 or not 1 <= args.cfg < math.inf:
        raise ValueError(f"need --steps >= 1 and a finite --cfg >= 1, got {args.steps} and {args.cfg}")
    if not 0 <= args.interval[0] < args.interval[1] <= 1:
        raise ValueError(f"--interval {args.interval}: need 0 <= LO < HI <= 1")
    for target in filter(None, (args.save or args.out, args.stats)):
        if not os.access(os.path.dirname(os.path.abspath(target)), os.W_OK):
            raise ValueError(f"cannot write {target}: its folder does not exist or is read-only")
    if args.save and args.save.endswith(".npz") and os.path.exists(args.save):
        raise ValueError(f"{args.save} is there already: remove it or choose another --save")
    model = load_dit(args.dit).to(device)
    c, extras = model.config, model.extras
    if wrong := [k for k in args.classes or () if not 0 <= k < c.num_classes]:
        raise ValueError(f"--classes {wrong}: {args.dit} knows classes 0 to {c.num_classes - 1}")
    guide = load_dit(args.guide).to(device) if args.guide else None
    if guide and any(getattr(guide.config, k) != getattr(c, k) for k in ("grid", "channels", "num_classes")):
        raise ValueError(f"--guide {args.guide}: latents of another shape than {args.dit}, or other classes")
    if guide and extras and guide.extras and guide.extras["fingerprint"] != extras["fingerprint"]:
        raise ValueError(f"--guide {args.guide} was trained on another tokenizer's latents than {args.dit}")
    path = args.tokenizer or extras.get("tokenizer")
    if not path:
        raise ValueError(f"{args.dit} names no tokenizer: give --tokenizer")
    tokenizer = load_tokenizer(path).to(device)
    if (tokenizer.config.grid, tokenizer.config.channels) != (c.grid, c.channels):
        raise ValueError(f"tokenizer {path} has {tokenizer.config.grid ** 2} x {tokenizer.config.channels} "
                         f"latents, the DiT {c.grid ** 2} x {c.channels}")
    if extras and extras["fingerprint"] != fingerprint(tokenizer):
        raise ValueError(f"tokenizer {path} is not what {args.dit} was trained with (other encoder weights)")
    shift = latent_shift(c.grid ** 2, c.channels)
    if extras and extras["args"]["shift"] != "auto":
        shift = float(extras["args"]["shift"])
    return model, guide, tokenizer, statistics(args, extras, tokenizer, device, rank, world), shift


def statistics(args, extras, tokenizer, device, rank, world):
    """Latent mean and std (C,): of our checkpoint, of --stats, or computed from --data into --stats."""
    if extras:
        return extras["latent_mean"].to(device), extras["latent_std"].to(device)
    C, mark = tokenizer.config.channels, fingerprint(tokenizer)
    if args.stats and os.path.exists(args.stats):
        try:
            with np.load(args.stats, allow_pickle=False) as file:
                mean, std = (torch.from_numpy(file[k]).float().flatten() for k in ("mean", "std"))
                other = str(file["fingerprint"]) if "fingerprint" in file.files else mark
        except Exception as error:
            raise ValueError(f"--stats {args.stats} is no npz with mean and std: {error}") from error
        if len(mean) != C or len(std) != C or other != mark:
            raise ValueError(f"--stats {args.stats} ({len(mean)} channels, here {C}) is of another tokenizer")
        return mean.to(device), std.to(device)
    if not args.data:
        raise ValueError(f"{args.dit} holds no latent statistics: give --stats FILE.npz (mean, std), or the "
                         "training images as --data to compute them")
    data = ImageFolder(args.data, tokenizer.config.image_size)
    part = Subset(data, range(rank, len(data), world))
    part = DataLoader(part, args.batch, num_workers=cores())
    mean, std = latent_statistics(tokenizer, progress(rank, part, desc="latent statistics"))
    if rank == 0 and args.stats:
        with open(args.stats + ".tmp", "wb") as f:
            np.savez(f, mean=mean.cpu().numpy(), std=std.cpu().numpy(), fingerprint=mark)
        os.replace(args.stats + ".tmp", args.stats)
    return mean, std


def save_all(args, recipe, num, labels, make, rank, world):
    """Samples 0..num-1 in chunks; a resumed run keeps finished ones. make(indices) -> uint8 (B, 3, H, W)."""
    npz = args.save.endswith(".npz")
    folder = args.save + ".parts" if npz else args.save
    os.makedirs(folder, exist_ok=True)
    note = os.path.join(folder, "recipe.json")
    if os.path.exists(note) and json.load(open(note)) != recipe:
        raise ValueError(f"{folder} holds samples of another recipe: {open(note).read()}; remove it "
                         "or choose another --save")
    if world > 1:
        dist.barrier()
    if rank == 0:
        with open(note, "w") as f:
            json.dump(recipe, f)
    if world > 1:
        dist.barrier()
    if not os.path.exists(note):
        raise ValueError(f"{folder} is not the same folder for all processes: all machines must see it")
    size = max(1, CHUNK // args.batch) * args.batch
    chunks = [range(k, min(num, k + size)) for k in range(0, num, size)]
    part = lambda i: os.path.join(folder, f"{i:06d}.npy" if npz else f"{i:06d}.png")
    mine = [c for c in chunks[rank::world] if not all(os.path.exists(part(i)) for i in (c[:1] if npz else c))]
    for chunk in progress(rank, mine, desc="sample"):
        images = make(chunk).permute(0, 2, 3, 1).numpy()                                       # NHWC
        for path, array in [(part(chunk[0]), images)] if npz else zip(map(part, chunk), images):
            with open(path + ".tmp", "wb") as f:
                np.save(f, array) if npz else Image.fromarray(array).save(f, "PNG")
            os.replace(path + ".tmp", path)
    if world > 1:
        dist.barrier()
    if rank or not npz:
        return
    with zipfile.ZipFile(args.save + ".tmp", "w") as file:             # streamed: 50,000 images are 10 GB
        with file.open("arr_0.npy", "w", force_zip64=True) as f:
            shape = (num, *np.load(part(0)).shape[1:])
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=shape))
            for chunk in chunks:
                f.write(np.load(part(chunk[0])).tobytes())
        with file.open("labels.npy", "w") as f:
            np.save(f, np.array(labels))
    os.replace(args.save + ".tmp", args.save)
    shutil.rmtree(folder)


def main(argv=None):
    args = parse(argv)
    device, rank, world = start()
    model, guide, tokenizer, (mean, std), shift = load(args, device, rank, world)
    c = model.config
    columns = c.num_classes if args.save else min(8, c.num_classes)
    classes = args.classes or [k * c.num_classes // columns for k in range(columns)]
    num = args.num or (50000 if args.save else len(classes) if args.trajectory else 4 * len(classes))
    if args.trajectory and num > args.batch:
        raise ValueError(f"--trajectory draws its {num} samples at once: at most --batch {args.batch}")
    labels = [classes[i % len(classes)] for i in range(num)]
    recipe = dict(dit=os.path.abspath(args.dit), step=model.extras.get("step"), guide=args.guide,
                  cfg=args.cfg, interval=list(args.interval), solver=args.solver, steps=args.steps,
                  shift=round(shift, 4), seed=args.seed, ema=True,
                  tokenizer=args.tokenizer or model.extras.get("tokenizer"), stats=args.stats,
                  classes=args.classes or f"{len(classes)} of {c.num_classes}", num=num, batch=args.batch)
    if rank == 0:
        print("recipe: " + ", ".join(f"{k} {v}" for k, v in recipe.items()))

    def make(indices, trajectory=None):
        images = []
        for first in range(0, len(indices), args.batch):
            part = list(indices[first:first + args.batch])
            noise = sample_noise(args.seed, part, c.grid ** 2, c.channels).to(device)
            y = torch.tensor([labels[i] for i in part], device=device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z = sample(model, noise, y, args.steps, shift, args.cfg, args.interval, guide,
                           args.solver, trajectory)
            with torch.no_grad():                    # pixels in float32: bf16 is coarser than a grey level
                images.append(to_uint8(tokenizer.decode(z * std + mean)).cpu())
        return torch.cat(images)

    if args.save:
        compile_on_cuda(device, args.no_compile, model, tokenizer.decoder, *filter(None, [guide]))
        save_all(args, recipe, num, labels, make, rank, world)
    elif rank == 0 and args.trajectory:
        path = []
        make(range(num), path)
        path = [path[i * (len(path) - 1) // 7] for i in range(8)] if len(path) > 8 else path
        with torch.no_grad():
            strip = torch.stack([to_uint8(tokenizer.decode(z * std + mean)) for _, z in path], 1)
        save_grid(args.out, strip.flatten(0, 1), len(path))  # strip (num, T, 3, H, W)
        print(f"columns: t = {', '.join(f'{t:.2f}' for t, _ in path)}")
    elif rank == 0:
        save_grid(args.out, make(range(num)), len(classes))
    if rank == 0:
        print(f"wrote {args.save or args.out}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"{type(error).__name__}: {error}")
