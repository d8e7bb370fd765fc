"""Images from a DiT and its tokenizer: a grid to look at, or many for the metrics.

    python sample.py --dit out/dit/last.pt --classes 207 360 --cfg 1.29                   # writes grid.png
    python sample.py --dit out/dit/last.pt --guide out/dit_s/last.pt --cfg 1.29           # AutoGuidance
    torchrun --nproc_per_node=8 sample.py --num_samples 50000 --save samples.npz          # for FID

Sample i depends on (seed, i) alone: not on the batch, the number of processes, or where a run was resumed.
"""
import argparse
import hashlib
import json
import os
import shutil
import warnings

import numpy as np
import torch

from dit import decode_normalised, generate, latent_statistics, load_dit, sample_path
from fid import check_writable
from tokenizer import (COUNT, GUIDANCE, SEED, ImageFolder, atomic, barrier, compile_blocks, cores, fingerprint,
                       flow_shift, from_rank_0, load_tokenizer, local_batches, naming, print_once,
                       progress_bar, run_script, sample_noise, save_grid, start, this_rank, to_uint8,
                       training_precision, weights_hash, world_size)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--dit", default="out/dit/last.pt", help="checkpoint of stage 2, or the authors' ditdh*.pth")
    add("--tokenizer", help="checkpoint of stage 1 or 1b; unset: the one the DiT was trained with")
    add("--guide", help="a smaller, less trained DiT: AutoGuidance instead of the null class")
    add("--classes", nargs="+", help="names, or else numbers, one a column; unset: 8 of them, all for --save")
    # --num_samples: a newer torchrun takes --num as short for its own --numa-binding, and refuses it.
    add("--num", "--num_samples", type=COUNT,
        help="of samples; sample i has class classes[i %% len(classes)]")
    add("--cfg", type=GUIDANCE, default=1.0, help="w >= 1 in v = v_weak + w (v - v_weak); 1: no guidance")
    add("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"), help="guided range of t")
    add("--steps", type=COUNT, default=49, help="grid intervals: the authors' 50 points are 49, 150 are 149")
    add("--solver", default="euler", choices=["euler", "heun"], help="heun: order 2, two evaluations a step")
    add("--seed", type=SEED, default=0, help="of the starting noise")
    add("--batch", type=COUNT, default=64, help="samples at a time; with --save at most 128")
    add("--out", default="grid.png", help="the picture")
    either = p.add_mutually_exclusive_group().add_argument
    either("--save", metavar="FILE.npz", help="instead: ADM's layout, arr_0 (uint8 NHWC) and labels")
    either("--trajectory", action="store_true", help="one row a sample, decoded at growing t")
    add("--stats", help="npz: latent mean and std, if the DiT file has none; written from --data if absent")
    add("--data", help="training images, to compute --stats from")
    add("--no_compile", action="store_true", help="no torch.compile for --save (on CUDA it is on)")
    args = p.parse_args(argv)
    if not 0 <= args.interval[0] < args.interval[1] <= 1:
        p.error(f"--interval {args.interval}: need 0 <= LO < HI <= 1")
    if args.guide and args.cfg == 1:
        p.error("--guide needs a --cfg above 1")
    return args


def main(argv=None):
    args = parse(argv)
    device, rank, _ = start()
    # What they are drawn with
    check_outputs(args)
    model, guide, tokenizer = open_networks(args, device)
    stats = open_statistics(args, model, tokenizer, device)
    config = model.config
    trained = model.extras.get("args", {}).get("shift", "auto")
    shift = flow_shift(trained, config)
    precision = training_precision(device)

    # Which samples
    columns = config.num_classes if args.save else min(8, config.num_classes)
    classes = [k * config.num_classes // columns for k in range(columns)]           # spread over all
    if args.classes:
        classes = [class_number(name, args.dit, model) for name in args.classes]
    rows = 1 if args.trajectory else 4
    num = args.num or (50000 if args.save else rows * len(classes))
    labels = torch.tensor([classes[i % len(classes)] for i in range(num)], device=device)
    options = dict(steps=args.steps, shift=shift, cfg=args.cfg, interval=args.interval, solver=args.solver)
    recipe = vars(args) | {"num": num, "shift": shift, "step": model.extras.get("step")}
    print_once("recipe: " + ", ".join(f"{name} {value}" for name, value in recipe.items()))

    def draw_samples(indices):
        """A range of indices -> uint8 (len(indices), 3, H, W), --batch at a time."""
        images = []
        for first in range(0, len(indices), args.batch):
            part = indices[first:first + args.batch]
            drawn = generate(model, tokenizer, stats, args.seed, part, labels[part], precision, guide=guide,
                             **options)
            images.append(to_uint8(drawn).cpu())
        return torch.cat(images)

    if args.save:
        nets = [net for net in (model, guide, tokenizer) if net]
        recipe |= {"batch": "any", "weights": weights_hash(*nets), "stats": [x.tolist() for x in stats]}
        mark = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]      # another recipe, another folder
        compile_blocks(device, args.no_compile, *nets)
        save_all(args.save, f"{args.save}.{mark}.parts", labels, draw_samples)
    elif rank == 0 and args.trajectory:
        noise = sample_noise(args.seed, range(num), config.grid ** 2, config.channels).to(device)
        with precision:
            path = list(sample_path(model, noise, labels, guide=guide, **options))
        if len(path) > 8:                                           # eight moments, with the first and last
            path = [path[i * (len(path) - 1) // 7] for i in range(8)]
        strip = torch.stack([to_uint8(decode_normalised(tokenizer, stats, z)) for _, z in path], dim=1)
        save_grid(args.out, strip.flatten(0, 1), len(path))
        print(f"columns: t = {', '.join(f'{t:.2f}' for t, _ in path)}")
    elif rank == 0:
        save_grid(args.out, draw_samples(range(num)), len(classes))
    print_once(f"wrote {args.save or args.out}")


def check_outputs(args):
    """What cannot be written, before any work."""
    path, extension = (args.save, ".npz") if args.save else (args.out, ".png")
    if not path.endswith(extension):
        raise ValueError(f"{path}: give it a name that ends in {extension}")
    check_writable(path)
    if args.save and os.path.exists(path):
        raise ValueError(f"{path} is there already: remove it or choose another --save")
    if args.stats and not os.path.exists(args.stats):
        check_writable(args.stats)


def open_networks(args, device):
    """-> DiT, guide or None, tokenizer; they must fit each other."""
    model = load_dit(args.dit).to(device)
    config, extras = model.config, model.extras
    guide = None
    if args.guide:
        guide = load_dit(args.guide).to(device)
        fits = [getattr(guide.config, k) == getattr(config, k) for k in ("grid", "channels", "num_classes")]
        latents = {extras.get("fingerprint"), guide.extras.get("fingerprint")} - {None}     # theirs have none
        if not all(fits) or len(latents) > 1:
            raise ValueError(f"--guide {args.guide} was trained on other latents or classes than {args.dit}")
    # Where the DiT's own folder says, which may have moved together with the tokenizer's.
    path = args.tokenizer or os.path.join(os.path.dirname(args.dit), extras.get("tokenizer", ""))
    if not os.path.isfile(path):
        path = os.path.normpath(path)                               # `..` as written, where out/dit is a link
    try:
        tokenizer = load_tokenizer(path).to(device)
    except FileNotFoundError as error:
        raise ValueError(f"no tokenizer of {args.dit} at {path!r}: give --tokenizer") from error
    if (tokenizer.config.grid, tokenizer.config.channels) != (config.grid, config.channels):
        raise ValueError(f"tokenizer {path} has {tokenizer.config.grid ** 2} x {tokenizer.config.channels} "
                         f"latents, {args.dit} {config.grid ** 2} x {config.channels}")
    if extras and extras["fingerprint"] != fingerprint(tokenizer):
        problem = f"tokenizer {path} is not what {args.dit} was trained with (other encoder weights)"
        if not args.tokenizer:
            raise ValueError(problem)
        warnings.warn(problem)  # named by hand: RecTok_decft.pth holds the raw encoder, RecTok.pth the EMA
    return model, guide, tokenizer


def open_statistics(args, model, tokenizer, device):
    """Latent mean and std (C,): of our checkpoint, or for the authors' DiTs, which hold none, of --stats.

    Where that file does not exist it is computed from --data: as they were trained, of posterior means.
    """
    if model.extras:
        return model.extras["latent_mean"].to(device), model.extras["latent_std"].to(device)
    there = from_rank_0(lambda: os.path.exists(args.stats or ""))
    if not args.stats or not (args.data or there):
        raise ValueError(f"{args.dit} holds no latent statistics: give --stats FILE.npz (mean, std), and if "
                         "it does not exist yet the training images as --data, to compute them")
    if not there:
        batches = local_batches(ImageFolder(args.data, tokenizer.config.image_size), args.batch, cores())
        mean, std = latent_statistics(tokenizer, batches, of_means=True)
        if this_rank() == 0:
            with atomic(args.stats) as f:
                np.savez(f, mean=mean.cpu(), std=std.cpu(), fingerprint=fingerprint(tokenizer))
        return mean, std
    with naming(args.stats, f"an npz with the mean and std of {model.config.channels} channels"):
        with np.load(args.stats) as file:
            stats = torch.from_numpy(np.stack([file["mean"], file["std"]])).float()
            stats = stats.view(2, model.config.channels)
            if str(file.get("fingerprint", "")) not in ("", fingerprint(tokenizer)):
                warnings.warn(f"{args.stats} has statistics of another tokenizer (other encoder weights)")
    return stats.to(device)


def class_number(asked, path, model):
    """The number of a class, asked for by the name of its folder, or else by number."""
    names = model.extras.get("classes", [])
    if asked in names:
        return names.index(asked)
    if asked.isdecimal() and int(asked) < model.config.num_classes:
        return int(asked)
    raise ValueError(f"--classes {asked}: {path} knows classes 0 to {model.config.num_classes - 1}, "
                     f"by name {', '.join(names[:8])}")


def save_all(path, folder, labels, draw_samples):
    """All samples into an npz. Finished chunks lie in a folder: the same command goes on after a stop."""
    os.makedirs(folder, exist_ok=True)
    everything = range(len(labels))
    chunks = [everything[k:k + 128] for k in range(0, len(labels), 128)]
    parts = [os.path.join(folder, f"{chunk[0]:06d}.npy") for chunk in chunks]
    for k in progress_bar(range(this_rank(), len(chunks), world_size()), desc="sample"):
        if not os.path.exists(parts[k]):
            images = draw_samples(chunks[k]).permute(0, 2, 3, 1).numpy()        # NHWC
            with atomic(parts[k]) as f:
                np.save(f, images)
    barrier()
    if this_rank() == 0:
        images = np.concatenate([np.load(part, mmap_mode="r") for part in parts])
        with atomic(path) as f:
            np.savez(f, arr_0=images, labels=labels.cpu().numpy())
        shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main)
