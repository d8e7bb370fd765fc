"""Images from a DiT and its tokenizer: a grid to look at, or many for the metrics.

    python sample.py --dit out/dit/last.pt --classes 207 360 --cfg 1.29                   # writes grid.png
    python sample.py --dit out/dit/last.pt --guide out/dit_s/last.pt --cfg 1.29           # AutoGuidance
    torchrun --nproc_per_node=8 sample.py --num_samples 50000 --save samples.npz          # for FID

Sample i depends on (seed, i) alone: not on the batch, the number of processes, or where a run was resumed.
"""
import argparse
import hashlib
import json
import math
import os
import shutil
import warnings
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from dit import decode_normalised, generate, kept_statistics, load_dit, sample_path
from fid import check_writable
from tokenizer import (ImageFolder, atomic, compile_blocks, cores, fingerprint, from_rank_0, latent_shift,
                       load_tokenizer, naming, print_once, progress, rank_and_world, run_script, sample_noise,
                       save_grid, start, to_uint8, training_precision)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--dit", default="out/dit/last.pt", help="checkpoint of stage 2, or the authors' ditdh*.pth")
    add("--tokenizer", help="checkpoint of stage 1 or 1b; unset: the one the DiT was trained with")
    add("--guide", help="a smaller, less trained DiT: AutoGuidance instead of the null class")
    add("--classes", nargs="+", help="names, or else numbers, one a column; unset: 8 of them, all for --save")
    # --num_samples: a newer torchrun takes --num as short for its own --numa-binding, and refuses it.
    add("--num", "--num_samples", type=int, help="of samples; sample i has class classes[i %% len(classes)]")
    add("--cfg", type=float, default=1.0, help="guidance w >= 1 in v = v_weak + w (v - v_weak); 1: none")
    add("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="guided range of t")
    add("--steps", type=int, default=49, help="grid intervals: the authors' 50 points are 49, 150 are 149")
    add("--solver", default="euler", choices=["euler", "heun"], help="heun: order 2, two evaluations a step")
    add("--seed", type=int, default=0, help="of the starting noise")
    add("--batch", type=int, default=64, help="samples at a time")
    add("--out", default="grid.png", help="the picture")
    add("--save", help="instead: FILE.npz (ADM layout: arr_0 uint8 NHWC, and labels) or a folder of PNG")
    add("--trajectory", action="store_true", help="one row a sample, decoded at growing t")
    add("--stats", help="npz: latent mean and std, if the DiT file has none; written from --data if absent")
    add("--data", help="training images, to compute --stats from")
    add("--no_compile", action="store_true", help="no torch.compile for --save (on CUDA it is on, from 2.9)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    check(args)
    device, rank, _ = start()
    # What they are drawn with
    model, guide, tokenizer = open_networks(args, device)
    stats = open_statistics(args, model, tokenizer, device)
    config = model.config
    shift = latent_shift(config.grid ** 2, config.channels)         # or what the DiT was trained with
    trained = model.extras.get("args", {}).get("shift", "auto")
    if trained != "auto":
        shift = float(trained)

    # Which samples
    columns = config.num_classes if args.save else min(8, config.num_classes)
    # Spread over all classes.
    classes = [k * config.num_classes // columns for k in range(columns)]
    if args.classes:
        classes = [class_number(name, args.dit, model) for name in args.classes]
    num = args.num
    if num is None:
        rows = 1 if args.trajectory else 4
        num = 50000 if args.save else rows * len(classes)
    if args.trajectory and num > args.batch:
        raise ValueError(f"--trajectory draws its {num} samples at once: at most --batch {args.batch}")
    labels = [classes[i % len(classes)] for i in range(num)]
    options = dict(steps=args.steps, shift=shift, cfg=args.cfg, interval=args.interval, solver=args.solver)
    recipe = dict(options, shift=round(shift, 4), interval=list(args.interval), seed=args.seed, num=num,
                  classes=args.classes or f"{columns} of {config.num_classes}",
                  dit=os.path.abspath(args.dit), step=model.extras.get("step"), guide=args.guide,
                  stats=args.stats)
    print_once("recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))
    precision = training_precision(device)

    def draw_samples(indices):
        """-> uint8 (len(indices), 3, H, W), --batch at a time."""
        images = []
        for first in range(0, len(indices), args.batch):
            part = list(indices[first:first + args.batch])
            y = torch.tensor([labels[i] for i in part], device=device)
            drawn = generate(model, tokenizer, stats, args.seed, part, y, precision, guide=guide, **options)
            images.append(to_uint8(drawn).cpu())
        return torch.cat(images)

    if args.save:
        compile_blocks(device, args.no_compile, model, tokenizer.decoder, *([guide] if guide else []))
        recipe["weights"] = weights_hash(model, guide, tokenizer)
        save_all(args, recipe, num, labels, draw_samples)
    elif rank == 0 and args.trajectory:
        noise = sample_noise(args.seed, range(num), config.grid ** 2, config.channels).to(device)
        with precision:
            y = torch.tensor(labels, device=device)
            path = list(sample_path(model, noise, y, guide=guide, **options))
        if len(path) > 8:                                           # eight moments, with the first and last
            path = [path[i * (len(path) - 1) // 7] for i in range(8)]
        strip = torch.stack([to_uint8(decode_normalised(tokenizer, stats, z)) for _, z in path], dim=1)
        save_grid(args.out, strip.flatten(0, 1), len(path))
        print(f"columns: t = {', '.join(f'{t:.2f}' for t, _ in path)}")
    elif rank == 0:
        save_grid(args.out, draw_samples(range(num)), len(classes))
    print_once(f"wrote {args.save or args.out}")


def check(args):
    """What is wrong with the flags, before any work."""
    if args.steps < 1 or not 1 <= args.cfg < math.inf:
        raise ValueError(f"need --steps >= 1 and a finite --cfg >= 1, got {args.steps} and {args.cfg}")
    if args.batch < 1 or (args.num is not None and args.num < 1):
        raise ValueError(f"--num {args.num} --batch {args.batch}: must be positive")
    if not 0 <= args.interval[0] < args.interval[1] <= 1:
        raise ValueError(f"--interval {args.interval}: need 0 <= LO < HI <= 1")
    pictures = [ext for ext, kind in Image.registered_extensions().items() if kind in Image.SAVE]
    if not args.save and os.path.splitext(args.out)[1].lower() not in pictures:
        raise ValueError(f"--out {args.out}: give it the extension of a picture, .png say")
    if args.save and args.trajectory:
        raise ValueError("--save and --trajectory: give one of them")
    extension = os.path.splitext((args.save or "").rstrip("/"))[1]
    if extension.lower() in (*pictures, ".npz", ".npy", ".zip", ".tar") and not args.save.endswith(".npz"):
        raise ValueError(f"--save {args.save}: FILE.npz, or the name of a folder")
    check_writable(args.save or args.out)
    if args.stats and not os.path.exists(args.stats):
        check_writable(args.stats)
    if args.save and args.save.endswith(".npz") and os.path.exists(args.save):
        raise ValueError(f"{args.save} is there already: remove it or choose another --save")


def open_networks(args, device):
    """-> DiT, guide or None, tokenizer; they must fit each other."""
    model = load_dit(args.dit).to(device)
    config, extras = model.config, model.extras
    guide = None
    if args.guide:
        guide = load_dit(args.guide).to(device)
        fits = [getattr(guide.config, k) == getattr(config, k) for k in ("grid", "channels", "num_classes")]
        if not all(fits):
            raise ValueError(f"--guide {args.guide}: other latents' shape, or other classes, than {args.dit}")
        if extras and guide.extras and guide.extras["fingerprint"] != extras["fingerprint"]:
            raise ValueError(f"--guide {args.guide} was trained on other latents than {args.dit}")
    path = args.tokenizer or extras.get("tokenizer")
    if not path:
        raise ValueError(f"{args.dit} names no tokenizer: give --tokenizer")
    tokenizer = load_tokenizer(path).to(device)
    if (tokenizer.config.grid, tokenizer.config.channels) != (config.grid, config.channels):
        theirs = f"{tokenizer.config.grid ** 2} x {tokenizer.config.channels}"
        raise ValueError(f"tokenizer {path} has {theirs} latents, "
                         f"{args.dit} {config.grid ** 2} x {config.channels}")
    if extras and extras["fingerprint"] != fingerprint(tokenizer):
        problem = f"tokenizer {path} is not what {args.dit} was trained with (other encoder weights)"
        if not args.tokenizer:
            raise ValueError(problem)
        warnings.warn(problem)  # named by hand: RecTok_decft.pth holds the raw encoder, RecTok.pth the EMA
    return model, guide, tokenizer


def open_statistics(args, model, tokenizer, device):
    """Latent mean and std (C,): of our checkpoint, of --stats, or computed from --data into --stats.

    Computed for the authors' DiTs, whose files hold none: as they were trained, of posterior means.
    """
    if model.extras:
        return model.extras["latent_mean"].to(device), model.extras["latent_std"].to(device)
    present = from_rank_0(lambda: bool(args.stats) and os.path.exists(args.stats))
    if not args.stats or not (args.data or present):
        raise ValueError(f"{args.dit} holds no latent statistics: give --stats FILE.npz (mean, std), and if "
                         "it does not exist yet the training images as --data, to compute them")
    data = None
    if not present:
        data = ImageFolder(args.data, tokenizer.config.image_size)
    return kept_statistics(args.stats, tokenizer, data, args.batch, cores(), of_means=True)


def class_number(asked, path, model):
    """The number of a class, asked for by the name of its folder, or else by number."""
    names = model.extras.get("classes", [])
    if asked in names:
        return names.index(asked)
    if asked.isdecimal() and int(asked) < model.config.num_classes:
        return int(asked)
    raise ValueError(f"--classes {asked}: {path} knows classes 0 to {model.config.num_classes - 1}"
                     + (f", by name {', '.join(names[:8])}, ..." if names else ""))


def weights_hash(*nets):
    """Tells weights apart that lie under the same path."""
    digest = hashlib.sha256()
    for net in nets:
        if net is not None:
            for w in net.state_dict().values():
                bits = w.contiguous().view(torch.int32)             # their sum is exact on any device
                digest.update(str(bits.sum(dtype=torch.int64).item()).encode())
    return digest.hexdigest()[:12]


def save_all(args, recipe, num, labels, draw_samples):
    """Samples 0..num-1 as PNG, or for an npz as chunks of its array; a resumed run keeps finished ones."""
    npz = args.save.endswith(".npz")
    folder = args.save + ".parts" if npz else args.save
    check_recipe(folder, recipe)
    rank, world = rank_and_world()
    size = 128                                                      # what an interrupted run can lose
    chunks = [range(k, min(num, k + size)) for k in range(0, num, size)]

    def path_of(i):
        return os.path.join(folder, f"{i:06d}.{'npy' if npz else 'png'}")

    for chunk in progress(chunks[rank::world], desc="sample"):
        # One file a chunk of an npz, one an image otherwise.
        paths = [path_of(i) for i in (chunk[:1] if npz else chunk)]
        if all(os.path.exists(path) for path in paths):
            continue
        images = draw_samples(chunk).permute(0, 2, 3, 1).numpy()    # NHWC
        for path, array in zip(paths, [images] if npz else images):
            with atomic(path) as f:
                if npz:
                    np.save(f, array)
                else:
                    Image.fromarray(array).save(f, "PNG")
    if world > 1:
        dist.barrier()
    if npz and rank == 0:
        # ADM's layout, written chunk by chunk: 50,000 images are 10 GB.
        shape = (num, *np.load(path_of(0)).shape[1:])
        with atomic(args.save) as out, zipfile.ZipFile(out, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as f:
                header = dict(descr="|u1", fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(f, header)
                for chunk in chunks:
                    f.write(np.load(path_of(chunk[0])).tobytes())
            with file.open("labels.npy", "w") as f:
                np.save(f, np.array(labels))
        shutil.rmtree(folder)


def check_recipe(folder, recipe):
    """The recipe stands in the folder of samples: another one, or samples without one, are refused."""
    rank, world = rank_and_world()
    note = os.path.join(folder, "recipe.json")
    if rank == 0:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(note):
            with naming(note, "the recipe of samples"), open(note) as f:
                before = json.load(f)
            if before != json.loads(json.dumps(recipe)):
                raise ValueError(f"{folder} holds samples of another recipe: {before}; "
                                 "remove it or choose another --save")
        elif os.listdir(folder):                                    # ours hold a recipe from the start
            raise ValueError(f"{folder} holds files of another program: choose another --save")
        with atomic(note) as f:
            f.write(json.dumps(recipe).encode())
    if world > 1:
        dist.barrier()
    if not os.path.exists(note):
        raise ValueError(f"{folder} is not the same folder for all processes: all machines must see it")


if __name__ == "__main__":
    run_script(main)
