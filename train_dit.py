"""Stage 2: train a DiT-DH by flow matching on the latents of a RecTok tokenizer.

    python train_dit.py --tiny  # after train_tokenizer.py --tiny; minutes on a laptop
    torchrun --nproc_per_node=8 train_dit.py --data data/imagenet/train --tokenizer out/tokenizer/last.pt
    torchrun --nproc_per_node=8 train_dit.py ... --size S --stop_at 37535 --out out/dit_s  # guide: 30 epochs

Latents are encoded on the fly, as published: posterior samples of flipped images, normalised by the channel
statistics of the posterior means. Running the same command again goes on from --out/last.pt. Published
figures at 80 and 600 epochs are snapshots of one 800-epoch schedule: leave --epochs and use --stop_at.
"""
import argparse
import functools
import json
import math
import os
import sys
import time
from copy import deepcopy
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from dit import PRESETS, DiT, DiTConfig, flow_loss, latent_statistics, sample
from fid import (Features, Moments, check_statistics, extract, frechet_distance, gather, inception_score,
                 read, start)
from tokenizer import (cores, fingerprint, latent_shift, load_named, load_tokenizer, read_weights, to_float,
                       to_uint8)
from train_tokenizer import (Help, bf16_on_cuda, catch_signals, clip_and_agree, compile_on_cuda, count_bad,
                             flops, guard, key, loader, log_row, matmul_rate, micro_batch, open_data,
                             progress, resume, sample_noise, save, save_grid, speed_row, update_ema)


def lr_at(progress, peak, final=0.1, flat=0.05):
    """Constant for the first 40 of 800 epochs, then linear to a tenth (2e-4 to 2e-5); progress in [0, 1]."""
    return peak * (1 - (1 - final) * min(1, max(0, (progress - flat) / (1 - flat))))


def draw(args, num_classes, z_shape, y, seed, device):
    """A micro-batch's draws, a function of `seed` alone: posterior eps, noise, u (B,), dropped labels."""
    rng = torch.Generator(device).manual_seed(seed)
    eps, noise = torch.randn(2, *z_shape, generator=rng, device=device)
    u, coin = torch.rand(2, len(y), generator=rng, device=device)
    return eps, noise, u, torch.where(coin < args.label_dropout, num_classes, y)


@torch.no_grad()
def generate(ema, tokenizer, stats, seed, indices, y, autocast, **how):
    """Images in [-1, 1] of the samples `indices` of classes y (B,); how: the arguments of dit.sample."""
    noise = sample_noise(seed, indices, ema.config.grid ** 2, ema.config.channels).to(y.device)
    with autocast():
        z = sample(ema, noise, y, **how)
    return tokenizer.decode(z * stats[1] + stats[0])


@torch.no_grad()
def evaluate(make, features, head, num, num_classes, reference, device, rank, world):
    """Scores of `num` class-balanced samples, each process its share: FID (FD on other features) against
    reference = (mu, sigma), IS, and with a class head the share that it takes for the class asked for.
    make(indices, labels) -> images in [-1, 1]."""
    moments, logits, hits = Moments(features.width, device), [], torch.zeros((), device=device)
    mine = range(rank, num, world)
    parts = [mine[k:k + 64] for k in range(0, len(mine), 64)]
    for part in progress(rank, parts, desc="evaluate", leave=False):
        labels = torch.tensor([i % num_classes for i in part], device=device)
        f, last = features(to_uint8(make(part, labels)))
        moments.add(f)
        logits += [] if last is None else [last.cpu()]
        hits += (head(f).argmax(1) == labels).sum() if head else 0
    if world > 1:
        dist.all_reduce(hits)
    mu, sigma, _ = moments.result()
    scores = {features.score: frechet_distance(mu, sigma, *reference)}
    if features.inception and num >= 10:
        scores["IS"] = inception_score(gather(logits, num, world))[0]
    return scores | ({"agreement": hits.item() / num} if head else {})


def open_metrics(args, tokenizer_path, held_out, device):
    """-> features, class head or None, reference statistics; nothing where there is no --reference."""
    if args.reference is None:
        return None, None, None
    beside = os.path.join(os.path.dirname(tokenizer_path), "teacher.pt")
    name = beside if args.features == "tiny" else args.features
    features, head = Features(name, args.weights, device), None
    state = read_weights(name).get("head") if os.path.isfile(name) else None      # a teacher.pt of --tiny
    if state:
        head = nn.Linear(features.width, len(state["bias"])).to(device)
        head.load_state_dict(state)
    source = {"images": held_out} if args.reference == "shapes" else read(args.reference, held_out.size)
    check_statistics(features, source)
    if "mu" not in source:
        source["mu"], source["sigma"], *_ = extract(features, source["images"], device, workers=args.workers)
    return features, head, (source["mu"], source["sigma"])


# ---------------------------------------------------------------- flags

TINY = dict(data="shapes", size="nano", steps=900, batch=64, lr=1e-3, ema=0.99, workers=0, save_every=200,
            sample_every=500, cfg=2.0, sample_steps=20, reference="shapes", features="tiny", eval_num=512)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = p.add_argument_group("run").add_argument
    add("--tiny", action="store_true", help="on the tokenizer of stage 1's --tiny: minutes on a laptop")
    add("--data", default="data/imagenet/train", help="root/class/*.jpg; 'shapes' draws its own")
    add("--tokenizer", default="out/tokenizer/last.pt", help="of stage 1 or 1b, or the authors' RecTok.pth")
    add("--out", default="out/dit", help="run folder; the same command again goes on from its last.pt")
    add("--seed", type=int, default=0, help="of the weights, the data order, every draw and the samples")
    add = p.add_argument_group("model").add_argument
    add("--size", default="XL", choices=list(PRESETS), help="row of dit.PRESETS")
    add("--qk_norm", action="store_true", help="RMSNorm on q and k, against late instability")
    add("--grad_checkpoint", action="store_true", help="recompute the blocks: less memory, a third slower")
    add("--shift", default="auto", help="timestep shift s (auto: max(1, sqrt(N C / 4096)))")
    add("--label_dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=float, default=800, help="length of the schedule")
    add("--steps", type=int, help="the same in steps, instead of --epochs")
    add("--stop_at", type=int, help="leave after this step; the same command without it goes on")
    add("--batch", type=int, default=1024, help="global batch, whatever the number of processes")
    add("--micro_batch", type=int, help="images a process and pass; the rest accumulates (default: up to 64)")
    add("--lr", type=float, default=2e-4, help="constant for 5 %% of training, then linear to a tenth")
    add("--ema", type=float, default=0.9995, help="decay of the averaged weights")
    add("--max_bad_steps", type=int, default=3, help="non-finite steps in a row, skipped before giving up")
    add = p.add_argument_group("machine").add_argument
    add("--save_every", type=int, default=5000, help="steps between last.pt; 10 x as many to a milestone")
    add("--sample_every", type=int, default=5000, help="steps between EMA sample grids, from the same noise")
    add("--eval_every", type=int, default=50000, help="steps between scores of EMA samples (and at the end)")
    add("--eval_num", type=int, default=50000, help="samples of a score")
    add("--reference", help="npz or image folder for gFID (default: no scores); 'shapes' draws its own")
    add("--features", default="inception", help="of gFID: inception, or a teacher or its file (gFD)")
    add("--weights", default="weights", help="folder of published files; free ones download into it")
    add("--cfg", type=float, default=1.0, help="guidance of those samples; above 1, scores with and without")
    add("--sample_steps", type=int, default=49, help="Euler steps of those samples")
    add("--workers", type=int, help="loader processes of each process (default: its share of the cores)")
    add("--no_compile", action="store_true", help="no torch.compile (on CUDA it is on, from torch 2.9)")
    add("--float32", action="store_true", help="compute in float32 where CUDA otherwise takes bf16 and TF32")
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**(TINY if first.tiny else {}))
    args = p.parse_args(argv)
    args.micro_batch, args.workers = micro_batch(args), cores() if args.workers is None else args.workers
    if not 1 <= args.cfg < math.inf or args.eval_num < 2 or not 0 <= args.label_dropout < 1:
        raise ValueError(f"--cfg {args.cfg} --eval_num {args.eval_num} --label_dropout {args.label_dropout}: "
                         "need a finite cfg >= 1, at least 2 samples, and a share below 1")
    return args


# ---------------------------------------------------------------- main

COLUMNS = ["step", "epoch", "lr", "loss", "grad_norm", "unreadable", "images_per_s", "mfu", "memory_gb"]
SCORES = [name + guided for guided in ("", "_cfg") for name in ("FID", "FD", "IS", "agreement")]


def main(argv=None):
    args = parse(argv)
    device, rank, world = start()
    torch.manual_seed(args.seed)

    # data, the frozen tokenizer, its latent statistics
    tokenizer = load_tokenizer(args.tokenizer).to(device).requires_grad_(False)
    config, mark = tokenizer.config, fingerprint(tokenizer)
    shift = latent_shift(config.grid ** 2, config.channels) if args.shift == "auto" else float(args.shift)
    data, plain, held_out, _ = open_data(args.data, config.image_size, args.seed)
    steps = args.steps or math.ceil(args.epochs * len(data) / args.batch)
    last = min(steps, args.stop_at or steps)
    os.makedirs(args.out, exist_ok=True)
    file = resume(args, rank)
    if file and file["fingerprint"] != mark:
        raise ValueError(f"{args.out} was trained on the latents of another tokenizer than {args.tokenizer} "
                         f"(fingerprint {file['fingerprint'][:8]}, now {mark[:8]})")
    if file and file["step"] >= last:
        if rank == 0:
            print(f"{args.out} is at step {file['step']} of {steps}: nothing to do")
        return
    first, streak = file["step"] if file else 0, 0
    images_of = loader(data, args, first, last, rank, world, device)  # forks while the process is small
    features, head, reference = open_metrics(args, args.tokenizer, held_out, device)
    if file:
        stats = file["latent_mean"].to(device), file["latent_std"].to(device)
    else:                                            # without flips; each rank its share of the images
        part = DataLoader(Subset(plain, range(rank, len(plain), world)), 64, num_workers=args.workers)
        stats = latent_statistics(tokenizer, progress(rank, part, desc="latent statistics"))

    # networks
    num_classes = data.num_classes
    torch.manual_seed(args.seed)                     # whatever was drawn for the tokenizer's layers
    model = DiT(DiTConfig(config.grid, config.channels, num_classes=num_classes, qk_norm=args.qk_norm,
                          **PRESETS[args.size])).to(device)
    model.grad_checkpoint = args.grad_checkpoint
    ema = deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=device.type == "cuda")
    if file:
        load_named(model, file["model"], args.out)
        load_named(ema, file["model_ema"], args.out)
        optimizer.load_state_dict(file["optimizer"])
        file = None
    if rank == 0:
        print(f"torch {torch.__version__}, {world} x {device.type}, "
              f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(data)} images of "
              f"{num_classes} classes, steps {first} to {last} of {steps}, shift {shift:.3f}")
        with open(os.path.join(args.out, "config.json"), "w") as f:
            json.dump({"args": vars(args), "model": asdict(model.config), "torch": torch.__version__,
                       "world": world}, f, indent=1)
    x = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
    z, one = torch.zeros(1, config.grid ** 2, config.channels, device=device), torch.zeros(1, device=device)
    per_image = 3 * flops(model, z, one, one.long()) + flops(tokenizer.encode, x)  # FLOPs, backward included
    rate, net = matmul_rate(device, args.float32), model
    if rank == 0:
        print(f"{per_image / 1e9:.1f} GFLOP an image; matrix rate {rate / 1e12:.3g} TFLOP/s")
    compile_on_cuda(device, args.no_compile, model, tokenizer.encoder)
    if args.grad_checkpoint:  # older versions of DDP cannot split a graph with checkpoints in it
        torch._dynamo.config.optimize_ddp = False
    if world > 1:
        net = DDP(net, gradient_as_bucket_view=True, broadcast_buffers=False)
    autocast = bf16_on_cuda(device, args.float32)

    accumulate = args.batch // (args.micro_batch * world)
    columns = min(8, num_classes)  # the picture: one class a column, the same noise every time
    show = torch.tensor([i % columns * (num_classes // columns) for i in range(8 * columns)], device=device)

    def make(indices, y, cfg=args.cfg):
        return generate(ema, tokenizer, stats, args.seed, indices, y, autocast, steps=args.sample_steps,
                        shift=shift, cfg=cfg)
    stop, bar = catch_signals(), progress(rank, total=last, initial=first, desc="stage 2")
    began, logged = time.time(), first

    for step in range(first, last):
        lr = lr_at(step / steps, args.lr)
        logs = torch.zeros(1, device=device)
        for m in range(accumulate):
            images, y = (x.to(device, non_blocking=True) for x in next(images_of))
            if world > 1:
                net.require_backward_grad_sync = m == accumulate - 1
            with autocast():
                with torch.no_grad():
                    mean, logvar = tokenizer.encode(to_float(images))
                eps, noise, u, y = draw(args, num_classes, mean.shape, y,
                                        key(args.seed, step, rank, m), device)
                z = mean.float() + (logvar.float() / 2).exp() * eps                # posterior sample
                z = (z - stats[0]) / stats[1]
                loss = flow_loss(net, z, y, shift, noise, u).mean()
            (loss / accumulate).backward()
            logs += loss.detach() / accumulate

        norms, bad, leave = clip_and_agree([(model, 1.0)], logs, stop, world, device)
        streak = guard(bad, streak, args, step, rank, {"loss": logs})
        if not bad:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            update_ema(ema, model, args.ema)
        optimizer.zero_grad()

        # below the fence: save first (what follows may take long), then pictures, scores and the log
        done = step + 1
        bar.update()
        scoring = features and (done % args.eval_every == 0 or done == steps)
        if rank == 0 and ((done % args.save_every == 0 or scoring) and not bad or done == last or leave):
            small = {"model": model.state_dict(), "model_ema": ema.state_dict(),
                     "config": asdict(model.config), "args": vars(args), "step": done,
                     "latent_mean": stats[0].cpu(), "latent_std": stats[1].cpu(),
                     "tokenizer": os.path.abspath(args.tokenizer), "fingerprint": mark}
            save(os.path.join(args.out, "last.pt"), small | {"optimizer": optimizer.state_dict()})
            if done % (10 * args.save_every) == 0 or done == last:
                save(os.path.join(args.out, f"step_{done}.pt"), small)
        if rank == 0 and (done % args.sample_every == 0 or done == last) and not leave:
            save_grid(os.path.join(args.out, f"step_{done}.png"), make(range(len(show)), show), columns)
        scores = {}
        if scoring and not leave:
            for cfg in sorted({1.0, args.cfg}):      # without guidance, and with
                found = evaluate(functools.partial(make, cfg=cfg), features, head, args.eval_num, num_classes,
                                 reference, device, rank, world)
                scores |= {k + "_cfg" * (cfg > 1): v for k, v in found.items()}
                if rank == 0:
                    tqdm.write(", ".join(f"{k} {v:.4f}" for k, v in found.items())
                               + f" (step {done}, EMA, {args.eval_num} samples, {args.sample_steps} Euler "
                               f"steps, CFG {cfg}, seed {args.seed}; reference {args.reference}, "
                               f"{features.name})")
        if done % 10 == 0 or scores:
            logs = torch.cat([logs / world, count_bad(data, device)])
            if world > 1:
                dist.all_reduce(logs)
            if rank == 0:
                loss, unreadable = logs.tolist()
                values = [done, done * args.batch / len(data), lr, loss, norms[0], int(unreadable)]
                speed = speed_row(began, (done - logged) * args.batch, per_image, rate, world, device)
                began, logged = time.time(), done
                log_row(args.out, COLUMNS + SCORES, dict(zip(COLUMNS, values)) | speed | scores)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
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
