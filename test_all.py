"""The tests: pytest test_all.py. Small, on the CPU, no network, nothing outside this folder.

    python -m pytest -q test_all.py                # 3 minutes on 2 cores
    python -m pytest -q test_all.py -m slow        # the slow ones: 4 minutes

Golden numbers: the weights are a function of each published tensor's name, so nothing large is stored; the
literals were recorded while this code agreed with the published code to 1e-5 (relative) on these weights.
"""
import contextlib
import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import asdict, replace
from types import SimpleNamespace
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""              # here and in every process that a test starts

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

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
    for number, handler in HANDLERS.items():         # a trainer leaves its own: Ctrl-C would not end us
        signal.signal(number, handler)


def refuses(names, call, *inputs, error=ValueError, **options):
    """The call raises such an error, and its text names the thing (a regular expression)."""
    with pytest.raises(error, match=names):
        call(*inputs, **options)


# ---------------------------------------------------------------- toys: everything is trained on these

class Toys:
    """A folder with 13 pictures in 2 classes, a teacher, and a tokenizer and a DiT trained for 4 steps."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.pictures = f"{folder}/pictures"
        self.teacher = f"{folder}/teacher.pt"
        self.tokenizer = f"{folder}/tok/last.pt"
        self.dit = f"{folder}/dit/last.pt"

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
    S1.main(toys.stage1(f"{toys.folder}/tok", "--ema", 0.5))
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


def rows_of(out):
    """The rows of a run's log, without the columns that depend on the clock or the machine."""
    with open(f"{out}/log.csv") as f:
        rows = list(csv.DictReader(f))
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "memory_gb")} for row in rows]


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
    return subprocess.Popen([*command, *map(str, flags)], text=True, stdout=subprocess.PIPE, env=environment,
                            stderr=subprocess.PIPE, start_new_session=True)


def run(target, *flags, world=0, timeout=180):
    """The same to its end: -> exit status, output, errors."""
    process = start(target, *flags, world=world)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.terminate()                          # torchrun takes its processes along, after 30 s by force
        process.wait(60)
    return process.returncode, output, errors


def wait_for(path, process):
    while not os.path.exists(path) and process.poll() is None:
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


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory):
    """A checkpoint as the authors save it: published names, a teacher, tables that we compute, EMA apart."""
    model = T.RecTok(T.TokenizerConfig(64, 16, 16, "tiny", "tiny", "tiny", 96))
    state = fill(model, lambda n: n.replace("sem_decoders.0", "sem_decoders.dinov3")).state_dict()
    state = {n.replace("sem_decoders.0", "sem_decoders.dinov3"): w for n, w in state.items()}
    state |= {"encoder.rope.freqs_cos": torch.zeros(3), "pos_embed": torch.zeros(3),
              "sem_foundation_models.dinov3.norm.weight": torch.zeros(3)}
    path = str(tmp_path_factory.mktemp("authors") / "RecTok.pth")
    torch.save({"model": {n: torch.zeros_like(w) for n, w in state.items()}, "model_ema": state}, path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of published files: VGG16, the LPIPS heads, ConvNeXt-S, with named weights."""
    folder = tmp_path_factory.mktemp("weights")
    lpips = S1.LPIPS("random")
    vgg = {f"features.{n}": named(f"features.{n}", *w.shape) for n, w in lpips.features.state_dict().items()}
    torch.save(vgg, folder / "vgg16-397923af.pth")
    heads = {f"lin{i}.model.1.weight": named(f"lin{i}.model.1.weight", *w.shape).abs()
             for i, w in enumerate(lpips.heads)}
    torch.save(heads, folder / "vgg.pth")
    torch.save(fill(S1.ConvNeXt()).state_dict(), folder / "convnext_small-0c510722.pth")
    return str(folder)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """pt_inception-2015-12-05-6726825d.pth with named weights, under its own names."""
    state = {}
    for ours, w in M.InceptionV3("random").state_dict().items():
        name = ours.replace("stem.", "").replace("mixed.", "Mixed_")
        if name.startswith("fc."):
            state[name] = named(name, *w.shape)
        elif name.endswith(".weight"):
            name = name.removesuffix(".weight")
            state[f"{name}.conv.weight"] = named(f"{name}.conv.weight", *w.shape)
            for kind in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.bn.{kind}"] = named(f"{name}.bn.{kind}", len(w))
    path = str(tmp_path_factory.mktemp("inception") / M.INCEPTION)
    torch.save(state, path)
    return path


def test_tokenizer_golden(authors_file):
    model = T.load_tokenizer(authors_file)
    x = noise("x", 2, 3, 64, 64).tanh()
    z = noise("z", 2, 16, 16)
    mean, logvar = model.encode(x)
    close(torch.cat([mean, logvar], -1), GOLDEN["moments"])
    close(S1.kl_loss(mean, logvar), GOLDEN["kl"])
    close(model.decode(z), GOLDEN["decoded"])
    close(model.predict(z), GOLDEN["semantic"])
    keep = T.random_visible(2, 16, 0.25, torch.from_numpy(np.random.RandomState(0).rand(2, 16)))
    assert keep.shape == (2, 12)
    mean, logvar = model.encode(x, keep)
    close(torch.cat([mean, logvar], -1), GOLDEN["masked_moments"])
    close(model.decode(mean, keep), GOLDEN["masked_decoded"])
    close(model.predict(mean, keep), GOLDEN["masked_semantic"])


def test_perceptual_golden(published):
    a = noise("a", 2, 3, 64, 64).sigmoid()
    b = noise("b", 2, 3, 64, 64).sigmoid().requires_grad_(True)
    loss = S1.PerceptualLoss(published)
    close(loss.lpips(a * 2 - 1, b * 2 - 1), GOLDEN["lpips"])
    close(loss.logits(a), GOLDEN["convnext"])
    total = loss(a, b)
    close(total, GOLDEN["perceptual"])
    total.backward()                                 # gradients reach the prediction, not the weights
    assert b.grad.abs().sum() > 0
    assert all(w.grad is None for w in loss.parameters())


def test_max_pooling_is_torchs():
    x, found = noise("x", 2, 3, 9, 12), []           # no two numbers are equal
    for pool in (S1.MaxPool(), torch.nn.MaxPool2d(2)):
        given = x.clone().requires_grad_(True)
        out = pool(given)
        (out * noise("weights", *out.shape)).sum().backward()
        found.append((out, given.grad))
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(*found))


def test_small_losses_golden():
    close(fill(S1.PatchGAN())(noise("a", 2, 3, 96, 96).sigmoid()), GOLDEN["patchgan"])
    f, g = noise("f", 2, 7, 24), noise("g", 2, 7, 24)
    close(S1.hinge_loss(f, g), GOLDEN["hinge"])
    for kind in ("cosine", "l1", "l2"):
        close(S1.semantic_loss(g, f, kind), GOLDEN[kind])
    hidden = torch.zeros(2, 7)
    assert S1.semantic_loss(g, f, "cosine", hidden) == 0            # nothing hidden: a well-defined zero
    hidden[0, 3] = 1
    one_patch = 1 - torch.cosine_similarity(f[0, 3], g[0, 3], 0)
    assert torch.isclose(S1.semantic_loss(g, f, "cosine", hidden), one_patch)


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


def timm_name(name):
    return re.sub(r"ls(\d)\.gamma", r"gamma_\1", name.replace("storage_tokens", "reg_token"))


def test_teachers_golden():
    x = noise("x", 2, 3, 64, 64)

    def dinov3():
        return T.DINO(3, 96, 2, 3, 16, 64, 4)

    state = dino_state(dinov3())
    unused = {"mask_token": torch.zeros(1, 96), "rope_embed.periods": torch.zeros(8),
              "blocks.0.attn.qkv.bias_mask": torch.zeros(288)}
    for layout in (state | unused, hf_state(state)):
        cls, patches = dinov3().load_published(layout)(x)
        close(patches, GOLDEN["dinov3"])
        close(cls, GOLDEN["dinov3_cls"])
    dinov2 = T.DINO(2, 96, 2, 3, 14, 98)                            # 7 x 7 positions, read at 4 x 4
    cls, patches = dinov2.load_published(dino_state(dinov2))(x[:, :, :56, :56])
    close(patches, GOLDEN["dinov2"])
    close(cls, GOLDEN["dinov2_cls"])
    # timm's layout has no bias of queries, keys and values.
    timm = {timm_name(n): named(timm_name(n), *w.shape) for n, w in state.items() if "qkv.bias" not in n}
    x = torch.from_numpy(np.random.RandomState(31).standard_normal((2, 3, 64, 64)).astype(np.float32))
    cls, patches = dinov3().load_published(timm)(x)
    close(patches, GOLDEN["timm"])
    close(cls, GOLDEN["timm_cls"])
    alike = {n: timm.get(timm_name(n), torch.zeros_like(w)) for n, w in state.items()}
    assert torch.equal(dinov3().load_published(alike)(x)[1], patches)


def test_a_teacher_with_other_tensors_is_refused():
    net = T.DINO(2, 96, 2, 3, 14, 98)
    state = dino_state(net)
    incomplete = {n: w for n, w in state.items() if n != "blocks.1.attn.qkv.weight"}
    refuses("blocks.1.attn.qkv.weight", net.load_published, incomplete)
    refuses("head.weight", net.load_published, state | {"head.weight": torch.zeros(1)})


def test_dit_golden():
    models = {"dit": small_dit(), "guide": small_dit((64, 192), (2, 1))}
    tables = {"pos_embed": torch.zeros(1, 64, 96), "enc_feat_rope.freqs_cos": torch.zeros(64, 24)}
    for name, model in models.items():               # as the authors save them: with tables that we compute
        torch.save({"model": {}, "model_ema": fill(model).state_dict() | tables}, f"{name}.pth")
    dit, guide = (D.load_dit(f"{name}.pth", model.config) for name, model in models.items())
    x, t, y = noise("x", 3, 64, 16), torch.tensor([0.05, 0.5, 0.93]), torch.tensor([1, 3, 10])
    close(dit(x, t, y), GOLDEN["velocity"])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0), GOLDEN["euler"])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0, cfg=2.0), GOLDEN["euler_cfg"])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0, cfg=1.5, guide=guide), GOLDEN["euler_autoguidance"])
    u = torch.tensor([0.1, 0.5, 0.9])
    close(D.flow_loss(dit, noise("z", 3, 64, 16), y, 2.0, x, u), GOLDEN["flow_loss"])


def test_metrics_golden(inception_file):
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 40, 56), dtype=np.uint8))
    model = M.InceptionV3(inception_file)
    with torch.no_grad():
        for name, feature in zip(("f64", "f192", "f768", "f2048"), model.features(images)):
            close(feature, GOLDEN[name])
    close(model(images)[1], GOLDEN["logits"])
    a = noise("a", 300, 24).numpy()
    b = 1.2 * noise("b", 350, 24).numpy() + 0.1

    def moments(x):
        return x.mean(0, dtype=np.float64), np.cov(x.astype(np.float64), rowvar=False)

    close(M.frechet_distance(*moments(a), *moments(b)), GOLDEN["fid"], 1e-6)
    close(M.frechet_distance(*moments(a[:15]), *moments(b[:15])), GOLDEN["fid_singular"], 1e-6)
    close(torch.tensor(M.inception_score(3 * noise("l", 200, 20))), GOLDEN["is"], 1e-6)
    close(torch.tensor(M.precision_recall(noise("a", 300, 4), 1.2 * noise("b", 350, 4))), GOLDEN["pr"], 1e-6)


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
    assert crop[::9, ::9, 2].tolist() == GOLDEN["crop"]


GOLDEN = {
    "moments": [-0.02687177, -0.2447858, -0.5318729, -0.9235055, 0.969769],
    "kl": [196.3164, 195.0991],
    "decoded": [0.03828252, -0.4401513, 0.8154236, -0.695222, 2.060538],
    "semantic": [0.9197729, -1.510944, 0.4022538, 0.6112949, 1.060118],
    "masked_moments": [-0.07302468, 0.3122176, -1.6269, -1.098973, 0.9894104],
    "masked_decoded": [3.329825, -1.299382, 2.198674, -0.5028995, 2.065322],
    "masked_semantic": [-1.450854, 0.4543444, -0.02733457, 0.801128, 1.035342],
    "lpips": [0.1207454, 0.1217918],
    "convnext": [0.3531383, 1.365966, -0.5841553, -0.1368193, 1.000388],
    "perceptual": [0.1165093],
    "patchgan": [-6.309882, -7.777207, -5.054701, 0.7491791, 6.342945],
    "hinge": [1.037291],
    "cosine": [0.9538776],
    "l1": [1.134289],
    "l2": [2.038629],
    "dinov3": [1.313595, -0.2378539, -0.9534615, -0.3883339, 1.007589],
    "dinov3_cls": [1.334478, 0.04376387, -0.5698411, -0.08908813, 0.9900368],
    "dinov2": [-0.6600999, -0.8538263, -0.7327282, 1.240358, 1.006295],
    "dinov2_cls": [1.339537, -0.0733581, -0.6897323, 0.4616515, 1.010018],
    "timm": [-1.140336, -0.7459657, 0.03940782, 0.07827631, 1.013614],
    "timm_cls": [1.90511, -0.2392098, 1.947997, -2.991048, 0.9923766],
    "crop": [[26, 45, 84, 102], [36, 23, 103, 89], [99, 91, 26, 18], [135, 153, 194, 213]],
    "velocity": [0.4634835, 1.304641, 1.832641, -0.5917304, 1.480623],
    "euler": [-2.462883, 0.7265256, 2.716082, 0.1668278, 1.647818],
    "euler_cfg": [-2.471891, 0.6587366, 2.816657, 0.06519488, 1.64531],
    "euler_autoguidance": [-2.788722, 0.2785241, 6.433426, -0.4864499, 2.193898],
    "flow_loss": [3.470793, 3.97692, 3.977197],
    "f64": [0.04759938, 0.2096305, 0.3057519, 0.1701016, 0.420538],
    "f192": [0.8601608, 0.3933923, 1.30679, 0.9733384, 0.6458193],
    "f768": [0.3332154, 0.1438928, 1.008172, 0.1369218, 0.3989701],
    "f2048": [0.0, 0.02280515, 0.1771776, 0.5561046, 0.423588],
    "logits": [0.325866, 0.2813853, -0.2729773, -0.1651827, 0.4200981],
    "fid": [2.704967],
    "fid_singular": [25.84819],
    "is": [5.073499, 0.4790747],
    "pr": [0.88, 0.98],
}


# ---------------------------------------------------------------- closed forms

def test_flow_ends():
    z, eps = noise("z", 3, 4, 5), noise("e", 3, 4, 5)
    z_t = T.flow(z, eps, torch.tensor([1.0, 0.0, 0.25]))
    assert torch.equal(z_t[0], z[0])                                # t = 1 is data
    assert torch.equal(z_t[1], eps[1])
    assert torch.allclose(z_t[2], 0.25 * z[2] + 0.75 * eps[2])


def test_random_visible_is_the_k_smallest():
    ranks = torch.rand(5, 16)
    keep = T.random_visible(5, 16, 0.3, ranks)
    assert keep.shape == (5, 12)                                    # ceil(16 * 0.7)
    assert torch.equal(ranks.gather(1, keep).max(1).values, ranks.sort(1).values[:, 11])
    assert T.random_visible(5, 16, 0.0).sort(1).values.equal(torch.arange(16).expand(5, -1))


def test_config_sizes():
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


def test_decay_groups():
    model = small()
    _, group = S1.optimizer_for(model, 1e-3).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in group["params"]}
    assert {"encoder.transformer.0.attn.qkv.weight", "decoder.conv_out.weight"} <= decayed
    free = {"encoder.patch_embed.0.weight", "decoder.decoder_embed.weight", "decoder.mask_token"}
    assert not decayed & free
    assert not any(n.endswith("bias") or "norm" in n or "ln_" in n or "embedding" in n for n in decayed)


def test_ema_holds_no_graph_and_follows():
    model, ema = small(), small().requires_grad_(False)
    with torch.no_grad():
        model.decoder.mask_token.add_(1)
    before = ema.decoder.mask_token.clone()
    S1.update_ema(ema, model, 0.9)
    assert torch.allclose(ema.decoder.mask_token - before, torch.tensor(0.1), atol=1e-5)
    assert not any(p.requires_grad for p in ema.parameters())


def test_shapes_dataset():
    data = T.Shapes(32, 64)
    image, label = data[11]
    assert (image.dtype, image.shape, label) == (torch.uint8, (3, 32, 32), 11 % 8)
    assert torch.equal(image, T.Shapes(32, 64)[11][0])
    assert not torch.equal(image, T.Shapes(32, 64, seed=1)[11][0])
    assert len(list(data)) == 64


def test_shapes_give_no_class_away():
    """A linear classifier of the pixels reads few classes: any place, turn and hue (43 %; 98 if upright)."""
    data = T.Shapes(32, 1600, seed=1)
    images = torch.stack([image for image, _ in data]).double() / 255
    labels = torch.arange(1600) % 8
    x = torch.nn.functional.pad(torch.nn.functional.avg_pool2d(images, 4).flatten(1), (0, 1), value=1.0)
    fitted, held_out = x.split(800)
    solution = torch.linalg.lstsq(fitted, torch.nn.functional.one_hot(labels[:800]).double()).solution
    right = ((held_out @ solution).argmax(1) == labels[800:]).double().mean()
    assert right < 0.5


def test_the_tiny_teachers_patches_know_the_class():
    """As a VFM's do: after 100 steps 35 % of them, without the dense term 20 %."""
    S1.fit_teacher("teacher.pt", 32, steps=100, batch=32)
    teacher = T.load_teacher("teacher.pt")
    head = load("teacher.pt")["head"]
    images = torch.stack([image for image, _ in T.Shapes(32, 256, seed=1)])
    said = (teacher(T.to_float(images)) @ head["weight"].T + head["bias"]).argmax(-1)           # (256, N)
    assert (said == torch.arange(256)[:, None] % 8).double().mean() > 0.27


class Gaussian(torch.nn.Module):
    """The exact velocity field of data ~ N(mean, std^2) in place of a network; counts its evaluations."""
    config = D.DiTConfig(num_classes=10)

    def __init__(self, mean=2.0, std=0.5):
        super().__init__()
        self.mean = mean
        self.std = std
        self.calls = 0

    def forward(self, x, t, y):
        self.calls += 1
        t = t.view(-1, 1, 1)
        variance = t ** 2 * self.std ** 2 + (1 - t) ** 2
        z = self.mean + t * self.std ** 2 / variance * (x - t * self.mean)      # E[z | z_t = x]
        return z - (1 - t) / variance * (x - t * self.mean)                     # minus E[noise | z_t = x]


def test_euler_is_first_order_and_heun_second():
    begin = noise("x", 4, 8, 3).double()
    exact = 2.0 + 0.5 * begin                                       # the flow of a Gaussian is affine
    y = torch.zeros(4, dtype=torch.long)
    for solver, order in (("euler", 1), ("heun", 2)):
        coarse, fine = ((D.sample(Gaussian(), begin, y, steps, 1.0, solver=solver) - exact).abs().max().item()
                        for steps in (40, 80))
        assert abs(math.log2(coarse / fine) - order) < 0.25, (solver, coarse, fine)


def test_guidance_interval_and_its_cost():
    begin, y = noise("x", 2, 4, 3), torch.tensor([1, 2])

    def guided(**options):
        strong, weak = Gaussian(), Gaussian(mean=0.0)
        return D.sample(strong, begin, y, 8, 1.0, guide=weak, **options), weak.calls

    plain, calls = guided(cfg=1.0)
    assert calls == 0                                               # w = 1: no second network
    z, calls = guided(cfg=3.0, interval=(2, 3))
    assert torch.equal(z, plain) and calls == 0
    z, calls = guided(cfg=3.0)
    assert z.mean() > plain.mean() + 1 and calls == 8               # away from the weak model's mean
    assert guided(cfg=3.0, interval=(0.25, 0.5))[1] == 3            # t = 0.25, 0.375, 0.5: the ends are in
    counted = Gaussian()
    D.sample(counted, begin, y, 10, 1.0, cfg=2.0)
    assert counted.calls == 20                                      # CFG: the null class, once a step
    for wrong in (dict(cfg=0.5), dict(cfg=math.inf), dict(steps=0), dict(solver="rk4")):
        refuses("", D.sample, counted, begin, y, **dict(steps=2, shift=1.0) | wrong)


class Patches(torch.nn.Module):
    """Stands for a tokenizer: its latents are the pixels, so that C = 3 and N = 1,024."""
    config = SimpleNamespace(channels=3, semantic="none")
    empty = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images):
        mean = images.flatten(2).transpose(1, 2)
        logvar = torch.full_like(mean, -30.0)
        if self.empty is not None:                                  # a channel that the KL has emptied
            mean, logvar = mean.clone(), logvar.clone()
            mean[..., self.empty] *= 0.01
            logvar[..., self.empty] = 0.0
        return mean, logvar


def test_latent_statistics():
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    mean, std = D.latent_statistics(Patches(), [(images[:7], 0), (images[7:], 0)])
    z = T.to_float(images).transpose(0, 1).flatten(1)               # (3, all pixels)
    assert torch.allclose(mean, z.mean(1), atol=1e-6)
    assert torch.allclose(std, z.std(1, correction=0), atol=1e-6)


def test_an_emptied_channel_stays_at_one(capsys):
    """Its samples are the posterior's noise: of them, not of its means, the deviation becomes 1."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    tokenizer = Patches()
    tokenizer.empty = 2
    stats = D.latent_statistics(tokenizer, [(images, 0)])
    assert "1 of 3 latent channels carry nothing" in capsys.readouterr().out
    mean, logvar = tokenizer.encode(T.to_float(images))
    z = (mean + (0.5 * logvar).exp() * noise("eps", *mean.shape) - stats[0]) / stats[1]
    assert torch.allclose(z.std((0, 1)), torch.ones(3), atol=0.05)
    _, of_means = D.latent_statistics(tokenizer, [(images, 0)], of_means=True)      # as for the authors' DiTs
    assert torch.allclose(of_means, mean.std((0, 1), correction=0), rtol=1e-4)


def test_stage_two_normalises_latents_and_drops_labels(monkeypatch):
    seen = {}

    def record(net, z, y, shift):
        seen.update(z=z, y=y)
        return torch.zeros(len(z))

    monkeypatch.setattr(S2, "flow_loss", record)
    images = torch.randint(0, 256, (4000, 3, 2, 2), dtype=torch.uint8)
    y = torch.arange(4000) % 8
    stats = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6])
    S2.stage2_loss(None, Patches(), stats, images, y, num_classes=8, shift=1.0, label_dropout=0.1)
    mean, _ = Patches().encode(T.to_float(images))
    assert torch.allclose(seen["z"], (mean - stats[0]) / stats[1], atol=1e-4)
    null = seen["y"] == 8
    assert abs(null.float().mean() - 0.1) < 0.02
    assert torch.equal(seen["y"][~null], y[~null])


def test_dit_starts_at_zero_and_learns_two_latents():
    torch.manual_seed(0)
    model = D.DiT(D.DiTConfig(2, 4, (32, 64), (1, 1), (2, 2), 2))
    z, y = noise("z", 2, 4, 4), torch.tensor([0, 1])
    assert model(z, torch.rand(2), y).abs().max() == 0
    assert torch.allclose(D.flow_loss(model, z, y, 1.0, torch.zeros_like(z)).mean(), z.square().mean())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        loss = D.flow_loss(model, z.repeat(8, 1, 1), y.repeat(8), 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (D.sample(model, noise("n", 2, 4, 4), y, 40, 1.0) - z).square().mean() < 0.1


def test_tokenizer_overfits_four_images():
    model = small(channels=32)
    images = T.to_float(torch.stack([T.Shapes(32, 4)[i][0] for i in range(4)]))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(100):
        loss = (model.decode(model.encode(images)[0]) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -10 * math.log10(loss.item() / 4) > 20                   # dB


def test_frechet_closed_forms():
    rng = np.random.RandomState(0)
    eye, mu = np.eye(5), rng.randn(5)
    assert M.frechet_distance(mu, eye, mu + 2, eye) == pytest.approx(20)        # equal covariances: |dmu|^2
    a, b = rng.rand(5) + 0.1, rng.rand(5) + 0.1
    distance = ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert M.frechet_distance(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(distance)
    x, y = rng.randn(5, 5), rng.randn(5, 5)
    s, t = x @ x.T, y @ y.T
    root = scipy.linalg.sqrtm(s @ t).real                           # as in the first implementations of FID
    assert M.frechet_distance(mu, s, mu, t) == pytest.approx(np.trace(s + t - 2 * root))
    assert abs(M.frechet_distance(mu, s, mu, s)) < 1e-6
    assert M.frechet_distance(mu, s, 2 * mu, t) == pytest.approx(M.frechet_distance(2 * mu, t, mu, s))
    refuses("5 .*4", M.frechet_distance, mu, s, mu[:4], s[:4, :4])
    refuses("finite", M.frechet_distance, mu * np.nan, s, mu, s)


def test_moments_equal_numpy():
    x, moments = noise("x", 50, 6), M.Moments(6)
    for part in x.split(7):
        moments.add(part)
    found = moments.result()
    assert found["n"] == 50
    assert np.allclose(found["mu"], x.double().mean(0))
    assert np.allclose(found["sigma"], np.cov(x.double().numpy(), rowvar=False))
    moments.add(torch.full((1, 6), math.nan))
    refuses("finite", moments.result)


def test_psnr_and_ssim_by_their_definitions():
    a, b = noise("a", 2, 3, 14, 13).sigmoid(), noise("b", 2, 3, 14, 13).sigmoid()
    assert torch.allclose(M.psnr(a, a + 0.1), torch.full((2,), 20.0), atol=1e-4)
    g = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
    weights = np.outer(g, g) / g.sum() ** 2

    def blur(x):                                     # every whole window of 11 x 11
        windows = np.lib.stride_tricks.sliding_window_view(x, (11, 11), (2, 3))
        return (windows * weights).sum((-1, -2))

    x, y = a.double().numpy(), b.double().numpy()
    var_x = blur(x * x) - blur(x) ** 2
    var_y = blur(y * y) - blur(y) ** 2
    covariance = blur(x * y) - blur(x) * blur(y)
    luminance = (2 * blur(x) * blur(y) + 0.01 ** 2) / (blur(x) ** 2 + blur(y) ** 2 + 0.01 ** 2)
    want = (luminance * (2 * covariance + 0.03 ** 2) / (var_x + var_y + 0.03 ** 2)).mean((1, 2, 3))
    assert np.allclose(M.ssim(a, b), want, atol=1e-5)
    assert torch.allclose(M.ssim(a, a), torch.ones(2))


def test_tf1_resize_has_no_half_pixel_offset():
    ramp = torch.arange(4.0).expand(1, 1, 2, 4)
    assert torch.allclose(M.tf1_resize(ramp, 8)[0, 0, 0], torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]))


def test_linear_probe_sees_what_is_there():
    class Labels(Patches):                           # its latent holds the class, and nothing else
        config = SimpleNamespace(channels=8, semantic="none")

        def encode(self, images):
            labels = images[:, 0, 0, 0].add(1).mul(127.5).round().long()
            return 20 * torch.nn.functional.one_hot(labels, 8).float()[:, None].expand(-1, 16, -1), None

    class Data(list):
        classes = list("abcdefgh")

    data = Data((torch.full((3, 32, 32), i % 8, dtype=torch.uint8), i % 8) for i in range(256))
    scores = M.linear_probe(Labels(), data, data, seed=0)
    assert scores["probe_z_1.0"] == scores["probe_z_0.5"] == 1
    assert scores["probe_z_0.0"] < 0.3


def test_cores_are_divided_once(monkeypatch):
    """torchrun may pin each process to its own cores: what is granted is its share already."""
    own, parent = range(2), range(8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(own if pid == 0 else parent), raising=False)
    assert T.cores() == 2
    own = range(8)                                   # not pinned: 8 cores for 4 processes
    assert T.cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert T.cores() == 1


# ---------------------------------------------------------------- invariances

def test_hidden_pixels_cannot_matter():
    model, x = small(), noise("x", 2, 3, 32, 32)
    keep = T.random_visible(2, 16, 0.5)
    hidden = torch.ones(2, 16).scatter(1, keep, 0).view(2, 1, 4, 4)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    before, _ = model.encode(x, keep)
    after, _ = model.encode(x + 9 * hidden, keep)
    assert torch.equal(before, after)
    after, _ = model.encode(x + 9 * (1 - hidden), keep)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("semantic", ["nano", "mlp"])
def test_order_of_keep_does_not_matter(semantic):
    model, z = small(semantic=semantic), noise("z", 2, 8, 8)
    keep, order = T.random_visible(2, 16, 0.5), torch.randperm(8)
    for read in (model.decode, model.predict):
        assert torch.allclose(read(z, keep), read(z[:, order], keep[:, order]), atol=1e-5)
        assert not torch.allclose(read(z, keep), read(z, keep[:, order]), atol=1e-5)


def test_every_patch_kept_equals_no_mask():
    model, x = small(), noise("x", 2, 3, 32, 32)
    keep = torch.arange(16).expand(2, -1)
    z, _ = model.encode(x)
    assert torch.allclose(z, model.encode(x, keep)[0], atol=1e-6)
    assert torch.allclose(model.decode(z), model.decode(z, keep), atol=1e-6)


def test_checkpointing_changes_nothing():
    model = fill(small_dit())
    inputs = noise("x", 2, 64, 16), torch.rand(2), torch.tensor([0, 1])
    want = model(*inputs)
    model.grad_checkpoint = True
    assert torch.allclose(model(*inputs), want)


def test_batches_are_the_same_for_any_number_of_processes():
    def batches(world, micro_batch):
        """The global batch of each of 5 steps, sorted."""
        ranks = [[key for part in S1.batch_indices(10, 8, micro_batch, 0, 0, 5, rank, world) for key in part]
                 for rank in range(world)]
        each = 8 // world
        return [sorted(sum((keys[step * each:][:each] for keys in ranks), [])) for step in range(5)]

    one = batches(1, 8)
    assert one == batches(2, 4) == batches(2, 2) == batches(4, 1)
    stream = sum(one, [])
    for epoch in range(4):                           # 40 places: each image once an epoch, 4 epochs
        assert sorted(i for e, i in stream if e == epoch) == list(range(10))
    first, second = S1.batch_indices(10, 10, 10, 0, 0, 2)
    assert [i for _, i in first] != [i for _, i in second]
    assert one[2:] == [sorted(batch) for batch in S1.batch_indices(10, 8, 8, 0, 2, 5)]      # from step 2 on


class Blank(torch.nn.Module):
    """Stands for a tokenizer: its latents are standard normal variables, and it keeps what it is given."""
    config = SimpleNamespace(grid=16, channels=4)

    def encode(self, images, keep):
        self.visible = keep
        mean = torch.zeros(*keep.shape, 4)
        return mean, mean

    def decode(self, z, keep):
        self.z_t = z
        return torch.zeros(len(z), 3, 2, 2)

    def predict_all(self, z, keep):
        return []


def draws(seed, B=50, *flags):
    """What the objective draws for one batch: visible patches (B, K), t (B,), z_t = t eps + (1 - t) noise."""
    tokenizer, times = Blank(), []
    args = S1.parse(["--tiny", *flags])

    def record_time(*inputs, **options):
        times.append(T.sample_time(*inputs, **options))
        return times[-1]

    torch.manual_seed(seed)
    with mock.patch.object(S1, "sample_time", record_time):
        S1.Objective(tokenizer, args, 2.83)(torch.zeros(B, 3, 2, 2), [])
    return tokenizer.visible, times[0], tokenizer.z_t


def test_draws_come_from_the_seed():
    one, again, other = (draws(seed) for seed in (5, 5, 6))
    assert same(one, again)
    for mine, theirs in zip(one, other):
        assert not same(mine, theirs)
    visible, t, z_t = one
    assert not same(visible[0].sort().values, visible[1].sort().values)        # another set for each image
    assert len(t.unique()) == 50
    variance = t ** 2 + (1 - t) ** 2                                # of two draws; of one it would be 1
    assert abs((z_t.var((1, 2)) / variance).mean() - 1) < 0.05


def test_draws_follow_their_laws():
    shares, times = [], []
    for seed in range(400):
        visible, t, _ = draws(seed, 10)
        shares.append(1 - visible.shape[1] / 256)
        times.append(t)
    assert abs(np.mean(np.equal(shares, 0)) - 0.2) < 0.06           # U(-0.1, 0.4): a fifth is below 0
    assert 0.38 < max(shares) <= 0.4
    assert abs(torch.cat(times).median() - 1 / 3.83) < 0.02         # of shift 2.83
    uniform, lognormal = (draws(0, 2000, "--schedule", name)[1] for name in ("uniform", "lognormal"))
    assert abs(uniform.median() - 0.5) < 0.04
    assert abs(lognormal.median() - 0.5) < 0.04
    assert lognormal.std() < 0.9 * uniform.std()


def every_ratio(model):
    """What a tokenizer makes of 2 images at four mask ratios."""
    found = []
    for ratio in (0, 0.2, 0.4, 0.3):
        keep = T.random_visible(2, 16, ratio, noise("k", 2, 16))
        z, logvar = model.encode(noise("x", 2, 3, 32, 32), keep)
        found += [z, logvar, model.decode(z, keep), *model.predict_all(z, keep)]
    return found


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


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="nothing is compiled before torch 2.9")
@pytest.mark.parametrize("make, call", [
    (lambda: small(semantic="tiny"), every_ratio),
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

def test_exact_resume_in_mid_epoch(toys):
    """11 steps at once, or 6, a stop and 5: batches of 8 from 13 images; both stages."""
    S1.main(toys.stage1("a", "--steps", 11, "--stop_at", 6))
    S1.main(toys.stage1("a", "--steps", 11))
    S1.main(toys.stage1("b", "--steps", 11, "--workers", 1))        # loader processes change nothing
    flags = "--steps", 11, "--features", "tiny", "--reference", toys.pictures, "--eval_num", 16
    S2.main(toys.stage2("c", *flags, "--stop_at", 6))
    S2.main(toys.stage2("c", *flags))
    S2.main(toys.stage2("d", *flags))
    for one, two in ("ab", "cd"):
        a, b = load(f"{one}/last.pt"), load(f"{two}/last.pt")
        for part in a.keys() - {"args"}:
            assert same(a[part], b[part]), part
        assert rows_of(one) == rows_of(two)
        assert [row["step"] for row in rows_of(one)] == ["10", "11"]
    assert {"FD", "FD_cfg", "agreement", "agreement_cfg"} <= rows_of("c")[-1].keys()


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
            S1.train_micro_batch(objective, torch.nn.Identity(), [lambda _: targets[mine]], None,
                                 images[mine], weights, False, 1 / len(passes), contextlib.nullcontext())
    return {name: p.grad for name, p in model.named_parameters()}


def scores_of(toys):
    """Of its tokenizer; mean and std of its latents, from each process's share of the pictures."""
    rank, world = T.rank_and_world()
    data = T.ImageFolder(toys.pictures, 32)
    model = T.load_tokenizer(toys.tokenizer)
    mine = torch.utils.data.Subset(data, range(rank, len(data), world))
    mean, std = D.latent_statistics(model, torch.utils.data.DataLoader(mine, 4))
    scores = M.score_tokenizer(model, data, data, "", M.Features(toys.teacher, "weights", CPU))
    return scores | {"mean": mean[3].item(), "std": std[3].item()}


SAMPLES = "--steps", "1", "--cfg", "1.5", "--num_samples", "140"


def on_two_processes(folder, out):
    """What is tested on two processes, in one launch: each takes 10 s to start."""
    toys = Toys(folder)
    _, rank, world = T.start()
    for main, flags, name in ((S1.main, toys.stage1, "stage1"), (S2.main, toys.stage2, "stage2")):
        main(flags(f"{out}/{name}a", "--micro_batch", 2, "--stop_at", 2))
        torch.distributed.barrier()
        main(flags(f"{out}/{name}a", "--micro_batch", 2))
        main(flags(f"{out}/{name}b", "--micro_batch", 2))
    S1.main(toys.stage1(f"{out}/continued"))
    X.main(["--dit", toys.dit, "--save", f"{out}/two.npz", "--batch", "7", *SAMPLES])
    torch.distributed.barrier()
    with open(f"{out}/fid{rank}.json", "w") as f, contextlib.redirect_stdout(f):
        M.main([f"{out}/two.npz", toys.pictures, "--image_size", "32", "--features", toys.teacher, "--json"])
    torch.save({"scores": scores_of(toys), "split": gradients(rank, world, 4),
                "accumulated": gradients(rank, world, 2),
                "order": M.in_order([torch.arange(rank, 7, world)[:, None]], 7)}, f"{out}/found{rank}.pt")
    kl_loss, signals = S1.kl_loss, [signal.SIGTERM] * rank          # rank 1 alone gets one, in its first step

    def with_a_signal(*inputs):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return kl_loss(*inputs)

    S1.kl_loss = with_a_signal
    S1.main(toys.stage1(f"{out}/left", "--steps", 50))
    if rank == 1:                                    # only here the loss is not finite; all gradients are
        S1.kl_loss = lambda *inputs: kl_loss(*inputs).detach() * math.nan
    try:
        S1.main(toys.stage1(f"{out}/nan"))
    except FloatingPointError:
        open(f"{out}/gave_up{rank}", "w").close()
    if rank == 1:
        S1.kl_loss = kl_loss
    fails("step", folder, f"{out}/dead")             # at the end, rank 1 dies


@pytest.fixture(scope="module")
def two(toys, tmp_path_factory):
    """The folder that on_two_processes leaves."""
    out = str(tmp_path_factory.mktemp("two"))
    S1.main(toys.stage1(f"{out}/continued", "--stop_at", 2))
    status, _, errors = run("on_two_processes", toys.folder, out, world=2)
    assert os.path.exists(f"{out}/gave_up1"), errors
    with open(f"{out}/status", "w") as f:
        f.write(str(status))
    return out


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_trains_and_resumes_on_two_processes(two, stage):
    a, b = load(f"{two}/{stage}a/last.pt"), load(f"{two}/{stage}b/last.pt")
    for part in a.keys() - {"args"}:
        assert same(a[part], b[part]), part
    files = {"config.json", "last.pt", "log.csv", "step_2.png", "step_2.pt", "step_4.png", "step_4.pt"}
    assert set(os.listdir(f"{two}/{stage}a")) - {"teacher.pt", "lock"} == files


def test_resumes_on_another_number_of_processes(two):
    assert load(f"{two}/continued/last.pt")["step"] == 4


def test_two_processes_give_the_gradient_of_one(two):
    found = load(f"{two}/found0.pt")
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
        both = json.loads(f.read().splitlines()[-1])
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


def test_all_ranks_decide_alike(two):
    """Only rank 1 got a signal, and saw losses that are not finite; both left, and gave up: none hangs."""
    assert load(f"{two}/left/last.pt")["step"] == 2
    assert os.path.exists(f"{two}/gave_up0") and os.path.exists(f"{two}/gave_up1")
    assert not os.path.exists(f"{two}/nan/last.pt")


def test_a_dead_rank_takes_the_job_down(two):
    """With an error on rank 1 the other one, and the job, ended; it would run into the time limit."""
    assert os.path.exists(f"{two}/dead.boom")
    with open(f"{two}/status") as f:
        assert f.read() == "1"


# ---------------------------------------------------------------- training

def test_ablations_train(toys):
    """Every switch of the page trains, and changes the numbers."""
    rows = {}
    for flags in ("", "--distill latent", "--distill none", "--target hidden", "--decode clean", "--gamma 0",
                  "--semantic mlp", "--semantic_loss l1", "--schedule uniform", "--schedule lognormal",
                  "--shift 3", "--mask_max 0 --mask_min 0", "--target hidden --mask_max 0 --mask_min 0",
                  "--w_gan 0"):
        S1.main(toys.stage1(flags or "default", "--steps", 3, "--shift", 2, *flags.split()))
        rows[flags] = rows_of(flags or "default")[-1]
    losses = [row["loss"] for row in rows.values()]
    assert all(math.isfinite(float(loss)) for loss in losses)
    assert len(set(losses)) == len(losses), dict(zip(rows, losses))
    assert "semantic" not in rows["--distill none"]
    assert "gan" not in rows["--w_gan 0"]
    assert float(rows["--target hidden --mask_max 0 --mask_min 0"]["semantic"]) == 0    # nothing is hidden


def test_several_teachers(toys):
    S1.main(toys.stage1("out", "--teacher", f"{toys.teacher},{toys.teacher}", "--stop_at", 1))
    assert T.load_tokenizer("out/last.pt").config.teacher_dim == (96, 96)


def test_small_images_train_or_are_refused(toys):
    flags = "--image_size", 16, "--patch_size", 4, "--distill", "none", "--stop_at", 3
    refuses("16", S1.main, toys.stage1("gan", *flags))              # at once, not when the GAN starts
    S1.main(toys.stage1("no_gan", *flags, "--w_gan", 0))


def test_decoder_finetuning(toys):
    """Stage 1b trains on the latents that the DiT reads, those of the EMA encoder, and ships that encoder."""
    S1.main(toys.stage1("out", "--finetune_decoder", toys.tokenizer))
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


def test_init_at_another_size(toys):
    state, own = T.read_tokenizer(toys.tokenizer)
    larger = T.load_tokenizer(toys.tokenizer, replace(own, image_size=64), init=True)
    for name, w in larger.state_dict().items():
        if name.endswith("positional_embedding"):    # interpolated: corners stay near, the mean stays
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


def test_init_for_another_teacher(toys):
    state, own = T.read_tokenizer(toys.tokenizer)
    other = replace(own, teacher_dim=20)
    with pytest.warns(UserWarning, match=toys.tokenizer):
        model = T.load_tokenizer(toys.tokenizer, other, init=True)
    for name, w in model.state_dict().items():
        assert name.startswith("sem_decoders.") or torch.equal(w, state[name]), name
    assert model.predict(noise("z", 1, 16, 16)).shape == (1, 16, 20)
    with pytest.warns(UserWarning):                  # and at another size
        larger = T.load_tokenizer(toys.tokenizer, replace(other, image_size=64), init=True)
    assert larger.predict(noise("z", 1, 64, 16)).shape == (1, 64, 20)
    refuses("sem_decoders.0.out", T.load_tokenizer, toys.tokenizer, other)      # without init: a silent loss
    coarser = replace(own, patch_size=16, image_size=64)
    refuses("patch_embed", T.load_tokenizer, toys.tokenizer, coarser, init=True)


def test_init_of_a_dit_with_other_classes(toys):
    config = D.load_dit(toys.dit).config
    with pytest.warns(UserWarning, match=toys.dit):
        model = D.load_dit(toys.dit, replace(config, num_classes=5), init=True)
    _, old = T.read_checkpoint(toys.dit)
    table = "y_embedder.embedding_table.weight"
    for name, w in model.state_dict().items():
        assert name == table or torch.equal(w, old[name]), name
    rows = model.state_dict()[table]
    assert len(rows) == 6 and not torch.equal(rows[0], old[table][0])
    assert torch.equal(rows[-1], old[table][-1])                    # the null class
    for change in (dict(channels=8), dict(depth=(4, 3))):
        refuses("x_embedder|blocks", D.load_dit, toys.dit, replace(config, **change), init=True)


def test_init_gives_way_to_the_run(toys):
    refuses("--init", S1.main, toys.stage1("out", "--init", "a.pt", "--finetune_decoder", toys.tokenizer))
    for main, flags, out in ((S1.main, toys.stage1, "tok"), (S2.main, toys.stage2, "dit")):
        main(flags(out, "--stop_at", 2))
        main(flags(out, "--init", "gone.pt"))                       # goes on from last.pt, and never opens it
        assert load(f"{out}/last.pt")["step"] == 4
    assert same(load("dit/last.pt")["model"], load(toys.dit)["model"])


def test_init_learns_sooner(toys, monkeypatch):
    """A DiT trained on other data reaches the loss of one from scratch in a third of the steps."""
    monkeypatch.setitem(D.PRESETS, "nano", dict(width=(64, 128), depth=(2, 1), heads=(2, 2)))
    for i in range(12):
        save_picture(f"other/{i % 3}/{i:02d}.png", T.Shapes(40, 12, seed=4)[i][0])
    tokenizer = small(channels=16)
    with torch.no_grad():                            # no posterior noise, which nobody can learn
        tokenizer.encoder.latent_head.bias[16:] = -9
    flags = "--batch", 16, "--tokenizer", save("tok.pt", tokenizer)
    S2.main(toys.stage2("start", *flags, "--steps", 60, "--data", "other"))
    S2.main(toys.stage2("scratch", *flags, "--steps", 30))
    S2.main(toys.stage2("init", *flags, "--steps", 10, "--init", "start/last.pt"))
    data = T.ImageFolder(toys.pictures, 32)
    images = torch.stack([image for image, _ in data]).repeat(8, 1, 1, 1)
    labels = torch.from_numpy(data.labels).repeat(8)

    def loss_of(run):
        model = D.load_dit(f"{run}/last.pt", ema=False)
        stats = model.extras["latent_mean"], model.extras["latent_std"]
        torch.manual_seed(0)
        with torch.no_grad():
            return S2.stage2_loss(model, tokenizer, stats, images, labels, 2, shift=1.0, label_dropout=0)

    assert loss_of("init") < loss_of("scratch")


# ---------------------------------------------------------------- pictures and folders of data

def plain(path, color=(200, 30, 30), mode="RGB"):
    """A picture of one colour, of the kind that its extension says."""
    save_picture(path, Image.new(mode, (40, 50), color))


def test_image_folder():
    plain("root/b/grey.PNG", 7, "L")
    plain("root/b/cmyk.jpg", (9, 9, 9, 200), "CMYK")
    plain("root/a/palette.png", 7, "P")
    plain("root/a/alpha.webp", (9, 9, 9, 200), "RGBA")
    data = T.ImageFolder("root", 32)
    names = [os.path.basename(os.fsdecode(path)) for path in data.paths]
    assert names == ["alpha.webp", "palette.png", "cmyk.jpg", "grey.PNG"]
    assert [label for _, label in data] == [0, 0, 1, 1]
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image, _ in data)
    with open("root/a/broken.jpg", "wb") as f:
        f.write(b"\xff\xd8 no jpeg")
    data = T.ImageFolder("root", 32)
    with pytest.warns(UserWarning, match="broken.jpg"):
        assert torch.equal(data[1][0], data[2][0])                  # replaced by the next, and counted
    assert data.bad.item() == 1
    flat = T.ImageFolder("root/b", 32)
    assert (len(flat), flat[1][1], flat.classes) == (2, 0, ["0"])


def test_flips_depend_on_seed_epoch_and_index():
    save_picture("root/ramp.png", torch.arange(32, dtype=torch.uint8).expand(3, 32, 32))

    def corners(seed):
        data = T.ImageFolder("root", 32, flip=True, seed=seed)
        return [data[epoch, 0][0][0, 0, 0].item() for epoch in range(16)]

    assert set(corners(0)) == {0, 31}
    assert corners(0) == corners(0) != corners(1)


def test_what_counts_as_data():
    """Leavings of editors, macOS and network drives do not, every extension does; loops are walked once."""
    names = ["n01/0.jpg", "n01/deep/1.png", "n02/0.bmp", "n02/1.gif", "n02/2.tiff", "n02/3.ppm", "n02/4.jfif"]
    for name in names:
        plain(f"root/{name}")
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        plain(f"root/{folder}/0.jpg")
        plain(f"root/n01/{folder}/0.jpg")
    for name in (".hidden.png", "n01/._0.jpg", "n01/notes.txt"):
        with open(f"root/{name}", "w") as f:
            f.write("no image")
    os.symlink("..", "root/n01/up")
    os.symlink("../n01/deep", "root/n02/twice")
    data = T.ImageFolder("root", 32)
    assert data.classes == ["n01", "n02"]
    assert [os.path.relpath(os.fsdecode(path), "root") for path in data.paths] == names
    assert len(list(data)) == 7 and not data.bad


def test_a_folder_that_would_move_labels_is_refused():
    plain("mixed/0.png")
    plain("mixed/previews/0.png")
    refuses("0.png.*previews", T.ImageFolder, "mixed", 32)
    plain("gap/a/0.png")
    os.mkdir("gap/b")
    refuses("gap/b", T.ImageFolder, "gap", 32)
    plain("whole/train/c/0.png")
    plain("whole/val/c/0.png")
    refuses("whole/train", T.ImageFolder, "whole", 32)
    os.mkdir("empty")
    refuses("empty", T.ImageFolder, "empty", 32)
    refuses("nowhere", T.ImageFolder, "nowhere", 32, error=FileNotFoundError)


def test_deep_and_transparent_pictures():
    """16 bits of grey stay a ramp, and what is transparent lies on white."""
    os.mkdir("root")
    Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))).save("root/0.png")
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
    rng, shapes, files = np.random.RandomState(0), T.Shapes(40, 160), []
    for i in range(160):
        buffer = io.BytesIO()
        Image.fromarray(shapes[i][0].permute(1, 2, 0).numpy()).save(buffer, "PNG" if i % 2 else "JPEG")
        files.append(bytearray(buffer.getvalue()))
    for file in files[30:80]:                        # truncated, down to nothing
        del file[rng.randint(0, len(file)):]
    for file in files[80:120]:
        for place in rng.randint(0, len(file), 5):
            file[place] ^= 1 << rng.randint(8)
    for file in files[120:140]:
        file[:] = rng.bytes(500)
    for file in files[141::2]:                       # a PNG that declares 3.6 gigapixels
        file[16:24] = (60000).to_bytes(4, "big") * 2
    os.mkdir("root")
    for i, file in enumerate(files):
        with open(f"root/{i:03d}.png", "wb") as f:
            f.write(file)
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    frames[0].save("root/animated.webp", save_all=True, append_images=frames[1:])
    data = T.ImageFolder("root", 32)
    with pytest.warns(UserWarning, match="root/"):
        assert all(image.shape == (3, 32, 32) for image, _ in data)
    assert 60 < data.bad < 130
    with pytest.warns(UserWarning, match="root/"):
        S1.main(toys.stage1("out", "--data", "root", "--steps", 20, "--stop_at", 10))
    assert int(rows_of("out")[-1]["unreadable"]) > 10
    os.mkdir("all_bad")
    shutil.copy("root/130.png", "all_bad")
    with pytest.warns(UserWarning, match="130.png"):
        refuses("all_bad", lambda: T.ImageFolder("all_bad", 32)[0])


# ---------------------------------------------------------------- checkpoints and published files

def test_loading_the_authors_files(authors_file):
    file = load(authors_file)
    want, z = T.load_tokenizer(authors_file), noise("z", 1, 16, 16)
    torch.save({n.replace("sem_", "aux_"): w for n, w in file["model_ema"].items()}, "older.pth")
    assert torch.equal(T.load_tokenizer("older.pth").predict(z), want.predict(z))
    tuned = {n: w for n, w in file["model_ema"].items() if not n.startswith("sem_decoders")}
    torch.save({"model_ema": tuned, "model": tuned}, "decft.pth")
    assert T.load_tokenizer("decft.pth").config.semantic == "none"
    torch.save(tuned | {"encoder.extra": torch.zeros(1)}, "surplus.pth")
    refuses("surplus.pth.*encoder.extra", T.load_tokenizer, "surplus.pth")
    torch.save({n: w for n, w in tuned.items() if n != "encoder.ln_post.weight"}, "missing.pth")
    refuses("missing.pth.*encoder.ln_post.weight", T.load_tokenizer, "missing.pth")
    refuses("RecTok.pth.*latent_head", T.load_tokenizer, authors_file, replace(want.config, channels=8))


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


def test_a_file_that_is_no_checkpoint_is_named(monkeypatch):
    monkeypatch.setitem(T.SIZES, "odd", (64, 1, 2))
    save_odd = small(encoder="odd", semantic="none").state_dict()
    monkeypatch.delitem(T.SIZES, "odd")
    torch.save(save_odd, "odd.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"a": 1}, "other.pt")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    texts = {"lfs.pth": pointer, "lfs.safetensors": pointer, "page.pth": "<!DOCTYPE html><html>log in</html>",
             "denied.pth": "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"}
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
    refuses("gone.pt", T.load_tokenizer, "gone.pt", error=FileNotFoundError)


def test_safetensors():
    tensors = {"a": ("F32", [2, 3], np.arange(6, dtype=np.float32).tobytes()), "byte": ("U8", [1], b"\7"),
               "b": ("BF16", [1], b"\xc0\x3f"), "empty": ("F32", [0], b""), "f8": ("F8_E4M3", [1], b"\x38"),
               "int16": ("I16", [2], b"\1\0\2\0"), "scalar": ("F64", [], np.float64(2).tobytes())}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    head = json.dumps(header).encode()
    file = len(head).to_bytes(8, "little") + head + data
    with open("x.safetensors", "wb") as f:
        f.write(file)
    found = T.read_weights("x.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3))
    assert found["b"].dtype == torch.bfloat16 and found["b"].item() == 1.5
    assert found["int16"].dtype == torch.int16 and found["int16"].tolist() == [1, 2]
    assert found["f8"].float().item() == 1
    assert found["empty"].shape == (0,) and found["scalar"].shape == ()
    with open("x.safetensors", "wb") as f:
        f.write(file[:-3])
    refuses("x.safetensors", T.read_weights, "x.safetensors")


def test_no_code_runs_from_files():
    class Code:
        def __reduce__(self):
            return os.mkdir, ("owned",)

    torch.save({"model": Code()}, "bad.pth")
    for read in (T.load_tokenizer, D.load_dit, T.load_teacher):
        refuses("bad.pth", read, "bad.pth")
    np.savez("bad.npz", arr_0=np.array([Code()], dtype=object), mu=np.array([Code()], dtype=object))
    refuses("bad.npz", M.read, "bad.npz")
    assert not os.path.exists("owned")
    for script in (T, D, M, S1, S2, X):
        with open(script.__file__) as f:
            source = f.read()
        assert not re.search("weights_only=False|allow_pickle=True|http://", source), script


def test_teacher_reads_the_grid_of_the_tokenizer():
    teacher = T.load_teacher("dinov2_vits14", "random")
    x = noise("x", 1, 3, 64, 64)
    assert teacher(x).shape == (1, 16, 384)          # 64 px at patch 14 is seen as 56 px
    assert not teacher(x).requires_grad
    assert not teacher.train().net.training          # it never trains
    refuses("60", teacher, noise("x", 1, 3, 60, 60))
    refuses("dinov9", T.load_teacher, "dinov9")


@pytest.fixture
def downloads(monkeypatch):
    """What would be downloaded: [(address, path, hash), ...]"""
    calls = []

    def download(url, path, hash_prefix=None):
        calls.append((url, path, hash_prefix))
        with open(path, "w") as f:
            f.write("weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return calls


def test_one_process_a_machine_downloads(monkeypatch, downloads, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    T.weight_file("vgg16-397923af.pth", "weights")
    assert downloads == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    for _ in range(2):                               # the second time it is there
        assert T.weight_file("vgg16-397923af.pth", "weights") == "weights/vgg16-397923af.pth"
    (url, _, mark), = downloads
    assert (url, mark) == ("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
    assert "licen" not in capsys.readouterr().out
    T.weight_file("vit_large_patch16_dinov3.lvd1689m.safetensors", "weights")
    assert "ai.meta.com/resources/models-and-libraries/dinov3-license" in capsys.readouterr().out
    assert all(url.startswith("https://") for url, _, _ in downloads)
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=ConnectionError))
    refuses("https://.*weights/vgg.pth", T.weight_file, "vgg.pth", "weights", error=OSError)


def test_files_of_a_teacher_in_their_order(monkeypatch, downloads):
    """Meta's file, else transformers', else timm's, which is downloaded where there is none."""
    opened = []

    def read(path):
        opened.append(os.path.basename(path))
        raise ValueError(f"{path} is empty")

    monkeypatch.setattr(T, "read_weights", read)
    _, names = T.TEACHERS["dinov3_vits16"]
    refuses(names[-1], T.load_teacher, "dinov3_vits16", "weights")
    assert [os.path.basename(path) for _, path, _ in downloads] == [names[-1]]
    for name in reversed(names[:-1]):                # each goes before those that were there
        open(f"weights/{name}", "w").close()
        refuses(name, T.load_teacher, "dinov3_vits16", "weights")
    refuses(names[0], T.load_teacher, f"weights/{names[0]}")        # by its path, it is known by its name
    assert opened == [*reversed(names), names[0]]


# ---------------------------------------------------------------- scores

def fid_scores(capsys, *flags):
    """What `python fid.py ... --json` prints."""
    capsys.readouterr()
    M.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def shapes_npz(path, number, noisiness=0):
    """Shapes with noise of this standard deviation, in the layout of ADM."""
    images = torch.stack([T.Shapes(32, number)[i][0] for i in range(number)]).permute(0, 2, 3, 1).numpy()
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
    distances = []
    for noisiness in (0, 5, 20, 60):                 # more noise, farther
        samples = shapes_npz("samples.npz", 120, noisiness)
        distances.append(fid_scores(capsys, samples, "reference.npz", *flags)["FD"])
    assert abs(distances[0]) < 1e-6
    assert distances == sorted(distances)
    other_batch = fid_scores(capsys, samples, "reference.npz", "--features", toys.teacher, "--batch", 50)
    assert other_batch["FD"] == pytest.approx(distances[-1], rel=1e-6)
    found = fid_scores(capsys, "clean.npz", "folder", *flags)
    assert found["precision"] == found["recall"] == 1
    assert found["n"] == found["n_reference"] == 120


def test_few_images_still_have_a_distance(toys, capsys):
    three, four = shapes_npz("three.npz", 3), shapes_npz("four.npz", 4)
    found = fid_scores(capsys, three, three, "--features", toys.teacher)
    assert abs(found["FD"]) < 1e-6
    assert "precision" not in found                  # there is no third neighbour
    assert "precision" in fid_scores(capsys, four, four, "--features", toys.teacher)


def test_bad_metric_input_is_named(toys, published):
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
    refuses("gone.npz", M.read, "gone.npz", error=FileNotFoundError)
    np.savez("wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    refuses("wide.npz", M.main, ["good.npz", "wide.npz", "--features", toys.teacher])
    np.savez("one.npz", arr_0=good[:1])
    refuses("1 images", M.main, ["one.npz", "good.npz", "--features", toys.teacher])
    refuses("convnext_small", M.InceptionV3, f"{published}/convnext_small-0c510722.pth")
    refuses("float32", M.InceptionV3("random"), torch.zeros(1, 3, 8, 8))


def test_statistics_with_a_leading_one(toys, capsys):
    mu = noise("mu", 96).numpy()
    np.savez("flat.npz", mu=mu, sigma=np.eye(96))
    np.savez("row.npz", mu=mu[None], sigma=np.eye(96))
    samples = shapes_npz("samples.npz", 8)
    flat = fid_scores(capsys, samples, "flat.npz", "--features", toys.teacher)
    row = fid_scores(capsys, samples, "row.npz", "--features", toys.teacher)
    assert flat["FD"] == row["FD"]


def test_images_of_an_npz_stay_on_disk():
    data = M.read(shapes_npz("stored.npz", 40))["images"]
    assert len(pickle.dumps(data)) < 2000            # what a loader that is not forked receives
    assert torch.equal(data[7][0], T.Shapes(32, 40)[7][0])
    assert isinstance(data.images, np.memmap)
    np.savez_compressed("packed.npz", arr_0=np.full((4, 8, 8, 3), 7, np.uint8))
    assert (M.read("packed.npz")["images"][3][0] == 7).all()


def test_statistics_are_written_whole_or_not_at_all(toys, monkeypatch):
    flags = [shapes_npz("samples.npz", 8), "--features", toys.teacher, "--save_stats"]
    M.main([*flags, "ref.npz"])
    with open("ref.npz", "rb") as f:
        before = f.read()

    def half(f, **arrays):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", half)
    refuses("ref.npz", M.main, [*flags, "ref.npz"], error=OSError)
    with open("ref.npz", "rb") as f:
        assert f.read() == before
    assert sorted(os.listdir()) == ["ref.npz", "samples.npz"]
    refuses("nowhere", M.main, [*flags, "nowhere/ref.npz"])         # before hours of work


def test_features_are_known_by_their_content(toys, capsys):
    samples = shapes_npz("samples.npz", 8)
    M.main(["--save_stats", "ref.npz", samples, "--features", toys.teacher])
    shutil.copy(toys.teacher, "teacher.pt")
    found = fid_scores(capsys, samples, "ref.npz", "--features", "./teacher.pt")    # the same, elsewhere
    assert abs(found["FD"]) < 1e-6
    config = load(toys.teacher)["config"]            # another file under the same name
    torch.save({"config": config, "model": T.DINO(**config).state_dict()}, "teacher.pt")
    refuses("ref.npz", M.main, [samples, "ref.npz", "--features", "teacher.pt"])


def test_eval_only_against_a_reference(toys, monkeypatch):
    """rFD against a file stands beside that against the originals; images are brought to the file's size."""
    scores = []
    monkeypatch.setattr(S1, "score_tokenizer", lambda *a, **k: scores.append(M.score_tokenizer(*a, **k)))
    features = M.Features(toys.teacher, "weights", CPU)
    model = T.load_tokenizer(toys.tokenizer)
    images = torch.stack([image for image, _ in T.ImageFolder(toys.pictures, 32)])
    with torch.no_grad():
        decoded = T.to_uint8(model.decode(model.encode(T.to_float(images))[0]))
    pictures = [Image.fromarray(image) for image in decoded.permute(0, 2, 3, 1).numpy()]
    resized = np.stack([picture.resize((16, 16), Image.Resampling.LANCZOS) for picture in pictures])
    resized = torch.from_numpy(resized).permute(0, 3, 1, 2)
    for size, ours in ((32, decoded), (16, resized)):
        judged = ["--features", toys.teacher]
        M.main(["--save_stats", "ref.npz", toys.pictures, "--image_size", str(size), *judged])
        S1.main(["--tiny", "--eval_only", toys.tokenizer, "--data", toys.pictures, *judged, "--reference",
                 "ref.npz", "--out", "out"])
        want = M.frechet(M.extract(features, [ours], 13), M.read("ref.npz"))
        assert scores[-1]["rFD_reference"] == pytest.approx(want, rel=1e-3)
    assert scores[0]["rFD"] == pytest.approx(scores[0]["rFD_reference"], rel=1e-3)      # of the originals
    assert scores[0]["psnr"] == pytest.approx(M.psnr(images / 255, decoded / 255).mean().item(), rel=1e-2)
    assert {"ssim", "probe_z_1.0", "probe_semantic_0.25"} <= scores[0].keys()
    width, height = Image.open("out/eval.png").size
    assert width / height == 8 / 2                   # originals above reconstructions


def test_scores_while_training_are_those_of_the_commands(toys, capsys):
    """FD in the log of stage 2 is what sample.py and fid.py find."""
    S2.main(toys.stage2("dit", "--features", "tiny", "--reference", toys.pictures, "--eval_num", 24))
    X.main(["--dit", "dit/last.pt", "--steps", "1", "--num", "24", "--save", "x.npz"])
    found = fid_scores(capsys, "x.npz", toys.pictures, "--image_size", 32, "--features", toys.teacher)
    assert float(rows_of("dit")[-1]["FD"]) == pytest.approx(found["FD"], rel=1e-3)


# ---------------------------------------------------------------- sampling

def draw(toys, *flags):
    """-> the picture that sample.py writes."""
    X.main(["--dit", toys.dit, "--steps", "2", "--out", "x.png", *flags])
    return Image.open("x.png").copy()


def test_pictures(toys):
    usual = draw(toys)
    assert usual.size == (98 * 2, 98 * 4)            # one class a column, 32 px enlarged to 96, a border
    assert draw(toys, "--classes", "1", "two words", "0", "--num", "5").size == (98 * 3, 98 * 2)
    assert draw(toys, "--trajectory", "--steps", "9").size == (98 * 8, 98 * 2)
    guide = "--guide", toys.dit.replace("last.pt", "step_4.pt"), "--cfg", "3"
    guided = draw(toys, "--cfg", "3"), draw(toys, *guide)
    others = draw(toys, "--solver", "heun"), draw(toys, "--seed", "1"), *guided
    assert usual not in others and guided[0] != guided[1]
    assert draw(toys, *guide, "--interval", "0.9", "1") == usual    # which takes its steps at t = 0 and 0.5


def test_classes_by_name(toys):
    pictures = [draw(toys, "--classes", name) for name in ("two words", "zürich 東京", "0", "1")]
    assert pictures[:2] == pictures[2:]
    assert pictures[0] != pictures[1]
    for unknown in ("2", "three words", "-1"):
        refuses(unknown, draw, toys, "--classes", unknown)


def test_bad_sampling_input_is_named_before_any_work(toys):
    for wrong in ("--num 0", "--num -1 --save x.npz", "--out picture", "--out nowhere/x.png", "--steps 0",
                  "--cfg 0.9", "--cfg inf", "--interval 0.9 0.1", "--batch 0", "--stats nowhere/x.npz",
                  "--save x.jpg", "--save x.npz --trajectory"):
        flag, value, *_ = wrong.split()
        refuses(f"{flag}|{value}", X.main, ["--dit", "gone.pt", *wrong.split()])    # which is missed later
    assert os.listdir() == []
    refuses("--trajectory", draw, toys, "--trajectory", "--num", "65")
    refuses("guide.pt", draw, toys, "--guide", save("guide.pt", small_dit()))
    refuses(toys.dit, draw, toys, "--tokenizer", toys.dit)


def test_another_tokenizer(toys):
    """Refused where the DiT's file names it; a warning where it is named by hand, as theirs must be."""
    other = save("other.pt", small(channels=16))
    torch.save(load(toys.dit) | {"tokenizer": other}, "dit.pt")
    refuses("other.pt", draw, toys, "--dit", "dit.pt")
    with pytest.warns(UserWarning, match="other.pt"):
        draw(toys, "--dit", "dit.pt", "--tokenizer", other)
    # Stage 2 does not go on with other latents.
    refuses("other.pt", S2.main, toys.stage2(os.path.dirname(toys.dit), "--tokenizer", other, "--steps", 9))


def test_saved_samples_go_on(toys):
    flags = ["--dit", toys.dit, "--steps", "1", "--num", "140", "--save"]
    X.main([*flags, "whole.npz"])
    with mock.patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        X.main([*flags, "part.npz"])                 # interrupted before its chunks are removed
    os.remove("part.npz")
    os.remove("part.npz.parts/000000.npy")
    np.save("part.npz.parts/000128.npy", np.zeros((12, 32, 32, 3), np.uint8))
    X.main([*flags, "part.npz"])
    with np.load("whole.npz") as whole, np.load("part.npz") as part:
        assert np.array_equal(part["arr_0"][:128], whole["arr_0"][:128])       # drawn again
        assert (part["arr_0"][128:] == 0).all()                                # kept
    assert not os.path.exists("part.npz.parts")
    refuses("part.npz", X.main, [*flags, "part.npz"])                          # it is there already


def test_samples_of_others_are_not_taken_for_ours(toys):
    shutil.copy(toys.dit, "dit.pt")
    flags = ["--dit", "dit.pt", "--num", "2", "--steps", "1", "--save"]
    plain("foreign/000000.png")
    refuses("foreign", X.main, [*flags, "foreign"])
    for _ in range(2):
        X.main([*flags, "ours"])
    refuses("ours", X.main, [*flags, "ours", "--steps", "2"])
    file = load("dit.pt")
    file["model_ema"]["final_layer.linear.bias"] += 0.1             # other weights, same path and step
    torch.save(file, "dit.pt")
    refuses("ours", X.main, [*flags, "ours"])
    assert sorted(os.listdir("ours")) == ["000000.png", "000001.png", "recipe.json"]


def test_sampling_reads_the_authors_files(toys, monkeypatch):
    """They hold no latent statistics: --stats is computed from --data (of posterior means), or only read."""
    monkeypatch.setitem(D.PRESETS, "toy", dict(width=(64, 128), depth=(2, 1), heads=(2, 2)))
    dit = D.DiT(D.DiTConfig(4, 16, num_classes=8, **D.PRESETS["toy"]))
    torch.save({"model_ema": dit.state_dict() | {"pos_embed": torch.zeros(1, 16, 64)}}, "theirs.pth")
    flags = ["--dit", "theirs.pth", "--tokenizer", toys.tokenizer]
    refuses("--stats", draw, toys, *flags)
    os.mkdir("shared")
    flags += ["--stats", "shared/stats.npz"]
    draw(toys, *flags, "--data", toys.pictures)
    images = torch.stack([image for image, _ in T.ImageFolder(toys.pictures, 32)])
    mean, _ = T.load_tokenizer(toys.tokenizer).encode(T.to_float(images))
    with np.load("shared/stats.npz") as file:
        assert np.allclose(file["mean"], mean.mean((0, 1)).detach(), atol=1e-5)
        assert np.allclose(file["std"], mean.std((0, 1), correction=0).detach(), atol=1e-5)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "shared" not in path and access(path, mode))
    draw(toys, *flags)                               # a read-only folder will do
    np.savez("shared/stats.npz", mean=np.zeros(3), std=np.ones(3))
    refuses("stats.npz", draw, toys, *flags)


# ---------------------------------------------------------------- bad flags and folders

def test_bad_flags_are_named_before_any_work(toys, monkeypatch):
    for wrong in ("--micro_batch 3", "--micro_batch -8", "--mask_max 1.5", "--mask_min 0.5 --mask_max 0.1",
                  "--shift 0", "--ema 1.5", "--batch 0", "--steps 0", "--lr -1", "--save_every 0"):
        refuses(wrong.split()[0], S1.main, toys.stage1("out", *wrong.split()))
    for wrong in ("--cfg 0.5", "--eval_num 1", "--label_dropout 1", "--sample_every 0", "--ema 1"):
        refuses(wrong.split()[0], S2.main, toys.stage2("out", *wrong.split()))
    for wrong in ("--image_size 30", "--data nowhere", "--finetune_decoder gone.pt"):
        refuses(wrong.split()[1], S1.main, toys.stage1("out", *wrong.split()), error=(ValueError, OSError))
    with monkeypatch.context() as three:
        three.setenv("WORLD_SIZE", "3")
        refuses("--batch", S1.main, toys.stage1("out"))
    assert not os.path.exists("out")
    full_size = ["--data", toys.pictures, "--out", "out", "--teacher"]
    refuses("dinov9", S1.main, [*full_size, "dinov9"])
    refuses(toys.teacher, S1.main, [*full_size, toys.teacher])      # a token every 8 pixels, not every 16


def test_a_mistake_on_the_command_line_is_one_line():
    status, _, errors = run("train_tokenizer.py", "--data", "nowhere")
    assert status == 1 and "nowhere" in errors and "Traceback" not in errors


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


def test_goes_on_with_the_data_elsewhere(toys):
    """The same images by another path are the same data."""
    shutil.copytree(toys.pictures, "moved")
    os.symlink(toys.folder, "there")
    for step, flags in enumerate(([], ["--data", toys.pictures + "/"], ["--data", "there/pictures"],
                                  ["--data", "moved", "--teacher", "there/teacher.pt"]), 1):
        S1.main(toys.stage1("out", *flags, "--stop_at", step))
        assert load("out/last.pt")["step"] == step


def test_latent_statistics_are_those_of_the_data(toys):
    """They are kept beside the tokenizer, but not taken for those of other images."""
    for name in ("two words", "zürich 東京"):
        for i in range(6):
            plain(f"other/{name}/{i}.png")
    S2.main(toys.stage2("dit", "--data", "other", "--stop_at", 1))
    images = torch.stack([image for image, _ in T.ImageFolder("other", 32)])
    mean, _ = D.latent_statistics(T.load_tokenizer(toys.tokenizer), [(images, None)])
    assert torch.allclose(load("dit/last.pt")["latent_mean"], mean, atol=1e-5)


# ---------------------------------------------------------------- trust

def slow(test):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # an unregistered mark: there is no configuration file
        test = pytest.mark.slow(test)
    return pytest.mark.skipif("slow" not in sys.argv, reason="minutes long: pytest test_all.py -m slow")(test)


def test_a_second_run_in_the_folder_is_refused(toys):
    """Until the first has ended; what a killed one left is removed."""
    os.mkdir("busy")
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def first_run():
        lock = S1.lock_folder("busy")
        ready.set()
        time.sleep(600)
        lock.close()

    first = fork.Process(target=first_run)
    first.start()
    ready.wait(60)
    refuses("busy", S1.main, toys.stage1("busy"))
    first.kill()
    first.join()
    open("busy/last.pt.x1y2.tmp", "w").close()
    S1.main(toys.stage1("busy", "--stop_at", 1))
    assert {"last.pt", "last.pt.x1y2.tmp"} & set(os.listdir("busy")) == {"last.pt"}


def test_full_disk_keeps_the_old_checkpoint(monkeypatch):
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
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    refuses("last.pt.*No space left", S1.save, "last.pt", {"step": 2}, error=OSError)
    assert load("last.pt") == {"step": 1}
    assert os.listdir() == ["last.pt"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(toys, monkeypatch):
    monkeypatch.setattr(S1, "save", mock.Mock(side_effect=OSError(28, "No space left on device", "last.pt")))
    refuses("last.pt", S1.main, toys.stage1("out"), error=OSError)


@pytest.mark.parametrize("number, world", [(signal.SIGHUP, 0), (signal.SIGTERM, 2)])
def test_a_signal_finishes_the_step_and_saves(toys, number, world):
    """The whole process group is signalled, loader processes too, as a terminal or SLURM does."""
    flags = toys.stage1("out", "--batch", 4, "--steps", 10 ** 6, "--save_every", 10 ** 6, "--workers", 2)
    signal.signal(number, signal.SIG_DFL)            # inherited; these tests may run under nohup
    process = start("train_tokenizer.py", *flags, world=world)
    wait_for("out/log.csv", process)                 # written at step 10
    assert not os.path.exists("out/last.pt")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)      # all have left: this reads their pipes to the end
    assert process.returncode == 0 or world, errors  # torchrun reports the signal
    step = load("out/last.pt")["step"]
    assert step >= 10
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


@pytest.mark.parametrize("steps_of_run, taken", [(50, 8), (7, 7)])
def test_non_finite_steps_end_the_run(toys, monkeypatch, steps_of_run, taken):
    """The third in a row, read a step later or at the end of the run, is the last."""
    kl_loss, steps, saved = S1.kl_loss, [], []

    def poisoned(mean, logvar):
        steps.append(1)
        return kl_loss(mean, logvar) * (math.nan if len(steps) > 4 else 1)

    monkeypatch.setattr(S1, "kl_loss", poisoned)
    monkeypatch.setattr(S1, "save", lambda path, file: saved.append(file))
    flags = toys.stage1("out", "--steps", steps_of_run, "--save_every", 1)
    refuses("kl", S1.main, flags, error=FloatingPointError)
    assert len(steps) == taken
    files = [file for file in saved if "discriminator" in file]
    assert [file["step"] for file in files] == list(range(1, taken))
    assert same(files[3]["model"], files[5]["model"]) and not same(files[2]["model"], files[3]["model"])


def test_a_non_finite_step_changes_no_weight(toys, monkeypatch, capsys):
    S1.main(toys.stage1("out", "--steps", 50, "--gan_start", 0, "--stop_at", 3))
    before = load("out/last.pt")
    monkeypatch.setattr(S1, "semantic_loss", lambda *_: torch.tensor(math.inf))    # its gradients are finite
    S1.main(toys.stage1("out", "--steps", 50, "--gan_start", 0, "--stop_at", 4))
    after = load("out/last.pt")
    assert after["step"] == 4 and "step 3: a loss or gradient" in capsys.readouterr().out
    for part in ("model", "discriminator"):
        assert same(before[part], after[part]), part
    for part in ("optimizer", "d_optimizer"):        # moments and step counts
        assert same(before[part]["state"], after[part]["state"]), part


@slow
def test_kill_at_twenty_moments(toys):
    """kill -9 at 20 random moments of a run that saves every third step: always resumable, little lost."""
    flags = toys.stage1("out", "--steps", 10 ** 6, "--save_every", 3)
    rng, step = np.random.RandomState(0), 0
    for _ in range(20):
        process = start("train_tokenizer.py", *flags)
        before = os.stat("out/last.pt").st_mtime_ns if step else 0
        wait_for("out/last.pt", process)
        while os.stat("out/last.pt").st_mtime_ns == before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1))
        process.kill()
        _, errors = process.communicate()
        now = load("out/last.pt")["step"]
        assert now > step and now % 3 == 0, errors
        step = now


def soak(folder, out):
    """300 steps with scores and pictures in between; the resident pages at each row of the log."""
    log_row, pages = S1.log_row, {}

    def record(out, row):
        log_row(out, row)
        with open("/proc/self/statm") as f:
            pages[row["step"]] = int(f.read().split()[1])

    S1.log_row = record
    toys = Toys(folder)
    often = "--eval_every", 50, "--save_every", 25, "--features", toys.teacher
    S1.main(toys.stage1(out, "--steps", 300, *often))
    with open(f"{out}/pages.json", "w") as f:
        json.dump(pages, f)


@slow
def test_memory_does_not_grow(toys):
    status, _, errors = run("soak", toys.folder, "out")
    assert status == 0, errors
    with open("out/pages.json") as f:
        pages = json.load(f)
    assert pages["300"] < 1.1 * pages["100"], pages


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
            assert float(compiled_row[name]) == pytest.approx(float(plain_row[name]), rel=1e-3), name


# ---------------------------------------------------------------- README.md

SCRIPTS = {"train_tokenizer.py": S1, "train_dit.py": S2, "sample.py": X, "fid.py": M}


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        return f.read()


def readme_commands():
    """What the README's shell blocks would run: [script, flag, ...] of each call of one of ours."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", readme(), re.S))
    stubs = """
        pip() { :; }
        python() { printf '%s\\037' "$@"; echo; }
        torchrun() { while [[ "$1" == -* ]]; do shift; done; python "$@"; }
    """
    done = subprocess.run(["bash", "-e", "-c", stubs + blocks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [line.split("\037")[:-1] for line in done.stdout.split("\n")]
    return [command for command in commands if command and command[0] in SCRIPTS]


def test_readme_links_lead_somewhere():
    for path in re.findall(r"\]\((?!http)([\w./-]+)", readme()):
        assert os.path.exists(os.path.join(HERE, path)), path
    with open(__file__) as f:
        tests = f.read()
    for name in re.findall(r"`(test_\w+)`", readme()):
        assert f"def {name}" in tests, name


def test_readme_commands_are_understood():
    commands = readme_commands()
    for script, *flags in commands:
        SCRIPTS[script].parse(flags)
    assert len(commands) >= 8
    assert ["train_tokenizer.py", "--tiny"] in commands


def test_ablation_commands_are_understood():
    """The whole script, with every command of ours printed instead of run."""
    stub = """
        python() { case $1 in train_*) printf '%s\\037' "$@"; echo;; esac; }
    """
    with open(os.path.join(HERE, "assets", "ablation.sh")) as f:
        done = subprocess.run(["bash", "-c", stub + f.read()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [line.split("\037")[:-1] for line in done.stdout.split("\n")]
    commands = [command for command in commands if command]
    assert len(commands) > 3 * 34                    # 17 rows, both stages, 3 seeds
    for script, *flags in commands:
        SCRIPTS[script].check(SCRIPTS[script].parse(flags))


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
