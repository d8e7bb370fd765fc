"""Stage 1: train the RecTok tokenizer. Stage 1b: fine-tune its pixel decoder.

    python train_tokenizer.py --tiny                                   # a laptop: no data, no downloads
    torchrun --nproc_per_node=8 train_tokenizer.py --data data/imagenet/train      # the published recipe
    torchrun --nproc_per_node=8 train_tokenizer.py --data ... --finetune_decoder out/tokenizer/last.pt

Running the same command again goes on from --out/last.pt. The same script runs with and without torchrun.
"""
import argparse
import csv
import functools
import glob
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from copy import copy, deepcopy
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

from fid import Features, open_reference, score_tokenizer
from tokenizer import (DINO, SIGNALS, SIZES, ImageFolder, RecTok, Shapes, TokenizerConfig, atomic,
                       compile_blocks, cores, flow, ignore_signals, latent_shift, load_named, load_teacher,
                       load_tokenizer, naming, print_once, progress, random_visible, rank_and_world,
                       read_tokenizer, read_weights, run_script, sample_noise, sample_time, save_grid,
                       seed_of, start, to_float, to_uint8, training_precision, weight_file)


# ---------------------------------------------------------------- the method; the rest serves it
# RecTok trains an image tokenizer on the path that a diffusion transformer (the DiT of stage 2) will
# walk through its latents z, from noise to data.
# B images, N patches (256 at 256 px), K of them visible, C latent channels (128), D teacher width (1024).
#
#   the flow    z_t = t z + (1 - t) gamma noise    t = 1 is z, the data; t = 0 is noise  (tokenizer.flow)
#   law of t    t = 1 - s u / (1 + (s - 1) u)      u ~ U(0, 1)                    (tokenizer.sample_time)
#               s = max(1, sqrt(N C / 4096))       sqrt(256 * 128 / 4096) = 2.83: half of all t < 0.26
#
# FSD, flow semantic distillation: a light semantic decoder reads z_t instead of z, and predicts the
#   features that a frozen vision foundation model (VFM, the teacher: DINOv3) has of the clean, whole image.
#   So z_t means something wherever the DiT will be. The pixel decoder reads the same z_t.
# RAD, reconstruction-alignment distillation: some patches are hidden from the encoder (the decoders put a
#   learned token in their place), yet the VFM's features of ALL patches are predicted: those of hidden
#   patches must be reconstructed, those of visible ones aligned.
#
# The method is the default: --distill flow --decode noisy --target all --semantic_loss cosine --gamma 1
#   --schedule shift --mask_min -0.1 --mask_max 0.4. Ablations: --distill latent (on clean z) or none,
#   --decode clean, --target hidden, --semantic_loss l1 or l2, --schedule uniform or lognormal, --gamma 0
#   (no flow: z_t = z), --mask_min 0 --mask_max 0 (no masks), --teacher dinov3_vitl16,dinov2_vitl14 (two).

class Objective(nn.Module):
    """What the tokenizer is trained to minimise. It is a module so that DDP can wrap it."""

    def __init__(self, tokenizer, args, shift):
        super().__init__()
        self.tokenizer = tokenizer
        self.args = args
        self.shift = shift                                  # s

    def forward(self, images, teachers, perceptual=None, discriminator=None):
        """images (B, 3, H, W) in [-1, 1] -> {name: loss}, and the real and the decoded images in [0, 1].

        teachers: [] with --distill none. perceptual: None where its weight is 0. discriminator: None while
        the GAN is off, that is for the first half of training (--gan_start 0.5).
        """
        args, config, device = self.args, self.tokenizer.config, images.device
        B, N, C = len(images), config.grid ** 2, config.channels

        # The draws. main has seeded the generators from (seed, step, rank, micro-step).
        hidden_share = args.mask_min + (args.mask_max - args.mask_min) * torch.rand(()).item()
        hidden_share = max(0.0, hidden_share)               # one for this micro-batch; 0 in 1 of 5
        visible = random_visible(B, N, hidden_share, device=device)    # (B, K) indices, other ones each image
        K = visible.shape[1]
        t = sample_time(B, self.shift, schedule=args.schedule, device=device)    # (B,): one an image
        eps = torch.randn(B, K, C, device=device)           # for the posterior: one a token and channel
        noise = torch.randn(B, K, C, device=device)         # for the flow: one a token and channel

        # What the frozen teachers, usually one, see in the clean, whole images: (B, N, D) each.
        with torch.no_grad():
            targets = [teacher(images) for teacher in teachers]

        # The pass. Where a flag switches, the method stands first and the ablation second.
        mean, logvar = self.tokenizer.encode(images, visible)         # RAD: visible patches only, (B, K, C)
        z = mean + (0.5 * logvar).exp() * eps                         # a sample of the posterior
        z_t = flow(z, args.gamma * noise, t) if args.gamma > 0 else z
        semantic_input = z_t if args.distill == "flow" else z         # FSD
        features = self.tokenizer.predict_all(semantic_input, visible)     # of all N patches, per teacher
        pixel_input = z_t if args.decode == "noisy" else z
        decoded = self.tokenizer.decode(pixel_input, visible)         # the whole image, (B, 3, H, W)
        real = images * 0.5 + 0.5                                     # [0, 1]
        fake = decoded.float() * 0.5 + 0.5                            # [0, 1], but for overshoot

        # The losses. A new one is a line here and a flag --w_NAME, its weight; log.csv follows.
        losses = {}
        losses["pixel"] = F.mse_loss(fake, real)                      # --w_pixel 1
        losses["kl"] = kl_loss(mean, logvar).mean()                   # --w_kl 1e-6: a sum over K and C
        if perceptual is not None:
            losses["perceptual"] = perceptual(real, fake)             # --w_perceptual 1: LPIPS + ConvNeXt
        if teachers:
            only = None                                               # RAD: all patches count
            if args.target == "hidden":
                only = torch.ones(B, N, device=device).scatter(1, visible, 0.0)
            each = [semantic_loss(f, y, args.semantic_loss, only) for f, y in zip(features, targets)]
            losses["semantic"] = sum(each) / len(each)                # --w_semantic 1: the mean teacher's
        if discriminator is not None:
            losses["gan"] = -discriminator(fake).float().mean()       # --w_gan 0.1
        return losses, real, fake


def train_micro_batch(objective, discriminator, teachers, perceptual, images, weights, gan_on, portion,
                      precision):
    """Adds the gradients of one micro-batch, `portion` of the step's batch; -> {name: number} to log."""
    discriminator.requires_grad_(False)         # the GAN term teaches pixel decoder and encoder alone
    with precision:                             # on CUDA autocast to bf16, but reductions in float32
        losses, real, fake = objective(images, teachers, perceptual, discriminator if gan_on else None)
    total = sum(weights[name] * loss for name, loss in losses.items())
    (total * portion).backward()
    terms = {"loss": total, **losses}

    if gan_on:                                  # then the discriminator learns, on the same images
        discriminator.requires_grad_(True)
        with precision:
            logits_real = discriminator(real)   # two passes: each its own batch statistics
            logits_fake = discriminator(fake.detach())
        d_loss = hinge_loss(logits_real, logits_fake)
        (d_loss * portion).backward()
        terms["d_loss"] = d_loss
        terms["logits_real"] = logits_real.float().mean()
        terms["logits_fake"] = logits_fake.float().mean()
    return {name: value.detach() for name, value in terms.items()}


def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over tokens and channels: (B, K, C) each -> (B,)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2))


def semantic_loss(pred, target, kind="cosine", only=None):
    """1 - cosine (or l1, l2) of features (B, N, D): mean over patches, or those where `only` (B, N) is 1.

    With no such patch it is 0."""
    pred, target = pred.float(), target.float()
    if kind == "cosine":
        loss = 1 - (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)            # (B, N)
    elif kind == "l1":
        loss = (pred - target).abs().mean(-1)
    else:
        loss = ((pred - target) ** 2).mean(-1)
    if only is None:
        return loss.mean()
    only = only.expand_as(loss)
    return (loss * only).sum() / only.sum().clamp(min=1)


def hinge_loss(real, fake):
    """Of the discriminator's logits: half of mean relu(1 - D(real)) + mean relu(1 + D(fake))."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def lr_at(fraction, peak, warmup=0.25):
    """Learning rate at a fraction of training in [0, 1]: linear warm-up from 0, then cosine to 0."""
    if fraction < warmup:
        return peak * fraction / warmup
    decayed = min(1, (fraction - warmup) / (1 - warmup))
    return 0.5 * peak * (1 + math.cos(math.pi * decayed))


# ---------------------------------------------------------------- flags

TINY = dict(  # --tiny: other defaults, nothing else. The KL's 1e-4 is 1e-6 for 1/128 of the numbers in z
    data="shapes", image_size=32, patch_size=8, channels=16, encoder="nano", decoder="nano", semantic="nano",
    teacher="tiny", features="tiny", gan_width=16, w_pixel=20.0, w_perceptual=0.0, w_gan=5e-4, w_kl=1e-4,
    shift="2", steps=4000, batch=32, lr=4e-3, warmup=0.1, ema=0.99, save_every=500, workers=0)
FINETUNE = dict(  # --finetune_decoder, stage 1b: on posterior samples of the encoder, which rests
    out="out/tokenizer_ft", distill="none", gamma=0.0, mask_min=0.0, mask_max=0.0, w_kl=0.0, w_semantic=0.0,
    gan_start=0.0, epochs=100.0, warmup=0.05)
TINY_FINETUNE = dict(steps=600, lr=1e-3)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_run_flags(p)
    p.set_defaults(out="out/tokenizer", epochs=200.0, ema=0.999, eval_every=12500)
    add_model_flags(p)
    add_method_flags(p)
    given = p.parse_args(argv)
    if given.tiny:
        p.set_defaults(**TINY)
    if given.finetune_decoder:
        p.set_defaults(**FINETUNE)
    if given.tiny and given.finetune_decoder:
        p.set_defaults(**TINY_FINETUNE)
    return p.parse_args(argv)


def add_model_flags(p):
    add = p.add_argument_group("model").add_argument
    add("--finetune_decoder", metavar="CKPT", help="stage 1b: train this checkpoint's pixel decoder alone")
    add("--eval_only", metavar="CKPT", help="no training: the scores of this checkpoint, and a picture")
    add("--val", help="held-out images; unset: the folder `val` beside --data, else --data itself")
    add("--image_size", type=int, help="pixels, a multiple of the patch; unset: 256, or the checkpoint's")
    add("--patch_size", type=int, default=16, help="pixels a token")
    add("--channels", type=int, default=128, help="C, of a latent token")
    add("--encoder", default="base", choices=list(SIZES), help="size of the encoder")
    add("--decoder", default="base", choices=list(SIZES), help="size of the pixel decoder")
    add("--semantic", default="tiny", choices=[*SIZES, "mlp", "none"], help="the semantic decoder")
    add("--gan_width", type=int, default=64, help="base channels of the discriminator")
    add("--teacher", default="dinov3_vitl16", help="VFM, or several: dinov3_vitl16,dinov2_vitl14")
    add("--random_weights", action="store_true", help="random VFM and perceptual nets: timing and tests only")


def add_method_flags(p):
    add = p.add_argument_group("method").add_argument
    add("--distill", default="flow", choices=["flow", "latent", "none"], help="the semantic decoder's input")
    add("--target", default="all", choices=["all", "hidden"], help="patches it predicts: rec+align, or rec")
    add("--semantic_loss", default="cosine", choices=["cosine", "l1", "l2"], help="distance to VFM features")
    add("--decode", default="noisy", choices=["noisy", "clean"], help="the pixel decoder's input: z_t or z")
    add("--schedule", default="shift", choices=["shift", "uniform", "lognormal"], help="law of t")
    add("--gamma", type=float, default=1.0, help="std of the noise; 0: no flow at all")
    add("--mask_min", type=float, default=-0.1, help="hidden share = max(0, U(mask_min, mask_max)): often 0")
    add("--mask_max", type=float, default=0.4, help="0 with --mask_min 0 switches RAD off")
    add("--w_pixel", type=float, default=1.0, help="weight of the mean squared error in [0, 1]")
    add("--w_perceptual", type=float, default=1.0, help="of (LPIPS + 0.1 ConvNeXt) / 1.1")
    # The authors' script says 0.5, but their loss builder does not pass it on: their code runs with 0.1.
    add("--w_gan", type=float, default=0.1, help="of -mean D(fake); 0: no discriminator")
    add("--w_kl", type=float, default=1e-6, help="of the KL, summed over tokens and channels")
    add("--w_semantic", type=float, default=1.0, help="of the distillation")
    add("--gan_start", type=float, default=0.5, help="fraction of training without GAN")
    add("--lr", type=float, help="peak; unset: 1e-4 * batch / 256 (stage 1b: 5e-5 * batch / 256)")
    add("--warmup", type=float, default=0.25, help="fraction of training; cosine to 0 after it")


def check(args):
    """What is wrong with the flags, before any work."""
    check_run_flags(args)
    if not args.eval_only:
        split_batch(args)
    if not 0 <= args.mask_max < 1 or args.mask_min > args.mask_max:
        given = f"--mask_min {args.mask_min} --mask_max {args.mask_max}"
        raise ValueError(f"{given}: need min <= max, and 0 <= max < 1")
    if args.init and args.finetune_decoder:
        raise ValueError("--init trains all of a checkpoint, --finetune_decoder its pixel decoder: give one")


# ---------------------------------------------------------------- main

def main(argv=None):
    args = parse(argv)
    check(args)
    device, rank, world = start()
    loss_weights = {name[2:]: value for name, value in vars(args).items() if name.startswith("w_")}

    # Setup: data, and how far this run goes
    config = tokenizer_config(args)
    smallest = 24 if args.w_gan else 16                             # of the discriminator, of VGG16
    if config.image_size < smallest and not args.eval_only:
        raise ValueError(f"images of {config.image_size} px are too small for the losses: they need "
                         f"{smallest} px (16 with --w_gan 0)")
    data, unflipped = open_data(args, config.image_size)
    held_out, held_out_name = open_held_out(args, config.image_size, unflipped)
    if args.eval_only:
        evaluate_only(args, config, unflipped, held_out, held_out_name, device)
        return
    run = Run(args, data)
    if run.first >= run.last:
        print_once(f"{args.out} is at step {run.first} of {run.steps}: nothing to do")
        return
    micro_batch, accumulate = split_batch(args)
    # Forked before the networks are built: loaders copy what is there.
    batches = load_batches(data, args, micro_batch, run.first, run.last, device)

    # Setup: networks
    torch.manual_seed(args.seed)
    if args.tiny:
        make_tiny_teacher(args, config.image_size)
    teachers = open_teachers(args, device)
    perceptual = PerceptualLoss(published(args)).to(device) if args.w_perceptual else None
    features = open_features(args, args.out, device)
    reference = open_reference(args.reference, features, config.image_size, args.workers)
    model, ema = open_tokenizers(args, config, teachers, device, init=None if run.checkpoint else args.init)
    config = model.config
    discriminator = PatchGAN(args.gan_width).to(device)
    peak_lr = args.lr or (5e-5 if args.finetune_decoder else 1e-4) * args.batch / 256
    optimizer = optimizer_for(model, peak_lr)
    d_optimizer = optimizer_for(discriminator, peak_lr)
    run.load(model=model, model_ema=ema, discriminator=discriminator, optimizer=optimizer,
             d_optimizer=d_optimizer)
    shift = latent_shift(config.grid ** 2, config.channels)
    if args.shift != "auto":
        shift = float(args.shift)
    run.announce(model, f"shift {shift:.3f}")
    objective = data_parallel(Objective(model, args, shift))
    compile_blocks(device, args.no_compile, model, *teachers)
    if perceptual is not None:
        compile_blocks(device, args.no_compile, perceptual.lpips, perceptual.convnext)
    precision = training_precision(device, args.float32)
    shown = first_images(held_out).to(device)
    stop = StopConditions(args.out)
    bar = progress(total=run.last, initial=run.first, desc="stage 1")

    for step in range(run.first, run.last):
        # Gradients, accumulated over micro-batches
        lr_scale = lr_at(step / run.steps, 1.0, args.warmup)
        gan_on = args.w_gan > 0 and step >= args.gan_start * run.steps
        terms = {}
        for micro_step in range(accumulate):
            images, _ = next(batches)
            images = to_float(images.to(device, non_blocking=True))
            torch.manual_seed(seed_of(args.seed, step, rank, micro_step))
            objective.require_backward_grad_sync = micro_step == accumulate - 1    # DDP: once a step
            found = train_micro_batch(objective, discriminator, teachers, perceptual, images, loss_weights,
                                      gan_on, 1 / accumulate, precision)
            terms = {name: terms.get(name, 0) + value / accumulate for name, value in found.items()}

        # The step. Where a loss or a gradient of any process is not finite, no weight is touched (the EMA
        # takes the same weights once more).
        terms["grad_norm"] = nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        if gan_on:
            average_gradients(discriminator)
            terms["d_grad_norm"] = nn.utils.clip_grad_norm_(discriminator.parameters(), 3.0)
        skip = stop.check(step, terms)
        step_at(lr_scale, optimizer, skip)
        if gan_on:
            step_at(lr_scale, d_optimizer, skip)
        update_ema(ema, model, args.ema)
        optimizer.zero_grad()
        d_optimizer.zero_grad()

        # Save first (what follows may take long), then picture, scores and log
        done = step + 1
        bar.update()
        if done == run.last:
            stop.read()                                             # no later step would
        scoring = (done % args.eval_every == 0 or done == run.steps) and not stop.leave
        saving = done % args.save_every == 0 or scoring or done == run.last or stop.leave
        if rank == 0 and saving:
            state = {"model": model.state_dict(), "model_ema": ema.state_dict(), "config": asdict(config)}
            run.save(done, state, {"discriminator": discriminator.state_dict(),
                                            "optimizer": optimizer.state_dict(),
                                            "d_optimizer": d_optimizer.state_dict()})
            if not stop.leave:
                picture(os.path.join(args.out, f"step_{done}.png"), ema, shown, args.seed, teachers)
        scores = {}
        if scoring:
            run.finish_save()                                       # the scores' loaders fork: no threads
            lpips = perceptual.lpips if perceptual else None
            scores = score_tokenizer(ema, unflipped, held_out, f"{held_out_name}, step {done}", features,
                                     reference, lpips, args.seed, args.workers)
        if done % 10 == 0 or done == run.steps or scores:
            row = run.log(done, lr_scale * peak_lr, terms, scores)
            bar.set_postfix(loss=f"{row['loss']:.4f}", pixel=f"{row['pixel']:.4f}", refresh=False)
        if stop.leave:
            print(f"rank {rank}: stopped by a signal after step {done}; the same command goes on from there")
            break
    run.finish_save()
    bar.close()


def tokenizer_config(args):
    """The shape that the flags ask for, or that of the checkpoint which stage 1b or the evaluation reads."""
    source = args.eval_only or args.finetune_decoder
    if source:
        _, config = read_tokenizer(source)
        return replace(config, image_size=args.image_size or config.image_size)
    semantic = "none" if args.distill == "none" else args.semantic
    return TokenizerConfig(args.image_size or 256, args.patch_size, args.channels, args.encoder,
                           args.decoder, semantic)


def open_held_out(args, size, unflipped):
    """-> held-out images, and what to call them; without any, the training images."""
    if args.data == "shapes":
        return Shapes(size, 1024, seed=1), "held-out shapes"
    beside = os.path.join(os.path.dirname(os.path.abspath(args.data)), "val")
    if args.val:
        return ImageFolder(args.val, size), f"images of {args.val}"
    if os.path.isdir(beside) and not os.path.samefile(beside, args.data):
        return ImageFolder(beside, size), f"images of {beside}"
    return unflipped, "TRAINING images (no val folder)"


def open_tokenizers(args, config, teachers, device, init):
    """-> the tokenizer to train, and its EMA."""
    torch.manual_seed(args.seed)
    if args.finetune_decoder:
        # The decoders learn on the latents that this run ships, and the DiT will read: of the EMA encoder.
        config = replace(config, semantic="none")
        model = load_tokenizer(args.finetune_decoder, config, ema=False)
        ema = load_tokenizer(args.finetune_decoder, config)
        model.encoder.load_state_dict(ema.encoder.state_dict())
        model.encoder.requires_grad_(False)
    else:
        config = replace(config, teacher_dim=tuple(teacher.width for teacher in teachers) or 1024)
        if init:
            model = load_tokenizer(init, config, ema=False, init=True)
            torch.manual_seed(args.seed)                            # fresh parts are the same in both
            ema = load_tokenizer(init, config, init=True)
        else:
            model = RecTok(config)
            ema = deepcopy(model)
    return model.to(device), ema.to(device).requires_grad_(False)


def published(args):
    """Where the published networks come from: a folder, or "random"."""
    return "random" if args.random_weights else args.weights


def open_teachers(args, device):
    """The frozen VFMs, in float32 weights; bf16 arithmetic comes from autocast."""
    if "none" in (args.distill, args.semantic):
        return []
    names = args.teacher.split(",")
    if args.teacher == "tiny":
        names = [os.path.join(args.out, "teacher.pt")]
    teachers = [load_teacher(name, published(args)).to(device).eval().requires_grad_(False) for name in names]
    for name, teacher in zip(names, teachers):
        if teacher.stride != args.patch_size:
            raise ValueError(f"teacher {name} has a token every {teacher.stride} pixels, the tokenizer every "
                             f"{args.patch_size}: their grids do not match")
    return teachers


def open_features(args, folder, device):
    """The network of rFID: Inception, or a teacher (then it is rFD); "tiny": the teacher.pt of `folder`."""
    if args.features == "none":
        return None
    name = os.path.join(folder, "teacher.pt") if args.features == "tiny" else args.features
    return Features(name, published(args), device)


def optimizer_for(model, lr):
    """AdamW, weight decay 1e-4 but none on 1-D tensors and on names with these parts (as published)."""
    free_parts = ("ln", "bias", "embedding", "norm", "gamma", "embed", "token")
    free, decayed = [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if weight.ndim == 1 or any(part in name for part in free_parts):
            free.append(weight)
        else:
            decayed.append(weight)
    groups = [dict(params=free, weight_decay=0.0), dict(params=decayed, weight_decay=1e-4)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def average_gradients(net):
    """Over processes. DDP does it for the tokenizer, while backward runs; the discriminator is small."""
    _, world = rank_and_world()
    if world == 1:
        return
    gradients = [p.grad for p in net.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / world).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def evaluate_only(args, config, unflipped, held_out, held_out_name, device):
    """The scores of a checkpoint, and a picture: originals above reconstructions."""
    model = load_tokenizer(args.eval_only, config).to(device)
    lpips = LPIPS(published(args)).to(device) if args.w_perceptual else None
    features = open_features(args, os.path.dirname(args.eval_only), device)
    reference = open_reference(args.reference, features, config.image_size, args.workers)
    score_tokenizer(model, unflipped, held_out, f"{held_out_name}, {args.eval_only}", features, reference,
                    lpips, args.seed, args.workers)
    rank, _ = rank_and_world()
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        path = os.path.join(args.out, "eval.png")
        picture(path, model, first_images(held_out).to(device), args.seed)
        print_once(f"wrote {path}: originals above reconstructions")


def first_images(data):
    """uint8 (up to 8, 3, H, W)."""
    return torch.stack([data[i][0] for i in range(min(8, len(data)))])


@torch.no_grad()
def picture(path, model, images, seed, teachers=()):
    """uint8 images -> rows: originals, reconstructions; and with a teacher its features, and those that are
    predicted from z_t at t = 1, 0.5 and 0.25: the first 3 principal components (of the teacher's) as RGB.
    """
    grid = model.config.grid
    originals = to_float(images)
    z, _ = model.encode(originals)
    rows = [originals, model.decode(z)]
    if teachers:
        noise = sample_noise(seed, range(len(z)), *z.shape[1:]).to(z.device)
        real = F.normalize(teachers[0](originals).float(), dim=-1)  # (B, N, D)
        shown = [real]
        for t in (1.0, 0.5, 0.25):
            z_t = flow(z, noise, torch.full((len(z),), t, device=z.device))
            shown.append(F.normalize(model.predict_all(z_t)[0].float(), dim=-1))
        centre = real.mean((0, 1))
        basis = torch.linalg.svd((real - centre).flatten(0, 1), full_matrices=False).Vh[:3].T   # (D, 3)
        spread = 2.5 * ((real - centre) @ basis).std((0, 1))
        for features in shown:
            rgb = ((features - centre) @ basis / spread).transpose(1, 2).unflatten(2, (grid, grid))
            rows.append(F.interpolate(rgb, size=images.shape[-1], mode="nearest"))
    save_grid(path, torch.cat([to_uint8(row) for row in rows]), len(images))


def make_tiny_teacher(args, size):
    """--tiny's VFM, out/teacher.pt: a copy of --teacher where it is a file, of stage 1's, or fitted here."""
    path = os.path.join(args.out, "teacher.pt")
    rank, _ = rank_and_world()
    if rank == 0 and not os.path.exists(path):
        given = args.teacher.split(",")[0]
        if args.finetune_decoder:
            given = os.path.join(os.path.dirname(args.finetune_decoder), "teacher.pt")
        if os.path.isfile(given):
            shutil.copy(given, path)
        else:
            fit_teacher(path, size)
    if dist.is_initialized():
        dist.barrier()


def fit_teacher(path, size, steps=750, batch=64, seed=0):
    """A small DINOv3, fitted to the classes of Shapes, and saved with its class head.

    The class token and every patch token must name the class: a VFM's patches know what they belong to.
    """
    torch.manual_seed(seed)
    config = dict(version=3, width=96, depth=3, heads=3, patch=8, image_size=size, registers=1)
    net = DINO(**config)
    head = nn.Linear(96, Shapes.num_classes)
    data = Shapes(size, steps * batch, seed=seed + 3)               # held-out shapes have seed 1
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    right = 0
    bar = progress(DataLoader(data, batch), desc="fit the tiny teacher")
    for step, (images, labels) in enumerate(bar):
        cls, patches = net(to_float(images))                        # (B, D), (B, N, D)
        logits, dense_logits = head(cls), head(patches)
        dense_labels = labels[:, None].expand(-1, patches.shape[1])
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss = loss + F.cross_entropy(dense_logits.flatten(0, 1), dense_labels.flatten(), label_smoothing=0.1)
        right = 0.9 * right + 0.1 * (logits.argmax(1) == labels).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        step_at(lr_at((step + 1) / steps, 1.0, 0.1), optimizer)
    print_once(f"tiny teacher: {100 * right:.0f} % of the last shapes classified rightly -> {path}")
    save(path, {"config": config, "model": net.state_dict(), "head": head.state_dict()})


# ---------------------------------------------------------------- the networks of the losses

class PerceptualLoss(nn.Module):
    """(1.0 LPIPS + 0.1 MSE of ConvNeXt-S logits) / 1.1 of (target, prediction) in [0, 1] -> scalar.

    weights: the folder of published files, or "random".
    """

    def __init__(self, weights="weights"):
        super().__init__()
        self.lpips = LPIPS(weights)
        self.convnext = ConvNeXt()
        if weights != "random":
            path = weight_file("convnext_small-0c510722.pth", weights)
            load_named(self.convnext, read_weights(path), path)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, target, prediction):
        lpips = self.lpips(target * 2 - 1, prediction * 2 - 1).mean()
        with torch.no_grad():
            real = self.logits(target)
        convnext = F.mse_loss(self.logits(prediction), real)
        return (1.0 * lpips + 0.1 * convnext) / 1.1

    def logits(self, images):
        x = F.interpolate(images, size=224, mode="bilinear", antialias=True)
        return self.convnext((x - self.mean) / self.std).float()


class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): target and prediction (B, 3, H, W) in [-1, 1] -> (B,)."""

    def __init__(self, weights="weights"):
        super().__init__()
        layers = []
        width = 3
        for out in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512,
                    512, 512):
            if out == "pool":
                layers.append(MaxPool())
            else:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU(inplace=True)]
                width = out
        self.features = nn.Sequential(*layers)  # torchvision's numbers, up to relu5_3
        self.heads = nn.ParameterList(torch.rand(1, c, 1, 1) / c for c in (64, 128, 256, 512, 512))
        if weights != "random":
            path = weight_file("vgg16-397923af.pth", weights)
            vgg = {n.removeprefix("features."): w for n, w in read_weights(path).items()
                   if n.startswith("features.")}
            load_named(self.features, vgg, path)
            path = weight_file("vgg.pth", weights)
            heads = read_weights(path)                              # lin0.model.1.weight and so on
            load_named(self.heads, {n.removeprefix("lin")[0]: w for n, w in heads.items()}, path)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, target, prediction):
        with torch.no_grad():
            real = self.unit_features(target)
        fake = self.unit_features(prediction)
        total = 0
        with torch.autocast(target.device.type, enabled=False):     # in float32
            for a, b, weight in zip(real, fake, self.heads):
                total = total + ((a - b) ** 2 * weight).sum(1).mean((1, 2))
        return total

    def unit_features(self, images):
        """The activations of five depths, each pixel's scaled to length 1."""
        x = (images - self.shift) / self.scale
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):                        # relu1_2, 2_2, 3_3, 4_3, 5_3
                length = x.float().norm(dim=1, keepdim=True)
                found.append(x.float() / (length + 1e-10))
        return found


class MaxPool(nn.Module):
    """The maximum of 2 x 2 pixels, channels last. By amax, since compiled for CUDA the backward of max
    pooling fills with zeros and adds atomically; on a CPU LPIPS takes a tenth more time with it. Equal
    maxima share the gradient, which torch's pooling gives to the first."""

    def forward(self, x):
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, :2 * height, :2 * width].permute(0, 2, 3, 1)    # an odd last row or column is dropped
        return x.unflatten(2, (width, 2)).unflatten(1, (height, 2)).amax((2, 4)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt-S (Liu et al. 2022), torchvision's names: normalised (B, 3, 224, 224) -> (B, 1000)."""

    def __init__(self):
        super().__init__()
        layers = []
        before = 3
        for depth, width in zip((3, 3, 27, 3), (96, 192, 384, 768)):
            if before == 3:
                stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), LayerNorm2d(width, eps=1e-6))
            else:
                stem = nn.Sequential(LayerNorm2d(before, eps=1e-6), nn.Conv2d(before, width, 2, stride=2))
            layers.append(stem)
            layers.append(nn.Sequential(*(ConvNeXtLayer(width) for _ in range(depth))))
            before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(LayerNorm2d(768, eps=1e-6), nn.Flatten(), nn.Linear(768, 1000))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.mean((2, 3), keepdim=True))


class ConvNeXtLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1))
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            Permute(0, 2, 3, 1),  # channels last: no copy in that memory format
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute(0, 3, 1, 2))

    def forward(self, x):
        return x + self.layer_scale * self.block(x)


class Permute(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchGAN(nn.Module):
    """Patch discriminator (Isola et al. 2017): images in [0, 1] -> logits (B, 1, h, w)."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for stride in (2, 2, 1):
            layers += [nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False), BatchNorm(2 * width),
                       nn.LeakyReLU(0.2)]
            width = 2 * width
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.main(images)


class BatchNorm(nn.BatchNorm2d):
    """Always batch statistics, as published (D stays in train mode); running ones only carry their names."""

    def forward(self, x):
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


# ---------------------------------------------------------------- a run; shared with train_dit.py

def add_run_flags(p):
    add = p.add_argument_group("run").add_argument
    add("--tiny", action="store_true",
        help="drawn shapes, small networks, other defaults: minutes on a laptop")
    add("--data", default="data/imagenet/train",
        help="root/class/*.jpg, or a flat folder; 'shapes' draws its own")
    add("--out", help="run folder; the same command again goes on from its last.pt")
    add("--init", metavar="CKPT",
        help="start from the weights of this checkpoint, ours or the authors'")
    add("--seed", type=int, default=0, help="of the weights, the data order and every draw")
    add("--epochs", type=float, help="length of the schedule")
    add("--steps", type=int, help="the same in steps, instead of --epochs")
    add("--stop_at", type=int, help="leave after this step; the same command without it goes on")
    add("--batch", type=int, default=1024, help="global batch, whatever the number of processes")
    add("--micro_batch", type=int,
        help="images a process and pass, the rest accumulates; unset: up to 64")
    add("--shift", default="auto", help="s of the law of t; auto: max(1, sqrt(N C / 4096))")
    add("--ema", type=float, help="decay of the averaged weights")
    add("--save_every", type=int, default=5000,
        help="steps between last.pt and pictures; 10 x: a milestone")
    add("--eval_every", type=int, help="steps between scores (and at the end)")
    add("--features", default="inception",
        help="of FID: inception; a teacher or its file: then it is FD; none")
    add("--reference", help="npz of statistics or images, or a folder, for FID")
    add("--weights", default="weights", help="folder of published files; absent ones download into it")
    add("--workers", type=int, default=cores(), help="loader processes of each process")
    add("--no_compile", action="store_true", help="no torch.compile (on CUDA it is on, from torch 2.9)")
    add("--float32", action="store_true",
        help="compute in float32 where CUDA otherwise takes bf16 and TF32")


def check_run_flags(args):
    for name in ("batch", "micro_batch", "epochs", "steps", "stop_at", "save_every", "eval_every", "lr",
                 "shift"):
        value = getattr(args, name)
        if value not in (None, "auto") and not float(value) > 0:
            raise ValueError(f"--{name} {value}: must be positive")
    if args.seed < 0 or args.workers < 0:
        raise ValueError(f"--seed {args.seed} --workers {args.workers}: must not be negative")
    if not 0 <= args.ema < 1:
        raise ValueError(f"--ema {args.ema}: need 0 <= ema < 1")


def split_batch(args):
    """-> images a process and pass (--micro_batch, or the largest divisor up to 64), passes a step."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} is not divisible among {world} processes")
    each = args.batch // world
    micro_batch = args.micro_batch or max(m for m in range(1, min(64, each) + 1) if each % m == 0)
    if each % micro_batch:
        raise ValueError(f"--micro_batch {micro_batch} does not divide the {each} images of a process a step")
    return micro_batch, each // micro_batch


def open_data(args, size):
    """-> training images with flips, and the same without.

    A data set has a length, `classes` (names), and [i] or [(epoch, i)] -> uint8 (3, size, size), label.
    """
    if args.data == "shapes":
        return Shapes(size, 1_000_000, args.seed + 2), Shapes(size, 4096, args.seed + 2)
    train = ImageFolder(args.data, size, flip=True, seed=args.seed)
    unflipped = copy(train)                                         # the folder is walked once
    unflipped.flip = False
    unflipped.bad = torch.zeros_like(train.bad).share_memory_()
    return train, unflipped


def load_batches(data, args, micro_batch, first, last, device):
    """Iterator over this process's micro-batches (uint8 images, labels) of steps first..last-1."""
    rank, world = rank_and_world()
    order = batch_indices(len(data), args.batch, micro_batch, args.seed, first, last, rank, world)
    return iter(DataLoader(data, batch_sampler=order, num_workers=args.workers,
                           worker_init_fn=ignore_signals, pin_memory=device.type == "cuda"))


def batch_indices(length, batch, micro_batch, seed, first, last, rank=0, world=1):
    """Yields the (epoch, index) pairs of each micro-batch of this process.

    The epochs' permutations form one endless stream, cut into global batches: each image comes exactly once
    an epoch, nothing is padded or dropped, and a step's global batch is the same for any number of processes.
    """
    @functools.lru_cache(2)                                         # a batch may span two epochs
    def permutation(epoch):
        return np.random.default_rng((seed, epoch)).permutation(length)

    for step in range(first, last):
        for micro_step in range(batch // (micro_batch * world)):
            begin = step * batch + (micro_step * world + rank) * micro_batch
            places = range(begin, begin + micro_batch)
            yield [(p // length, int(permutation(p // length)[p % length])) for p in places]


def data_parallel(module):
    """Under torchrun: DDP, which averages the gradients of all processes while backward runs."""
    _, world = rank_and_world()
    if world == 1:
        return module
    # The buffers are constant tables. Torch 2.13 renamed the flag that leaves them alone.
    sync_buffers = "forward_sync_buffers" if torch.__version__ >= (2, 13) else "broadcast_buffers"
    return DDP(module, gradient_as_bucket_view=True, **{sync_buffers: False})


class Run:
    """A run and its folder: the lock, last.pt to go on from, milestones, log.csv, config.json."""

    def __init__(self, args, data):
        self.args = args
        self.data = data
        self.steps = args.steps or math.ceil(args.epochs * len(data) / args.batch)  # of the schedule
        self.last = min(self.steps, args.stop_at or self.steps)  # of this run
        os.makedirs(args.out, exist_ok=True)
        self.lock = lock_folder(args.out)
        self.checkpoint = resume(args, data)
        self.first = self.checkpoint["step"] if self.checkpoint else 0
        self.writer = None                                          # the thread that writes a checkpoint
        self.failure = None                                         # its error

    def load(self, **parts):
        """The modules and optimizers by their names in last.pt, where there is one."""
        if self.checkpoint:
            path = os.path.join(self.args.out, "last.pt")
            with naming(path, "a checkpoint of this run"):
                for name, part in parts.items():
                    if isinstance(part, nn.Module):
                        load_named(part, self.checkpoint[name], path)
                    else:
                        part.load_state_dict(self.checkpoint[name])
            self.checkpoint = None                                  # frees its memory

    def announce(self, model, more):
        """What is about to run, and where its numbers go; also config.json."""
        rank, world = rank_and_world()
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        device = next(model.parameters()).device.type
        print_once(f"torch {torch.__version__}, {world} x {device}, {parameters:.1f} M parameters, "
                   f"{len(self.data)} images of {len(self.data.classes)} classes, "
                   f"steps {self.first} to {self.last} of {self.steps}, {more}")
        print_once(f"log: {self.args.out}/log.csv (assets/costs.md: from images_per_s to the share of a "
                   "GPU's matrix rate)")
        config = {"args": vars(self.args), "model": asdict(model.config), "classes": list(self.data.classes),
                  "torch": torch.__version__, "world": world}
        if rank == 0:
            with open(os.path.join(self.args.out, "config.json"), "w") as f:
                json.dump(config, f, indent=1)
        self.logged = (self.first, time.time())

    def save(self, done, weights, rest):
        """last.pt, everything needed to go on; now and then step_N.pt, the weights alone. On rank 0.

        Copied to host memory here and written by a thread, so that training goes on: XL's has 13.4 GB.
        """
        self.finish_save()
        weights = to_host(weights)
        weights |= {"args": vars(self.args), "step": done, "images": len(self.data),
                    "classes": list(self.data.classes)}
        files = {"last.pt": weights | to_host(rest)}
        if done % (10 * self.args.save_every) == 0 or done == self.last:
            files[f"step_{done}.pt"] = weights
        self.writer = threading.Thread(target=self.write, args=(files,), name="checkpoint")
        self.writer.start()

    def write(self, files):
        try:
            for name, file in files.items():
                save(os.path.join(self.args.out, name), file)
        except Exception as error:                                  # raised by finish_save
            print(f"checkpoint: {error}", file=sys.stderr)
            self.failure = error

    def finish_save(self):
        """Waits for the thread, and raises what went wrong in it."""
        if self.writer:
            self.writer.join()
        self.writer = None
        if self.failure:
            raise self.failure

    def log(self, done, lr, terms, scores):
        """A row of log.csv, its terms averaged over processes, on all of them. Returns it."""
        _, world = rank_and_world()
        unreadable = torch.as_tensor(getattr(self.data, "bad", 0.0)).float().sum()
        device = next(iter(terms.values())).device
        values = torch.stack([*terms.values(), unreadable.to(device)]).float()
        if world > 1:
            dist.all_reduce(values)
        *means, unreadable = values.tolist()
        row = {"step": done, "epoch": done * self.args.batch / len(self.data), "lr": lr}
        row |= {name: total / world for name, total in zip(terms, means)}
        row["unreadable"] = int(unreadable)
        # Saving, scores and compilation since the row before count too.
        steps, seconds = done - self.logged[0], time.time() - self.logged[1]
        row["images_per_s"] = steps * self.args.batch / seconds
        if device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.logged = (done, time.time())
        log_row(self.args.out, row | scores)
        return row


def lock_folder(out):
    """A file that one process alone may hold, rank 0 of one run: no second run writes into its folder."""
    rank, _ = rank_and_world()
    if rank > 0 or os.name == "nt":                                 # Windows has no fcntl
        return None
    import fcntl
    lock = open(os.path.join(out, "lock"), "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"another run is at work in {out}: stop it, or choose another --out") from error
    except OSError:                                                 # a file system without locks
        pass
    return lock


# Length, logging, scores and pictures leave a step's weights as they are; --micro_batch and the number of
# processes change its draws (masks, t, noise), which have the same distribution. The data set is compared by
# its number of images and its class names, the tokenizer of stage 2 by its fingerprint.
MAY_DIFFER = {"data", "val", "out", "init", "tokenizer", "weights", "epochs", "steps", "stop_at",
              "micro_batch", "save_every", "eval_every", "eval_num", "sample_every", "sample_steps",
              "cfg", "features", "reference", "workers", "grad_checkpoint", "no_compile"}


def resume(args, data):
    """The checkpoint in --out, or None; refuses another configuration's folder; the log loses later rows."""
    path = os.path.join(args.out, "last.pt")
    rank, world = rank_and_world()
    file = read_weights(path) if os.path.lexists(path) else None
    if file:
        if not {"step", "args", "optimizer"} <= file.keys():
            raise ValueError(f"{path} holds weights alone, nothing to go on from: use them with --init")
        if "classes" not in file:                                   # its optimizer has another order
            raise ValueError(f"{path} is of an earlier version: start from its weights with --init")
        before = {k: v for k, v in file["args"].items() if k in vars(args)}
        before |= {"images": file["images"], "classes": file["classes"]}
        now = vars(args) | {"images": len(data), "classes": list(data.classes)}
        changed = [k for k in before if same_spelling(before[k]) != same_spelling(now[k])]
        wrong = [f"{k}: was {before[k]}, now {now[k]}"[:200] for k in changed if k not in MAY_DIFFER]
        if wrong:
            raise ValueError(f"{args.out} belongs to another configuration ({'; '.join(wrong)}): "
                             "choose another --out")
        new = sorted(vars(args).keys() - file["args"].keys())
        if new:
            print_once(f"notice: {path} was written without the flags {', '.join(new)}")
        if {"epochs", "steps"} & set(changed):
            print_once("notice: the length of training changed, and with it the learning rate schedule")
        if args.init:
            print_once(f"notice: {path} goes on; --init {args.init} was for its start")
    if rank == 0:
        for left in glob.glob(os.path.join(glob.escape(args.out), "*.tmp")):  # of a killed run
            os.remove(left)
        trim_log(args.out, file["step"] if file else -1)
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, file["step"] if file else 0)
        if len(set(steps)) > 1:
            raise ValueError(f"processes find different steps in {args.out} ({sorted(set(steps))}): "
                             "it must be one folder that all machines see")
    return file


def same_spelling(value):
    """A path that exists, in one spelling; anything else as it is."""
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def log_row(out, row):
    """Adds {name: number} to out/log.csv, on rank 0; a name that is new becomes a column."""
    rank, _ = rank_and_world()
    if rank > 0:
        return
    path = os.path.join(out, "log.csv")
    before = []
    if os.path.exists(path):
        with open(path, newline="") as f:
            before = next(csv.reader(f), [])
    columns = list(dict.fromkeys([*before, *row]))
    text = {name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()}
    if columns == before:
        with open(path, "a", newline="") as f:
            csv.DictWriter(f, columns).writerow(text)
    else:
        write_log(out, columns, [*read_log(out), text])


def trim_log(out, step):
    """Drops the rows after `step`, and half a row that a kill may have left."""
    rows = read_log(out)
    if rows and "step" not in rows[0]:
        raise ValueError(f"{os.path.join(out, 'log.csv')} is the log of another program: move it away")
    if rows:
        whole = [r for r in rows if None not in r.values() and r["step"].isdecimal()]
        write_log(out, list(rows[0]), [r for r in whole if int(r["step"]) <= step])


def read_log(out):
    path = os.path.join(out, "log.csv")
    if not os.path.exists(path):
        return []
    with open(path, newline="", errors="replace") as f:
        return list(csv.DictReader(f))


def write_log(out, columns, rows):
    with atomic(os.path.join(out, "log.csv")) as f:
        text = io.TextIOWrapper(f, newline="", write_through=True)
        table = csv.DictWriter(text, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        text.detach()


def to_host(x):
    """A copy in host memory of all tensors in nested dicts and lists."""
    if torch.is_tensor(x):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: to_host(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(to_host(value) for value in x)
    return x


def save(path, file):
    """A checkpoint, written aside and renamed."""
    with atomic(path) as f:
        torch.save(file, f)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, for weights that train (stage 1b must keep the EMA encoder)."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


def step_at(scale, optimizer, skip=None):
    """A step at `scale` times the peak learning rate of each group of parameters; none where `skip` is 1.

    skip is a number on the device: a fused optimizer, which knows it by the name that torch.amp.GradScaler
    gives it, then leaves weights and moments alone.
    """
    for group in optimizer.param_groups:
        peak = group.setdefault("initial_lr", group["lr"])
        group["lr"] = scale * peak
    optimizer.found_inf = skip
    optimizer.step()


class StopConditions:
    """What ends a run early: a signal, a step later; or three steps in a row that are not finite.

    A second signal, more than 5 s later, ends the process at once.
    """
    PATIENCE = 3

    def __init__(self, out):
        self.out = out
        self.signalled = False
        self.leave = False
        self.bad_steps = 0
        self.found = None                                           # by the last check, not read yet
        for s in SIGNALS:
            if signal.getsignal(s) != signal.SIG_IGN:               # nohup ignores SIGHUP: so do we
                signal.signal(s, self.catch)

    def catch(self, number, frame):
        if not self.signalled:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > 5:                     # sooner: the first, passed on
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signalled = True

    def check(self, step, terms):
        """-> a flag on the device, 1 where a loss or gradient norm of some process is not finite (step_at).

        The host does not wait for it, or a GPU would idle until it is fed again: it reads the flags of the
        step before. So `leave` comes, on all processes at once, the step after a signal.
        """
        self.read()
        _, world = rank_and_world()
        values = torch.stack(list(terms.values())).detach().float()
        signalled = torch.full((), float(self.signalled), device=values.device)
        flags = torch.stack([(~values.isfinite().all()).float(), signalled])
        if world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        copies = flags.to("cpu", non_blocking=True), values.to("cpu", non_blocking=True)
        event = torch.cuda.current_stream().record_event() if flags.is_cuda else None
        self.found = step, list(terms), *copies, event
        return flags[0]

    def read(self):
        """What the last check found: sets `leave`, reports bad steps, raises after three in a row."""
        if self.found is None:
            return
        step, names, flags, values, event = self.found
        self.found = None
        if event:
            event.synchronize()
        bad, self.leave = flags.bool().tolist()
        self.bad_steps = self.bad_steps + 1 if bad else 0
        if not bad:
            return
        rank, _ = rank_and_world()
        report = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values.tolist()))
        report = f"on rank {rank}: {report}"
        print_once(f"step {step}: a loss or gradient of some process is not finite, skipped; {report}")
        if self.bad_steps == self.PATIENCE:
            path = os.path.join(self.out, "last.pt")
            kept = f"the last checkpoint is {path}" if os.path.exists(path) else "nothing was saved before"
            summary = f"{self.PATIENCE} non-finite steps in a row, the last one {step}"
            raise FloatingPointError(f"{summary}: {report}; {kept}")


if __name__ == "__main__":
    run_script(main)
