"""Stage 2: train a DiT-DH by flow matching on the latents of a RecTok tokenizer.

    python train_dit.py --tiny                      # after train_tokenizer.py --tiny; minutes on a laptop
    torchrun --nproc_per_node=8 train_dit.py --data data/imagenet/train --tokenizer out/tokenizer/last.pt
    torchrun --nproc_per_node=8 train_dit.py ... --size S --stop_at 37535 --out out/dit_s  # guide: 30 epochs

Running the same command again goes on from --out/last.pt. The published figures at 80 and 600 epochs are
snapshots of one 800-epoch schedule: do not set --epochs but --stop_at.
"""
import argparse
import hashlib
import math
import os
from copy import deepcopy
from dataclasses import asdict

import torch
import torch.nn as nn

from dit import PRESETS, DiT, DiTConfig, flow_loss, generate, kept_statistics, load_dit
from fid import Features, extract, frechet, inception_score, open_reference
from tokenizer import (compile_blocks, fingerprint, latent_shift, load_tokenizer, print_once, progress,
                       rank_and_world, read_weights, run_script, save_grid, seed_of, start, to_float,
                       to_uint8, training_precision)
from train_tokenizer import (Run, StopConditions, add_run_flags, check_run_flags, data_parallel,
                             load_batches, open_data, split_batch, step_at, update_ema)

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

TINY = dict(data="shapes", size="nano", shift="2", steps=2000, batch=32, lr=2e-3, ema=0.99, workers=0,
            save_every=500, sample_every=500, cfg=2.0, sample_steps=20, reference="shapes",
            features="tiny", eval_num=512)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_run_flags(p)
    p.set_defaults(out="out/dit", epochs=800.0, ema=0.9995, eval_every=50000)
    add = p.add_argument_group("stage 2").add_argument
    add("--tokenizer", default="out/tokenizer/last.pt",
        help="of stage 1 or 1b, or the authors' RecTok.pth")
    add("--size", default="XL", choices=list(PRESETS), help="row of dit.PRESETS")
    add("--qk_norm", action="store_true", help="RMSNorm on q and k, against late instability")
    add("--grad_checkpoint", action="store_true",
        help="recompute the blocks: less memory, a third slower")
    add("--label_dropout", type=float, default=0.1, help="share of labels replaced by the null class")
    add("--lr", type=float, default=2e-4, help="constant for 5 %% of training, then linear to a tenth; whatever --batch")
    add("--sample_every", type=int, default=5000,
        help="steps between EMA sample grids, from the same noise")
    add("--eval_num", type=int, default=50000, help="samples of a score")
    add("--cfg", type=float, default=1.0,
        help="guidance of those samples; above 1, scores with and without")
    add("--sample_steps", type=int, default=49, help="Euler steps of those samples")
    if p.parse_args(argv).tiny:
        p.set_defaults(**TINY)
    return p.parse_args(argv)


def check(args):
    """What is wrong with the flags, before any work."""
    check_run_flags(args)
    split_batch(args)
    if not 1 <= args.cfg < math.inf or args.eval_num < 2 or not 0 <= args.label_dropout < 1:
        raise ValueError(f"--cfg {args.cfg} --eval_num {args.eval_num} --label_dropout {args.label_dropout}: "
                         "need a finite cfg >= 1, at least 2 samples, and a share below 1")
    if args.sample_every < 1 or args.sample_steps < 1:
        given = f"--sample_every {args.sample_every} --sample_steps {args.sample_steps}"
        raise ValueError(f"{given}: must be positive")


# ---------------------------------------------------------------- main

def main(argv=None):
    args = parse(argv)
    check(args)
    device, rank, _ = start()

    # Setup: the frozen tokenizer, data, and how far this run goes
    tokenizer = load_tokenizer(args.tokenizer).to(device).requires_grad_(False)
    shape = tokenizer.config
    mark = fingerprint(tokenizer)
    data, unflipped = open_data(args, shape.image_size)
    run = Run(args, data)
    if run.checkpoint and run.checkpoint["fingerprint"] != mark:
        raise ValueError(f"{args.out} was trained on the latents of another tokenizer than {args.tokenizer} "
                         f"(fingerprint {run.checkpoint['fingerprint'][:8]}, now {mark[:8]})")
    if run.first >= run.last:
        print_once(f"{args.out} is at step {run.first} of {run.steps}: nothing to do")
        return
    micro_batch, accumulate = split_batch(args)
    # Forked before the networks are built: loaders copy what is there.
    batches = load_batches(data, args, micro_batch, run.first, run.last, device)

    # Setup: networks, scores, statistics of the latents
    config = DiTConfig(shape.grid, shape.channels, num_classes=len(data.classes), qk_norm=args.qk_norm,
                       **PRESETS[args.size])
    torch.manual_seed(args.seed)                                    # whatever was drawn for the tokenizer
    if args.init and not run.checkpoint:
        model = load_dit(args.init, config, ema=False, init=True).to(device)
        torch.manual_seed(args.seed)                                # fresh parts are the same in both
        ema = load_dit(args.init, config, init=True).to(device)
    else:
        model = DiT(config).to(device)
        ema = deepcopy(model)
    ema.requires_grad_(False)
    model.grad_checkpoint = args.grad_checkpoint
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    features, head, reference = open_metrics(args, shape.image_size, device)
    if run.checkpoint:
        stats = run.checkpoint["latent_mean"].to(device), run.checkpoint["latent_std"].to(device)
    else:
        path = f"{args.tokenizer}.latents_{mark[:8]}_{data_mark(unflipped)}.npz"      # for the next DiT too
        stats = kept_statistics(path, tokenizer, unflipped, workers=args.workers)
    run.load(model=model, model_ema=ema, optimizer=optimizer)
    shift = latent_shift(shape.grid ** 2, shape.channels)
    if args.shift != "auto":
        shift = float(args.shift)
    run.announce(model, f"shift {shift:.3f}")
    compile_blocks(device, args.no_compile, model, ema, tokenizer.encoder)
    net = data_parallel(model)
    precision = training_precision(device, args.float32)

    # The picture: one class a column, the same noise every time
    columns = min(8, config.num_classes)
    shown = torch.arange(8 * columns, device=device) % columns * (config.num_classes // columns)

    def draw_samples(indices, y, cfg=args.cfg):
        return to_uint8(generate(ema, tokenizer, stats, args.seed, indices, y, precision,
                                 steps=args.sample_steps, shift=shift, cfg=cfg))

    stop = StopConditions(args.out)
    bar = progress(total=run.last, initial=run.first, desc="stage 2")

    for step in range(run.first, run.last):
        # Gradients, accumulated over micro-batches
        lr_scale = lr_at(step / run.steps, 1.0)
        terms = {"loss": 0}
        for micro_step in range(accumulate):
            images, y = next(batches)
            images, y = images.to(device, non_blocking=True), y.to(device, non_blocking=True)
            torch.manual_seed(seed_of(args.seed, step, rank, micro_step))
            net.require_backward_grad_sync = micro_step == accumulate - 1          # DDP: once a step
            with precision:
                loss = stage2_loss(net, tokenizer, stats, images, y, config.num_classes, shift,
                                   args.label_dropout)
            (loss / accumulate).backward()
            terms["loss"] = terms["loss"] + loss.detach() / accumulate

        # The step. Where the loss or the gradient of any process is not finite, no weight is touched (the
        # EMA takes the same weights once more).
        terms["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        skip = stop.check(step, terms)
        step_at(lr_scale, optimizer, skip)
        update_ema(ema, model, args.ema)
        optimizer.zero_grad()

        # Save first (what follows may take long), then picture, scores and log
        done = step + 1
        bar.update()
        if done == run.last:
            stop.read()                                             # no later step would
        due = done % args.eval_every == 0 or done == run.steps
        scoring = features is not None and due and not stop.leave
        saving = done % args.save_every == 0 or scoring or done == run.last or stop.leave
        if rank == 0 and saving:
            state = {"model": model.state_dict(), "model_ema": ema.state_dict(), "config": asdict(config),
                     "latent_mean": stats[0].cpu(), "latent_std": stats[1].cpu(),
                     "tokenizer": os.path.abspath(args.tokenizer), "fingerprint": mark}
            run.save(done, state, {"optimizer": optimizer.state_dict()})
        if rank == 0 and (done % args.sample_every == 0 or done == run.last) and not stop.leave:
            images = draw_samples(range(len(shown)), shown)
            save_grid(os.path.join(args.out, f"step_{done}.png"), images, columns)
        scores = {}
        if scoring:
            run.finish_save()
            for cfg in sorted({1.0, args.cfg}):                     # without guidance, and with
                found = score_samples(draw_samples, cfg, args.eval_num, config.num_classes, features,
                                      head, reference)
                scores |= {name + ("_cfg" if cfg > 1 else ""): value for name, value in found.items()}
                line = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
                print_once(f"{line} (step {done}, EMA, {args.eval_num} samples, {args.sample_steps} "
                           f"steps, CFG {cfg}, seed {args.seed}; against {args.reference}, {features.name})")
        if done % 10 == 0 or done == run.steps or scores:
            row = run.log(done, lr_scale * args.lr, terms, scores)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        if stop.leave:
            print(f"rank {rank}: stopped by a signal after step {done}; the same command goes on from there")
            break
    run.finish_save()
    bar.close()


def data_mark(data):
    """Tells data sets apart: by length, class names and a few images."""
    digest = hashlib.sha256(f"{len(data)} {list(data.classes)}".encode())
    for k in range(8):
        image, _ = data[k * len(data) // 8]
        digest.update(image.numpy().tobytes())
    return digest.hexdigest()[:8]


def open_metrics(args, image_size, device):
    """-> features, class head or None, reference statistics; nothing where there is no --reference."""
    if args.reference is None or args.features == "none":
        return None, None, None
    name = args.features
    if name == "tiny":  # the teacher.pt beside the tokenizer
        name = os.path.join(os.path.dirname(args.tokenizer), "teacher.pt")
    features = Features(name, args.weights, device)
    head = None
    state = read_weights(name).get("head") if os.path.isfile(name) else None
    if state:  # of --tiny: it knows the classes of Shapes
        head = nn.Linear(features.width, len(state["bias"])).to(device)
        head.load_state_dict(state)
    return features, head, open_reference(args.reference, features, image_size, args.workers)


@torch.no_grad()
def score_samples(draw_samples, cfg, total, num_classes, features, head, reference):
    """Scores of `total` class-balanced samples, each process its share: FID (FD on other features) against
    the reference, IS, and with a class head the share that it takes for the class asked for."""
    rank, world = rank_and_world()
    mine = range(rank, total, world)
    parts = [mine[k:k + 64] for k in range(0, len(mine), 64)]

    def drawn():
        for part in progress(parts, desc="evaluate", leave=False):
            y = torch.tensor([i % num_classes for i in part], device=features.device)
            yield draw_samples(part, y, cfg)

    found = extract(features, drawn(), total, keep=head is not None)
    scores = {features.score: frechet(found, reference)}
    if features.inception and total >= 10:
        scores["IS"], _ = inception_score(found["logits"])
    if head:
        classes = head(found["rows"].to(features.device)).argmax(1).cpu()
        scores["agreement"] = (classes == torch.arange(total) % num_classes).float().mean().item()
    return scores


if __name__ == "__main__":
    run_script(main)
