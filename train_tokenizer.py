"""Stage 1: train the RecTok tokenizer. Stage 1b: fine-tune its pixel decoder.

    python train_tokenizer.py --tiny                                   # a laptop: no data, no downloads
    torchrun --nproc_per_node=8 train_tokenizer.py --data data/imagenet/train      # the published recipe
    torchrun --nproc_per_node=8 train_tokenizer.py --data ... --finetune_decoder out/tokenizer/last.pt

Running the same command again goes on from --out/last.pt. The same script runs with and without torchrun.
"""
import argparse
import functools
import glob
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
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

from fid import INCEPTION, Features, open_reference, score_tokenizer
from tokenizer import RecTok, flow, random_visible, sample_time                      # those of the method
from tokenizer import (COUNT, DINO, POSITIVE, SEED, SHARE, SIGNALS, SIZES, TEACHERS, ImageFolder, Normalize,
                       Shapes, TokenizerConfig, all_reduce, atomic, barrier, compile_blocks, cores,
                       fetch_weights, fingerprint, flow_shift, from_rank_0, ignore_signals, load_named,
                       load_teacher, load_tokenizer, plot, print_once, progress_bar, read_tokenizer,
                       read_weights, run_script, sample_noise, save_grid, seed_of, start, teacher_file,
                       this_rank, to_float, to_uint8, training_precision, weight_file, within, world_size)


# ---------------------------------------------------------------- the method; the rest serves it
# RecTok ("Reconstruction Distillation along Rectified Flow") trains an image tokenizer on the path that a
# diffusion transformer (the DiT of stage 2) will walk through its latents z, from noise to data.
# B images, N patches (256 at 256 px), K of them visible, C latent channels (128), D teacher width (1024).
#
#   the flow    z_t = t z + (1 - t) noise          t = 1 is z, the data; t = 0 is noise  (tokenizer.flow)
#   law of t    t = 1 - s u / (1 + (s - 1) u)      u ~ U(0, 1)                    (tokenizer.sample_time)
#               s = max(1, sqrt(N C / 4096))       2.83 for 256 x 128: half of all t are below 0.26. The more
#                                                  numbers in z, the more noise it takes to hide it; at 4096
#                                                  (SD-VAE's 32 x 32 x 4) t is uniform.
#
# FSD, flow semantic distillation: a light semantic decoder reads z_t instead of z, and predicts the
#   features that a frozen vision foundation model (VFM, the teacher: DINOv3) has of the clean, whole image.
#   So z_t means something wherever the DiT will be. The pixel decoder reads the same z_t. Neither is told t.
# RAD, reconstruction-alignment distillation: some patches are hidden from the encoder (the decoders put a
#   learned token in their place), yet the VFM's features of ALL patches are predicted: those of hidden
#   patches must be reconstructed, those of visible ones aligned.
#
#                    the method, and default      ablations
#   --distill        flow: FSD                    latent: the semantic decoder reads clean z; none
#   --decode         noisy: pixels from z_t       clean: from z
#   --target         all patches                  hidden: these alone
#   --mask_min, max  -0.1, 0.4                    0, 0: no patch is hidden, no RAD
#   --gamma          1, the noise's deviation     0: no flow, z_t = z at every t
#   --schedule       shift, the law above         uniform, lognormal
#   --semantic_loss  cosine                       l1, l2
#   --teacher        dinov3_vitl16                another; or two, A,B: the mean of their losses

class Objective(nn.Module):
    """What the tokenizer is trained to minimise. A module, so that DDP can wrap it.

    main, below, sums its gradients over micro-batches, and steps the optimizers and the EMA: the moving
    average of the weights, which is what is used afterwards.
    """

    def __init__(self, tokenizer, args, shift):
        super().__init__()
        self.tokenizer = tokenizer
        self.args = args
        self.shift = shift                                  # s

    def forward(self, images, teachers, progress, perceptual=None, discriminator=None):
        """images (B, 3, H, W) in [-1, 1] -> losses and notes by name; real and decoded images in [0, 1].

        teachers: [] with --distill none. progress: the share of training that is done, for curricula.
        perceptual: None where its weight is 0. discriminator: None while the GAN is off (--gan_start 0.5:
        the first half of training).
        """
        args, config, device = self.args, self.tokenizer.config, images.device
        B, N, C = len(images), config.grid ** 2, config.channels

        # The draws. main has seeded the generators from (seed, step, rank, micro-step).
        hidden_share = args.mask_min + (args.mask_max - args.mask_min) * torch.rand(()).item()
        hidden_share = max(0.0, hidden_share)               # of this micro-batch; 0 in one of five
        visible = random_visible(B, N, hidden_share, device=device)     # (B, K) indices, others in each image
        K = visible.shape[1]                                            # ceil(N (1 - hidden_share))
        t = sample_time(B, self.shift, schedule=args.schedule, device=device)           # (B,): one an image
        if args.noise_warmup > 0:
            # Ours, not the paper's: it begins with clean latents. Decoders that are not told t learn little
            # from noise at first, and rest on a plateau.
            t = 1 - (1 - t) * min(1, progress / args.noise_warmup)
        eps = torch.randn(B, K, C, device=device)           # the posterior's noise
        noise = args.gamma * torch.randn(B, K, C, device=device)        # the flow's

        # What the frozen teachers, usually one, see in the clean, whole images: (B, N, D) each.
        with torch.no_grad():
            targets = [teacher(images) for teacher in teachers]

        # The pass. Where a flag switches, the method stands first and the ablation second.
        mean, logvar = self.tokenizer.encode(images, visible)           # RAD: of visible patches, (B, K, C)
        z = mean + (0.5 * logvar).exp() * eps                           # a sample of the posterior
        z_t = flow(z, noise, t) if args.gamma > 0 else z
        semantic_input = z_t if args.distill == "flow" else z           # FSD
        # The semantic decoders predict the features of all N patches: (B, N, D) each, as the targets.
        features = [decoder(semantic_input, visible) for decoder in self.tokenizer.sem_decoders]
        pixel_input = z_t if args.decode == "noisy" else z
        decoded = self.tokenizer.decode(pixel_input, visible)           # the whole image, (B, 3, H, W)
        real = images * 0.5 + 0.5                                       # [0, 1]
        fake = decoded.float() * 0.5 + 0.5                              # [0, 1], but for overshoot

        # The losses. A new one is a line here and a flag --w_NAME, its weight; the log follows.
        losses = {}
        losses["pixel"] = F.mse_loss(fake, real)                        # --w_pixel 1
        losses["kl"] = kl_loss(mean, logvar).mean()                     # --w_kl 1e-6: a sum over K and C
        if perceptual is not None:
            losses["perceptual"] = perceptual(real, fake)               # --w_perceptual 1: LPIPS + ConvNeXt
        if teachers:
            if args.target == "hidden":                                 # else RAD: all patches count
                hidden = torch.ones(B, N, dtype=torch.bool, device=device).scatter(1, visible, False)
                features = [x[hidden] for x in features]
                targets = [x[hidden] for x in targets]
            each = [semantic_loss(x, y, args.semantic_loss) for x, y in zip(features, targets)]
            losses["semantic"] = sum(each) / len(each)                  # --w_semantic 1
        if discriminator is not None:
            losses["gan"] = -discriminator(fake).float().mean()         # --w_gan 0.1

        # Logged beside them, not minimised. NaN says: nothing of it in this batch.
        notes = {"z_std": z.detach().std()}
        if args.target == "hidden" and K == N:
            notes["semantic"] = math.nan                                # in the log, for the 0 of no patch
        return losses, notes, real, fake


def train_micro_batch(objective, discriminator, teachers, perceptual, images, weights, progress, accumulate,
                      precision):
    """Adds the gradients of one of the step's `accumulate` micro-batches; -> {name: number} to log.

    discriminator: None while the GAN is off. precision: on CUDA autocast to bf16 (reductions in float32).
    """
    if discriminator is not None:
        discriminator.requires_grad_(False)     # the GAN term teaches pixel decoder and encoder alone
    with precision:
        losses, notes, real, fake = objective(images, teachers, progress, perceptual, discriminator)
    loss = sum(weights[name] * value for name, value in losses.items())
    (loss / accumulate).backward()
    logged = {"loss": loss, **losses, **notes}

    if discriminator is not None:               # then it learns, on the same images, to tell them apart
        discriminator.requires_grad_(True)
        with precision:
            logits_real = discriminator(real)   # two passes: each its own batch statistics
            logits_fake = discriminator(fake.detach())
        d_loss = hinge_loss(logits_real, logits_fake)
        (d_loss / accumulate).backward()
        logged |= {"d_loss": d_loss, "logits_real": logits_real.float().mean(),
                   "logits_fake": logits_fake.float().mean()}
    return logged


def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, 1)), summed over tokens and channels: (B, K, C) each -> (B,)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2))


def semantic_loss(pred, target, kind="cosine"):
    """1 - cosine (or l1, l2) of features (..., D), the mean over all patches; of none it is 0."""
    pred, target = pred.float(), target.float()
    if kind == "cosine":
        loss = 1 - F.cosine_similarity(pred, target, dim=-1)
    elif kind == "l1":
        loss = (pred - target).abs().mean(-1)
    else:
        loss = ((pred - target) ** 2).mean(-1)
    return loss.sum() / max(1, loss.numel())


def hinge_loss(real, fake):
    """Of the discriminator's logits, which should be above 1 for real images and below -1 for fake ones:
    half of mean relu(1 - D(real)) + mean relu(1 + D(fake))."""
    on_real = F.relu(1 - real.float()).mean()
    on_fake = F.relu(1 + fake.float()).mean()
    return 0.5 * (on_real + on_fake)


def lr_at(fraction, peak, warmup=0.25):
    """Learning rate at a fraction of training in [0, 1]: linear warm-up from 0, then cosine to 0."""
    if fraction < warmup:
        return peak * fraction / warmup
    decayed = min(1, (fraction - warmup) / (1 - warmup))
    return 0.5 * peak * (1 + math.cos(math.pi * decayed))


# ---------------------------------------------------------------- flags

TINY = dict(  # --tiny: other defaults, nothing else. Its z has 256 numbers, not 32,768: so has the KL's sum
    data="shapes", image_size=32, patch_size=8, channels=16, encoder="nano", decoder="nano", semantic="nano",
    teacher="tiny", features="tiny", gan_width=8, w_pixel=20.0, w_perceptual=0.0, w_gan=5e-4, w_kl=5e-5,
    gan_start=0.7, noise_warmup=0.25, shift="2", steps=1000, batch=32, lr=3e-3, warmup=0.1, ema=0.99,
    workers=0)
FINETUNE = dict(  # --finetune_decoder, stage 1b: on posterior samples of the frozen encoder of a checkpoint
    patch_size=None, channels=None, encoder=None, decoder=None, semantic=None,
    distill="none", gamma=0.0, mask_min=0.0, mask_max=0.0, w_kl=0.0, gan_start=0.0, epochs=100.0, warmup=0.05)
TINY_FINETUNE = dict(steps=400, lr=2e-3, noise_warmup=0.0)


def parse(argv=None):
    p = run_parser(__doc__, "train_tokenizer.py --data my_images --batch 256 --steps 50000")
    add_flags(p)
    given = given_flags(p, argv)
    p.set_defaults(out="out/tokenizer", epochs=200.0, ema=0.999, eval_every=12500)
    if given.tiny:
        p.set_defaults(**TINY)
    if given.finetune_decoder or given.eval_only:
        p.set_defaults(**FINETUNE)
    if given.finetune_decoder:
        p.set_defaults(out="out/tokenizer_ft")
        if given.tiny:
            p.set_defaults(**TINY_FINETUNE)
    if given.epochs:
        p.set_defaults(steps=None)
    args = p.parse_args(argv)
    if args.mask_min > args.mask_max:
        p.error(f"--mask_min {args.mask_min} is above --mask_max {args.mask_max}")
    if args.target == "hidden" and args.mask_max == 0:
        p.error("--target hidden with --mask_max 0: no patch is ever hidden")
    if args.finetune_decoder and (args.init or args.eval_only or args.distill != "none"):
        p.error("--finetune_decoder trains a checkpoint's decoder alone: no --init, --eval_only, --distill")
    if args.random_weights:
        args.weights = "random"
    args.random_weights = args.weights == "random"                  # either says it
    return args


def add_flags(p):
    add = p.add_argument_group("model").add_argument
    add("--finetune_decoder", metavar="CKPT", help="stage 1b: train this checkpoint's pixel decoder alone")
    add("--eval_only", metavar="CKPT", help="no training: the scores of this checkpoint, and a picture")
    add("--val", help="held-out images; unset: the folder `val` beside --data, else --data itself")
    add("--image_size", type=COUNT, help="pixels, a multiple of the patch; unset: 256, or the checkpoint's")
    add("--patch_size", type=COUNT, default=16, help="pixels a token")
    add("--channels", type=COUNT, default=128, help="C, of a latent token")
    add("--encoder", default="base", choices=SIZES, help="size of the encoder")
    add("--decoder", default="base", choices=SIZES, help="size of the pixel decoder")
    add("--semantic", default="tiny", choices=[*SIZES, "mlp", "none"], help="the semantic decoder")
    add("--gan_width", type=COUNT, default=64, help="base channels of the discriminator")
    add("--teacher", default="dinov3_vitl16", help="VFM, or several: dinov3_vitl16,dinov2_vitl14")
    add("--random_weights", action="store_true", help="random VFM and perceptual nets: timing, tests only")

    add = p.add_argument_group("method").add_argument
    add("--distill", default="flow", choices=["flow", "latent", "none"], help="the semantic decoder's input")
    add("--target", default="all", choices=["all", "hidden"], help="patches it predicts: rec+align, or rec")
    add("--semantic_loss", default="cosine", choices=["cosine", "l1", "l2"], help="distance to VFM features")
    add("--decode", default="noisy", choices=["noisy", "clean"], help="the pixel decoder's input: z_t or z")
    add("--schedule", default="shift", choices=["shift", "uniform", "lognormal"], help="law of t")
    add("--gamma", type=within(0, 1e6), default=1.0, help="std of the noise; 0: no flow at all")
    add("--noise_warmup", type=SHARE, default=0.0,
        help="the noise level 1 - t grows from 0 over this share of training (ours, not the paper's)")
    add("--mask_min", type=float, default=-0.1, help="hidden share = max(0, U(mask_min, mask_max)): often 0")
    add("--mask_max", type=SHARE, default=0.4, help="0 with --mask_min 0 switches RAD off")
    add("--w_pixel", type=float, default=1.0, help="weight of the mean squared error in [0, 1]")
    add("--w_perceptual", type=float, default=1.0, help="of (LPIPS + 0.1 ConvNeXt) / 1.1")
    # The authors' script says 0.5, but their loss builder does not pass it on: their code runs with 0.1.
    add("--w_gan", type=float, default=0.1, help="of -mean D(fake); 0: no discriminator")
    add("--w_kl", type=float, default=1e-6, help="of the KL, summed over tokens and channels")
    add("--w_semantic", type=float, default=1.0, help="of the distillation")
    add("--gan_start", type=float, default=0.5, help="fraction of training without GAN")
    add("--lr", type=POSITIVE, help="peak; unset: 1e-4 * batch / 256 (stage 1b: 5e-5 * batch / 256)")
    add("--warmup", type=SHARE, default=0.25, help="fraction of training; cosine to 0 after it")


# ---------------------------------------------------------------- main

def main(argv=None):
    args = parse(argv)
    device, rank, _ = start()
    loss_weights = {name[2:]: value for name, value in vars(args).items() if name.startswith("w_")}

    # Setup: data, and how far this run goes
    config = tokenizer_config(args)
    shift = flow_shift(args.shift, config)
    if args.w_gan and config.image_size < 24 and not args.eval_only:
        raise ValueError(f"the discriminator needs 24 px, not {config.image_size}: --w_gan 0 switches it off")
    data, unflipped = open_data(args, config.image_size)
    held_out = open_held_out(args, config.image_size, unflipped)
    if args.eval_only:
        evaluate_only(args, config, unflipped, held_out, device)
        return
    micro_batch, accumulate = split_batch(args)
    mark = fingerprint(load_tokenizer(args.finetune_decoder)) if args.finetune_decoder else None
    run = Run(args, data, device, mark)
    if run.first >= run.last:
        print_once(f"{args.out} is at step {run.first} of {run.steps}: nothing to do")
        return
    # Forked before the networks are built: loaders copy what is there.
    batches = run.batches(micro_batch)

    # Setup: networks
    if args.weights != "random":
        fetch_weights(published_files(args), args.weights)
    if args.tiny:
        make_tiny_teacher(args, config.image_size)
    torch.manual_seed(args.seed)                                    # whatever was drawn before
    teachers = open_teachers(args, device)
    perceptual = PerceptualLoss(args.weights).to(device) if args.w_perceptual else None
    features, reference = open_features(args, args.out, device, config.image_size)
    model, ema = open_tokenizers(args, config, teachers, device, init=None if run.checkpoint else args.init)
    discriminator = PatchGAN(args.gan_width).to(device)
    peak_lr = args.lr or (5e-5 if args.finetune_decoder else 1e-4) * args.batch / 256
    optimizer = optimizer_for(model, peak_lr)
    d_optimizer = optimizer_for(discriminator, peak_lr)
    run.load(model=model, model_ema=ema, discriminator=discriminator, optimizer=optimizer,
             d_optimizer=d_optimizer)
    run.announce(model, shift)
    objective = data_parallel(Objective(model, args, shift))
    compile_blocks(device, args.no_compile, model, *teachers)
    if perceptual is not None:
        compile_blocks(device, args.no_compile, perceptual.lpips, perceptual.convnext)
    precision = training_precision(device, args.float32)
    if args.w_gan and device.type == "cuda":
        # The GAN starts late, but its memory must be there: a pass whose gradients are dropped.
        images = torch.zeros(micro_batch, 3, config.image_size, config.image_size, device=device)
        train_micro_batch(objective, discriminator, teachers, perceptual, images, loss_weights, 0.0,
                          accumulate, precision)
    stage = "stage 1b" if args.finetune_decoder else "stage 1"
    bar = progress_bar(range(run.first, run.last), initial=run.first, total=run.last, desc=stage)

    for step in bar:
        # Gradients, accumulated over micro-batches
        optimizer.zero_grad()
        d_optimizer.zero_grad()
        progress = step / run.steps
        lr_scale = lr_at(progress, 1.0, args.warmup)
        gan_on = args.w_gan > 0 and progress >= args.gan_start
        for micro_step in range(accumulate):
            images, _ = next(batches)
            images = to_float(images.to(device, non_blocking=True))
            torch.manual_seed(seed_of(args.seed, step, rank, micro_step))
            objective.require_backward_grad_sync = micro_step == accumulate - 1    # DDP: once a step
            run.note(train_micro_batch(objective, discriminator if gan_on else None, teachers, perceptual,
                                       images, loss_weights, progress, accumulate, precision))

        # The step; none where a gradient is not finite
        norms = {"grad_norm": nn.utils.clip_grad_norm_(model.parameters(), 3.0)}
        if gan_on:
            average_gradients(discriminator)
            norms["d_grad_norm"] = nn.utils.clip_grad_norm_(discriminator.parameters(), 3.0)
        skip = run.check(norms)
        step_at(lr_scale, optimizer, skip)
        if gan_on:
            step_at(lr_scale, d_optimizer, skip)
        update_ema(ema, model, args.ema, step)

        # What is due: save first (the rest may take long), then picture, scores and log
        done = step + 1
        row = run.finish_step(done, lr_scale * peak_lr)
        if run.saving:
            run.save(done)
            if rank == 0 and not run.leave:
                picture(f"{args.out}/step_{done}.png", ema, held_out, args.seed)
        scores = {}
        if run.scoring:
            lpips = perceptual.lpips if perceptual else None
            scores = score_tokenizer(ema, unflipped, held_out, f"step {done}", features, reference, lpips,
                                     args.seed, args.workers)
        if row:
            run.log(row | scores)
            bar.set_postfix(loss=f"{row['loss']:.4f}", pixel=f"{row['pixel']:.4f}", refresh=False)
        if run.leave:
            break
    return run.leave or run.signalled is not None                   # if only during the last scores


def tokenizer_config(args):
    """The shape that the flags ask for, or that of the checkpoint which stage 1b or the evaluation reads."""
    source = args.finetune_decoder or args.eval_only
    if not source:
        semantic = "none" if args.distill == "none" else args.semantic
        return TokenizerConfig(args.image_size or 256, args.patch_size, args.channels, args.encoder,
                               args.decoder, semantic)
    _, config = read_tokenizer(source)
    for name in ("patch_size", "channels", "encoder", "decoder", "semantic"):
        if getattr(args, name) not in (None, getattr(config, name)):
            raise ValueError(f"--{name} {getattr(args, name)}: {source} has {getattr(config, name)}")
    if args.finetune_decoder:
        config = replace(config, semantic="none")
    return replace(config, image_size=args.image_size or config.image_size)


def open_held_out(args, size, unflipped):
    """Images to score on: those of --val, or of a folder `val` beside --data; else the training images."""
    if args.data == "shapes":
        return Shapes(size, 1024, seed=1)
    val = args.val
    beside = os.path.join(os.path.dirname(os.path.abspath(args.data)), "val")
    if val is None and os.path.isdir(beside) and not os.path.samefile(beside, args.data):
        val = beside
    return ImageFolder(val, size) if val else unflipped


def open_tokenizers(args, config, teachers, device, init):
    """-> the tokenizer to train, from the raw weights of a checkpoint where one is given, and its EMA."""
    source = args.finetune_decoder or init
    if not args.finetune_decoder:
        config = replace(config, teacher_dim=tuple(teacher.width for teacher in teachers) or 1024)
    torch.manual_seed(args.seed)
    model = load_tokenizer(source, config, ema=False) if source else RecTok(config)
    if args.finetune_decoder:
        # The decoder learns on the latents that this run ships, and the DiT will read: of the EMA encoder.
        model.encoder = load_tokenizer(source, config).encoder.requires_grad_(False)
    ema = deepcopy(model).requires_grad_(False)
    return model.to(device), ema.to(device)


def published_files(args):
    """The file names of the published weights that this run needs."""
    names = (*teacher_names(args), args.features)
    files = [teacher_file(name, args.weights) for name in names if name in TEACHERS]
    if args.features == "inception":
        files.append(INCEPTION)
    if args.w_perceptual:
        files += [VGG16, LPIPS_HEADS, CONVNEXT]
    return files


def teacher_names(args):
    """The VFMs to distill; none of them where no semantic decoder learns."""
    return [] if "none" in (args.distill, args.semantic) else args.teacher.split(",")


def open_teachers(args, device):
    """The frozen VFMs, in float32 weights; bf16 arithmetic comes from autocast."""
    teachers = []
    for name in teacher_names(args):
        if name == "tiny":
            name = f"{args.out}/teacher.pt"
        teacher = load_teacher(name, args.weights).to(device)
        if teacher.stride != args.patch_size:
            raise ValueError(f"teacher {name} has a token every {teacher.stride} pixels, the tokenizer every "
                             f"{args.patch_size}: their grids do not match")
        teachers.append(teacher)
    return teachers


def open_features(args, folder, device, image_size):
    """-> the network of FID: Inception, or a teacher (then it is FD; "tiny": the teacher.pt of a run folder),
    and its statistics of --reference; None for what is not asked for."""
    if args.features == "none":
        return None, None
    name = os.path.join(folder, "teacher.pt") if args.features == "tiny" else args.features
    features = Features(name, args.weights, device)
    return features, open_reference(args.reference, features, image_size, args.workers)


def optimizer_for(model, lr):
    """AdamW; no weight decay on 1-D tensors, embeddings and tokens, 1e-4 on the rest (as published)."""
    groups = [dict(params=[], weight_decay=0.0), dict(params=[], weight_decay=1e-4)]
    for name, weight in model.named_parameters():
        free = weight.ndim == 1 or "embed" in name or "token" in name
        if weight.requires_grad:
            groups[0 if free else 1]["params"].append(weight)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def average_gradients(net):
    """Over processes. DDP does it for the tokenizer, while backward runs; the discriminator is small."""
    for p in net.parameters():
        all_reduce(p.grad)
        p.grad /= world_size()


def evaluate_only(args, config, unflipped, held_out, device):
    """The scores of a checkpoint, and a picture."""
    model = load_tokenizer(args.eval_only, config).to(device)
    lpips = LPIPS(args.weights).to(device) if args.w_perceptual else None
    features, reference = open_features(args, os.path.dirname(args.eval_only), device, config.image_size)
    score_tokenizer(model, unflipped, held_out, args.eval_only, features, reference, lpips, args.seed,
                    args.workers)
    path = f"{args.out}/eval.png"
    if this_rank() == 0:
        os.makedirs(args.out, exist_ok=True)
        picture(path, model, held_out, args.seed)
    print_once(f"wrote {path}: originals, reconstructions, and decoded z_t at t = 0.75, 0.5, 0.25")


@torch.no_grad()
def picture(path, model, data, seed):
    """A row of the first eight images, and below it what the pixel decoder makes of their z_t at t = 1 (the
    reconstructions), 0.75, 0.5 and 0.25."""
    images = torch.stack([data[i][0] for i in range(min(8, len(data)))])
    images = images.to(next(model.parameters()).device)
    z, _ = model.encode(to_float(images))
    noise = sample_noise(seed, range(len(z)), *z.shape[1:]).to(z.device)
    rows = [images]
    for t in (1.0, 0.75, 0.5, 0.25):
        z_t = flow(z, noise, z.new_tensor([t]))
        rows.append(to_uint8(model.decode(z_t)))
    save_grid(path, torch.cat(rows), len(images))


def make_tiny_teacher(args, size):
    """--tiny's VFM, out/teacher.pt: --teacher where that is a file, in stage 1b stage 1's, else fitted."""
    path = f"{args.out}/teacher.pt"
    given = args.teacher
    if args.finetune_decoder:
        given = os.path.join(os.path.dirname(args.finetune_decoder), "teacher.pt")
    if this_rank() == 0 and not os.path.exists(path):
        if os.path.isfile(given):
            shutil.copy(given, path)
        elif "tiny" in (args.teacher, args.features):
            fit_teacher(path, size)
    barrier()


def fit_teacher(path, size, steps=400, batch=64, seed=0):
    """A small DINOv3, fitted to the classes of Shapes, and saved with its class head.

    The class token and every patch token must name the class: a VFM's patches know what they belong to.
    """
    torch.manual_seed(seed)
    config = dict(version=3, width=96, depth=3, heads=3, patch=8, image_size=size, registers=1)
    net = DINO(**config)
    head = nn.Linear(96, Shapes.num_classes)
    data = Shapes(size, steps * batch, seed=seed + 3)               # held-out shapes have seed 1
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    batches = progress_bar(DataLoader(data, batch), desc="fit the tiny teacher")
    for step, (images, labels) in enumerate(batches):
        cls, patches = net(to_float(images))                        # (B, D), (B, N, D)
        dense_labels = labels[:, None].expand(-1, patches.shape[1])
        loss = F.cross_entropy(head(cls), labels, label_smoothing=0.1)
        loss = loss + F.cross_entropy(head(patches).transpose(1, 2), dense_labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        step_at(lr_at((step + 1) / steps, 1.0, 0.1), optimizer)
    print_once(f"fitted {path}, cross-entropy {loss.item():.2f}")
    save(path, {"config": config, "model": net.state_dict(), "head": head.state_dict()})


# ---------------------------------------------------------------- the networks of the losses

VGG16, LPIPS_HEADS, CONVNEXT = "vgg16-397923af.pth", "vgg.pth", "convnext_small-0c510722.pth"


class PerceptualLoss(nn.Module):
    """(1.0 LPIPS + 0.1 MSE of ConvNeXt-S logits) / 1.1 of (target, prediction) in [0, 1] -> scalar.

    weights: the folder of published files, or "random".
    """

    def __init__(self, weights="weights"):
        super().__init__()
        self.lpips = LPIPS(weights)
        self.convnext = ConvNeXt()
        if weights != "random":
            path = weight_file(CONVNEXT, weights)
            load_named(self.convnext, read_weights(path), path)
        self.normalize = Normalize()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, target, prediction):
        target, prediction = target * 2 - 1, prediction * 2 - 1
        lpips = self.lpips(target, prediction).mean()
        convnext = F.mse_loss(self.logits(prediction), self.logits(target))
        return (1.0 * lpips + 0.1 * convnext) / 1.1

    def logits(self, images):
        x = F.interpolate(images, size=224, mode="bilinear", antialias=True)
        return self.convnext(self.normalize(x)).float()


class LPIPS(nn.Module):
    """LPIPS v0.1 on VGG16 (Zhang et al. 2018): target and prediction (B, 3, H, W) in [-1, 1] -> (B,)."""

    def __init__(self, weights="weights"):
        super().__init__()
        layers = []
        before = 3                                                  # channels
        widths = (64, 128, 256, 512, 512)
        for width, convolutions in zip(widths, (2, 2, 3, 3, 3)):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
        self.features = nn.Sequential(*layers)                      # torchvision's numbers, up to relu5_3
        self.heads = nn.ParameterList(torch.rand(1, width, 1, 1) / width for width in widths)
        if weights != "random":
            path = weight_file(VGG16, weights)
            vgg = {n.removeprefix("features."): w for n, w in read_weights(path).items()
                   if n.startswith("features.")}
            load_named(self.features, vgg, path)
            path = weight_file(LPIPS_HEADS, weights)                 # lin0.model.1.weight and so on
            load_named(self.heads, {n[3]: w for n, w in read_weights(path).items()}, path)
        self.normalize = Normalize()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(self, target, prediction):
        real = self.unit_features(target)
        fake = self.unit_features(prediction)
        total = 0
        for a, b, weight in zip(real, fake, self.heads):
            total = total + ((a - b) ** 2 * weight).sum(1).mean((1, 2))
        return total

    def unit_features(self, images):
        """The activations of five depths, each pixel's scaled to length 1."""
        x = self.normalize(images)
        found = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):                        # relu1_2, 2_2, 3_3, 4_3, 5_3
                length = x.float().norm(dim=1, keepdim=True)
                found.append(x.float() / (length + 1e-10))
        return found


class ConvNeXt(nn.Module):
    """ConvNeXt-S (Liu et al. 2022), torchvision's names: normalised (B, 3, 224, 224) -> (B, 1000)."""

    def __init__(self):
        super().__init__()
        before = 96
        layers = [nn.Sequential(nn.Conv2d(3, before, 4, stride=4), LayerNorm2d(before, 1e-6))]
        for depth, width in zip((3, 3, 27, 3), (96, 192, 384, 768)):
            if width > before:
                layers.append(nn.Sequential(LayerNorm2d(before, 1e-6),
                                            nn.Conv2d(before, width, 2, stride=2)))
            layers.append(nn.Sequential(*(ConvNeXtLayer(width) for _ in range(depth))))
            before = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(LayerNorm2d(768, 1e-6), nn.Flatten(), nn.Linear(768, 1000))

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.mean((2, 3), keepdim=True))


class ConvNeXtLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(width, 1, 1))
        self.block = nn.ModuleDict({
            "0": nn.Conv2d(width, width, 7, padding=3, groups=width),
            "2": nn.LayerNorm(width, 1e-6),
            "3": nn.Linear(width, 4 * width),
            "5": nn.Linear(4 * width, width)})

    def forward(self, x):
        y = self.block["0"](x).permute(0, 2, 3, 1)                  # no copy: it lies channels last
        y = F.gelu(self.block["3"](self.block["2"](y)))
        return x + self.layer_scale * self.block["5"](y).permute(0, 3, 1, 2)


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

def run_parser(doc, example):
    p = argparse.ArgumentParser(description=doc.splitlines()[0], epilog=f"example: {example}",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = p.add_argument_group("run").add_argument
    add("--tiny", action="store_true",
        help="drawn shapes, small networks, other defaults: minutes on a laptop")
    add("--data", default="data/imagenet/train",
        help="root/class/*.jpg, or a flat folder; 'shapes' draws its own")
    add("--out", help="run folder; the same command again goes on from its last.pt")
    add("--init", metavar="CKPT",
        help="start from the weights of this checkpoint, ours or the authors'")
    add("--seed", type=SEED, default=0, help="of the weights, the data order and every draw")
    add("--epochs", type=POSITIVE, help="length of the schedule")
    add("--steps", type=COUNT, help="the same in steps, instead of --epochs")
    add("--stop_at", type=COUNT, help="leave after this step; the same command without it goes on")
    add("--batch", type=COUNT, default=1024, help="global batch, whatever the number of processes")
    add("--micro_batch", type=COUNT,
        help="images a process and pass, the rest accumulates; unset: up to 64")
    add("--shift", default="auto", type=auto_or_positive,
        help="s of the law of t; auto: max(1, sqrt(N C / 4096))")
    add("--ema", type=SHARE, help="decay of the averaged weights; less in the first steps")
    add("--save_every", type=COUNT, default=5000,
        help="steps between last.pt and pictures, at most a twentieth of the run; 10 x: a milestone")
    add("--eval_every", type=COUNT, help="steps between scores (and at the end)")
    add("--features", default="inception",
        help="of FID: inception; a teacher or its file: then it is FD; none")
    add("--reference", help="npz of statistics or images, or a folder, for FID")
    add("--weights", default="weights", help="folder of published files; absent ones download into it")
    add("--workers", type=int, default=cores(), help="loader processes of each process")
    add("--no_compile", action="store_true", help="no torch.compile (on CUDA it is on)")
    add("--float32", action="store_true",
        help="train without bf16 on CUDA: in TF32, on cards before Ampere in float32")
    return p


def given_flags(parser, argv):
    """The flags of the command line, before defaults are chosen by them; without --help, which must show
    the chosen ones."""
    words = sys.argv[1:] if argv is None else argv
    given, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    return given


def auto_or_positive(text):
    return text if text == "auto" else POSITIVE(text)


def split_batch(args):
    """-> images a process and pass (--micro_batch, or the largest divisor up to 64), passes a step."""
    world = world_size()
    if args.batch % world:
        raise ValueError(f"--batch {args.batch} is not divisible among {world} processes")
    each = args.batch // world
    micro_batch = args.micro_batch or max(m for m in range(1, min(64, each) + 1) if each % m == 0)
    if each % micro_batch:
        raise ValueError(f"--micro_batch {micro_batch} does not divide the {each} images of a process a step")
    return micro_batch, each // micro_batch


def open_data(args, size):
    """-> training images with flips, and the same without. Held-out ones come from open_held_out.

    A data set has a length, `classes` (names), and [i] -> a uint8 tensor (3, size, size), an int label; the
    first also [(epoch, i)], for flips that change with the epoch.
    """
    if args.data == "shapes":
        seed = args.seed + 2
        return Shapes(size, 1_000_000, seed), Shapes(size, 4096, seed)
    train = ImageFolder(args.data, size, flip=True, seed=args.seed)
    unflipped = copy(train)                                         # the folder is walked once
    unflipped.flip = False
    unflipped.bad = torch.zeros_like(train.bad).share_memory_()
    return train, unflipped


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
    return DDP(module, gradient_as_bucket_view=True) if world_size() > 1 else module


class Run:
    """A run and its folder: last.pt to go on from, milestones, log.jsonl, config.json; what ends it early.

    mark: the fingerprint of the tokenizer on whose latents it trains (stages 1b and 2), or None.

    A signal lets it finish the step (with several processes, up to ten), save and leave; a second one, more
    than 5 s later, ends the process at once.
    """

    def __init__(self, args, data, device, mark):
        self.args = args
        self.data = data
        self.device = device
        self.mark = mark
        self.steps = args.steps or math.ceil(args.epochs * len(data) / args.batch)  # of the schedule
        self.last = min(self.steps, args.stop_at or self.steps)                     # of this run
        self.save_every = max(1, min(args.save_every, self.steps // 20))
        self.sums = {}                              # name: sum and number of finite values since the last row
        self.signalled = None                                       # when the first signal came
        self.leave = False                                          # stop after this step
        os.makedirs(args.out, exist_ok=True)
        self.lock = lock_folder(args.out)
        self.checkpoint = resume(args, data, mark)
        self.first = self.checkpoint["step"] if self.checkpoint else 0

    def catch(self, number, frame):
        if self.signalled is None:
            self.signalled = time.monotonic()
        elif time.monotonic() - self.signalled > 5:                 # sooner: the first, passed on by torchrun
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def batches(self, micro_batch):
        """Iterator over this process's micro-batches (uint8 images, labels) of steps first..last-1."""
        args = self.args
        order = batch_indices(len(self.data), args.batch, micro_batch, args.seed, self.first, self.last,
                              this_rank(), world_size())
        return iter(DataLoader(self.data, batch_sampler=order, num_workers=args.workers,
                               worker_init_fn=ignore_signals, pin_memory=self.device.type == "cuda"))

    def load(self, **parts):
        """Modules and optimizers by their names in last.pt; takes their states from it, where there is one."""
        self.parts = parts                                          # save writes their states
        if self.checkpoint:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint[name])
            for name, sums in self.checkpoint.get("sums", {}).items():
                self.sums[name] = sums.to(self.device)
            self.checkpoint = None                                  # frees its memory

    def announce(self, model, shift):
        """Says what is about to run, and where its numbers go; writes config.json; catches signals."""
        args = self.args
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print_once(f"torch {torch.__version__}, {world_size()} x {self.device.type}, {parameters:.1f} M "
                   f"parameters, {len(self.data)} images of {len(self.data.classes)} classes in {args.data}, "
                   f"steps {self.first} to {self.last} of {self.steps}, shift {shift:.3f}\n"
                   f"log: {args.out}/log.jsonl, each row the mean of ten steps (assets/costs.md: from "
                   "images_per_s to the share of a GPU's matrix rate)")
        if this_rank() == 0:
            config = {"args": vars(args), "model": asdict(model.config), "torch": torch.__version__,
                      "world": world_size(), "classes": list(self.data.classes)}
            with open(f"{args.out}/config.json", "w") as f:
                json.dump(config, f, indent=1)
        self.logged = (self.first, time.time())                     # step and time of the last row
        if threading.current_thread() is threading.main_thread():   # elsewhere no handler may be set
            for s in SIGNALS:
                if signal.getsignal(s) != signal.SIG_IGN:           # nohup ignores SIGHUP: so do we
                    signal.signal(s, self.catch)

    def note(self, values):
        """{name: number, here or on the device} for the log's next row. What is not finite does not count."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
            finite = value.isfinite()
            sum_and_number = torch.stack([value.where(finite, 0), finite])
            self.sums[name] = self.sums.get(name, 0) + sum_and_number

    def check(self, norms):
        """{name: gradient norm} -> 1 where one is not finite, else 0: a number on the device, for step_at.

        Gradients are averaged, so all processes see the same. The host does not wait for it, or the GPU would
        idle until it is fed again: row() reads how many steps were skipped.
        """
        skip = 1 - torch.stack(list(norms.values())).isfinite().all().float()
        self.note(norms | {"skipped": skip})
        return skip

    def finish_step(self, done, lr):
        """After step `done`, sets what is due: saving, scoring, leave. -> the log's row, or None."""
        due = done % self.args.eval_every == 0 or done == self.steps
        row = self.row(done, lr) if due or done % 10 == 0 else None
        if world_size() == 1:                                       # several processes agree in row()
            self.leave = self.signalled is not None
        self.scoring = due and not self.leave
        self.saving = done % self.save_every == 0 or due or done == self.last or self.leave
        return row

    def row(self, done, lr):
        """{name: mean since the last row, over steps and processes}, on all processes."""
        # A row holds means over the processes; unreadable is meant as a sum.
        self.note({"unreadable": world_size() * getattr(self.data, "bad", torch.zeros(1)).sum(),
                   "signalled": float(self.signalled is not None)})
        totals = {name: sums.tolist() for name, sums in self.all_sums().items()}
        self.sums = {}
        self.leave = totals.pop("signalled")[0] > 0
        row = {"step": done, "epoch": done * self.args.batch / len(self.data), "lr": lr}
        row |= {name: total / number if number else math.nan for name, (total, number) in totals.items()}
        steps = done - self.logged[0]
        # Saving, scores and compilation since the row before count too.
        row["images_per_s"] = steps * self.args.batch / (time.time() - self.logged[1])
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.logged = (done, time.time())
        skipped = round(totals["skipped"][0])
        if skipped:
            print_once(f"step {done}: {skipped} steps skipped since the last row, a gradient was not finite")
        if skipped > 2:
            raise FloatingPointError(f"{skipped} of ten steps without finite gradients, up to step {done}, "
                                     f"with {row}; what {self.args.out} holds is whole")
        return row

    def all_sums(self):
        """The sums by name, averaged over all processes."""
        totals = {name: self.sums[name] / world_size() for name in sorted(self.sums)}   # one order everywhere
        all_reduce(*totals.values())
        return totals

    def log(self, row):
        """Adds a line to log.jsonl, on rank 0; where it is time to save, also curves.png."""
        if this_rank() == 0:
            with open(f"{self.args.out}/log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            if self.saving:
                curves(self.args.out)

    def save(self, done, **more):
        """last.pt, everything needed to go on; now and then step_N.pt, the weights and what their use needs:
        shape, flags, classes, and `more`. Rank 0 writes."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        weights = more | {"model": states.pop("model"), "model_ema": states.pop("model_ema"),
                          "config": asdict(self.parts["model"].config), "args": vars(self.args),
                          "step": done, "images": len(self.data), "classes": list(self.data.classes),
                          "fingerprint": self.mark}
        states["sums"] = self.all_sums()
        if this_rank() == 0:
            save(f"{self.args.out}/last.pt", weights | states)
            if self.leave:
                print_once(f"stopped by a signal after step {done}; the same command goes on from there")
            if done % (10 * self.save_every) == 0 or done == self.last:
                save(f"{self.args.out}/step_{done}.pt", weights)


def curves(out):
    """curves.png: the log's columns over the steps, those that vary."""
    rows = read_log(out)
    panels = {}
    for name in sorted(set().union(*rows) - {"step", "epoch"}):
        known = [row for row in rows if math.isfinite(row.get(name, math.nan))]
        line = [(row["step"], row[name]) for row in known]
        if len({value for _, value in line}) > 1:
            panels[name] = {"": line}
    if panels:
        plot(f"{out}/curves.png", panels)


def save(path, file):
    """A checkpoint, written aside and renamed."""
    with atomic(path) as f:
        torch.save(file, f)


def lock_folder(out):
    """A file that one process alone may hold, rank 0 of one run: no second run writes into its folder."""
    if this_rank() > 0 or os.name == "nt":                                 # Windows has no fcntl
        return None
    import fcntl
    lock = open(f"{out}/lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"another run is at work in {out}: stop it, or choose another --out") from error
    except OSError:                                                 # a file system without locks
        pass
    return lock


# Flags that may differ when a run goes on. Logging, scores and pictures do not touch the weights; --epochs and
# --steps move the learning rate (a notice says so); --micro_batch and the number of processes draw other masks,
# t and noise of the same distribution. The data set is compared by its number of images and its class names,
# the tokenizer of stages 1b and 2 by its fingerprint.
MAY_DIFFER = {"data", "val", "out", "init", "tokenizer", "finetune_decoder", "weights", "epochs", "steps",
              "stop_at", "micro_batch", "save_every", "eval_every", "eval_num", "sample_every", "sample_steps",
              "cfg", "features", "reference", "workers", "grad_checkpoint", "no_compile"}


def resume(args, data, mark=None):
    """The checkpoint in --out, or None; refuses another configuration's folder; the log loses later rows."""
    path = f"{args.out}/last.pt"
    file = read_weights(path) if os.path.lexists(path) else None
    if file:
        if not {"step", "args", "optimizer", "classes"} <= file.keys():
            raise ValueError(f"{path} does not hold all that is needed to go on: use its weights with --init")
        latents = "fingerprint of the tokenizer (--tokenizer or --finetune_decoder)"
        before = file["args"] | {"images": file["images"], "classes": file["classes"],
                                 latents: file.get("fingerprint", mark)}
        now = vars(args) | {"images": len(data), "classes": list(data.classes), latents: mark}
        changed = [k for k in now if before.get(k, now[k]) != now[k]]
        wrong = [f"{k}: was {before[k]}, now {now[k]}"[:200] for k in changed if k not in MAY_DIFFER]
        if wrong:
            raise ValueError(f"{args.out} belongs to another configuration ({'; '.join(wrong)}): "
                             "choose another --out")
        new = sorted(now.keys() - before.keys())
        if new:
            print_once(f"notice: {path} was written without the flags {', '.join(new)}")
        if {"epochs", "steps"} & set(changed):
            print_once("notice: the length of training changed, and with it the learning rate schedule")
    step = file["step"] if file else 0
    if from_rank_0(lambda: step) != step:
        raise ValueError(f"processes find different steps in {args.out}: all machines must see one folder")
    if this_rank() == 0:
        for left in glob.glob(f"{glob.escape(args.out)}/*.tmp"):    # of a killed run
            os.remove(left)
        log = f"{args.out}/log.jsonl"
        if os.path.exists(log):
            rows = [row for row in read_log(args.out) if row["step"] <= step]
            with atomic(log) as f:
                f.writelines((json.dumps(row) + "\n").encode() for row in rows)
    return file


def read_log(out):
    """The rows of a run's log; half a line that a kill has left is no row."""
    if not os.path.exists(f"{out}/log.jsonl"):
        return []
    with open(f"{out}/log.jsonl") as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


@torch.no_grad()
def update_ema(ema, model, decay, updates):
    """ema <- d ema + (1 - d) model, for weights that train (stage 1b must keep the EMA encoder).

    d is `decay`, but less in the first updates, or the average of a short run would be its random start.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    for average, weight in zip(ema.parameters(), model.parameters()):
        if weight.requires_grad:
            average.lerp_(weight, 1 - decay)


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


if __name__ == "__main__":
    run_script(main)
