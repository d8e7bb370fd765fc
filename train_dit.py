"""Stage 2: train a DiT-DH by flow matching on the latents of a RecTok tokenizer.

    python train_dit.py --tiny                      # after train_tokenizer.py --tiny; minutes on a laptop
    torchrun --nproc_per_node=8 train_dit.py --data data/imagenet/train --tokenizer out/tokenizer/last.pt
    torchrun --nproc_per_node=8 train_dit.py ... --size S --stop_at 37535 --out out/dit_s  # guide: 30 epochs

Running the same command again goes on from --out/last.pt. The published figures at 80 and 600 epochs are
snapshots of one 800-epoch schedule: do not set --epochs but --stop_at.
"""
import math
import os
from copy import deepcopy

import torch
import torch.nn as nn
import torch.nn.functional as F

from dit import PRESETS, DiT, DiTConfig, flow_loss, generate, latent_statistics, load_dit
from fid import collect, frechet, in_order, inception_scores
from tokenizer import (COUNT, GUIDANCE, POSITIVE, SHARE, compile_blocks, fingerprint, flow_shift,
                       load_tokenizer, local_batches, print_once, progress_bar, run_script, save_grid, seed_of,
                       start, this_rank, to_float, to_uint8, training_precision, within, world_size)
from train_tokenizer import (Run, data_parallel, given_flags, open_data, open_features, run_parser,
                             split_batch, step_at, update_ema)

# ---------------------------------------------------------------- the method
# The DiT learns the velocity of the path on which the tokenizer was trained (tokenizer.flow, sample_time):
#
#   z_t = t z + (1 - t) noise          t = 1 is the latents, t = 0 is noise          velocity = z - noise

def stage2_loss(net, tokenizer, stats, images, y, num_classes, shift, label_dropout):
    """uint8 images (B, 3, H, W), classes y (B,) -> scalar. stats: mean and std (C,) of the latents.

    The generator was seeded from (seed, step, rank, micro-step).
    """
    # A sample of the frozen encoder's posterior, normalised channel by channel.
    with torch.no_grad():
        mean, logvar = tokenizer.encode(to_float(images))           # (B, N, C)
        mean, logvar = mean.float(), logvar.float()
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        z = (z - stats[0]) / stats[1]
    # Some labels become the null class, for classifier-free guidance.
    dropped = torch.rand(len(y), device=y.device) < label_dropout
    y = torch.where(dropped, num_classes, y)
    # t by the shifted law, z_t, the network, the error of its velocity.
    return flow_loss(net, z, y, shift).mean()


def lr_at(fraction, peak, final=0.1, flat=0.05):
    """Learning rate at a fraction of training: constant for 5 % (40 of 800 epochs), then down to a tenth."""
    decayed = min(1, max(0, (fraction - flat) / (1 - flat)))
    return peak * (1 - (1 - final) * decayed)


# ---------------------------------------------------------------- flags

TINY = dict(data="shapes", size="nano", shift="2", steps=1000, batch=32, lr=4e-3, ema=0.99, workers=0,
            sample_every=500, cfg=2.0, sample_steps=20, reference="shapes",
            features="tiny", eval_num=512)


def parse(argv=None):
    p = run_parser(__doc__, "train_dit.py --data my_images --tokenizer RecTok.pth --size S --steps 50000")
    add = p.add_argument_group("stage 2").add_argument
    add("--tokenizer", default="out/tokenizer/last.pt",
        help="of stage 1 or 1b, or the authors' RecTok.pth")
    add("--size", default="XL", choices=PRESETS, help="row of dit.PRESETS")
    add("--qk_norm", action="store_true", help="RMSNorm on q and k, against late instability")
    add("--grad_checkpoint", action="store_true",
        help="recompute the blocks: less memory, a third slower")
    add("--label_dropout", type=SHARE, default=0.1, help="share of labels replaced by the null class")
    add("--lr", type=POSITIVE, default=2e-4,
        help="constant for 5 %% of training, then linear to a tenth; whatever --batch")
    add("--sample_every", type=COUNT, default=5000,
        help="steps between EMA sample grids, from the same noise")
    add("--eval_num", type=within(2, math.inf, int), default=50000, help="samples of a score")
    add("--cfg", type=GUIDANCE, default=1.0,
        help="guidance of those samples; above 1, scores with and without")
    add("--sample_steps", type=COUNT, default=49, help="Euler steps of those samples")
    given = given_flags(p, argv)
    p.set_defaults(out="out/dit", epochs=800.0, ema=0.9995, eval_every=50000)
    if given.tiny:
        p.set_defaults(**TINY)
    if given.epochs:
        p.set_defaults(steps=None)
    args = p.parse_args(argv)
    if args.reference == "shapes" and args.data != "shapes":        # --tiny on images of the user
        args.reference = None
    return args


# ---------------------------------------------------------------- main

def main(argv=None):
    args = parse(argv)
    device, rank, _ = start()
    micro_batch, accumulate = split_batch(args)

    # Setup: the frozen tokenizer, data, and how far this run goes
    tokenizer = load_tokenizer(args.tokenizer).to(device).requires_grad_(False)
    shape = tokenizer.config
    shift = flow_shift(args.shift, shape)
    data, unflipped = open_data(args, shape.image_size)
    run = Run(args, data, device, fingerprint(tokenizer))
    if run.first >= run.last:
        print_once(f"{args.out} is at step {run.first} of {run.steps}: nothing to do")
        return
    # Forked before the networks are built: loaders copy what is there.
    batches = run.batches(micro_batch)

    # Setup: networks, scores, statistics of the latents
    config = DiTConfig(shape.grid, shape.channels, num_classes=len(data.classes), qk_norm=args.qk_norm,
                       **PRESETS[args.size])
    torch.manual_seed(args.seed)                                    # whatever was drawn before
    if args.init and not run.checkpoint:
        model = load_dit(args.init, config, ema=False).to(device)
    else:
        model = DiT(config).to(device)
    ema = deepcopy(model).requires_grad_(False)
    model.grad_checkpoint = args.grad_checkpoint
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    reference = None
    if args.reference:
        features, reference = open_features(args, os.path.dirname(args.tokenizer), device,
                                            shape.image_size)
    if reference is None:
        print_once("no scores of samples: they need --reference (a folder of images, or an npz), --features")
    if run.checkpoint:
        stats = run.checkpoint["latent_mean"].to(device), run.checkpoint["latent_std"].to(device)
    else:
        stats = latent_statistics(tokenizer, local_batches(unflipped, 64, args.workers, "latent statistics"))
    run.load(model=model, model_ema=ema, optimizer=optimizer)
    run.announce(model, shift)
    compile_blocks(device, args.no_compile, model, ema, tokenizer.encoder)
    net = data_parallel(model)
    precision = training_precision(device, args.float32)

    # The picture: one class a column, the same noise every time
    columns = min(8, config.num_classes)
    spread = torch.arange(columns, device=device) * config.num_classes // columns       # over all classes
    shown = spread.repeat(8)

    def draw_samples(indices, y, cfg=args.cfg):
        return to_uint8(generate(ema, tokenizer, stats, args.seed, indices, y, precision,
                                 steps=args.sample_steps, shift=shift, cfg=cfg))

    bar = progress_bar(range(run.first, run.last), initial=run.first, total=run.last, desc="stage 2")

    for step in bar:
        # Gradients, accumulated over micro-batches
        optimizer.zero_grad()
        lr_scale = lr_at(step / run.steps, 1.0)
        for micro_step in range(accumulate):
            images, y = next(batches)
            images, y = images.to(device, non_blocking=True), y.to(device, non_blocking=True)
            torch.manual_seed(seed_of(args.seed, step, rank, micro_step))
            net.require_backward_grad_sync = micro_step == accumulate - 1          # DDP: once a step
            with precision:
                loss = stage2_loss(net, tokenizer, stats, images, y, config.num_classes, shift,
                                   args.label_dropout)
            (loss / accumulate).backward()
            run.note({"loss": loss})

        # The step; none where the gradient is not finite
        skip = run.check({"grad_norm": nn.utils.clip_grad_norm_(model.parameters(), 1.0)})
        step_at(lr_scale, optimizer, skip)
        update_ema(ema, model, args.ema, step)

        # What is due: save first (the rest may take long), then picture, scores and log
        done = step + 1
        row = run.finish_step(done, lr_scale * args.lr)
        if run.saving:
            run.save(done, latent_mean=stats[0].cpu(), latent_std=stats[1].cpu(),
                     tokenizer=os.path.relpath(args.tokenizer, args.out))
        if rank == 0 and (done % args.sample_every == 0 or done == run.last) and not run.leave:
            images = draw_samples(range(len(shown)), shown)
            save_grid(f"{args.out}/step_{done}.png", images, columns)
        scores = {}
        if run.scoring and reference is not None:
            for cfg in sorted({1.0, args.cfg}):                     # without guidance, and with: NAME_cfg
                scores |= score_samples(draw_samples, cfg, args.eval_num, config.num_classes, features,
                                        reference)
            line = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print_once(f"{line} (step {done}, EMA, {args.eval_num} samples, {args.sample_steps} steps, CFG "
                       f"{args.cfg}, seed {args.seed}; against {args.reference}, {features.name})")
        if row:
            run.log(row | scores)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        if run.leave:
            break
    return run.leave or run.signalled is not None                   # if only during the last scores


def score_samples(draw_samples, cfg, total, num_classes, features, reference):
    """Scores of `total` class-balanced samples, each process its share: FID (FD on other features) against
    the reference, IS, and with a class head the share that it takes for the class asked for."""
    mine = range(this_rank(), total, world_size())
    found = []
    for first in progress_bar(range(0, len(mine), 64), desc="evaluate", leave=False):
        part = mine[first:first + 64]
        y = torch.tensor(part, device=features.device) % num_classes
        found.append(features(draw_samples(part, y, cfg)))
    found = collect(found)
    scores = {features.score: frechet(found, reference)}
    scores |= inception_scores(features, found["logits"], total)
    if features.head:
        logits = F.linear(in_order(found["rows"], total).cpu(), **features.head)
        scores["agreement"] = (logits.argmax(1) == torch.arange(total) % num_classes).float().mean().item()
    return {name + ("_cfg" if cfg > 1 else ""): value for name, value in scores.items()}


if __name__ == "__main__":
    run_script(main)
