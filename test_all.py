"""The tests: pytest test_all.py. Small, on the CPU, no network, nothing outside this folder.

    python -m pytest -q test_all.py                # 4 minutes on 2 cores
    python -m pytest -q test_all.py -m slow        # the slow ones: 4 minutes

Golden numbers: the weights are a function of each published tensor's name, so nothing large is stored; the
literals were recorded while this code agreed with the published code to 1e-5 (relative) on these weights.
"""
import contextlib
import functools
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from copy import deepcopy
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""              # here and in every process that a test starts

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import EpsImagePlugin, Image

import dit as D
import fid as M
import sample as X
import tokenizer as T
import train_dit as S2
import train_tokenizer as S1

HERE = os.path.dirname(os.path.abspath(__file__))
torch.set_num_threads(1)                             # toys gain nothing from more, and suffer on busy cores
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")     # those that are promised are caught below
HANDLERS = {number: signal.getsignal(number) for number in T.SIGNALS}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own, to which its paths are relative."""
    monkeypatch.chdir(tmp_path)
    yield
    reset_signals()
    while STARTED:
        end(STARTED.pop())


def reset_signals():
    """A trainer leaves its own handlers, and with them the lock of its folder: Ctrl-C would not end us."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


def refuses(names, call, *inputs, error=ValueError, **options):
    """The call raises such an error, and its text names the thing (a regular expression)."""
    with pytest.raises(error, match=names):
        call(*inputs, **options)


def bad_flags(names, call, flags):
    """argparse refuses them: status 2, and the last line on stderr names the thing."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        refuses("2", call, flags, error=SystemExit)
    assert re.search(names, said.getvalue().splitlines()[-1]), said.getvalue()


# ---------------------------------------------------------------- toys: everything is trained on these

class Toys:
    """A folder with 13 pictures in 2 classes, a teacher, and a tokenizer and a DiT trained for 4 steps."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.pictures, self.teacher = f"{folder}/pictures", f"{folder}/teacher.pt"
        self.tokenizer, self.dit = f"{folder}/tok/last.pt", f"{folder}/dit/last.pt"

    def stage1(self, out, *flags):
        """The flags of a run of 4 steps, the last 3 with GAN. Later flags win."""
        return ["--tiny", "--data", self.pictures, "--teacher", self.teacher, "--features", "none", "--batch",
                "8", "--steps", "4", "--gan_start", "0.25", "--out", out, *map(str, flags)]

    def stage2(self, out, *flags):
        return ["--tiny", "--data", self.pictures, "--tokenizer", self.tokenizer, "--features", "none",
                "--batch", "8", "--steps", "4", "--sample_steps", "1", "--out", out, *map(str, flags)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    toys = Toys(tmp_path_factory.mktemp("toys"))
    classes = "two words", "zürich 東京"
    for i in range(12):
        save_picture(f"{toys.pictures}/{classes[i % 2]}/{i:02d}.png", T.Shapes(40, 12)[i][0])
    os.symlink("01.png", f"{toys.pictures}/{classes[1]}/link.png")
    torch.manual_seed(0)
    config = dict(version=3, width=96, depth=1, heads=3, patch=8, image_size=32, registers=1)
    torch.save({"config": config, "model": T.DINO(**config).state_dict(),
                "head": torch.nn.Linear(96, 8).state_dict()}, toys.teacher)
    save_picture(f"{toys.folder}/held_out/{classes[0]}/0.png", T.Shapes(40, 12)[0][0])
    with (mock.patch.object(S1, "step_at", wraps=S1.step_at) as toys.steps1,
          mock.patch.object(S2, "step_at", wraps=S2.step_at) as toys.steps2,
          mock.patch.object(S1, "score_tokenizer", wraps=S1.score_tokenizer) as toys.scores):
        S1.main(toys.stage1(f"{toys.folder}/tok", "--val", f"{toys.folder}/held_out"))
        S2.main(toys.stage2(f"{toys.folder}/dit"))
    file = load(toys.dit)                            # so young a DiT still predicts zero; this one will not
    file["model_ema"] = {n: w + 0.1 * noise(n, *w.shape) for n, w in file["model_ema"].items()}
    torch.save(file, toys.dit)
    return toys


def save_picture(path, pixels):
    """uint8 (3, H, W), or a PIL image."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if torch.is_tensor(pixels):
        pixels = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    pixels.save(path)


def plain(path, color=(200, 30, 30), mode="RGB"):
    """A picture of one colour, of the kind that its extension says."""
    save_picture(path, Image.new(mode, (40, 50), color))


def images_of(data):
    """All images of a data set, or of a folder at 32 px, uint8 (n, 3, H, W)."""
    data = T.ImageFolder(data, 32) if isinstance(data, str) else data
    return torch.stack([image for image, _ in data])


def load(path):
    return torch.load(path, weights_only=True)


def save(path, model, **more):
    """A checkpoint in our own layout."""
    weights = model.state_dict()
    torch.save({"model": weights, "model_ema": weights, "config": asdict(model.config), **more}, path)
    return path


def small(**changes):
    """A tokenizer of 16 tokens, 8 channels."""
    torch.manual_seed(0)
    shape = dict(image_size=32, patch_size=8, channels=8, encoder="nano", decoder="nano", semantic="nano",
                 teacher_dim=12)
    return T.RecTok(T.TokenizerConfig(**shape | changes))


def small_dit(width=(96, 192), depth=(3, 2), heads=(4, 4), channels=16):
    return D.DiT(D.DiTConfig(8, channels, width, depth, heads, 10))


def same(a, b):
    """Equal to the bit, whatever is nested in whatever."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def same_runs(one, other):
    """All that two runs have left is equal, and so are their logs."""
    a, b = load(f"{one}/last.pt"), load(f"{other}/last.pt")
    for part in a.keys() - {"args"}:
        assert same(a[part], b[part]), part
    assert rows_of(one) == rows_of(other)


def rows_of(out):
    """The rows of a run's log, without the columns that depend on the clock or the machine."""
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in S1.read_log(out)]


STARTED = []                                         # the processes of this test, ended with it


def start(target, *flags, world=0):
    """A script, or a function of this file, in `world` processes under torchrun (0: in one without it)."""
    command = [sys.executable, os.path.join(HERE, target)]
    if not target.endswith(".py"):
        code = f"import sys, test_all as t; t.T.run_script(lambda: t.{target}(*sys.argv[1:]))"
        command = [sys.executable, "-c", code]
    if world:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc_per_node={world}", "--no-python", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    process = subprocess.Popen([*command, *map(str, flags)], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment, start_new_session=True)
    STARTED.append(process)
    return process


def run(target, *flags, world=0, timeout=180):
    """The same to its end: -> exit status, output, errors."""
    process = start(target, *flags, world=world)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        end(process)
    return process.returncode, output, errors


def end(process):
    """And all of its group."""
    process.terminate()                              # torchrun takes its processes along, after 30 s by force
    try:
        process.wait(60)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(there, process):
    """Where the process dies first, or within two minutes nothing comes: what it said."""
    until = time.monotonic() + 120
    while not there():
        if process.poll() is not None or time.monotonic() > until:
            end(process)
            pytest.fail(process.communicate()[1])
        time.sleep(0.05)


# ---------------------------------------------------------------- golden numbers

def named(name, *shape):
    """The weight that the published module held under this name when the numbers were recorded."""
    w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2 and shape[0] > 1:
        w = w * np.float32(math.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:])))
    elif name.endswith("running_var"):
        w = 1 + np.abs(0.1 * w)
    else:
        w = 0.1 * w + (len(shape) == 1 and name.endswith(("weight", "gamma")))
    return torch.from_numpy(np.asarray(w, dtype=np.float32))


def fill(module, rename=lambda name: name):
    """Every parameter and buffer from its published name."""
    module.load_state_dict({n: named(rename(n), *w.shape).to(w) for n, w in module.state_dict().items()})
    return module.eval()


def noise(name, *shape):
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def close(x, numbers, tol=1e-4):
    """x is `numbers`; of more than five, four values spread over x and the root mean square."""
    x = torch.as_tensor(x).detach().double().flatten()
    got = x.tolist()
    if len(x) > 5:
        got = [*x[torch.linspace(0, len(x) - 1, 4).long()].tolist(), x.square().mean().sqrt().item()]
    assert len(got) == len(numbers)
    error = max(abs(a - b) for a, b in zip(got, numbers))
    assert error <= tol * max(map(abs, numbers)), got


def test_tokenizer_golden():
    """From a file of the authors: published names, a teacher, tables that we compute, EMA apart."""
    model = fill(T.RecTok(T.TokenizerConfig(64, 16, 16, "tiny", "tiny", "tiny", 96)),
                 lambda n: n.replace("sem_decoders.0", "sem_decoders.dinov3"))
    state = {n.replace("sem_decoders.0", "sem_decoders.dinov3"): w for n, w in model.state_dict().items()}
    computed = "encoder.rope.freqs_cos", "pos_embed", "sem_foundation_models.dinov3.norm.weight"
    state |= dict.fromkeys(computed, torch.zeros(3))
    zeros = {n: torch.zeros_like(w) for n, w in state.items()}
    torch.save({"model": zeros, "model_ema": state}, "RecTok.pth")
    model = T.load_tokenizer("RecTok.pth")
    x = noise("x", 2, 3, 64, 64).tanh()
    z = noise("z", 2, 16, 16)
    mean, logvar = model.encode(x)
    close(torch.cat([mean, logvar], -1), [-0.02687177, -0.2447858, -0.5318729, -0.9235055, 0.969769])
    close(S1.kl_loss(mean, logvar), [196.3164, 195.0991])
    close(model.decode(z), [0.03828252, -0.4401513, 0.8154236, -0.695222, 2.060538])
    close(model.predict(z), [0.9197729, -1.510944, 0.4022538, 0.6112949, 1.060118])
    keep = T.random_visible(2, 16, 0.25, torch.from_numpy(np.random.RandomState(0).rand(2, 16)))
    assert keep.shape == (2, 12)
    mean, logvar = model.encode(x, keep)
    close(torch.cat([mean, logvar], -1), [-0.07302468, 0.3122176, -1.6269, -1.098973, 0.9894104])
    close(model.decode(mean, keep), [3.329825, -1.299382, 2.198674, -0.5028995, 2.065322])
    close(model.predict(mean, keep), [-1.450854, 0.4543444, -0.02733457, 0.801128, 1.035342])
    refuses("RecTok.pth.*latent_head", T.load_tokenizer, "RecTok.pth", replace(model.config, channels=8))
    torch.save({n.replace("sem_", "aux_"): w for n, w in state.items()}, "older.pth")
    assert torch.equal(T.load_tokenizer("older.pth").predict(z), model.predict(z))
    tuned = {n: w for n, w in state.items() if not n.startswith("sem_decoders")}
    torch.save({"model_ema": tuned, "model": tuned}, "decft.pth")
    assert T.load_tokenizer("decft.pth").config.semantic == "none"
    torch.save(tuned | {"encoder.extra": torch.zeros(1)}, "surplus.pth")
    refuses("surplus.pth.*encoder.extra", T.load_tokenizer, "surplus.pth")
    del tuned["encoder.ln_post.weight"]
    torch.save(tuned, "missing.pth")
    refuses("missing.pth.*Missing.*encoder.ln_post.weight", T.load_tokenizer, "missing.pth")


def test_perceptual_golden():
    """From the published files of VGG16, the LPIPS heads and ConvNeXt-S."""
    lpips = S1.LPIPS("random")
    vgg = {f"features.{n}": w.shape for n, w in lpips.features.state_dict().items()}
    torch.save({n: named(n, *shape) for n, shape in vgg.items()}, "vgg16-397923af.pth")
    heads = {f"lin{i}.model.1.weight": w.shape for i, w in enumerate(lpips.heads)}
    torch.save({n: named(n, *shape).abs() for n, shape in heads.items()}, "vgg.pth")
    torch.save(fill(S1.ConvNeXt()).state_dict(), "convnext_small-0c510722.pth")
    loss = S1.PerceptualLoss(".")
    a = noise("a", 2, 3, 64, 64).sigmoid()
    b = noise("b", 2, 3, 64, 64).sigmoid().requires_grad_(True)
    close(loss.lpips(a * 2 - 1, b * 2 - 1), [0.1207454, 0.1217918])
    close(loss.logits(a * 2 - 1), [0.3531383, 1.365966, -0.5841553, -0.1368193, 1.000388])
    total = loss(a, b)
    close(total, [0.1165093])
    total.backward()                                 # gradients reach the prediction, not the weights
    assert b.grad.abs().sum() > 0
    assert all(w.grad is None for w in loss.parameters())


def test_small_losses_golden():
    close(fill(S1.PatchGAN())(noise("a", 2, 3, 96, 96).sigmoid()),
          [-6.309882, -7.777207, -5.054701, 0.7491791, 6.342945])
    f, g = noise("f", 2, 7, 24), noise("g", 2, 7, 24)
    close(S1.hinge_loss(f, g), [1.037291])
    for kind, value in (("cosine", 0.9538776), ("l1", 1.134289), ("l2", 2.038629)):
        close(S1.semantic_loss(g, f, kind), [value])
        assert S1.semantic_loss(g[:0], f[:0], kind) == 0            # nothing hidden: a well-defined zero


def dino_state(net):
    """Named weights under the published names of DINO."""
    state = {}
    for ours, w in net.state_dict().items():
        name = ours.replace("registers", "storage_tokens").replace("patch_embed.", "patch_embed.proj.")
        state[name] = named(name, *w.shape)
    return state


HF_NAMES = {
    "cls_token": "embeddings.cls_token", "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings", "blocks.": "layer.", "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj", "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1"}


def hf_state(state):
    """A DINOv3 state dict under the published names -> the same network under those of transformers."""
    out = {}
    for name, w in state.items():
        for old, new in HF_NAMES.items():
            name = name.replace(old, new)
        if "attn.qkv" not in name:
            out[name] = w
            continue
        for part, rows in zip("qkv", w.chunk(3)):
            if not (part == "k" and name.endswith("bias")):         # it has no bias of the keys
                out[name.replace("attn.qkv", f"attention.{part}_proj")] = rows
    return out


def test_teachers_golden():
    x = noise("x", 2, 3, 64, 64)
    dinov3 = functools.partial(T.DINO, 3, 96, 2, 3, 16, 64, 4)
    state = dino_state(dinov3())
    unused = {"mask_token": torch.zeros(1, 96), "rope_embed.periods": torch.zeros(8),
              "blocks.0.attn.qkv.bias_mask": torch.zeros(288)}
    for layout in (state | unused, hf_state(state)):
        cls, patches = dinov3().load_published(layout)(x)
        close(patches, [1.313595, -0.2378539, -0.9534615, -0.3883339, 1.007589])
        close(cls, [1.334478, 0.04376387, -0.5698411, -0.08908813, 0.9900368])
    dinov2 = T.DINO(2, 96, 2, 3, 14, 98)                            # 7 x 7 positions, read at 4 x 4
    cls, patches = dinov2.load_published(dino_state(dinov2))(x[:, :, :56, :56])
    close(patches, [-0.6600999, -0.8538263, -0.7327282, 1.240358, 1.006295])
    close(cls, [1.339537, -0.0733581, -0.6897323, 0.4616515, 1.010018])
    # timm's layout has no bias of queries, keys and values.
    names = {n: re.sub(r"ls(.)\.gamma", r"gamma_\1", n.replace("storage_tokens", "reg_token")) for n in state}
    timm = {names[n]: named(names[n], *w.shape) for n, w in state.items() if "qkv.bias" not in n}
    x = torch.from_numpy(np.random.RandomState(31).standard_normal((2, 3, 64, 64)).astype(np.float32))
    cls, patches = dinov3().load_published(timm)(x)
    close(patches, [-1.140336, -0.7459657, 0.03940782, 0.07827631, 1.013614])
    close(cls, [1.90511, -0.2392098, 1.947997, -2.991048, 0.9923766])
    alike = {n: timm.get(names[n], torch.zeros_like(w)) for n, w in state.items()}
    assert torch.equal(dinov3().load_published(alike)(x)[1], patches)
    state = dino_state(dinov2)                       # other tensors are named
    refuses("head.weight", dinov2.load_published, state | {"head.weight": torch.zeros(1)})
    del state["blocks.1.attn.qkv.weight"]
    refuses("blocks.1.attn.qkv.weight", dinov2.load_published, state)


def test_dit_golden():
    models = {"dit": small_dit(), "guide": small_dit((64, 192), (2, 1))}
    tables = {"pos_embed": torch.zeros(1, 64, 96), "enc_feat_rope.freqs_cos": torch.zeros(64, 24)}
    for name, model in models.items():               # as the authors save them: with tables that we compute
        torch.save({"model": {}, "model_ema": fill(model).state_dict() | tables}, f"{name}.pth")
    dit, guide = (D.load_dit(f"{name}.pth", model.config) for name, model in models.items())
    x, t, y = noise("x", 3, 64, 16), torch.tensor([0.05, 0.5, 0.93]), torch.tensor([1, 3, 10])
    for dit.grad_checkpoint in (True, False):
        close(dit(x, t, y), [0.4634835, 1.304641, 1.832641, -0.5917304, 1.480623])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0), [-2.462883, 0.7265256, 2.716082, 0.1668278, 1.647818])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0, cfg=2.0), [-2.471891, 0.6587366, 2.816657, 0.06519488, 1.64531])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0, cfg=1.5, guide=guide),
          [-2.788722, 0.2785241, 6.433426, -0.4864499, 2.193898])
    u = torch.tensor([0.1, 0.5, 0.9])
    close(D.flow_loss(dit, noise("z", 3, 64, 16), y, 2.0, x, u), [3.470793, 3.97692, 3.977197])


def test_a_dit_without_a_config():
    """As the authors save them: heads by the widths, the rest by the tensors. --qk_norm counts."""
    said, inputs = [], (noise("x", 2, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([1, 8]))
    for qk_norm in (False, True):
        model = fill(D.DiT(D.DiTConfig(4, 16, num_classes=8, qk_norm=qk_norm, **D.PRESETS["nano"])))
        torch.save(model.state_dict() | {"pos_embed": torch.zeros(1, 16, 160)}, "dit.pth")
        read = D.load_dit("dit.pth")
        assert read.config == model.config and ("blocks.4.attn.k_norm.weight" in read.state_dict()) == qk_norm
        said += [model(*inputs), read(*inputs)]
    assert torch.equal(*said[:2]) and torch.equal(*said[2:]) and not torch.allclose(*said[1:3], rtol=0.1)


def test_inception_golden():
    state = {}                                       # under the names of pytorch-fid
    for ours, w in M.InceptionV3("random").state_dict().items():
        name = ours.replace("stem.", "").replace("mixed.", "Mixed_")
        if name.startswith("fc."):
            state[name] = named(name, *w.shape)
        elif name.endswith(".weight"):
            bn = name.replace(".weight", ".bn.")
            shapes = {bn + kind: w.shape[:1] for kind in ("weight", "bias", "running_mean", "running_var")}
            shapes[name.replace(".weight", ".conv.weight")] = w.shape
            state |= {n: named(n, *shape) for n, shape in shapes.items()}
    torch.save(state, M.INCEPTION)
    model = M.InceptionV3(".")
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 40, 56), dtype=np.uint8))
    pool, logits = model(images)
    close(pool, [0.0, 0.02280515, 0.1771776, 0.5561046, 0.423588])
    close(logits, [0.325866, 0.2813853, -0.2729773, -0.1651827, 0.4200981])
    refuses("float32", model, images.float())
    state["fc.weight"] = state["fc.weight"][:1000]   # torchvision's
    torch.save(state, "other.pth")
    refuses("other.pth", M.InceptionV3, "other.pth")


def test_metrics_golden():
    a = noise("a", 300, 24).numpy()
    b = 1.2 * noise("b", 350, 24).numpy() + 0.1
    for n, value in ((350, 2.704967), (15, 25.84819)):              # 15: singular
        of_a, of_b = ((x[:n].mean(0, dtype=np.float64), np.cov(x[:n].astype(np.float64).T)) for x in (a, b))
        close(M.frechet_distance(*of_a, *of_b), [value], 1e-6)
    close(torch.tensor(M.inception_score(3 * noise("l", 200, 20))), [5.073499, 0.4790747], 1e-6)
    for block in ({}, {"block": 64}):
        found = M.precision_recall(noise("a", 300, 4), 1.2 * noise("b", 350, 4), **block)
        close(torch.tensor(found), [0.88, 0.98], 1e-6)


def test_schedules_golden():
    assert T.latent_shift(256, 128) == pytest.approx(math.sqrt(8))
    assert T.latent_shift(16, 16) == 1
    u = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])                    # authors' noise level is 1 - t
    close(1 - T.sample_time(5, T.latent_shift(256, 128), u), [0, 0.485281, 0.738796, 0.962195, 1], 1e-5)
    stage1 = {0: 0, 0.5: 4e-6, 10: 8e-5, 49.5: 3.96e-4, 50: 4e-4, 99.25: 3.02708250e-4, 150: 1e-4,
              199.9: 4.38648924e-10}                                # epoch of 200: learning rate
    assert np.allclose([S1.lr_at(epoch / 200, 4e-4) for epoch in stage1], list(stage1.values()), rtol=1e-6)
    stage2 = {0: 2e-4, 39.9: 2e-4, 40: 2e-4, 100.5: 1.8567105e-4, 400: 1.1473684e-4, 799: 2.0236842e-5,
              800: 2e-5, 900: 2e-5}                                 # of 800
    assert np.allclose([S2.lr_at(epoch / 800, 2e-4) for epoch in stage2], list(stage2.values()), rtol=1e-6)


def test_center_crop_golden():
    y, x = np.mgrid[:97, :143]
    image = np.stack([(x * 7 + y * 3) % 256, (x * x // 9) % 256, (y * 11 ^ x) % 256], -1).astype(np.uint8)
    crop = np.asarray(T.center_crop(Image.fromarray(image), 32))
    assert crop.shape == (32, 32, 3)
    assert crop[::9, ::9, 2].flatten().tolist() == [
        26, 45, 84, 102, 36, 23, 103, 89, 99, 91, 26, 18, 135, 153, 194, 213]


# ---------------------------------------------------------------- closed forms

def test_flow_and_visible_patches():
    z, eps = noise("z", 3, 4, 5), noise("e", 3, 4, 5)
    z_t = T.flow(z, eps, torch.tensor([1.0, 0.0, 0.25]))
    assert torch.equal(z_t[0], z[0]) and torch.equal(z_t[1], eps[1])            # t = 1 is data
    assert torch.allclose(z_t[2], 0.25 * z[2] + 0.75 * eps[2])
    ranks = torch.rand(5, 16)
    keep = T.random_visible(5, 16, 0.3, ranks)                      # ceil(16 * 0.7) smallest
    assert keep.shape == (5, 12)
    assert torch.equal(ranks.gather(1, keep).max(1).values, ranks.sort(1).values[:, 11])
    assert T.random_visible(5, 16, 0.0).sort(1).values.equal(torch.arange(16).expand(5, -1))


def test_config_sizes():
    """The published ones: width, depth, attention heads."""
    body = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    for name, sizes in body.items():
        assert [*zip(*D.PRESETS[name].values())] == [sizes, (2048, 2, 16)], name
    sizes = {"tiny": (192, 3, 4), "small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16),
             "xl": (1152, 28, 16), "huge": (1280, 32, 16)}
    assert T.SIZES == sizes | {"nano": T.SIZES["nano"]}
    with torch.device("meta"):
        paper = T.RecTok(T.TokenizerConfig())
        xl = D.DiT(D.DiTConfig(**D.PRESETS["XL"]))
    count = sum(p.numel() for n, p in paper.named_parameters() if not n.startswith("sem_"))
    assert abs(count / 1e6 - 172) < 1
    count = sum(p.numel() for p in xl.parameters()) + xl.positions.numel()      # the table is published too
    assert abs(count / 1e6 - 835.3) < 0.05
    assert not any("rope" in n or "positions" in n for n in xl.state_dict())    # tables are not saved
    several = small(teacher_dim=(12, 20)).predict(noise("z", 2, 16, 8))
    assert [features.shape for features in several] == [(2, 16, 12), (2, 16, 20)]


def test_decay_groups_and_ema():
    model, ema = small(), small().requires_grad_(False)
    _, group = S1.optimizer_for(model, 1e-3).param_groups
    decayed = {n for n, p in model.named_parameters() if any(p is other for other in group["params"])}
    assert {"encoder.transformer.0.attn.qkv.weight", "decoder.conv_out.weight"} <= decayed
    free = {"encoder.patch_embed.0.weight", "decoder.decoder_embed.weight", "decoder.mask_token"}
    assert not decayed & free
    assert not any(n.endswith("bias") or "norm" in n or "ln_" in n or "embedding" in n for n in decayed)
    for updates, decay in ((0, 0.1), (8, 0.5), (1000, 0.9)):        # min(decay, (1 + n) / (10 + n))
        with torch.no_grad():
            model.decoder.mask_token.copy_(ema.decoder.mask_token + 1)
        before = ema.decoder.mask_token.clone()
        S1.update_ema(ema, model, 0.9, updates)
        assert torch.allclose(ema.decoder.mask_token - before, torch.tensor(1 - decay), atol=1e-5)
    assert not any(p.requires_grad for p in ema.parameters())       # it holds no graph


def test_shapes():
    """A linear classifier of the pixels is not sure: places, turns and hues differ (76 %; 98 if upright)."""
    data = T.Shapes(32, 1600, seed=1)
    assert torch.equal(data[11][0], T.Shapes(32, 64, seed=1)[11][0])
    assert not torch.equal(data[11][0], T.Shapes(32, 64)[11][0])
    images, labels = images_of(data), torch.arange(1600) % 8
    assert (images.dtype, images.shape, data[11][1]) == (torch.uint8, (1600, 3, 32, 32), 11 % 8)
    x = torch.nn.functional.avg_pool2d(images.double() / 255, 4).flatten(1)
    fitted, held_out = torch.nn.functional.pad(x, (0, 1), value=1.0).split(800)
    solution = torch.linalg.lstsq(fitted, torch.nn.functional.one_hot(labels[:800]).double()).solution
    right = ((held_out @ solution).argmax(1) == labels[800:]).double().mean()
    assert right < 0.85
    # The patches of the teacher of --tiny do, as a VFM's: 35 % after 100 steps, without the dense term 20 %.
    S1.fit_teacher("teacher.pt", 32, steps=100, batch=32)
    head = load("teacher.pt")["head"]
    patches = T.load_teacher("teacher.pt")(T.to_float(images[:256]))
    said = (patches @ head["weight"].T + head["bias"]).argmax(-1)   # (256, N)
    assert (said == labels[:256, None]).double().mean() > 0.27


def test_curves():
    """A panel for each column that varies, and in it a line from the largest value to the least."""
    rows = [{"step": 10, "loss": 3.0, "skipped": 0.0}, {"step": 20, "loss": 1.0, "gan": math.nan},
            {"step": 30, "loss": 2.0, "skipped": 0.0, "psnr": 20.0}]
    with open("log.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    S1.curves(".")
    blue = np.all(np.array(Image.open("curves.png")) == (70, 130, 180), axis=2)     # steelblue
    down, across = blue.nonzero()
    assert blue.shape == (150, 1150) and across.max() < 230                         # one of five places
    assert down[across < 20].min() < 40 and down[abs(across - 115) < 3].max() > 135


class Gaussian(torch.nn.Module):
    """The exact velocity field of data ~ N(mean, 0.5^2) in place of a network; counts its evaluations."""
    config = D.DiTConfig(num_classes=10)
    calls = 0

    def __init__(self, mean=2.0):
        super().__init__()
        self.mean = mean

    def forward(self, x, t, y):
        self.calls += 1
        t = t.view(-1, 1, 1)
        away = (x - t * self.mean) / (0.25 * t ** 2 + (1 - t) ** 2)
        return self.mean + 0.25 * t * away - (1 - t) * away         # E[z | z_t = x] - E[noise | z_t = x]


def test_solvers_and_guidance():
    begin, y = noise("x", 4, 8, 3).double(), torch.zeros(4, dtype=torch.long)
    exact = 2.0 + 0.5 * begin                                       # the flow of a Gaussian is affine
    for solver, order in (("euler", 1), ("heun", 2)):
        coarse, fine = ((D.sample(Gaussian(), begin, y, steps, 1.0, solver=solver) - exact).abs().max().item()
                        for steps in (40, 80))
        assert abs(math.log2(coarse / fine) - order) < 0.25, (solver, coarse, fine)

    def guided(**options):
        strong, weak = Gaussian(), Gaussian(mean=0.0)
        return D.sample(strong, begin, y, 8, 1.0, guide=weak, **options), weak.calls

    plain, calls = guided(cfg=1.0)
    assert calls == 0                                               # w = 1: no second network
    assert guided(cfg=3.0, interval=(2, 3))[1] == 0
    assert guided(cfg=3.0, interval=(0.25, 0.5))[1] == 3            # t = 0.25, 0.375, 0.5: the ends are in
    z, calls = guided(cfg=3.0)
    assert z.mean() > plain.mean() + 1 and calls == 8               # away from the weak model's mean
    counted = Gaussian()
    D.sample(counted, begin, y, 10, 1.0, cfg=2.0)
    assert counted.calls == 20                                      # CFG: the null class, once a step


class Patches(torch.nn.Module):
    """Stands for a tokenizer: its latents are the pixels, so that C = 3 and N = 1,024."""
    config = SimpleNamespace(channels=3, semantic="none")

    def __init__(self, scale=(1.0, 1.0, 1.0), logvar=(-30.0, -30.0, -30.0)):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.logvar = torch.tensor(logvar)

    def encode(self, images):
        mean = images.flatten(2).transpose(1, 2) * self.scale.detach()
        return mean, self.logvar.expand_as(mean)


def test_latent_statistics():
    """Of the posterior's samples: where the KL has emptied a channel, its noise has the deviation 1."""
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    z = T.to_float(images).transpose(0, 1).flatten(1)               # (3, all pixels)
    mean, std = D.latent_statistics(Patches(), [(images[:7], 0), (images[7:], 0)])
    assert torch.allclose(mean, z.mean(1), atol=1e-6)
    assert torch.allclose(std, z.std(1, correction=0), atol=1e-6)
    tokenizer = Patches((1.0, 1.0, 0.01), (-30.0, -30.0, 0.0))
    _, std = D.latent_statistics(tokenizer, [(images, 0)])
    assert torch.allclose(std, torch.cat([z[:2].std(1, correction=0), torch.ones(1)]), atol=1e-3)
    _, of_means = D.latent_statistics(tokenizer, [(images, 0)], of_means=True)      # as for the authors' DiTs
    assert torch.allclose(of_means[2], 0.01 * z[2].std(correction=0), rtol=1e-4)


def test_stage_two_normalises_latents_and_drops_labels(monkeypatch):
    flow_loss = mock.Mock(return_value=torch.zeros(1))
    monkeypatch.setattr(S2, "flow_loss", flow_loss)
    images = torch.randint(0, 256, (4000, 3, 2, 2), dtype=torch.uint8)
    y = torch.arange(4000) % 8
    stats = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])
    S2.stage2_loss(None, Patches(), stats, images, y, num_classes=8, shift=1.0, label_dropout=0.1)
    _, z, kept, _ = flow_loss.call_args.args
    mean, _ = Patches().encode(T.to_float(images))
    assert torch.allclose(z, (mean - stats[0]) / stats[1], atol=1e-4)
    assert abs((kept == 8).float().mean() - 0.1) < 0.02
    assert torch.equal(kept[kept != 8], y[kept != 8])


def descend(model, loss_of, steps, lr):
    """-> the loss before the last of those steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_dit_starts_at_zero_and_learns_two_latents():
    torch.manual_seed(0)
    model = D.DiT(D.DiTConfig(2, 4, (32, 64), (1, 1), (2, 2), 2))
    z, y = noise("z", 2, 4, 4), torch.tensor([0, 1])
    assert model(z, torch.rand(2), y).abs().max() == 0
    for layer in (model.y_embedder["embedding_table"], *model.t_embedder.mlp[::2]):
        assert abs(layer.weight.std() - 0.02) < 0.003
    for embedder, width in ((model.s_embedder, 32), (model.x_embedder, 64)):
        largest = embedder["proj"].weight.abs().max() / math.sqrt(6 / (4 + width))      # Xavier's bound
        assert 0.9 < largest <= 1
    assert torch.allclose(D.flow_loss(model, z, y, 1.0, torch.zeros_like(z)).mean(), z.square().mean())
    descend(model, lambda: D.flow_loss(model, z.repeat(8, 1, 1), y.repeat(8), 1.0).mean(), 150, 1e-2)
    assert (D.sample(model, noise("n", 2, 4, 4), y, 40, 1.0) - z).square().mean() < 0.1


def test_tokenizer_overfits_four_images():
    model = small(channels=32)
    images = T.to_float(images_of(T.Shapes(32, 4)))
    loss = descend(model, lambda: (model.decode(model.encode(images)[0]) - images).square().mean(), 100, 2e-3)
    assert -10 * math.log10(loss / 4) > 20                          # dB


def test_frechet_closed_forms():
    rng = np.random.RandomState(0)
    eye, mu = np.eye(5), rng.randn(5)
    assert M.frechet_distance(mu, eye, mu + 2, eye) == pytest.approx(20)        # equal covariances: |dmu|^2
    x, y = rng.randn(5, 5), rng.randn(5, 5)
    s, t = x @ x.T, y @ y.T
    root = scipy.linalg.sqrtm(s @ t).real                           # as in the first implementations of FID
    assert M.frechet_distance(mu, s, mu, t) == pytest.approx(np.trace(s + t - 2 * root))
    assert abs(M.frechet_distance(mu, s, mu, s)) < 1e-6
    assert M.frechet_distance(mu, s, 2 * mu, t) == pytest.approx(M.frechet_distance(2 * mu, t, mu, s))
    refuses("5 .*4", M.frechet_distance, mu, s, mu[:4], s[:4, :4])
    refuses("finite", M.frechet_distance, mu * np.nan, s, mu, s)
    x = noise("x", 5100, 6) + 10                     # more than one block
    found = M.moments(x)
    assert found["n"] == 5100 and np.allclose(found["mu"], x.double().mean(0))
    assert np.allclose(found["sigma"], np.cov(x.double().numpy(), rowvar=False))
    refuses("1 images", M.moments, x[:1])
    refuses("finite", M.moments, x * math.nan)


def test_scores_are_computed_in_float32():
    """Whatever was set: TF32 comes back afterwards."""
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = settings()
    torch.set_float32_matmul_precision("high")
    try:
        assert M.exact_float32()(settings)() == ("highest", False)
        assert settings() == ("high", before[1])
    finally:
        torch.set_float32_matmul_precision(before[0])


def test_psnr_and_ssim_by_their_definitions():
    a, b = noise("a", 2, 3, 14, 13).sigmoid(), noise("b", 2, 3, 14, 13).sigmoid()
    assert torch.allclose(M.psnr(a, a + 0.1), torch.full((2,), 20.0), atol=1e-4)
    g = torch.exp(-torch.arange(-5.0, 6.0).double() ** 2 / (2 * 1.5 ** 2))
    weights = torch.outer(g, g) / g.sum() ** 2
    # Every whole window of 11 x 11, (2, 3, 4, 3, 11, 11): means, variances, covariance.
    x, y = (image.double().unfold(2, 11, 1).unfold(3, 11, 1) for image in (a, b))
    mean_x, mean_y, xx, yy, xy = ((part * weights).sum((-1, -2)) for part in (x, y, x * x, y * y, x * y))
    luminance = (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
    contrast = (2 * (xy - mean_x * mean_y) + 0.03 ** 2) / (xx - mean_x ** 2 + yy - mean_y ** 2 + 0.03 ** 2)
    assert np.allclose(M.ssim(a, b), (luminance * contrast).mean((1, 2, 3)), atol=1e-5)
    assert torch.allclose(M.ssim(a, a), torch.ones(2))


class Data(list):
    """A data set as simple as they come: (uint8 image, label) pairs, and the names of the classes."""
    classes = list("abcdefgh")

    def __getitem__(self, key):                      # (epoch, index) too
        return super().__getitem__(key[1] if isinstance(key, tuple) else key)


def test_linear_probe_sees_what_is_there():
    class Labels(Patches):                           # its latent holds the class, and nothing else
        config = SimpleNamespace(semantic="nano")
        sem_decoders = [torch.nn.Identity()]

        def encode(self, images):
            labels = images[:, 0, 0, 0].add(1).mul(127.5).round().long()
            return 20 * torch.nn.functional.one_hot(labels, 300).float()[:, None].expand(-1, 16, -1), None

    data = Data((torch.full((3, 32, 32), i % 8, dtype=torch.uint8), i % 8) for i in range(256))
    scores = M.linear_probe(Labels(), data, data, seed=0)
    for kind in ("z", "semantic"):
        assert scores[f"probe_{kind}_1.0"] == scores[f"probe_{kind}_0.5"] == 1
        assert scores[f"probe_{kind}_0.0"] < 0.3     # 300 channels could tell 256 images by their noise


# ---------------------------------------------------------------- invariances

@pytest.mark.parametrize("semantic", ["nano", "mlp"])
def test_patches_are_hidden_whatever_their_order(semantic):
    """Hidden pixels and the order of visible patches cannot matter; to keep every patch equals no mask."""
    model, x = small(semantic=semantic), noise("x", 2, 3, 32, 32)
    keep, order, every = T.random_visible(2, 16, 0.5), torch.randperm(8), torch.arange(16).expand(2, -1)
    hidden = torch.ones(2, 16).scatter(1, keep, 0).view(2, 1, 4, 4)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    z, _ = model.encode(x, keep)
    assert torch.equal(z, model.encode(x + 9 * hidden, keep)[0])
    assert not torch.allclose(z, model.encode(x + 9 * (1 - hidden), keep)[0])
    z_all, _ = model.encode(x)
    assert torch.allclose(z_all, model.encode(x, every)[0], atol=1e-6)
    for read in (model.decode, model.predict):
        assert torch.allclose(read(z_all), read(z_all, every), atol=1e-6)
        assert torch.allclose(read(z, keep), read(z[:, order], keep[:, order]), atol=1e-5)
        assert not torch.allclose(read(z, keep), read(z, keep[:, order]), atol=1e-5)


def test_batches_are_the_same_for_any_number_of_processes():
    def batches(world, micro_batch, first=0):
        """The global batch of each of the steps up to 5, sorted."""
        ranks = [list(S1.batch_indices(10, 8, micro_batch, 0, first, 5, r, world)) for r in range(world)]
        keys = np.array(ranks).reshape(world, 5 - first, -1, 2).swapaxes(0, 1).reshape(5 - first, 8, 2)
        return [sorted(map(tuple, batch)) for batch in keys.tolist()]

    one = batches(1, 8)
    assert one == batches(2, 4) == batches(2, 2) == batches(4, 1)
    assert one[2:] == batches(1, 8, first=2)
    for epoch in range(4):                           # 40 places: each image once an epoch, 4 epochs
        assert sorted(i for e, i in sum(one, []) if e == epoch) == list(range(10))
    first, second = S1.batch_indices(10, 10, 10, 0, 0, 2)
    assert [i for _, i in first] != [i for _, i in second]


class Blank(torch.nn.Module):
    """Stands for a tokenizer: its latents are standard normal variables, and it keeps what it is given."""
    config = SimpleNamespace(grid=16, channels=4)
    sem_decoders = ()

    def encode(self, images, keep):
        self.visible = keep
        mean = torch.zeros(*keep.shape, 4)
        return mean, mean

    def decode(self, z, keep):
        self.z_t = z
        return torch.zeros(len(z), 3, 2, 2)


def draws(seed, B=50, flags="", progress=0.0):
    """What the objective draws for one batch: visible patches (B, K), t (B,), z (B, K, 4), z_t."""
    tokenizer = Blank()
    with mock.patch.object(S1, "flow", side_effect=T.flow) as flow:
        torch.manual_seed(seed)
        args = S1.parse(["--tiny", "--noise_warmup", "0", *flags.split()])
        objective = S1.Objective(tokenizer, args, 2.83)
        objective(torch.zeros(B, 3, 2, 2), [], progress)
    z, _, t = flow.call_args.args
    return tokenizer.visible, t, z, tokenizer.z_t


def test_draws_come_from_the_seed():
    one, again, other = (draws(seed) for seed in (5, 5, 6))
    assert same(one, again)
    assert not any(map(same, one, other))
    visible, t, _, z_t = one
    assert not same(visible[0].sort().values, visible[1].sort().values)        # another set for each image
    assert len(t.unique()) == 50
    variance = t ** 2 + (1 - t) ** 2                                # of two draws; of one it would be 1
    assert abs((z_t.var((1, 2)) / variance).mean() - 1) < 0.05


def test_draws_follow_their_laws():
    found = [draws(seed, 10)[:2] for seed in range(400)]
    shares = [1 - visible.shape[1] / 256 for visible, _ in found]
    assert abs(np.mean(np.equal(shares, 0)) - 0.2) < 0.06           # U(-0.1, 0.4): a fifth is below 0
    assert 0.38 < max(shares) <= 0.4
    assert abs(torch.cat([t for _, t in found]).median() - 1 / 3.83) < 0.02     # of shift 2.83
    uniform, lognormal = (draws(0, 2000, f"--schedule {name}")[1] for name in ("uniform", "lognormal"))
    assert abs(uniform.median() - 0.5) < 0.04
    assert abs(lognormal.median() - 0.5) < 0.04
    assert lognormal.std() < 0.9 * uniform.std()
    # --noise_warmup: from clean latents at the first step to the law of t, after a share of training.
    usual = draws(5)
    assert same(usual, draws(5, progress=0.9))
    first, early, *late = (draws(5, 50, "--noise_warmup 0.5", progress) for progress in (0, 0.125, 0.5, 0.9))
    assert first[1].min() == 1 and same(first[2], first[3])
    assert torch.allclose(1 - early[1], (1 - usual[1]) / 4, atol=1e-6)
    assert all(torch.allclose(x, y, atol=1e-6) for draw in late for x, y in zip(usual, draw))


def every_ratio(model):
    """What a tokenizer makes of 2 images at four mask ratios."""
    for ratio in (0, 0.2, 0.4, 0.3):
        keep = T.random_visible(2, 16, ratio, noise("k", 2, 16))
        z, logvar = model.encode(noise("x", 2, 3, 32, 32), keep)
        yield z, logvar, model.decode(z, keep), model.predict(z, keep)


def convnext():
    net = S1.ConvNeXt().requires_grad_(False)
    for stage in (1, 3, 5, 7):                       # two blocks of each width will do
        net.features[stage] = net.features[stage][:2]
    return net


def both_passes(net):
    """Of the real images, without a graph, and of the decoded ones, with one."""
    x = noise("x", 1, 3, 32, 32)
    with torch.no_grad():
        real = net(x)
    return real, net(x.requires_grad_(True)).detach()


@pytest.mark.parametrize("make, call", [
    (lambda: small(semantic="tiny"), lambda net: list(every_ratio(net))),
    (lambda: T.load_teacher("dinov2_vits14_reg", "random"), lambda net: net(noise("x", 1, 3, 64, 64))),
    (lambda: fill(small_dit()), lambda net: net(noise("z", 2, 64, 16), torch.ones(2), torch.tensor([0, 10]))),
    (lambda: S1.LPIPS("random"), lambda net: net(noise("x", 1, 3, 32, 32), noise("y", 1, 3, 32, 32))),
    (convnext, both_passes)], ids=["tokenizer", "teacher", "dit", "lpips", "convnext"])
def test_networks_compile_to_one_graph(monkeypatch, make, call):
    """What torch.compile traces on CUDA, run by Python here: no graph break, and never too many graphs."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda module: compile_module(module, backend="eager", fullgraph=True))
    torch.compiler.reset()
    net = make()
    strict = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with strict, torch.autocast("cpu", torch.bfloat16):
        plain = call(net)
        T.compile_blocks(torch.device("cuda"), False, net)
        assert same(call(net), plain)


# ---------------------------------------------------------------- exact resume; one process and two

def test_exact_resume_in_mid_epoch(toys, capsys, monkeypatch):
    """11 steps, or 6, a stop and 5 with the images elsewhere: batches of 8 from 13, in two passes."""
    monkeypatch.setattr(S1, "train_micro_batch", S1.train_micro_batch)          # and back at the end
    kept = record_micro_batches()
    shutil.copytree(toys.pictures, "moved")
    then = "--data", "moved/", "--init", "gone.pt"                  # goes on from last.pt, and never opens it
    scored = "--features", "tiny", "--reference", toys.pictures, "--eval_num", 16, "--sample_steps", 2
    for main, stage, out, more in ((S1.main, toys.stage1, "tok", ()), (S2.main, toys.stage2, "dit", scored)):
        flags = "--steps", 11, "--micro_batch", 4, *more
        main(stage(f"{out}1", *flags, "--stop_at", 6))
        main(stage(f"{out}1", *flags, *then))
        kept.clear()
        main(stage(f"{out}2", *flags, "--workers", 1))              # loader processes change nothing
        assert [row["step"] for row in rows_of(f"{out}2")] == [10, 11]
        same_runs(f"{out}1", f"{out}2")
        if out == "tok":
            is_mean(rows_of("tok2")[0], kept[:20])
            is_mean(rows_of("tok2")[1], kept[20:])
    row = rows_of("dit1")[-1]
    assert {"FD", "FD_cfg", "agreement", "agreement_cfg"} <= row.keys()
    X.main(["--dit", "dit1/last.pt", "--steps", "2", "--num", "16", "--save", "x.npz"])
    found = fid_scores(capsys, "x.npz", toys.pictures, "--image_size", 32, "--features", toys.teacher)
    assert row["FD"] == pytest.approx(found["FD"], rel=1e-3)        # as those commands find
    images = images_of(toys.pictures)                               # without flips
    mean, _ = D.latent_statistics(T.load_tokenizer(toys.tokenizer), [(images, None)])
    assert torch.allclose(load("dit1/last.pt")["latent_mean"], mean, atol=1e-5)


def record_micro_batches():
    """Makes stage 1 keep what each micro-batch gives to the log, now and then without a note: -> [{}, ...]"""
    train, kept = S1.train_micro_batch, []

    def record(*inputs):
        logged = train(*inputs)
        if len(kept) % 4 == 1:
            logged["z_std"] = torch.tensor(math.nan)
        kept.append({name: value.item() for name, value in logged.items()})
        return logged

    S1.train_micro_batch = record
    return kept


def is_mean(row, kept):
    """The row holds the means of those numbers: what is not there, or not finite, does not count."""
    for name in kept[-1]:
        values = [one[name] for one in kept if math.isfinite(one.get(name, math.nan))]
        assert row[name] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6), name


def gradients(rank, world, share):
    """Of the tokenizer (GAN off) on 8 images with fixed draws, in passes of `share` images a process."""
    model = small()
    objective = S1.data_parallel(S1.Objective(model, S1.parse(["--tiny"]), 1.0))
    images = noise("x", 8, 3, 32, 32).tanh()
    targets = noise("y", 8, 16, 12)
    keep = T.random_visible(8, 16, 0.25, torch.from_numpy(np.random.RandomState(0).rand(8, 16)))
    t = torch.linspace(0.1, 0.9, 8)
    eps = noise("e", 8, 12, 8)
    weights = dict(pixel=1.0, kl=1e-4, semantic=1.0)
    passes = range(0, 8, share)[rank::world]
    for number, first in enumerate(passes):
        mine = slice(first, first + share)
        objective.require_backward_grad_sync = number == len(passes) - 1
        with (mock.patch.object(S1, "random_visible", lambda *_, **__: keep[mine]),
              mock.patch.object(S1, "sample_time", lambda *_, **__: t[mine]),
              mock.patch.object(torch, "randn", lambda *_, **__: eps[mine])):
            S1.train_micro_batch(objective, None, [lambda _: targets[mine]], None, images[mine], weights, 0.0,
                                 len(passes), contextlib.nullcontext())
    return {name: p.grad for name, p in model.named_parameters()}


def scores_of(toys):
    """Of its tokenizer; mean and std of its latents, from each process's share of the pictures."""
    data = T.ImageFolder(toys.pictures, 32)
    model = T.load_tokenizer(toys.tokenizer)
    mean, std = D.latent_statistics(model, T.local_batches(data, 4))
    scores = M.score_tokenizer(model, data, data, "", M.Features(toys.teacher, "weights", CPU))
    return scores | {"mean": mean[3].item(), "std": std[3].item()}


SAMPLES = "--steps", "1", "--cfg", "1.5", "--num_samples", "140"


def on_two_processes(folder, out):
    """What is tested on two processes, in one launch: each takes 10 s to start."""
    toys = Toys(folder)
    _, rank, world = T.start()
    kept = record_micro_batches()
    for main, flags, name in ((S2.main, toys.stage2, "stage2"), (S1.main, toys.stage1, "stage1")):
        main(flags(f"{out}/{name}a", "--micro_batch", 2, "--stop_at", 2))
        torch.distributed.barrier()
        main(flags(f"{out}/{name}a", "--micro_batch", 2))
        kept.clear()
        main(flags(f"{out}/{name}b", "--micro_batch", 2))
    torch.save(kept, f"{out}/kept{rank}.pt")
    S1.main(toys.stage1(f"{out}/continued"))
    X.main(["--dit", toys.dit, "--save", f"{out}/two.npz", "--batch", "7", *SAMPLES])
    torch.distributed.barrier()
    with open(f"{out}/fid{rank}.json", "w") as f, contextlib.redirect_stdout(f):
        M.main([f"{out}/two.npz", toys.pictures, "--image_size", "32", "--features", toys.teacher, "--json"])
    net = torch.nn.Linear(1, 1)                      # for the discriminator, which has no DDP
    for p in net.parameters():
        p.grad = torch.full_like(p, rank)
    S1.average_gradients(net)
    torch.save({"scores": scores_of(toys), "split": gradients(rank, world, 4), "averaged": net.weight.grad,
                "accumulated": gradients(rank, world, 2),
                "order": M.in_order(torch.arange(rank, 7, world)[:, None], 7)}, f"{out}/found{rank}.pt")
    kl_loss, signals = S1.kl_loss, [signal.SIGTERM] * rank          # rank 1 alone gets one, in its first step

    def with_a_signal(*inputs):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return kl_loss(*inputs)

    S1.kl_loss = with_a_signal
    S1.main(toys.stage1(f"{out}/left", "--steps", 50))
    if rank == 1:                                    # only here the loss is not finite
        S1.kl_loss = lambda *inputs: kl_loss(*inputs) * math.nan
    with contextlib.suppress(FloatingPointError):
        S1.main(toys.stage1(f"{out}/nan"))
        return
    open(f"{out}/gave_up{rank}", "w").close()
    S1.kl_loss = kl_loss
    fails("step", folder, f"{out}/dead")             # at the end, rank 1 dies


@pytest.fixture(scope="module")
def two(toys, tmp_path_factory):
    """The folder that on_two_processes leaves."""
    out = str(tmp_path_factory.mktemp("two"))
    S1.main(toys.stage1(f"{out}/continued", "--stop_at", 2))
    reset_signals()
    status, _, errors = run("on_two_processes", toys.folder, out, world=2, timeout=400)
    assert os.path.exists(f"{out}/gave_up1"), errors
    os.rename(f"{out}/dead.boom", f"{out}/{'failed' if status == 1 else 'passed'}")
    return out


def test_a_run_follows_its_schedule_and_scores_held_out_images(toys):
    scales = [call.args[0] for call in toys.steps1.call_args_list]
    assert scales == [S1.lr_at(k / 4, 1.0, 0.1) for k in (0, 1, 1, 2, 2, 3, 3)]     # twice where a GAN trains
    scales = [call.args[0] for call in toys.steps2.call_args_list]
    assert scales == [S2.lr_at(k / 4, 1.0) for k in range(4)]
    ema, train, held_out, *_ = toys.scores.call_args.args
    assert (train.root, train.flip, held_out.root) == (toys.pictures, False, f"{toys.folder}/held_out")
    assert not any(weight.requires_grad for weight in ema.parameters())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_trains_and_resumes_on_two_processes(two, stage):
    same_runs(f"{two}/{stage}a", f"{two}/{stage}b")
    files = {"config.json", "last.pt", "log.jsonl", "step_2.png", "step_2.pt", "step_4.png"}
    assert files <= set(os.listdir(f"{two}/{stage}a"))
    if stage == "stage1":                            # a row is the mean over both
        is_mean(rows_of(f"{two}/stage1b")[-1], load(f"{two}/kept0.pt") + load(f"{two}/kept1.pt"))


def test_two_processes_give_the_gradient_of_one(two):
    found = load(f"{two}/found0.pt")
    assert found["averaged"].item() == 0.5
    for name, gradient in gradients(0, 1, 8).items():
        for way in ("split", "accumulated"):
            tolerance = 1e-6 * max(1, gradient.abs().max())
            assert torch.allclose(gradient, found[way][name], rtol=1e-4, atol=tolerance), (way, name)


def test_two_processes_give_the_scores_of_one(two, toys, capsys):
    for rank in "01":
        found = load(f"{two}/found{rank}.pt")
        assert found["scores"] == pytest.approx(scores_of(toys), rel=1e-4, abs=1e-6)
        assert found["order"].flatten().tolist() == list(range(7))
    with open(f"{two}/fid0.json") as f:
        both = json.load(f)
    one = fid_scores(capsys, f"{two}/two.npz", toys.pictures, "--image_size", 32, "--features", toys.teacher)
    for name in ("FD", "precision", "recall", "n", "n_reference"):
        assert both[name] == pytest.approx(one[name], rel=1e-5), name


def test_samples_depend_on_seed_and_index_alone(two, toys):
    X.main(["--dit", toys.dit, "--save", "one.npz", *SAMPLES])
    with np.load("one.npz") as one, np.load(f"{two}/two.npz") as both:
        assert one["arr_0"].shape == (140, 32, 32, 3) and one["arr_0"].dtype == np.uint8
        assert np.array_equal(one["labels"], both["labels"])
        assert one["labels"][:5].tolist() == [0, 1, 0, 1, 0]
        assert np.abs(one["arr_0"].astype(int) - both["arr_0"]).max() <= 1      # rounding of float32 sums


def test_two_processes_end_alike(two):
    """Only rank 1 got a signal, a loss that is not finite, an error. What hangs runs out of time."""
    assert load(f"{two}/continued/last.pt")["step"] == 4            # begun by one process
    assert load(f"{two}/left/last.pt")["step"] == 10                # both left, at a row of the log
    assert os.path.exists(f"{two}/gave_up0")
    nan = load(f"{two}/nan/last.pt")
    assert nan["step"] == 3 and all(w.isfinite().all() for w in nan["model"].values())
    assert os.path.exists(f"{two}/failed")


def test_what_is_distilled():
    """All patches or the hidden ones; from z_t or z."""
    visible = T.random_visible(2, 16, 0.5)
    numbers = torch.arange(16.0).view(1, 16, 1).expand(2, -1, 12)       # features that say which patch it is
    hidden = torch.ones(2, 16, dtype=bool).scatter(1, visible, False)
    for flags, targets, from_z_t in (("", numbers, True), ("--target hidden", numbers[hidden], True),
                                     ("--distill latent", numbers, False)):
        model, reads = small(), []
        model.sem_decoders[0].register_forward_hook(lambda _, inputs, __: reads.append(inputs[0].mean()))
        objective = S1.Objective(model, S1.parse(["--tiny", *flags.split()]), 1.0)
        with (mock.patch.object(S1, "random_visible", return_value=visible),
              mock.patch.object(S1, "flow", lambda z, noise, t: z + 1000),
              mock.patch.object(S1, "semantic_loss", return_value=torch.zeros(())) as loss):
            objective(noise("x", 2, 3, 32, 32), [lambda _: numbers], 0.5)
        assert torch.equal(loss.call_args.args[1], targets)
        assert (reads[0] > 500) == from_z_t


def test_the_gan_term_teaches_the_tokenizer_alone():
    found = []
    for w_gan in (0.0, 1.0):
        torch.manual_seed(0)
        discriminator = S1.PatchGAN(8)
        objective = S1.Objective(small(), S1.parse(["--tiny"]), 1.0)
        torch.manual_seed(1)
        S1.train_micro_batch(objective, discriminator, [], None, noise("x", 2, 3, 32, 32).tanh(),
                             dict(pixel=1.0, kl=0.0, gan=w_gan), 0.5, 1, contextlib.nullcontext())
        found.append([p.grad for p in discriminator.parameters()])
    assert all(map(torch.equal, *found))


def test_posterior_samples_have_its_deviation(monkeypatch):
    class Wide(Blank):
        def encode(self, images, keep):
            mean, _ = super().encode(images, keep)
            return 0 * mean, 0 * mean + 2 * math.log(3)

    with mock.patch.object(S1, "flow", side_effect=T.flow) as flow:
        S1.Objective(Wide(), S1.parse(["--tiny"]), 1.0)(torch.zeros(50, 3, 2, 2), [], 0.5)
    assert abs(flow.call_args.args[0].std() - 3) < 0.1
    flow_loss = mock.Mock(return_value=torch.zeros(1))
    monkeypatch.setattr(S2, "flow_loss", flow_loss)
    tokenizer = Patches((0.0, 0, 0), (2 * math.log(3),) * 3)
    images, y = torch.zeros(4000, 3, 2, 2, dtype=torch.uint8), torch.zeros(4000, dtype=torch.long)
    S2.stage2_loss(None, tokenizer, (torch.zeros(3), torch.ones(3)), images, y, 8, 1.0, 0.1)
    assert abs(flow_loss.call_args.args[1].std() - 3) < 0.1


def test_samples_are_decoded_as_the_tokenizer_knows_them():
    z, stats = noise("z", 2, 4, 3), (torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6]))
    decoded = D.decode_normalised(SimpleNamespace(decode=lambda z: z), stats, z)
    assert torch.equal(decoded, z * stats[1] + stats[0])


# ---------------------------------------------------------------- training

def test_ablations_train(toys):
    """Every switch of the page trains, and changes the numbers."""
    rows = {}
    for flags in ("", "--distill latent", "--distill none", "--target hidden", "--decode clean", "--gamma 0",
                  "--semantic mlp", "--semantic_loss l1", "--schedule uniform", "--schedule lognormal",
                  "--shift 3", "--mask_max 0 --mask_min 0", "--w_gan 0", "--noise_warmup 0.9",
                  f"--teacher {toys.teacher},{toys.teacher}"):
        S1.main(toys.stage1(f"run{len(rows)}", "--steps", 3, "--shift", 2, *flags.split()))
        rows[flags] = rows_of(f"run{len(rows)}")[-1]
    assert T.load_tokenizer("run14/last.pt").config.teacher_dim == (96, 96)
    losses = [row["loss"] for row in rows.values()]
    assert all(map(math.isfinite, losses))
    assert len(set(losses)) == len(losses), dict(zip(rows, losses))
    assert "semantic" not in rows["--distill none"]
    assert "gan" not in rows["--w_gan 0"]


def test_another_data_set(toys, monkeypatch):
    """Arrays in place of open_data: both stages train on them, and score."""
    data = Data((T.Shapes(32, 24)[i][0], i % 12) for i in range(24))
    data.classes = list("abcdefghijkl")
    for stage in (S1, S2):
        monkeypatch.setattr(stage, "open_data", lambda args, size: (data, data))
    S1.main(toys.stage1("tok"))
    with mock.patch.object(S2, "generate", wraps=S2.generate) as generate:
        S2.main(toys.stage2("dit", "--tokenizer", "tok/last.pt", "--qk_norm"))
    assert generate.call_args.args[5][:8].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]         # spread over all 12
    assert load("dit/last.pt")["classes"] == data.classes and load("dit/last.pt")["config"]["qk_norm"]
    assert "probe_z_1.0" in rows_of("tok")[-1]


def test_a_law_that_does_not_end_in_noise_is_refused(toys, monkeypatch):
    """Or turns back on its way: by both trainers, before they train."""
    for law in (lambda u: 1 - 0.9 * u, lambda u: 0.9 - 0.9 * u, lambda u: u,
                lambda u: 1 - (7.853981634 * u).sin() ** 2):
        monkeypatch.setattr(T, "sample_time", lambda n, shift, u=None, *_, **__: law(u))
        for main, flags in ((S1.main, toys.stage1), (S2.main, toys.stage2)):
            refuses("sample_time", main, flags("out"))
            assert not os.path.exists("out/last.pt")


def test_saves_at_least_twenty_times(toys, monkeypatch):
    """However short the run: a kill loses a twentieth of it."""
    saved = []
    monkeypatch.setattr(S1, "save", lambda path, file: saved.append((os.path.basename(path), file["step"])))
    S1.main(toys.stage1("out", "--steps", 30, "--w_gan", 0))
    steps = [step for name, step in saved if name == "last.pt"]
    assert max(np.diff([0, *steps])) <= 30 / 20 and steps[-1] == 30
    assert 1 < len(saved) - len(steps) < 10          # milestones


def test_decoder_finetuning(toys):
    """Stage 1b trains on the latents that the DiT reads, those of the EMA encoder, and ships that encoder."""
    shutil.copy(toys.tokenizer, "tok.pt")
    S1.main(toys.stage1("out", "--finetune_decoder", "tok.pt", "--stop_at", 2))
    S1.main(toys.stage1("out", "--finetune_decoder", toys.tokenizer))           # the same by another path
    before, after = load(toys.tokenizer), load("out/last.pt")
    encoder = [name for name in before["model"] if name.startswith("encoder.")]
    assert not all(torch.equal(before["model"][n], before["model_ema"][n]) for n in encoder)
    for part in ("model", "model_ema"):
        assert all(torch.equal(after[part][n], before["model_ema"][n]) for n in encoder)
        assert not torch.equal(after[part]["decoder.ffn.1.weight"], before[part]["decoder.ffn.1.weight"])
        assert not any(n.startswith("sem_") for n in after[part])
    tuned = T.load_tokenizer("out/last.pt")
    assert tuned.config.semantic == "none"
    assert T.fingerprint(tuned) == T.fingerprint(T.load_tokenizer(toys.tokenizer))      # one DiT fits both
    torch.save(before | {"model_ema": before["model"]}, "tok.pt")   # another one where the first was
    refuses("fingerprint of the tokenizer", S1.main, toys.stage1("out", "--finetune_decoder", "tok.pt"))


def test_init_of_a_tokenizer(toys):
    """At another size positions are interpolated; semantic decoders that do not fit are fresh."""
    state, own = T.read_tokenizer(toys.tokenizer)
    larger = T.load_tokenizer(toys.tokenizer, replace(own, image_size=64))
    for name, w in larger.state_dict().items():
        if name.endswith("positional_embedding"):    # corners stay near, the mean stays
            old = state[name].view(4, 4, -1)
            assert torch.allclose(w.mean(1), old.mean((0, 1)), atol=0.05)
            assert torch.cosine_similarity(w[0, 0], old[0, 0], 0) > 0.9
        else:
            assert torch.equal(w, state[name]), name
    # The trainer: the learning rate of its first step is 0, so its weights are those it began with.
    S1.main(toys.stage1("out", "--init", toys.tokenizer, "--image_size", 64, "--stop_at", 1))
    raw = T.load_tokenizer(toys.tokenizer, replace(own, image_size=64), ema=False)
    assert same(load("out/last.pt")["model"], raw.state_dict())
    assert T.load_tokenizer("out/last.pt").config.image_size == 64

    with pytest.warns(UserWarning, match=toys.tokenizer):
        model = T.load_tokenizer(toys.tokenizer, replace(own, teacher_dim=20, image_size=64))
    assert model.predict(noise("z", 1, 64, 16)).shape == (1, 64, 20)
    assert torch.equal(model.decoder.mask_token, state["decoder.mask_token"])
    coarser = replace(own, patch_size=16, image_size=64)
    refuses("patch_embed", T.load_tokenizer, toys.tokenizer, coarser)


def test_init_of_a_dit_with_other_classes(toys):
    config = D.load_dit(toys.dit).config
    with pytest.warns(UserWarning, match=toys.dit):
        model = D.load_dit(toys.dit, replace(config, num_classes=5))
    _, old = T.read_checkpoint(toys.dit)
    table = "y_embedder.embedding_table.weight"
    for name, w in model.state_dict().items():
        assert name == table or torch.equal(w, old[name]), name
    rows = model.state_dict()[table]
    assert len(rows) == 6 and not torch.equal(rows[0], old[table][0])
    assert torch.equal(rows[-1], old[table][-1])                    # the null class
    for change in (dict(channels=8), dict(depth=(4, 3))):
        refuses("x_embedder|blocks", D.load_dit, toys.dit, replace(config, **change))
    # The trainer: after a step of no length, its weights are those it began with.
    S2.main(toys.stage2("out", "--init", toys.dit, "--stop_at", 1, "--lr", 1e-12))
    raw, now = load(toys.dit)["model"], load("out/last.pt")["model"]
    assert all(torch.allclose(raw[name], now[name], atol=1e-9) for name in raw)


# ---------------------------------------------------------------- pictures and folders of data

def test_flips_depend_on_seed_epoch_and_index():
    save_picture("root/ramp.png", torch.arange(32, dtype=torch.uint8).expand(3, 32, 32))

    def corners(seed):
        data = T.ImageFolder("root", 32, flip=True, seed=seed)
        return [data[epoch, 0][0][0, 0, 0].item() for epoch in range(16)]

    assert set(corners(0)) == {0, 31}
    assert corners(0) == corners(0) != corners(1)


def test_what_counts_as_data():
    """Leavings of editors, macOS and network drives do not, every extension does; loops are walked once."""
    kinds = {"n01/0.jpg": "CMYK", "n01/deep/1.png": "P", "n02/0.bmp": "RGB", "n02/1.gif": "L",
             "n02/2.TIFF": "RGBA", "n02/3.ppm": "RGB", "n02/4.jfif": "RGB", "n02/5.webp": "RGBA"}
    for name, mode in kinds.items():
        plain(f"root/{name}", 7 if mode in "LP" else (9, 9, 9, 200)[:len(mode)], mode)
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        plain(f"root/{folder}/0.jpg")
        plain(f"root/n01/{folder}/0.jpg")
    for name in (".hidden.png", "n01/._0.jpg", "n01/notes.txt", "n02/6.eps", "n02/7.pdf"):
        with open(f"root/{name}", "w") as f:
            f.write("no image")
    os.symlink("..", "root/n01/up")
    os.symlink("../n01/deep", "root/n02/twice")
    data = T.ImageFolder("root", 32)
    assert data.classes == ["n01", "n02"]
    assert [os.path.relpath(os.fsdecode(path), "root") for path in data.paths] == list(kinds)
    images, labels = zip(*data)
    assert labels == (0, 0, 1, 1, 1, 1, 1, 1) and not data.bad
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in images)
    os.remove("root/n02/twice")
    flat = T.ImageFolder("root/n02", 32)
    assert (len(flat), flat[1][1], flat.classes) == (6, 0, ["0"])
    with open("root/n01/0.jpg", "wb") as f:
        f.write(b"\xff\xd8 no jpeg")
    data = T.ImageFolder("root", 32)
    with pytest.warns(UserWarning, match="0.jpg"):
        assert torch.equal(data[0][0], data[1][0])                  # replaced by the next, and counted
    assert data.bad.item() == 1


def test_a_folder_that_would_move_labels_is_refused():
    for name in ("mixed/0", "mixed/previews/0", "gap/a/0", "whole/train/c/0", "whole/val/c/0"):
        plain(f"{name}.png")
    os.mkdir("gap/b")
    os.mkdir("empty")
    plain("twice/a/0.png")
    plain("lost/a/0.png")
    os.symlink("a", "twice/b")                       # a class of links alone, and one that is not mounted
    os.symlink("/nowhere", "lost/b")
    for names in ("mixed/0.png.*previews", "gap/b", "whole/train", "empty", "twice/b", "lost/b"):
        refuses(names, T.ImageFolder, names.split("/")[0], 32)
    refuses("nowhere", T.ImageFolder, "nowhere", 32, error=FileNotFoundError)


def test_the_folder_val_beside_the_data(toys):
    """Stage 1 scores on it; stage 2 does not even open it."""
    shutil.copytree(toys.pictures, "data/train")
    os.makedirs("data/val/empty")
    flags = "out", "--data", "data/train", "--stop_at", 1
    S2.main(toys.stage2(*flags))
    args = S1.parse(toys.stage1(*flags))
    refuses("val/empty", S1.open_held_out, args, 32, None)
    plain("data/val/empty/0.png")
    assert len(S1.open_held_out(args, 32, None)) == 1


def test_deep_and_transparent_pictures():
    """16 bits of grey stay a ramp, and what is transparent lies on white."""
    save_picture("root/0.png", Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))))
    clip_art = np.zeros((64, 64, 4), np.uint8)
    clip_art[20:40, 20:40, 3] = 255                  # an opaque black square; elsewhere transparent black
    Image.fromarray(clip_art).save("root/1.png")
    Image.fromarray(clip_art[..., 2:], "LA").save("root/2.png")
    palette = Image.fromarray(clip_art[..., 3], "P")
    palette.putpalette([0] * 768)
    palette.save("root/3.png", transparency=0)
    deep, *transparent = (image.float() for image, _ in T.ImageFolder("root", 64))
    assert (deep[0, 32] - torch.linspace(0, 255, 64)).abs().max() <= 1
    for image in transparent:
        assert image[:, 2, 2].min() == 255
        assert image[:, 30, 30].max() == 0


def test_hostile_images(toys):
    """Mutations of good files among good ones: training goes on, warns, counts."""
    rng = np.random.RandomState(0)
    os.mkdir("root")
    for i, (image, _) in enumerate(T.Shapes(40, 160)):
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG" if i % 2 else "JPEG")
        file = bytearray(buffer.getvalue())
        if 30 <= i < 80:                             # truncated, down to nothing
            del file[rng.randint(0, len(file)):]
        elif 80 <= i < 120:
            for place in rng.randint(0, len(file), 5):
                file[place] ^= 1 << rng.randint(8)
        elif 120 <= i < 140:
            file[:] = rng.bytes(500)
        elif i > 140 and i % 2:                      # a PNG that declares 3.6 gigapixels
            file[16:24] = (60000).to_bytes(4, "big") * 2
        with open(f"root/{i:03d}.png", "wb") as f:
            f.write(file)
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save("root/animated.webp", save_all=True, append_images=frames[1:])
    data = T.ImageFolder("root", 32)
    with pytest.warns(UserWarning, match="root/"):
        assert images_of(data).shape == (161, 3, 32, 32)
    assert 60 < data.bad < 130
    with pytest.warns(UserWarning, match="root/"):
        S1.main(toys.stage1("out", "--data", "root", "--steps", 20, "--stop_at", 10))
    assert rows_of("out")[-1]["unreadable"] > 10
    os.mkdir("all_bad")
    shutil.copy("root/130.png", "all_bad")
    with pytest.warns(UserWarning, match="130.png"):
        refuses("all_bad", lambda: T.ImageFolder("all_bad", 32)[0])


def test_postscript_is_not_executed(monkeypatch):
    """Whatever its extension says: Pillow would start Ghostscript."""
    started = mock.Mock(return_value=Image.new("RGB", (40, 40)).im)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    plain("root/1.png")
    with open("root/0.jpg", "w") as f:
        f.write("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n%%EOF\n")
    Image.open("root/0.jpg").load()
    assert started.call_count == 1                   # it is what Pillow takes for PostScript
    with pytest.warns(UserWarning, match="0.jpg"):
        assert T.ImageFolder("root", 32)[0][0].shape == (3, 32, 32)
    assert started.call_count == 1


# ---------------------------------------------------------------- checkpoints and published files

def test_checkpoints_of_other_programs():
    for model, read in ((small(semantic="none"), lambda: T.load_tokenizer("theirs.pt")),
                        (fill(small_dit()), lambda: D.load_dit("theirs.pt", small_dit().config))):
        weights = model.state_dict()
        zeros = {n: torch.zeros_like(w) for n, w in weights.items()}
        layouts = {"ours": {"model": zeros, "model_ema": weights},
                   "averaged": {"model": zeros, "ema": weights},
                   "bare": weights,
                   "EMA off": {"model": weights, "model_ema": None},
                   "state_dict": {"state_dict": weights, "epoch": 3},
                   "foreign config": {"model": weights, "config": {"lr": 1e-4}}}
        for prefix in ("module.", "model.", "_orig_mod.", "module._orig_mod."):
            layouts[prefix] = {"model": {prefix + n: w for n, w in weights.items()}}
        for name, file in layouts.items():
            torch.save(file, "theirs.pt")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                assert same(read().state_dict(), weights), name
            warned = any("theirs.pt" in str(warning.message) for warning in said)
            assert warned == (name not in ("ours", "averaged", "bare")), name      # raw weights were taken


class Code:
    """What a hostile file makes of it: a call."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_file_that_is_no_checkpoint_is_named(monkeypatch):
    """And none runs code."""
    with monkeypatch.context() as other:
        other.setitem(T.SIZES, "odd", (64, 1, 2))
        torch.save(small(encoder="odd", semantic="none").state_dict(), "odd.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"a": 1}, "other.pt")
    torch.save({"model": Code()}, "code.pth")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    texts = {"lfs.pth": pointer, "lfs.safetensors": pointer, "page.pth": "<!DOCTYPE html><html>log in</html>"}
    for name, text in texts.items():
        with open(name, "w") as f:
            f.write(text)
    with open("other.pt", "rb") as whole, open("truncated.pt", "wb") as f:
        f.write(whole.read()[:500])
    for name in os.listdir():
        for read in (T.load_tokenizer, D.load_dit, T.load_teacher):
            with pytest.raises(ValueError, match=name) as error:
                read(name)
            assert "weights_only" not in str(error.value)           # torch's advice, and a dangerous one
            assert name != "code.pth" or "mkdir" in str(error.value)
    refuses("gone.pt", T.load_tokenizer, "gone.pt", error=FileNotFoundError)
    np.savez("bad.npz", arr_0=np.array([Code()], dtype=object), mu=np.array([Code()], dtype=object))
    refuses("bad.npz", M.read, "bad.npz")
    assert not os.path.exists("owned")
    for script in (T, D, M, S1, S2, X):
        with open(script.__file__) as f:
            source = f.read()
        assert not re.search("weights_only=False|allow_pickle=True|http://|pickle.load", source), script


def test_safetensors():
    places = {"byte": ("U8", [1], 0, 1), "a": ("F32", [2, 3], 1, 25), "b": ("BF16", [], 25, 27)}
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
              for name, (dtype, shape, begin, end) in places.items()}
    head = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    file = len(head).to_bytes(8, "little") + head + b"\7" + np.arange(6, dtype="f4").tobytes() + b"\xc0\x3f"
    with open("x.safetensors", "wb") as f:
        f.write(file)
    want = {"byte": torch.tensor([7], dtype=torch.uint8), "a": torch.arange(6.0).view(2, 3),
            "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    assert same(T.read_weights("x.safetensors"), want)
    with open("x.safetensors", "wb") as f:
        f.write(file[:-3])
    refuses("x.safetensors", T.read_weights, "x.safetensors")


def test_downloads(monkeypatch, capsys):
    """One process a machine, over https, with the hash that stands in the name."""
    calls = []

    def download(url, path, hash_prefix=None):
        calls.append((url, hash_prefix))
        open(path, "w").close()

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("LOCAL_RANK", "1")
    T.weight_file("vgg16-397923af.pth", "weights")
    assert calls == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    for _ in range(2):                               # the second time it is there
        assert T.weight_file("vgg16-397923af.pth", "weights") == "weights/vgg16-397923af.pth"
    assert calls == [("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")]
    assert "licen" not in capsys.readouterr().out
    T.weight_file("vit_large_patch16_dinov3.lvd1689m.safetensors", "weights")
    assert "ai.meta.com/resources/models-and-libraries/dinov3-license" in capsys.readouterr().out
    assert all(T.download_address(files[-1]).startswith("https://") for _, *files in T.TEACHERS.values())
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=ConnectionError))
    names = "vgg.pth", "convnext_small-0c510722.pth"                # all that is missing, and where it is
    refuses("weights/vgg.pth https://(.|\n)*next_small", T.fetch_weights, names, "weights", error=OSError)


def test_teachers(monkeypatch):
    """The publisher's file, else NAME.safetensors, else the one that downloads; each is known by its path."""
    teacher, x = T.load_teacher("dinov2_vits14", "random"), noise("x", 1, 3, 64, 64)
    assert teacher(x).shape == (1, 16, 384)          # 64 px at patch 14 is seen as 56 px
    assert not teacher(x).requires_grad
    refuses("60", teacher, x[..., :60, :60])
    refuses("dinov9", T.load_teacher, "dinov9")
    _, published, timm = T.TEACHERS["dinov3_vits16"]
    read = mock.Mock(side_effect=ValueError("empty"))
    monkeypatch.setattr(T, "read_weights", read)
    monkeypatch.setattr(T, "weight_file", lambda name, folder: os.path.join(folder, name))
    os.mkdir("weights")
    for name in (timm, "dinov3_vits16.safetensors", published):     # each goes before those that were there
        open(f"weights/{name}", "w").close()
        for asked in ("dinov3_vits16", f"weights/{name}"):
            refuses(name, T.load_teacher, asked, "weights")
            assert os.path.samefile(read.call_args.args[0], f"weights/{name}")


# ---------------------------------------------------------------- scores

def fid_scores(capsys, *flags):
    """What `python fid.py ... --json` prints."""
    capsys.readouterr()
    M.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)       # all of stdout


def shapes_npz(path, number, noisiness=0):
    """Shapes with noise of this standard deviation, in the layout of ADM."""
    images = images_of(T.Shapes(32, number)).permute(0, 2, 3, 1).numpy()
    images = images + noisiness * np.random.RandomState(0).randn(*images.shape)
    np.savez(path, arr_0=np.clip(images, 0, 255).astype(np.uint8))
    return path


def test_fid_command(toys, capsys):
    flags = "--features", toys.teacher, "--batch", "16"
    with np.load(shapes_npz("clean.npz", 120)) as file:
        for i, image in enumerate(file["arr_0"]):
            save_picture(f"folder/{i:03d}.png", Image.fromarray(image))
    # The real command, once; it adds the extension.
    status, _, errors = run("fid.py", "--save_stats", "reference", "folder", "--image_size", 32, *flags)
    assert status == 0, errors
    with np.load("reference.npz") as file:
        assert (int(file["n"]), int(file["image_size"]), file["mu"].shape) == (120, 32, (96,))
        np.savez("row.npz", mu=file["mu"][None], sigma=file["sigma"])           # as others write it
    distances = []
    for noisiness in (0, 5, 20, 60):                 # more noise, farther
        samples = shapes_npz("samples.npz", 120, noisiness)
        distances.append(fid_scores(capsys, samples, "reference.npz", *flags)["FD"])
    assert abs(distances[0]) < 1e-6
    assert distances == sorted(distances)
    for reference, batch in (("reference.npz", 50), ("row.npz", 16)):
        other = fid_scores(capsys, samples, reference, "--features", toys.teacher, "--batch", batch)
        assert other["FD"] == pytest.approx(distances[-1], rel=1e-6)
    found = fid_scores(capsys, "clean.npz", "folder", *flags)
    assert found["precision"] == found["recall"] == 1
    assert found["n"] == found["n_reference"] == 120
    with np.load("clean.npz") as clean, np.load(samples) as noisy:
        np.savez("wide.npz", arr_0=np.concatenate([clean["arr_0"][:40], noisy["arr_0"][:40]]))
    found = fid_scores(capsys, shapes_npz("few.npz", 40), "wide.npz", *flags)   # they lie in half of it
    assert found["precision"] == 1 and found["recall"] < 0.9
    # Few images still have a distance; of three there is no third neighbour.
    for number in (3, 4):
        few = shapes_npz("few.npz", number)
        found = fid_scores(capsys, few, few, *flags)
        assert abs(found["FD"]) < 1e-6 and ("precision" in found) == (number == 4)


def test_fid_command_on_inception(capsys, monkeypatch):
    """FID, and IS of ten images or more; Inception, which has its golden numbers, is stood for."""
    monkeypatch.setattr(M.InceptionV3, "forward",
                        lambda net, images: (images.float().mean((2, 3)), 99 * torch.eye(len(images), 1008)))
    for number in (9, 12):
        few = shapes_npz("few.npz", number)
        found = fid_scores(capsys, few, few, "--weights", "random")
        assert abs(found["FID"]) < 1e-6 and found["features"] == "RANDOM_inception"
        assert ("IS" in found) == (number == 12)
    assert (found["IS"], found["IS_std"]) == pytest.approx((1.2, 0.4))          # two of ten parts hold two


def test_bad_metric_input_is_named(toys):
    inception = SimpleNamespace(name="inception", net=SimpleNamespace(width=2))
    side = {"path": "ref.npz", "mu": np.zeros(2), "sigma": np.eye(2), "features": "RANDOM_inception"}
    refuses("ref.npz.*RANDOM", M.measure, inception, side, 64, 0)
    good = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez("empty.npz", x=good)
    np.savez("float.npz", arr_0=good / 255)
    np.savez("nchw.npz", arr_0=good.transpose(0, 3, 1, 2))
    np.savez("diagonal.npz", mu=np.zeros(96), sigma=np.ones(96))
    np.savez("narrow.npz", mu=np.zeros(96), sigma=np.eye(64))
    np.savez("nan.npz", mu=np.full(96, np.nan), sigma=np.eye(96))
    np.save("array.npy", good)
    with open(shapes_npz("good.npz", 4), "rb") as whole, open("truncated.npz", "wb") as f:
        f.write(whole.read()[:5000])
    for name in set(os.listdir()) - {"good.npz"}:
        refuses(name, M.read, name)
    refuses("good.npz", M.main, ["--save_stats", "good", "good.npz", "--features", toys.teacher])
    data = M.read("good.npz")["images"]
    sent = pickle.dumps(data)                        # what a loader that is not forked receives: the path
    assert len(sent) < 2000 and torch.equal(pickle.loads(sent)[3][0], T.Shapes(32, 4)[3][0])
    refuses("gone.npz", M.read, "gone.npz", error=FileNotFoundError)
    np.savez("wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    refuses("wide.npz", M.main, ["good.npz", "wide.npz", "--features", toys.teacher])
    np.savez("one.npz", arr_0=good[:1])
    refuses("1 images", M.main, ["one.npz", "good.npz", "--features", toys.teacher])


def test_statistics_of_features(toys, capsys):
    """They are known by the network's content, not its path, and written whole or not at all."""
    samples = shapes_npz("samples.npz", 8)
    shutil.copy(toys.teacher, "teacher.pt")
    save_stats = [samples, "--features", toys.teacher, "--save_stats"]
    M.main([*save_stats, "ref.npz"])
    with mock.patch.object(np, "savez", side_effect=OSError(28, "No space left on device")):
        refuses("ref.npz", M.main, [*save_stats, "ref.npz"], error=OSError)
    refuses("nowhere", M.main, [*save_stats, "nowhere/ref.npz"])    # before hours of work
    assert sorted(os.listdir()) == ["ref.npz", "samples.npz", "teacher.pt"]
    found = fid_scores(capsys, samples, "ref.npz", "--features", "./teacher.pt")
    assert abs(found["FD"]) < 1e-6
    config = load(toys.teacher)["config"]            # another file under the same name
    torch.save({"config": config, "model": T.DINO(**config).state_dict()}, "teacher.pt")
    refuses("ref.npz", M.main, [samples, "ref.npz", "--features", "teacher.pt"])


def test_eval_only_against_a_reference(toys, monkeypatch):
    """rFD against a file stands beside that against the originals."""
    scores = {}
    monkeypatch.setattr(S1, "score_tokenizer", lambda *a, **k: scores.update(M.score_tokenizer(*a, **k)))
    features = M.Features(toys.teacher, "weights", CPU)
    model = T.load_tokenizer(toys.tokenizer)
    images = images_of(toys.pictures)
    with torch.no_grad():
        decoded = T.to_uint8(model.decode(model.encode(T.to_float(images))[0]))
    M.main(["--save_stats", "ref.npz", shapes_npz("samples.npz", 20), "--features", toys.teacher])
    S1.main(["--tiny", "--eval_only", toys.tokenizer, "--data", toys.pictures, "--features", toys.teacher,
             "--reference", "ref.npz", "--out", "out"])
    assert M.open_reference("samples.npz", features, 32, 0).keys() == {"mu", "sigma", "n", "name"}
    found = M.collect([features(decoded)])
    assert scores["rFD"] == pytest.approx(M.frechet(found, M.collect([features(images)])), rel=1e-3)
    assert scores["rFD_reference"] == pytest.approx(M.frechet(found, M.read("ref.npz")), rel=1e-3)
    assert scores["psnr"] == pytest.approx(M.psnr(images / 255, decoded / 255).mean().item(), rel=1e-2)
    assert {"ssim", "probe_z_1.0", "probe_semantic_0.25"} <= scores.keys()
    assert os.path.exists("out/eval.png")


# ---------------------------------------------------------------- sampling

def draw(toys, *flags):
    """-> the picture that sample.py writes."""
    X.main(["--dit", toys.dit, "--steps", "2", "--out", "x.png", *flags])
    return Image.open("x.png").copy()


def test_pictures(toys):
    usual = draw(toys)
    assert usual.size == (98 * 2, 98 * 4)            # one class a column, 32 px enlarged to 96, a border
    assert draw(toys, "--classes", "1", "two words", "0", "--num", "5").size == (98 * 3, 98 * 2)
    path, end_of_it = draw(toys, "--trajectory", "--steps", "9"), draw(toys, "--steps", "9", "--num", "2")
    assert path.size == (98 * 8, 98 * 2)             # one row a sample, and its last column the sample
    for row in (0, 98):
        assert path.crop((98 * 7, row, 98 * 8, row + 98)) == end_of_it.crop((row, 0, row + 98, 98))
    guide = "--guide", toys.dit.replace("last.pt", "step_4.pt"), "--cfg", "3"
    guided = draw(toys, "--cfg", "3"), draw(toys, *guide)
    others = draw(toys, "--solver", "heun"), draw(toys, "--seed", "1"), *guided
    assert usual not in others and guided[0] != guided[1]
    assert draw(toys, *guide, "--interval", "0.9", "1") == usual    # which takes its steps at t = 0 and 0.5
    by_name = [draw(toys, "--classes", name) for name in ("two words", "zürich 東京", "0", "1")]
    assert by_name[:2] == by_name[2:]
    assert by_name[0] != by_name[1]
    for unknown in ("2", "three words", "-1"):
        refuses(unknown, draw, toys, f"--classes={unknown}")


def test_bad_sampling_input_is_named_before_any_work(toys):
    for wrong in ("--num 0", "--num -1 --save x.npz", "--steps 0", "--cfg 0.9", "--cfg inf", "--cfg nan",
                  "--interval 0.9 0.1", "--batch 0", "--save x.npz --trajectory", "--seed -1",
                  "--guide small.pt"):
        bad_flags(wrong.split()[0], X.main, ["--dit", "gone.pt", *wrong.split()])
    for wrong in ("--out picture", "--out nowhere/x.png", "--stats nowhere/x.npz", "--save x.jpg"):
        flag, value = wrong.split()
        refuses(value, X.main, ["--dit", "gone.pt", flag, value])   # the DiT is missed later
    assert os.listdir() == []
    config, other = D.load_dit(toys.dit).config, {"latent_mean": 0, "fingerprint": "another tokenizer's"}
    for change, more in (({"grid": 8}, {}), ({"channels": 8}, {}), ({"num_classes": 3}, {}), ({}, other)):
        guide = save("guide.pt", D.DiT(replace(config, **change)), **more)
        refuses("guide.pt.*other latents or classes", draw, toys, "--cfg", "2", "--guide", guide)
    refuses(toys.dit, draw, toys, "--tokenizer", toys.dit)


def test_another_tokenizer(toys):
    """Found beside a DiT that was moved, also where its folder is a link; another is refused, or a warning
    where it is named by hand."""
    usual = draw(toys)
    shutil.copytree(toys.folder, "there", symlinks=True)
    os.mkdir("disk")
    os.rename("there/dit", "disk/dit")
    os.symlink("../disk/dit", "there/dit")
    file = load("there/dit/last.pt")
    assert draw(toys, "--dit", "there/dit/last.pt") == usual
    os.symlink(os.path.dirname(toys.dit), "elsewhere")              # or that link stands elsewhere
    assert draw(toys, "--dit", "elsewhere/last.pt") == usual
    S1.main(toys.stage1("there/tok", "--steps", 5))                 # and runs go on
    assert load("there/tok/last.pt")["step"] == 5
    os.rename("there/tok", "there/elsewhere")
    refuses("tok/last.pt", draw, toys, "--dit", "there/dit/last.pt")
    other = save("other.pt", small(channels=16))
    torch.save(file | {"tokenizer": os.path.abspath(other)}, "dit.pt")
    refuses("other.pt", draw, toys, "--dit", "dit.pt")
    with pytest.warns(UserWarning, match="other.pt"):               # as the authors' must be
        draw(toys, "--dit", "dit.pt", "--tokenizer", other)
    # Stage 2 does not go on with other latents.
    refuses("fingerprint of the tokenizer", S2.main,
            toys.stage2(os.path.dirname(toys.dit), "--tokenizer", other, "--steps", 9))


def test_saved_samples_go_on(toys):
    """Where they were interrupted, but not with samples of another recipe or other weights."""
    shutil.copy(toys.dit, "dit.pt")
    flags = ["--dit", "dit.pt", "--tokenizer", toys.tokenizer, *SAMPLES, "--save", "x.npz"]

    def samples(*more):
        X.main([*flags, *more])
        with np.load("x.npz") as file:
            images = file["arr_0"]
        os.remove("x.npz")
        return images

    whole = samples()
    with mock.patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        samples()                                    # interrupted before its chunks are removed
    refuses("x.npz", X.main, flags)                  # it is there already
    os.remove("x.npz")
    folder, = (name for name in os.listdir() if name.endswith(".parts"))
    os.remove(f"{folder}/000000.npy")
    np.save(f"{folder}/000128.npy", np.zeros((12, 32, 32, 3), np.uint8))
    assert samples("--steps", "2")[128:].any()
    rest = samples()
    assert np.array_equal(rest[:128], whole[:128]) and not rest[128:].any()     # drawn again; kept
    assert sorted(os.listdir()) == ["dit.pt"]

    def place(*more):                                # of the chunks
        with mock.patch.object(X, "save_all") as save_all:
            X.main([*flags, *more])
        return save_all.call_args.args[1]

    file = load("dit.pt")
    places = [folder, place("--batch", "7")]
    torch.save(file | {"model_ema": {n: 1.1 * w for n, w in file["model_ema"].items()}}, "dit.pt")
    places.append(place())                           # the same path and step
    del file["latent_mean"]                          # as the authors' files
    torch.save(file, "dit.pt")
    for std in (1, 2):
        np.savez("stats.npz", mean=np.zeros(16), std=np.full(16, std))
        places.append(place("--stats", "stats.npz"))
    assert places[0] == places[1] and len(set(places)) == 4


def test_sampling_reads_the_authors_files(toys, monkeypatch):
    """They hold no latent statistics: --stats is computed from --data (of posterior means), or only read."""
    monkeypatch.setitem(D.PRESETS, "toy", dict(width=(64, 128), depth=(2, 1), heads=(2, 2)))
    dit = D.DiT(D.DiTConfig(4, 16, num_classes=8, **D.PRESETS["toy"]))
    torch.save({"model_ema": dit.state_dict() | {"pos_embed": torch.zeros(1, 16, 64)}}, "theirs.pth")
    flags = ["--dit", "theirs.pth", "--tokenizer", toys.tokenizer]
    refuses("--stats", draw, toys, *flags)
    flags += ["--stats", "stats.npz"]
    usual = draw(toys, *flags, "--data", toys.pictures)
    mean, _ = T.load_tokenizer(toys.tokenizer).encode(T.to_float(images_of(toys.pictures)))
    with np.load("stats.npz") as file:
        assert np.allclose(file["mean"], mean.mean((0, 1)).detach(), atol=1e-5)
        assert np.allclose(file["std"], mean.std((0, 1), correction=0).detach(), atol=1e-5)
    assert draw(toys, *flags) == usual
    np.savez("stats.npz", mean=np.zeros(3), std=np.ones(3))
    refuses("stats.npz", draw, toys, *flags)
    np.savez("stats.npz", mean=np.zeros(16), std=np.ones(16), fingerprint="another tokenizer's")
    with pytest.warns(UserWarning, match="stats.npz"):
        draw(toys, *flags)


# ---------------------------------------------------------------- bad flags and folders

def test_bad_flags_are_named_before_any_work(toys):
    for wrong in ("--micro_batch -8", "--mask_max 1.5", "--mask_min 0.5 --mask_max 0.1", "--shift 0",
                  "--ema 1.5", "--batch 0", "--steps 0", "--lr -1", "--save_every 0", "--noise_warmup 1",
                  "--target hidden --mask_max 0", "--init a.pt --finetune_decoder b.pt", "--w_pixels 1"):
        bad_flags(wrong.split()[0], S1.main, toys.stage1("out", *wrong.split()))
    for wrong in ("--cfg 0.5", "--eval_num 0", "--label_dropout 1", "--sample_every 0", "--ema 1"):
        bad_flags(wrong.split()[0], S2.main, toys.stage2("out", *wrong.split()))
    bad_flags("--save_stats", M.main, ["one.npz"])
    for wrong in ("--image_size 30", "--data nowhere", "--finetune_decoder gone.pt"):
        refuses(wrong.split()[1], S1.main, toys.stage1("out", *wrong.split()), error=(ValueError, OSError))
    refuses("--micro_batch", S1.main, toys.stage1("out", "--micro_batch", 3))
    tokenizer = "--distill", "none", "--image_size", 16, "--patch_size", 4, "--stop_at", 1
    refuses("16", S1.main, toys.stage1("out", *tokenizer))          # at once, not when the GAN starts
    for flag in ("--finetune_decoder", "--eval_only"):              # their shape is the checkpoint's
        refuses("--channels", S1.main, toys.stage1("out", flag, toys.tokenizer, "--channels", 8))
    with mock.patch.object(S1, "world_size", lambda: 3):
        refuses("--batch", S1.split_batch, S1.parse(toys.stage1("out")))
    assert not os.path.exists("out")
    S1.main(toys.stage1("no_gan", *tokenizer, "--w_gan", 0))
    status, _, errors = run("train_tokenizer.py", "--data", "nowhere")          # one line
    assert status == 1 and "nowhere" in errors and "Traceback" not in errors
    full_size = ["--data", toys.pictures, "--features", "none", "--random_weights", "--teacher"]
    refuses("dinov9", S1.main, [*full_size, "dinov9"])
    refuses(toys.teacher, S1.main, [*full_size, toys.teacher])      # a token every 8 pixels, not every 16


@pytest.mark.parametrize("parse, flags, defaults", [
    (S1.parse, "", dict(epochs=200.0, w_gan=0.1, mask_max=0.4, noise_warmup=0.0)),
    (S1.parse, "--tiny", S1.TINY),
    (S1.parse, "--finetune_decoder x", dict(epochs=100.0, w_gan=0.1, gan_start=0.0, mask_max=0.0)),
    (S1.parse, "--finetune_decoder x --tiny", S1.TINY | S1.FINETUNE | S1.TINY_FINETUNE),
    (S2.parse, "", dict(epochs=800.0, size="XL")),
    (S2.parse, "--tiny", S2.TINY)])
def test_help_shows_the_defaults_that_hold(parse, flags, defaults, capsys):
    refuses("0", parse, [*flags.split(), "--help"], error=SystemExit)
    said = " ".join(capsys.readouterr().out.split())
    args = vars(parse(flags.split()))
    for name, value in defaults.items():
        assert str(args[name]).removesuffix(".0") == str(value).removesuffix(".0"), name
        assert re.search(rf" --{name} [A-Z{{]\S* .*?\(default: (.*?)\)", said)[1] == str(value), name


def test_defaults_that_follow_other_flags():
    for parse in (S1.parse, S2.parse):
        args = parse(["--tiny", "--epochs", "0.001"])
        assert (args.steps, args.epochs, parse(["--tiny"]).steps) == (None, 0.001, 1000)
    assert S2.parse(["--tiny"]).reference == "shapes"
    assert S2.parse(["--tiny", "--data", "my_images"]).reference is None


def limited():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")


def test_a_limit_of_the_machine_is_one_line_with_a_way_out():
    status, _, errors = run("limited")
    assert status == 1 and "--shm-size" in errors and "Traceback" not in errors


def test_refuses_the_folder_of_another_configuration(toys):
    S1.main(toys.stage1("out", "--stop_at", 1))
    for flag, value in (("--w_kl", 0.5), ("--seed", 3), ("--batch", 4), ("--semantic", "mlp")):
        refuses(flag[2:], S1.main, toys.stage1("out", flag, value))
    shutil.copytree(toys.pictures, "more")
    plain("more/two words/new.png")
    refuses("images", S1.main, toys.stage1("out", "--data", "more"))
    os.remove("more/two words/new.png")
    os.rename("more/two words", "more/three words")
    refuses("three words", S1.main, toys.stage1("out", "--data", "more"))
    shutil.copy("out/step_1.pt", "out/last.pt")                     # a milestone: it holds no optimizer
    refuses("last.pt", S1.main, toys.stage1("out"))


# ---------------------------------------------------------------- trust

def slow(test):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # an unregistered mark: there is no configuration file
        test = pytest.mark.slow(test)
    return pytest.mark.skipif("slow" not in sys.argv, reason="minutes long: pytest test_all.py -m slow")(test)


def test_a_second_run_in_the_folder_is_refused(toys):
    """Until the first has ended; what a killed one left is removed."""
    first = start("hold_lock", "busy")
    wait_for(lambda: os.path.exists("busy/last.pt.x1y2.tmp"), first)
    refuses("busy", S1.main, toys.stage1("busy"))
    first.kill()
    first.communicate()
    S1.main(toys.stage1("busy", "--stop_at", 1))
    refuses("random_weights", S1.main, toys.stage1("busy", "--random_weights"))
    assert {"last.pt", "last.pt.x1y2.tmp"} & set(os.listdir("busy")) == {"last.pt"}


def hold_lock(out):
    os.mkdir(out)
    lock = S1.lock_folder(out)
    open(f"{out}/last.pt.x1y2.tmp", "w").close()
    time.sleep(600)
    lock.close()


def test_full_disk_keeps_the_old_checkpoint(toys, monkeypatch):
    resource = pytest.importorskip("resource")
    S1.save("last.pt", {"step": 1})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))      # stands for a small disk
    try:
        for number in (100_000, 30_000):             # torch fails in its own way in the middle of a file
            with pytest.raises(OSError, match="last.pt") as error:
                S1.save("last.pt", {f"w{i}": torch.zeros(number) for i in range(8)})
            assert "enforce fail" not in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        refuses("last.pt.*No space left", S1.save, "last.pt", {"step": 2}, error=OSError)
    assert load("last.pt") == {"step": 1}
    assert os.listdir() == ["last.pt"]
    monkeypatch.setattr(S1, "save", mock.Mock(side_effect=OSError(28, "No space left on device", "last.pt")))
    refuses("last.pt", S1.main, toys.stage1("out"), error=OSError)  # it ends the run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_one_process_obeys_a_signal_at_once(toys, monkeypatch, number):
    signal.signal(number, lambda *_: None)           # tests may run under nohup, which has some ignored
    kl_loss = S1.kl_loss
    monkeypatch.setattr(S1, "kl_loss", lambda *inputs: os.kill(os.getpid(), number) or kl_loss(*inputs))
    S1.main(toys.stage1("out"))
    assert load("out/last.pt")["step"] == 1          # the step was finished
    S1.main(toys.stage1("out"))
    assert load("out/last.pt")["step"] == 2


@pytest.mark.parametrize("number, world", [(signal.SIGHUP, 0), (signal.SIGTERM, 2)])
def test_a_signal_finishes_the_step_and_saves(toys, number, world):
    """The whole process group is signalled, loader processes too, as a terminal or SLURM does."""
    flags = toys.stage1("out", "--batch", 4, "--steps", 10 ** 6, "--save_every", 10 ** 6, "--workers", 2)
    signal.signal(number, signal.SIG_DFL)            # inherited; these tests may run under nohup
    process = start("train_tokenizer.py", *flags, world=world)
    wait_for(lambda: S1.read_log("out"), process)    # its first row is that of step 10
    assert not os.path.exists("out/last.pt")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)      # all have left: this reads their pipes to the end
    assert process.returncode == 1 or world, errors  # what a shell chains to it shall not begin
    step = load("out/last.pt")["step"]
    assert step >= 10 and (step % 10 == 0 or not world)
    S1.main(toys.stage1("out", "--batch", 4, "--steps", 10 ** 6, "--stop_at", step + 1))


def fails(where, folder, out):
    """A run with two loader processes that fails in a way that nobody expects."""
    def boom(*_):
        if os.environ.get("RANK", "1") == "1":
            open(f"{out}.boom", "w").close()
            raise RuntimeError("boom")

    if where == "loader":
        T.ImageFolder.__getitem__ = boom
    else:
        S1.update_ema = boom
    S1.main(Toys(folder).stage1(out, "--workers", 2))


@pytest.mark.parametrize("where", ["step", "loader"])
def test_an_unexpected_error_ends_the_run(toys, where):
    status, _, errors = run("fails", where, toys.folder, "out", timeout=60)
    assert status == 1 and "Traceback" in errors and "boom" in errors, errors


@pytest.mark.parametrize("loss, bad, stop, done", [
    ("kl_loss", (4, 5), 12, 12), ("hinge_loss", (4, 5), 12, 12), ("kl_loss", (4, 5, 11, 12), 12, 12),
    ("kl_loss", (4, 5, 8), 12, 9), ("kl_loss", (4, 5, 8), 7, 9)])
def test_steps_without_finite_gradients(toys, monkeypatch, loss, bad, stop, done):
    """They change no weight; three since the last row end the run at the next, stopped in between or not."""
    right, steps, saved = getattr(S1, loss), [], {}
    write = S1.save

    def poisoned(*inputs):
        steps.append(1)
        return right(*inputs) * (math.nan if len(steps) in bad else 1)

    def keep(path, file):
        if "optimizer" in file:                      # no milestone
            saved[file["step"]] = deepcopy(file)
        write(path, file)

    monkeypatch.setattr(S1, loss, poisoned)
    monkeypatch.setattr(S1, "save", keep)
    with pytest.raises(FloatingPointError) if len(bad) == 3 else contextlib.nullcontext():
        for stop_at in (stop, 12):
            S1.main(toys.stage1("out", "--steps", 12, "--gan_start", 0, "--stop_at", stop_at))
    assert len(saved) == done
    for part in ("model", "discriminator", "optimizer", "d_optimizer"):         # moments and step counts too
        for step in range(2, done + 1):
            before, after = saved[step - 1][part], saved[step][part]
            assert same(before.get("state", before), after.get("state", after)) == (step in bad), (part, step)


@slow
def test_kill_at_twenty_moments(toys):
    """kill -9 at 20 random moments of a run that saves every third step: always resumable, little lost."""
    flags = toys.stage1("out", "--steps", 10 ** 6, "--save_every", 3)
    rng, step = np.random.RandomState(0), 0

    def saved():
        return os.stat("out/last.pt").st_mtime_ns if os.path.exists("out/last.pt") else 0

    for _ in range(20):
        process, before = start("train_tokenizer.py", *flags), saved()
        wait_for(lambda: saved() > before, process)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        _, errors = process.communicate()
        now = load("out/last.pt")["step"]
        assert now > step and now % 3 == 0, errors
        step = now


@slow
def test_memory_does_not_grow(toys, monkeypatch):
    """300 steps with scores and pictures in between; the resident pages at each row of the log."""
    log, pages = S1.Run.log, {}

    def record(run, row):
        log(run, row)
        with open("/proc/self/statm") as f:
            pages[row["step"]] = int(f.read().split()[1])

    monkeypatch.setattr(S1.Run, "log", record)
    S1.main(toys.stage1("out", "--steps", 300, "--eval_every", 50, "--features", toys.teacher))
    assert pages[300] < 1.1 * pages[100], pages


def compiled_and_plain(folder):
    """Both stages, plain and compiled: traced, and run in float32 without Inductor."""
    toys = Toys(folder)
    compile_module, compile_blocks = torch.nn.Module.compile, T.compile_blocks
    torch.nn.Module.compile = lambda module: compile_module(module, backend="aot_eager")

    def compile_here(device, switched_off, *nets):
        compile_blocks(torch.device("cuda"), switched_off, *nets)

    flags = "--batch", 16, "--micro_batch", 4, "--steps", 10
    for way in ("plain", "compiled"):
        S1.main(toys.stage1(f"{way}1", *flags))
        S2.main(toys.stage2(f"{way}2", *flags, "--grad_checkpoint"))
        S1.compile_blocks = S2.compile_blocks = compile_here


@slow
def test_compiled_networks_train_alike_on_two_processes(toys):
    """DDP reduces gradients while compiled blocks run backward, masks vary, gradients accumulate."""
    status, _, errors = run("compiled_and_plain", toys.folder, world=2, timeout=400)
    assert status == 0, errors
    for stage in "12":
        plain_row, compiled_row = (rows_of(way + stage)[-1] for way in ("plain", "compiled"))
        for name in ("loss", "grad_norm"):
            assert compiled_row[name] == pytest.approx(plain_row[name], rel=1e-3), name


# ---------------------------------------------------------------- README.md

SCRIPTS = {"train_tokenizer.py": S1, "train_dit.py": S2, "sample.py": X, "fid.py": M}


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        return f.read()


def printed_by(script, stubs):
    """What bash would run: [script of ours, flag, ...] of each call that the stub `show` prints."""
    show = """
        show() { printf '%s\\037' "$@"; echo; }
    """
    done = subprocess.run(["bash", "-e", "-c", show + stubs + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [line.split("\037")[:-1] for line in done.stdout.split("\n")]
    return [command for command in commands if command and command[0] in SCRIPTS]


def readme_commands():
    return printed_by("\n".join(re.findall(r"```sh\n(.*?)```", readme(), re.S)), """
        pip() { :; }
        python() { show "$@"; }
        torchrun() { while [[ "$1" == -* ]]; do shift; done; show "$@"; }
    """)


def test_readme_links_and_commands():
    for path in re.findall(r"\]\((?!http)([\w./-]+)", readme()):
        assert os.path.exists(os.path.join(HERE, path)), path
    with open(__file__) as f:
        tests = f.read()
    for name in re.findall(r"`(test_\w+)`", readme()):
        assert f"def {name}" in tests, name
    commands = readme_commands()
    assert len(commands) >= 8 and ["train_tokenizer.py", "--tiny"] in commands
    with open(os.path.join(HERE, "assets", "ablation.sh")) as f:
        ablation = printed_by(f.read(), 'python() { case $1 in train_*) show "$@";; esac; }\n')
    assert len(ablation) > 30 and len(ablation) % 3 == 0            # of 3 seeds
    for script, *flags in commands + ablation:
        SCRIPTS[script].parse(flags)


def test_tables_are_those_of_the_csv(capsys):
    """Every line that assets/ablation.py prints stands in assets/ablation.md."""
    runpy.run_path(os.path.join(HERE, "assets", "ablation.py"))["tables"]()
    with open(os.path.join(HERE, "assets", "ablation.md"), encoding="utf-8") as f:
        page = f.read().splitlines()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 10 and [line for line in lines if line not in page] == []


def test_readme_first_commands(monkeypatch):
    """The tiny commands in their order as they stand, but on 64 shapes and a few steps long."""
    fit = S1.fit_teacher
    monkeypatch.setattr(S1, "fit_teacher", lambda path, size: fit(path, size, steps=5))
    monkeypatch.setattr(T.Shapes, "__len__", lambda self: 64)
    few = ["--batch", "8", "--steps", "2"]
    less = {"train_tokenizer.py": few, "train_dit.py": [*few, "--eval_num", "64", "--sample_steps", "1"],
            "sample.py": ["--steps", "2"]}
    first = [command for command in readme_commands() if command[0] in less][:4]
    assert [script for script, *_ in first] == ["train_tokenizer.py", *less]
    for script, *flags in first:
        SCRIPTS[script].main([*flags, *less[script]])
    assert Image.open("grid.png").size == (98 * 8, 98 * 4)
    assert "rFD" in rows_of("out/tokenizer")[-1] and "agreement_cfg" in rows_of("out/dit")[-1]
