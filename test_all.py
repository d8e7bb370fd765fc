"""The tests: pytest test_all.py. Small, no network, nothing outside this folder.

Golden numbers: the weights are a function of each published tensor's name, so nothing large is stored; the
literals were recorded while this code agreed with the published code to 1e-5 (relative) on these weights.
"""
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zlib

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


def fill(module, rename=lambda n: n):
    """Every parameter and buffer from its published name."""
    module.load_state_dict({n: named(rename(n), *w.shape).to(w) for n, w in module.state_dict().items()})
    return module.eval()


def noise(name, *shape):
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def picks(x):
    """Four values spread over a tensor, and its root mean square."""
    x = torch.as_tensor(x).detach().double().flatten()
    return [*x[torch.linspace(0, len(x) - 1, 4).long()].tolist(), x.square().mean().sqrt().item()]


def close(x, numbers, tol=1e-4):
    x = torch.as_tensor(x).detach().double().flatten()
    got = picks(x) if len(x) > 5 else x.tolist()
    error = max(abs(a - b) for a, b in zip(got, numbers))
    assert len(got) == len(numbers) and error <= tol * max(map(abs, numbers)), got


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory):
    """A checkpoint as the authors save it: published names, a teacher, tables that we compute, EMA apart."""
    config = T.TokenizerConfig(64, 16, 16, "tiny", "tiny", "tiny", 96)
    state = fill(T.RecTok(config), lambda n: n.replace("sem_decoders.0", "sem_decoders.dinov3")).state_dict()
    state = {n.replace("sem_decoders.0", "sem_decoders.dinov3"): w for n, w in state.items()}
    state |= {"encoder.rope.freqs_cos": torch.zeros(3), "pos_embed": torch.zeros(3),
              "sem_foundation_models.dinov3.norm.weight": torch.zeros(3)}
    path = str(tmp_path_factory.mktemp("authors") / "RecTok.pth")
    torch.save({"model": {n: torch.zeros_like(w) for n, w in state.items()}, "model_ema": state}, path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of published files: VGG16, the LPIPS heads, ConvNeXt-S, with named weights."""
    folder, lpips = tmp_path_factory.mktemp("weights"), S1.LPIPS("random")
    vgg = {f"features.{n}": named(f"features.{n}", *w.shape) for n, w in lpips.features.state_dict().items()}
    torch.save(vgg, folder / "vgg16-397923af.pth")
    torch.save({f"lin{i}.model.1.weight": named(f"lin{i}.model.1.weight", *w.shape).abs()
                for i, w in enumerate(lpips.heads)}, folder / "vgg.pth")
    torch.save(fill(S1.ConvNeXt()).state_dict(), folder / "convnext_small-0c510722.pth")
    return str(folder)


def write_inception(path):
    """pt_inception-2015-12-05-6726825d.pth with named weights, under its own names."""
    state = {}
    for ours, w in M.InceptionV3("random").state_dict().items():
        name = ours.replace("stem.", "").replace("mixed.", "Mixed_")
        if name.startswith("fc."):
            state[name] = named(name, *w.shape)
        elif name.endswith(".weight"):
            name = name[:-len(".weight")]
            state[name + ".conv.weight"] = named(name + ".conv.weight", *w.shape)
            state |= {n: named(n, len(w)) for k in ("weight", "bias", "running_mean", "running_var")
                      for n in [f"{name}.bn.{k}"]}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return write_inception(str(tmp_path_factory.mktemp("inception") / M.INCEPTION))


# ---------------------------------------------------------------- golden numbers

def test_tokenizer_golden(authors_file):
    model, x, z = T.load_tokenizer(authors_file), noise("x", 2, 3, 64, 64).tanh(), noise("z", 2, 16, 16)
    mean, logvar = model.encode(x)
    close(torch.cat([mean, logvar], -1), GOLDEN["moments"])
    close(S1.kl_loss(mean, logvar), GOLDEN["kl"])
    close(model.decode(z), GOLDEN["decoded"])
    close(model.predict(z), GOLDEN["semantic"])
    keep = T.random_keep(2, 16, 0.25, torch.from_numpy(np.random.RandomState(0).rand(2, 16)))
    assert keep.shape == (2, 12)
    mean, logvar = model.encode(x, keep)
    close(torch.cat([mean, logvar], -1), GOLDEN["masked_moments"])
    close(model.decode(mean, keep), GOLDEN["masked_decoded"])
    close(model.predict(mean, keep), GOLDEN["masked_semantic"])


def test_perceptual_golden(published):
    a, b = noise("a", 2, 3, 64, 64).sigmoid(), noise("b", 2, 3, 64, 64).sigmoid()
    loss = S1.PerceptualLoss(published)
    close(loss.lpips(a * 2 - 1, b * 2 - 1), GOLDEN["lpips"])
    close(loss.logits(a), GOLDEN["convnext"])
    close(loss(a, b), GOLDEN["perceptual"])
    prediction = b.clone().requires_grad_(True)
    loss(a, prediction).backward()  # gradients reach the prediction, not the weights
    assert prediction.grad.abs().sum() > 0 and all(w.grad is None for w in loss.parameters())


def test_small_losses_golden():
    close(fill(S1.PatchGAN())(noise("a", 2, 3, 96, 96).sigmoid()), GOLDEN["patchgan"])
    f, g = noise("f", 2, 7, 24), noise("g", 2, 7, 24)
    close(S1.hinge_loss(f, g), GOLDEN["hinge"])
    for kind in ("cosine", "l1", "l2"):
        close(S1.semantic_loss(g, f, kind), GOLDEN[kind])
    hidden = torch.zeros(2, 7)
    assert S1.semantic_loss(g, f, "cosine", hidden) == 0            # nothing hidden: a well-defined zero
    hidden[0, 3] = 1
    assert torch.isclose(S1.semantic_loss(g, f, "cosine", hidden),
                         1 - torch.cosine_similarity(f[0, 3], g[0, 3], 0))


def hf_names(state, depth):
    """A DINOv3 state dict under the published names -> the same network under the Hugging Face names."""
    out = {f"embeddings.{new}": state[old] for old, new in (
        ("cls_token", "cls_token"), ("storage_tokens", "register_tokens"), ("patch_embed.proj.weight",
         "patch_embeddings.weight"), ("patch_embed.proj.bias", "patch_embeddings.bias"))}
    out |= {n: state[n] for n in ("norm.weight", "norm.bias")}
    for i in range(depth):
        a, b = f"blocks.{i}.", f"layer.{i}."
        for kind in ("weight", "bias"):
            for part, w in zip("qkv", state[f"{a}attn.qkv.{kind}"].chunk(3)):
                out |= {} if part == "k" and kind == "bias" else {f"{b}attention.{part}_proj.{kind}": w}
            for old, new in (("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.up_proj"),
                             ("norm1", "norm1"), ("mlp.fc2", "mlp.down_proj"), ("norm2", "norm2")):
                out[f"{b}{new}.{kind}"] = state[f"{a}{old}.{kind}"]
        out |= {f"{b}layer_scale{k}.lambda1": state[f"{a}ls{k}.gamma"] for k in (1, 2)}
    return out


def dino_state(net):
    names = {n: n.replace("registers", "storage_tokens").replace("patch_embed.", "patch_embed.proj.")
             for n in net.state_dict()}
    return {new: named(new, *net.state_dict()[old].shape) for old, new in names.items()}


def test_teachers_golden():
    x = noise("x", 2, 3, 64, 64)
    state = dino_state(T.DINO(3, 96, 2, 3, 16, 64, 4))
    extra = {"mask_token": torch.zeros(1, 96), "rope_embed.periods": torch.zeros(8),
             "blocks.0.attn.qkv.bias_mask": torch.zeros(288)}
    for published_state in (state | extra, hf_names(state, 2)):
        cls, patches = T.DINO(3, 96, 2, 3, 16, 64, 4).load_published(published_state)(x)
        close(patches, GOLDEN["dinov3"])
        close(cls, GOLDEN["dinov3_cls"])
    net = T.DINO(2, 96, 2, 3, 14, 98)                                # 7 x 7 positions, read at 4 x 4
    cls, patches = net.load_published(dino_state(net))(x[:, :, :56, :56])
    close(patches, GOLDEN["dinov2"])
    close(cls, GOLDEN["dinov2_cls"])
    with pytest.raises(ValueError, match="missing.*blocks.1.attn.qkv.weight"):
        net.load_published({n: w for n, w in dino_state(net).items() if n != "blocks.1.attn.qkv.weight"})
    with pytest.raises(ValueError, match="surplus.*head.weight"):
        net.load_published(dino_state(net) | {"head.weight": torch.zeros(1)})


def small_dit(width=(96, 192), depth=(3, 2), heads=(4, 4), channels=16):
    return D.DiT(D.DiTConfig(8, channels, width, depth, heads, 10))


def test_dit_golden(tmp_path):
    files = {"dit": small_dit(), "guide": small_dit((64, 192), (2, 1))}
    for name, model in files.items():  # as the authors save them: with tables that are computed here
        tables = {"pos_embed": torch.zeros(1, 64, 96), "enc_feat_rope.freqs_cos": torch.zeros(64, 24)}
        torch.save({"model": {}, "model_ema": fill(model).state_dict() | tables}, tmp_path / f"{name}.pth")
    dit, guide = (D.load_dit(str(tmp_path / f"{n}.pth"), m.config) for n, m in files.items())
    x, t, y = noise("x", 3, 64, 16), torch.tensor([0.05, 0.5, 0.93]), torch.tensor([1, 3, 10])
    close(dit(x, t, y), GOLDEN["velocity"])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0), GOLDEN["euler"])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0, cfg=2.0), GOLDEN["euler_cfg"])
    close(D.sample(dit, x[:2], y[:2], 6, 2.0, cfg=1.5, guide=guide), GOLDEN["euler_autoguidance"])
    close(D.flow_loss(dit, noise("z", 3, 64, 16), y, 2.0, x, torch.tensor([0.1, 0.5, 0.9])),
          GOLDEN["flow_loss"])
    with pytest.raises(ValueError, match="no preset"):
        D.load_dit(str(tmp_path / "dit.pth"))


def test_metrics_golden(inception_file):
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 40, 56), dtype=np.uint8))
    model = M.InceptionV3(inception_file)
    with torch.no_grad():
        for name, feature in zip(("f64", "f192", "f768", "f2048"), model.features(x)):
            close(feature, GOLDEN[name])
    close(model(x)[1], GOLDEN["logits"])
    a, b = noise("a", 300, 24).numpy(), 1.2 * noise("b", 350, 24).numpy() + 0.1
    moments = [(v.mean(0, dtype=np.float64), np.cov(v.astype(np.float64), rowvar=False))
               for v in (a, b, a[:15], b[:15])]
    close(M.frechet_distance(*moments[0], *moments[1]), GOLDEN["fid"], 1e-6)
    close(M.frechet_distance(*moments[2], *moments[3]), GOLDEN["fid_singular"], 1e-6)
    close(torch.tensor(M.inception_score(3 * noise("l", 200, 20))), GOLDEN["is"], 1e-6)
    close(torch.tensor(M.precision_recall(noise("a", 300, 4), 1.2 * noise("b", 350, 4))), GOLDEN["pr"], 1e-6)


def test_schedules_golden():
    assert T.latent_shift(256, 128) == pytest.approx(math.sqrt(8)) and T.latent_shift(16, 16) == 1
    u = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])                     # authors' noise level is 1 - t
    close(1 - T.sample_time(5, T.latent_shift(256, 128), u), [0, 0.485281, 0.738796, 0.962195, 1], 1e-5)
    epochs = [0, 0.5, 10, 49.5, 50, 99.25, 150, 199.9]
    published = [0, 4e-06, 8e-05, 3.96e-04, 4e-04, 3.02708250e-04, 1e-04, 4.38648924e-10]
    assert np.allclose([S1.lr_at(e / 200, 4e-4) for e in epochs], published, rtol=1e-6)


def test_center_crop_golden():
    y, x = np.mgrid[:97, :143]
    image = np.stack([(x * 7 + y * 3) % 256, (x * x // 9) % 256, (y * 11 ^ x) % 256], -1).astype(np.uint8)
    crop = np.asarray(T.center_crop(Image.fromarray(image), 32))
    assert crop.shape == (32, 32, 3) and crop[::9, ::9, 2].tolist() == GOLDEN["crop"]


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


# ---------------------------------------------------------------- what must hold

def small(**kw):
    torch.manual_seed(0)
    return T.RecTok(T.TokenizerConfig(**dict(image_size=32, patch_size=8, channels=8, encoder="nano",
                                             decoder="nano", semantic="nano", teacher_dim=12) | kw))


def test_flow_ends():
    z, eps = noise("z", 3, 4, 5), noise("e", 3, 4, 5)
    t = torch.tensor([1.0, 0.0, 0.25])
    z_t = T.flow(z, eps, t)
    assert torch.equal(z_t[0], z[0]) and torch.equal(z_t[1], eps[1])
    assert torch.allclose(z_t[2], 0.25 * z[2] + 0.75 * eps[2])


def test_random_keep_is_the_k_smallest():
    ranks = torch.rand(5, 16)
    keep = T.random_keep(5, 16, 0.3, ranks)
    assert keep.shape == (5, 12)                                     # ceil(16 * 0.7)
    assert torch.equal(ranks.gather(1, keep).max(1).values, ranks.sort(1).values[:, 11])
    assert T.random_keep(5, 16, 0.0).sort(1).values.equal(torch.arange(16).expand(5, -1))


def test_hidden_pixels_cannot_matter():
    model, x = small(), noise("x", 2, 3, 32, 32)
    keep = T.random_keep(2, 16, 0.5)
    hidden = torch.ones(2, 16).scatter(1, keep, 0).view(2, 1, 4, 4)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    before, after = model.encode(x, keep)[0], model.encode(x + 9 * hidden, keep)[0]
    assert torch.equal(before, after)
    assert not torch.allclose(before, model.encode(x + 9 * (1 - hidden), keep)[0])


@pytest.mark.parametrize("semantic", ["nano", "mlp"])
def test_order_of_keep_does_not_matter(semantic):
    model, z = small(semantic=semantic), noise("z", 2, 8, 8)
    keep, order = T.random_keep(2, 16, 0.5), torch.randperm(8)
    for read in (model.decode, model.predict):
        assert torch.allclose(read(z, keep), read(z[:, order], keep[:, order]), atol=1e-5)
        assert not torch.allclose(read(z, keep), read(z, keep[:, order]), atol=1e-5)


def test_every_patch_kept_equals_no_mask():
    model, x = small(), noise("x", 2, 3, 32, 32)
    keep = torch.arange(16).expand(2, -1)
    z = model.encode(x)[0]
    assert torch.allclose(z, model.encode(x, keep)[0], atol=1e-6)
    assert torch.allclose(model.decode(z), model.decode(z, keep), atol=1e-6)


def test_config_sizes():
    with torch.device("meta"):
        paper = T.RecTok(T.TokenizerConfig())
    count = sum(p.numel() for n, p in paper.named_parameters() if not n.startswith("sem_"))
    assert abs(count / 1e6 - 172) < 1, count
    several = small(teacher_dim=(12, 20)).predict(noise("z", 2, 16, 8))
    assert [p.shape[-1] for p in several] == [12, 20]
    for wrong, says in ((dict(image_size=30), "not divisible"),
                        (dict(encoder="giant"), "unknown encoder size 'giant'")):
        with pytest.raises(ValueError, match=says):
            small(**wrong)


def test_decay_groups():
    model = small()
    plain, decay = S1.optimizer_for(model, 1e-3).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)] for p in decay["params"]}
    assert "encoder.transformer.0.attn.qkv.weight" in decay and "decoder.conv_out.weight" in decay
    assert not decay & {"encoder.patch_embed.0.weight", "decoder.decoder_embed.weight", "decoder.mask_token"}
    assert not any(n.endswith("bias") or "norm" in n or "ln_" in n or "embedding" in n for n in decay)


def test_shapes_dataset():
    data = T.Shapes(32, 64)
    image, label = data[11]
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and label == 11 % 8
    assert torch.equal(image, T.Shapes(32, 64)[11][0])
    assert not torch.equal(image, T.Shapes(32, 64, seed=1)[11][0])
    assert len(list(data)) == 64 and len(set(T.Shapes.classes)) >= 8


def test_image_folder(tmp_path):
    for name, mode in (("b/grey.PNG", "L"), ("b/cmyk.jpg", "CMYK"), ("a/palette.png", "P"),
                       ("a/alpha.webp", "RGBA")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new(mode, (40, 50), 7 if mode in "LP" else (9, 9, 9, 200)).save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("no image")
    data = T.ImageFolder(str(tmp_path), 32)
    names = [os.path.basename(os.fsdecode(p)) for p in data.paths]
    assert names == ["alpha.webp", "palette.png", "cmyk.jpg", "grey.PNG"]
    assert [data[i][1] for i in range(4)] == [0, 0, 1, 1] and len(list(data)) == 4
    assert all(data[i][0].shape == (3, 32, 32) and data[i][0].dtype == torch.uint8 for i in range(4))
    (tmp_path / "a/broken.jpg").write_bytes(b"\xff\xd8 no jpeg")
    data = T.ImageFolder(str(tmp_path), 32)
    with pytest.warns(UserWarning, match="broken.jpg"):
        assert torch.equal(data[1][0], data[2][0])                   # replaced by the next, and counted
    assert data.bad.item() == 1
    flat = T.ImageFolder(str(tmp_path / "b"), 32)
    assert len(flat) == 2 and flat[1][1] == 0
    flips = T.ImageFolder(str(tmp_path / "b"), 32, flip=True)
    grad = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    grad.save(tmp_path / "b/cmyk.jpg", "PNG")
    seen = {flips[(epoch, 0)][0].sum(0)[0, 0].item() for epoch in range(16)}
    assert len(seen) == 2 and torch.equal(flips[(3, 0)][0], flips[(3, 0)][0])


def test_batches_are_the_same_for_any_number_of_processes():
    def stream(world, micro):
        parts = [list(S1.batches(10, 8, micro, 0, 0, 5, rank, world)) for rank in range(world)]
        per = 8 // (micro * world)
        return [sorted(sum((parts[r][s * per + m] for r in range(world) for m in range(per)), []))
                for s in range(5)]
    one = stream(1, 8)
    assert one == stream(2, 4) == stream(2, 2) == stream(4, 1)
    whole = sum(one, [])
    for epoch in range(4):  # 40 slots: each image once an epoch, 4 epochs
        assert sorted(i for e, i in whole if e == epoch) == list(range(10))
    order = [[i for e, i in sum(S1.batches(10, 10, 10, 0, 0, 2), []) if e == k] for k in (0, 1)]
    assert order[0] != order[1]
    assert one[2:] == [sorted(b) for b in S1.batches(10, 8, 8, 0, 2, 5)]          # resuming at step 2


def test_draws_come_from_the_seed():
    args = S1.parse(["--tiny"])
    config = T.TokenizerConfig(32, 8, 16)
    a, b = (S1.draw(args, config, 4, 5, "cpu") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[1], S1.draw(args, config, 4, 6, "cpu")[1][:, :a[1].shape[1]])
    paper = T.TokenizerConfig(channels=1)
    shares = [1 - S1.draw(args, paper, 1, s, "cpu")[0].shape[1] / 256 for s in range(400)]
    assert abs(np.mean([s == 0 for s in shares]) - 0.2) < 0.06 and max(shares) <= 0.4  # a fifth hides nothing
    times = {s: torch.cat([S1.draw(S1.parse(["--tiny", "--schedule", s, "--shift", "2.83"]), config, 50, k,
                                   "cpu")[3] for k in range(40)]) for s in ("shift", "uniform", "lognormal")}
    for name, median in (("shift", 1 / 3.83), ("uniform", 0.5), ("lognormal", 0.5)):
        assert abs(times[name].median() - median) < 0.04, name
    assert times["lognormal"].std() < times["uniform"].std()


def test_loading(authors_file, tmp_path):
    file = torch.load(authors_file, weights_only=True)
    older = {n.replace("sem_", "aux_"): w for n, w in file["model_ema"].items()}
    torch.save(older, tmp_path / "aux.pth")
    x = noise("x", 1, 3, 64, 64)
    want = T.load_tokenizer(authors_file)
    assert torch.equal(T.load_tokenizer(str(tmp_path / "aux.pth")).predict(want.encode(x)[0]),
                       want.predict(want.encode(x)[0]))
    plain = {n: w for n, w in file["model_ema"].items() if not n.startswith("sem_decoders")}
    torch.save({"model_ema": plain, "model": plain}, tmp_path / "decft.pth")
    assert T.load_tokenizer(str(tmp_path / "decft.pth")).config.semantic == "none"
    for change, says in (({"encoder.extra": torch.zeros(1)}, "surplus.*encoder.extra"),
                         ({"encoder.ln_post.weight": None}, "missing.*encoder.ln_post.weight")):
        torch.save({n: w for n, w in (plain | change).items() if w is not None}, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match=says):
            T.load_tokenizer(str(tmp_path / "bad.pth"))
    with pytest.raises(ValueError, match="of another shape"):
        T.load_tokenizer(authors_file, T.TokenizerConfig(64, 16, 8, "tiny", "tiny", "tiny", 96))
    big = T.load_tokenizer(authors_file, T.TokenizerConfig(128, 16, 16, "tiny", "tiny", "tiny", 96))
    assert big.decode(big.encode(noise("x", 1, 3, 128, 128))[0]).shape == (1, 3, 128, 128)
    pos = big.encoder.positional_embedding.view(8, 8, -1)
    assert torch.allclose(pos.mean((0, 1)), want.encoder.positional_embedding.mean((0, 1)), atol=0.05)
    (tmp_path / "broken.pth").write_bytes(open(authors_file, "rb").read()[:5000])
    with pytest.raises(ValueError, match="broken.pth.*corrupt"):
        T.load_tokenizer(str(tmp_path / "broken.pth"))


def test_teacher_reads_the_grid_of_the_tokenizer(tmp_path):
    teacher = T.load_teacher("dinov2_vits14", "random")
    assert teacher(noise("x", 1, 3, 64, 64)).shape == (1, 16, 384)   # 64 px at patch 14 is seen as 56 px
    with pytest.raises(ValueError, match="no such grid"):
        teacher(noise("x", 1, 3, 60, 60))
    assert not teacher.train().training and not teacher(noise("x", 1, 3, 64, 64)).requires_grad
    with pytest.raises(FileNotFoundError, match="(?s)dinov3_vitl16_pretrain.*ai.meta.com.*dinov2_vitl14"):
        T.load_teacher("dinov3_vitl16", str(tmp_path))
    with pytest.raises(ValueError, match="unknown teacher 'dinov9'"):
        T.load_teacher("dinov9")


def test_one_process_a_machine_downloads(tmp_path, monkeypatch):
    calls = []
    def download(url, path, hash_prefix):
        calls.append((url, hash_prefix))
        open(path, "w").write("weights")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = tmp_path / "weights/vgg16-397923af.pth"
    monkeypatch.setenv("LOCAL_RANK", "1")
    others = threading.Timer(0.5, lambda: path.write_text("of rank 0"))
    others.start()
    assert T.weight_file(path.name, str(path.parent)) == str(path) and not calls   # it waited
    path.unlink()
    monkeypatch.setenv("LOCAL_RANK", "0")
    T.weight_file(path.name, str(path.parent))
    assert calls == [("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")]


def test_safetensors(tmp_path):
    w = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5, -2], dtype=torch.bfloat16)}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, t in w.items():
        raw = t.view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[t.dtype]
        header[name] = {"dtype": kind, "shape": list(t.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)
    assert all(torch.equal(T.read_weights(str(path))[n], w[n]) for n in w)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="x.safetensors.*corrupt"):
        T.read_weights(str(path))


def test_ssim_and_psnr():
    a = noise("a", 2, 3, 32, 32).sigmoid()
    assert torch.allclose(S1.ssim(a, a), torch.ones(2)) and (S1.ssim(a, a.roll(7, 3)) < 0.5).all()


# ---------------------------------------------------------------- training

@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory):
    torch.manual_seed(0)
    config = dict(version=3, width=96, depth=1, heads=3, patch=8, image_size=32, registers=1)
    path = str(tmp_path_factory.mktemp("teacher") / "teacher.pt")
    torch.save({"config": config, "model": T.DINO(**config).state_dict(),
                "head": torch.nn.Linear(96, 8).state_dict()}, path)
    return path


def tiny(teacher, out, *flags):
    return ["--tiny", "--teacher", teacher, "--out", str(out), "--batch", "8", "--steps", "4", "--gan_start",
            "0.25", *flags]


def run(script, *flags, world=0):
    """The real command, with `world` gloo processes (0: plain python)."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world else []
    return subprocess.run([sys.executable, *launch, os.path.join(HERE, script), *map(str, flags)],
                          capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def test_overfits_eight_images():
    model, images = small(channels=32), T.to_float(torch.stack([T.Shapes(32, 8)[i][0] for i in range(8)]))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(150):
        loss = (model.decode(model.encode(images)[0]) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert -10 * math.log10(loss.item() / 4) > 22                    # dB


def test_trains_and_resumes_on_two_processes(tmp_path, tiny_teacher):
    flags = tiny(tiny_teacher, tmp_path / "a", "--micro_batch", "2")
    first = run("train_tokenizer.py", *flags, "--stop_at", 2, world=2)
    assert first.returncode == 0, first.stderr
    again = run("train_tokenizer.py", *flags, world=2)
    assert again.returncode == 0 and "steps 2 to 4" in again.stdout, again.stderr
    files = sorted(os.listdir(tmp_path / "a"))
    assert files == ["config.json", "last.pt", "log.csv", "step_2.png", "step_2.pt", "step_4.png",
                     "step_4.pt", "teacher.pt"]
    whole = run("train_tokenizer.py", *tiny(tiny_teacher, tmp_path / "b", "--micro_batch", "2"), world=2)
    assert whole.returncode == 0, whole.stderr
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in "ab")
    for part in ("model", "model_ema", "discriminator"):             # k + k steps are 2k steps, to the bit
        assert all(torch.equal(a[part][n], b[part][n]) for n in a[part]), part


def test_refuses_the_folder_of_another_configuration(tmp_path, tiny_teacher):
    S1.main(tiny(tiny_teacher, tmp_path, "--stop_at", "1"))
    with pytest.raises(ValueError, match="another configuration.*w_kl: was 1e-06, now 0.5"):
        S1.main(tiny(tiny_teacher, tmp_path, "--w_kl", "0.5"))


@pytest.mark.parametrize("flags", [
    "--distill latent", "--distill none", "--target hidden", "--decode clean", "--gamma 0", "--semantic mlp",
    "--semantic_loss l1", "--mask_max 0 --mask_min 0", "--target hidden --mask_max 0 --mask_min 0",
    "--w_gan 0"])
def test_ablations_train(tmp_path, tiny_teacher, flags):
    S1.main(tiny(tiny_teacher, tmp_path, "--steps", "20", "--stop_at", "10", *flags.split()))
    file = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(w.isfinite().all() for w in file["model"].values())
    columns, *rows = [r.split(",") for r in open(tmp_path / "log.csv").read().split("\n") if r]
    row = dict(zip(columns, rows[-1]))
    assert (float(row["semantic"]) == 0) == (
        flags in ("--distill none", "--target hidden --mask_max 0 --mask_min 0"))
    assert (float(row["gan"]) == 0) == (flags == "--w_gan 0")


def test_several_teachers(tmp_path, tiny_teacher):
    S1.main(tiny(f"{tiny_teacher},{tiny_teacher}", tmp_path, "--stop_at", "1"))
    assert T.load_tokenizer(str(tmp_path / "last.pt")).config.teacher_dim == (96, 96)


def test_networks_compile_to_one_graph():
    """What torch.compile traces on CUDA, run by Python here: no graph break, any number of visible tokens."""
    def same(net, *inputs):
        torch.compiler.reset()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        for x in inputs:
            with torch.autocast("cpu", torch.bfloat16):
                want, got = net(*x), compiled(*x)
            for a, b in zip(want, got) if isinstance(want, tuple) else [(want, got)]:
                assert torch.equal(a[0] if isinstance(a, list) else a, b[0] if isinstance(b, list) else b)
    args, x = S1.parse(["--tiny"]), noise("x", 2, 3, 32, 32)
    model = small()
    masks = [T.random_keep(2, 16, ratio) for ratio in (0, 0.2, 0.4)]
    same(S1.RecTokPass(model, args), *([x, keep, *noise("e", 2, 2, keep.shape[1], 8), torch.rand(2)]
                                       for keep in masks))
    same(T.load_teacher("dinov2_vits14_reg", "random"), [noise("x", 1, 3, 64, 64)])
    same(S1.PerceptualLoss("random"), [x, x.roll(1, 3)])
    same(fill(small_dit()), [noise("z", 2, 64, 16), torch.rand(2), torch.tensor([0, 10])])


def test_decoder_finetuning(tmp_path, tiny_teacher):
    S1.main(tiny(tiny_teacher, tmp_path / "a", "--channels", "1024"))
    S1.main(["--tiny", "--finetune_decoder", str(tmp_path / "a/last.pt"), "--out", str(tmp_path / "b"),
             "--batch", "8", "--steps", "2"])
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in "ab")
    for part in ("model", "model_ema"):
        for name, w in b[part].items():
            if name.startswith("encoder") or name == "decoder.ffn.1.weight":
                assert torch.equal(w, a[part][name]) == name.startswith("encoder"), name
    assert not any(n.startswith("sem_") for n in b["model"])
    assert b["args"]["shift"] == a["args"]["shift"] == 2  # sqrt(16 x 1024 / 4096), whatever --channels says
    assert T.load_tokenizer(str(tmp_path / "b/last.pt")).config.semantic == "none"


def test_bad_input_is_named_before_any_work(tmp_path, tiny_teacher):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    cases = [(["--data", str(tmp_path / "nowhere")], FileNotFoundError, "nowhere.*does not exist"),
             (["--data", str(tmp_path / "empty")], ValueError, "empty.*holds no image"),
             (["--image_size", "250"], ValueError, "250 is not divisible by the patch size 16"),
             (["--data", str(tmp_path), "--teacher", "dinov9"], ValueError, "unknown teacher 'dinov9'"),
             (["--data", str(tmp_path), "--teacher", tiny_teacher], ValueError, "grids do not match"),
             (["--micro_batch", "3"], ValueError, "--micro_batch 3 does not divide"),
             (["--mask_max", "1.5"], ValueError, "--mask_max 1.5"),
             (["--micro_batch", "-8"], ValueError, "--micro_batch -8: must be positive"),
             (["--shift", "0"], ValueError, "--shift 0.0: must be positive"),
             (["--ema", "1.5"], ValueError, "--ema 1.5")]
    for flags, kind, says in cases:
        with pytest.raises(kind, match=says):
            S1.main([*flags, "--out", str(tmp_path / "out")])
    os.environ["WORLD_SIZE"] = "3"
    try:
        with pytest.raises(ValueError, match="--batch 1024 is not divisible among 3 processes"):
            S1.parse([])
    finally:
        del os.environ["WORLD_SIZE"]
    shown = run("train_tokenizer.py", "--data", tmp_path / "nowhere")
    assert shown.returncode and "nowhere" in shown.stderr and "Traceback" not in shown.stderr


# ---------------------------------------------------------------- stage 2 and sampling

class Gaussian(torch.nn.Module):
    """The exact velocity field of data ~ N(mean, std^2) in place of a network; counts its evaluations."""
    config = D.DiTConfig(num_classes=10)

    def __init__(self, mean=2.0, std=0.5):
        super().__init__()
        self.mean, self.std, self.calls = mean, std, 0

    def forward(self, x, t, y):
        self.calls += 1
        t = t.view(-1, 1, 1)
        var = t ** 2 * self.std ** 2 + (1 - t) ** 2
        z = self.mean + t * self.std ** 2 / var * (x - t * self.mean)          # E[z | z_t = x]
        return z - (1 - t) / var * (x - t * self.mean)                         # minus E[noise | z_t = x]


def test_euler_is_first_order_and_heun_second():
    start = noise("x", 4, 8, 3).double()
    exact, y = 2.0 + 0.5 * start, torch.zeros(4, dtype=torch.long)  # the flow of a Gaussian is affine
    for solver, order in (("euler", 1), ("heun", 2)):
        errors = [(D.sample(Gaussian(), start, y, n, 1.0, solver=solver) - exact).abs().max().item()
                  for n in (40, 80)]
        assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25, (solver, errors)


def test_guidance_interval_and_its_cost():
    start, y = noise("x", 2, 4, 3), torch.tensor([1, 2])
    def run(**kw):
        strong, weak = Gaussian(), Gaussian(mean=0.0)
        return D.sample(strong, start, y, 8, 1.0, guide=weak, **kw), weak.calls
    plain, calls = run(cfg=1.0)
    assert calls == 0                                                          # w = 1: no second network
    assert torch.equal(run(cfg=3.0, interval=(2, 3))[0], plain) and run(cfg=3.0, interval=(2, 3))[1] == 0
    assert run(cfg=3.0)[1] == 8 and run(cfg=3.0, interval=(0.25, 0.5))[1] == 3  # t = .25 .375 .5, ends in
    assert run(cfg=3.0)[0].mean() > plain.mean() + 1  # away from the weak model's mean
    counted = Gaussian()
    D.sample(counted, start, y, 10, 1.0, cfg=2.0)
    assert counted.calls == 20  # CFG: the null class, once a step
    for wrong in (dict(cfg=0.5), dict(cfg=math.inf), dict(steps=0), dict(solver="rk4")):
        with pytest.raises(ValueError):
            D.sample(counted, start, y, **(dict(steps=2, shift=1.0) | wrong))


def test_dit_starts_at_zero_and_learns_two_latents():
    torch.manual_seed(0)
    model = D.DiT(D.DiTConfig(2, 4, (32, 64), (1, 1), (2, 2), 2))
    z, y = noise("z", 2, 4, 4), torch.tensor([0, 1])
    assert model(z, torch.rand(2), y).abs().max() == 0
    assert abs(D.flow_loss(model, z, y, 1.0, torch.zeros_like(z)).mean() - z.square().mean()) < 1e-6
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(400):
        loss = D.flow_loss(model, z.repeat(16, 1, 1), y.repeat(16), 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (D.sample(model, noise("n", 2, 4, 4), y, 40, 1.0) - z).square().mean() < 0.1


def test_dit_sizes():
    with torch.device("meta"):
        xl = D.DiT(D.DiTConfig(**D.PRESETS["XL"]))
    count = sum(p.numel() for p in xl.parameters()) + xl.positions.numel()  # published with the fixed table
    assert abs(count / 1e6 - 835.3) < 0.05
    state = small_dit().state_dict()
    assert not any("rope" in n or "positions" in n for n in state)             # tables are not saved
    checkpointed = fill(small_dit())
    x, t, y = noise("x", 2, 64, 16), torch.rand(2), torch.tensor([0, 1])
    want = checkpointed(x, t, y)
    checkpointed.grad_checkpoint = True
    assert torch.allclose(checkpointed(x, t, y), want)


def test_dit_schedule_and_draws():
    epochs, published = [0, 39.9, 40, 100.5, 400, 799, 800, 900], [
        2e-4, 2e-4, 2e-4, 1.8567105e-04, 1.1473684e-04, 2.0236842e-05, 2e-5, 2e-5]
    assert np.allclose([S2.lr_at(e / 800, 2e-4) for e in epochs], published, rtol=1e-6)
    args, y = S2.parse(["--tiny"]), torch.zeros(4000, dtype=torch.long)
    a, b = (S2.draw(args, 8, (4000, 2, 2), y, 3, "cpu") for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b))
    assert abs((a[3] == 8).float().mean() - 0.1) < 0.02 and set(a[3].tolist()) == {0, 8}


def test_latent_statistics():
    class Encoder(torch.nn.Module):
        config = T.TokenizerConfig(32, 8, 3)
        def parameters(self):
            yield torch.zeros(1)
        def encode(self, x):
            return T.gather_tokens(x.flatten(2).transpose(1, 2), torch.arange(16).expand(len(x), -1)), None
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    mean, std = D.latent_statistics(Encoder(), [(images[:7], 0), (images[7:], 0)])
    z = Encoder().encode(T.to_float(images))[0].flatten(0, 1)
    assert torch.allclose(mean, z.mean(0), atol=1e-6)
    assert torch.allclose(std, z.std(0, correction=0), atol=1e-6)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_teacher):
    """A folder with a tokenizer and a DiT of a few steps, made by the real commands."""
    folder = tmp_path_factory.mktemp("chain")
    S1.main(tiny(tiny_teacher, folder / "tok", "--stop_at", "2"))
    S2.main(["--tiny", "--tokenizer", str(folder / "tok/last.pt"), "--out", str(folder / "dit"),
             "--batch", "8", "--steps", "3", "--eval_num", "128", "--sample_steps", "2"])
    return folder


def test_stage_two_trains_resumes_and_guards_its_tokenizer(chain, tmp_path, tiny_teacher):
    flags = ["--tiny", "--tokenizer", str(chain / "tok/last.pt"), "--out", str(tmp_path / "a"),
             "--batch", "8", "--steps", "3", "--eval_num", "128", "--sample_steps", "2", "--micro_batch", "4"]
    S2.main([*flags, "--stop_at", "2"])
    S2.main(flags)
    S2.main([*flags[:4], str(tmp_path / "b"), *flags[5:]])
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in "ab")
    assert all(torch.equal(a[p][n], b[p][n]) for p in ("model", "model_ema") for n in a[p])
    assert a["fingerprint"] == T.fingerprint(T.load_tokenizer(str(chain / "tok/last.pt")))
    rows = (tmp_path / "a/log.csv").read_text().split("\n")
    assert "agreement" in rows[0] and rows[1].startswith("3,") and float(rows[1].split(",")[-1]) <= 1
    S1.main(tiny(tiny_teacher, tmp_path / "other", "--stop_at", "1", "--seed", "5"))
    os.replace(tmp_path / "other/last.pt", chain / "tok/other.pt")
    with pytest.raises(ValueError, match="latents of another tokenizer"):
        S2.main([*flags[:2], str(chain / "tok/other.pt"), *flags[3:], "--steps", "5"])
    with pytest.raises(ValueError, match="is not what"):
        X.main(["--dit", str(tmp_path / "a/last.pt"), "--tokenizer", str(chain / "tok/other.pt")])


def test_samples_depend_on_seed_and_index_alone(chain, tmp_path):
    def save(name, *flags, world=0):
        done = run("sample.py", "--dit", chain / "dit/last.pt", "--steps", 2, "--num_samples", 210,
                   "--cfg", 1.5, "--save", tmp_path / name, *flags, world=world)
        assert done.returncode == 0 and "recipe: " in done.stdout, done.stderr
        with np.load(tmp_path / name) as file:
            return file["arr_0"], file["labels"]
    images, labels = save("one.npz")
    assert images.shape == (210, 32, 32, 3) and images.dtype == np.uint8
    assert labels[:10].tolist() == [*range(8), 0, 1]
    again, _ = save("two.npz", "--batch", 7, world=2)
    assert np.abs(images.astype(int) - again).max() <= 1                       # rounding of float32 sums
    os.makedirs(tmp_path / "part.npz.parts")  # an interrupted run: chunk 1 is there
    np.save(tmp_path / "part.npz.parts/000128.npy", np.zeros((82, 32, 32, 3), np.uint8))
    taken, _ = save("part.npz")
    assert (taken[128:] == 0).all() and np.array_equal(taken[:128], images[:128])
    other = run("sample.py", "--dit", chain / "dit/last.pt", "--steps", 2, "--num", 20,
                "--save", tmp_path / "png")
    assert other.returncode == 0 and len(list((tmp_path / "png").glob("*.png"))) == 20, other.stderr
    clash = run("sample.py", "--dit", chain / "dit/last.pt", "--steps", 3, "--num", 20,
                "--save", tmp_path / "png")
    assert clash.returncode and "another recipe" in clash.stderr


def test_pictures(chain, tmp_path):
    for flags in (["--classes", "1", "5", "--num", "6"], ["--trajectory", "--steps", "9"],
                  ["--solver", "heun"],
                  ["--guide", str(chain / "dit/last.pt"), "--cfg", "1.3", "--interval", "0.1", "0.9"]):
        X.main(["--dit", str(chain / "dit/last.pt"), "--steps", "2", "--out", str(tmp_path / "x.png"),
                *flags])
        width, height = Image.open(tmp_path / "x.png").size
        assert (width, height) == {"--classes": (196, 294), "--trajectory": (784, 784)}.get(
            flags[0], (784, 392))


def test_sampling_reads_the_authors_files(chain, tmp_path):
    dit = D.DiT(D.DiTConfig(4, 16, (384, 2048), (1, 1), (6, 16), 8))  # the widths of a preset, fewer blocks
    torch.save({"model_ema": dit.state_dict() | {"pos_embed": torch.zeros(1, 16, 384)}},
               tmp_path / "theirs.pth")
    for i in range(4):
        Image.fromarray(T.Shapes(32, 4)[i][0].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    flags = ["--dit", str(tmp_path / "theirs.pth"), "--tokenizer", str(chain / "tok/last.pt"), "--steps", "2",
             "--num", "2", "--out", str(tmp_path / "a/x.png")]
    os.makedirs(tmp_path / "a")
    with pytest.raises(ValueError, match="no latent statistics.*--stats"):
        X.main(flags)
    X.main([*flags, "--stats", str(tmp_path / "stats.npz"), "--data", str(tmp_path)])  # computed, and kept
    with np.load(tmp_path / "stats.npz") as file:
        assert file["mean"].shape == file["std"].shape == (16,)
    X.main([*flags, "--stats", str(tmp_path / "stats.npz")])


def test_bad_sampling_input_is_named(chain, tmp_path):
    dit = str(chain / "dit/last.pt")
    torch.save({"model_ema": small_dit().state_dict(), "config": vars(small_dit().config)},
               tmp_path / "guide.pt")
    for flags, says in ((["--classes", "8"], "classes 0 to 7"), (["--steps", "0"], "--steps >= 1"),
                        (["--trajectory", "--num", "65"], "65 samples at once"),
                        (["--cfg", "0.9"], "--cfg >= 1"), (["--cfg", "inf"], "finite --cfg"),
                        (["--guide", str(tmp_path / "guide.pt")], "latents of another shape"),
                        (["--interval", "0.9", "0.1"], "--interval"),
                        (["--out", "/nowhere/x.png"], "cannot write"),
                        (["--tokenizer", dit], "no RecTok tokenizer")):
        with pytest.raises(ValueError, match=says):
            X.main(["--dit", dit, *flags])


# ---------------------------------------------------------------- metrics

def test_frechet_closed_forms():
    rng = np.random.RandomState(0)
    eye, mu = np.eye(5), rng.randn(5)
    assert M.frechet_distance(mu, eye, mu + 2, eye) == pytest.approx(20)  # equal covariances: |dmu|^2
    a, b = rng.rand(5) + 0.1, rng.rand(5) + 0.1
    distance = ((a ** 0.5 - b ** 0.5) ** 2).sum()
    assert M.frechet_distance(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(distance)
    x, y = rng.randn(5, 5), rng.randn(5, 5)
    s, t = x @ x.T, y @ y.T
    root = scipy.linalg.sqrtm(s @ t).real            # as the first implementations of FID computed it
    assert M.frechet_distance(mu, s, mu, t) == pytest.approx(np.trace(s + t - 2 * root))
    assert abs(M.frechet_distance(mu, s, mu, s)) < 1e-6
    assert M.frechet_distance(mu, s, 2 * mu, t) == pytest.approx(M.frechet_distance(2 * mu, t, mu, s))
    with pytest.raises(ValueError, match="5 features against statistics of 4"):
        M.frechet_distance(mu, s, mu[:4], s[:4, :4])
    with pytest.raises(ValueError, match="non-finite"):
        M.frechet_distance(mu * np.nan, s, mu, s)


def test_moments_equal_numpy():
    x, m = noise("x", 50, 6), M.Moments(6)
    for part in x.split(7):
        m.add(part)
    mu, sigma, n = m.result()
    assert n == 50 and np.allclose(mu, x.double().mean(0))
    assert np.allclose(sigma, np.cov(x.double().numpy(), rowvar=False))
    with pytest.raises(ValueError, match="non-finite"):
        m.add(torch.full((1, 6), float("nan")))
        m.result()


def test_tf1_resize_has_no_half_pixel_offset():
    ramp = torch.arange(4.0).expand(1, 1, 2, 4)
    assert torch.allclose(M.tf1_resize(ramp, 8)[0, 0, 0], torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3]))


def test_fid_command(tmp_path, tiny_teacher):
    rng = np.random.RandomState(0)
    clean = torch.stack([T.Shapes(32, 120)[i][0] for i in range(120)]).permute(0, 2, 3, 1).numpy()
    noisy = [np.clip(clean + rng.randn(*clean.shape) * s, 0, 255).astype(np.uint8) for s in (5, 20, 60)]
    np.savez(tmp_path / "clean.npz", arr_0=clean)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(clean):
        Image.fromarray(image).save(tmp_path / f"folder/{i:03d}.png")
    flags = ["--features", tiny_teacher, "--batch", "16", "--json"]
    done = run("fid.py", "--save_stats", tmp_path / "ref.npz", tmp_path / "folder",
               "--image_size", 32, *flags)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "ref.npz") as file:
        assert int(file["n"]) == 120 and int(file["image_size"]) == 32 and file["mu"].shape == (96,)
    scores = []
    for k, images in enumerate([clean, *noisy]):
        np.savez(tmp_path / f"{k}.npz", arr_0=images)
        done = run("fid.py", tmp_path / f"{k}.npz", tmp_path / "ref.npz", *flags, world=2 if k == 1 else 0)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout)["FD"])
    assert abs(scores[0]) < 1e-6 and scores[0] < scores[1] < scores[2] < scores[3]  # more noise, farther
    one = run("fid.py", tmp_path / "1.npz", tmp_path / "ref.npz", "--features", tiny_teacher, "--batch", 50)
    assert f"{scores[1]:.4f}" in one.stdout and "n_reference  120" in one.stdout  # any batch, any processes
    both = run("fid.py", tmp_path / "0.npz", tmp_path / "folder", *flags)
    assert {"precision": 1.0, "recall": 1.0}.items() <= json.loads(both.stdout).items(), both.stderr


def test_bad_metric_input_is_named(tmp_path, tiny_teacher, published):
    good = np.zeros((4, 8, 8, 3), np.uint8)
    for name, arrays, says in (
            ("empty", dict(x=good), "neither images"), ("float", dict(arr_0=good / 255), "uint8"),
            ("chw", dict(arr_0=good.transpose(0, 3, 1, 2)), r"\(N, H, W, 3\)"),
            ("good", dict(arr_0=good), None), ("one", dict(arr_0=good[:1]), "2 are needed"),
            ("wide", dict(mu=np.zeros(3), sigma=np.eye(3)), "3 .*features")):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        if says:
            with pytest.raises(ValueError, match=says):
                M.main([str(tmp_path / f"{name}.npz"), str(tmp_path / f"{name}.npz"),
                        "--features", tiny_teacher])
    np.savez_compressed(tmp_path / "small.npz", arr_0=good + 7)
    stored, small = (M.read(str(tmp_path / f"{n}.npz"))["images"].images for n in ("good", "small"))
    assert isinstance(stored, np.memmap) and (stored == 0).all() and (small == 7).all()
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="text.npz"):
        M.read(str(tmp_path / "text.npz"))
    with pytest.raises(FileNotFoundError, match="gone"):
        M.read(str(tmp_path / "gone.npz"))
    with pytest.raises(ValueError, match="not the Inception of FID"):
        M.InceptionV3(os.path.join(published, "convnext_small-0c510722.pth"))
    with pytest.raises(ValueError, match="uint8 images"):
        M.InceptionV3("random")(torch.zeros(1, 3, 8, 8))


def test_linear_probe_sees_what_is_there(tiny_teacher):
    class Tokenizer:                                 # its latent holds the class, and nothing else
        config = T.TokenizerConfig(32, 8, 8, semantic="none")
        def encode(self, images):
            labels = images[:, 0, 0, 0].add(1).mul(127.5).round().long()
            return 20 * torch.nn.functional.one_hot(labels, 8).float()[:, None].expand(-1, 16, -1), None
    data = [(torch.full((3, 32, 32), i % 8, dtype=torch.uint8), i % 8) for i in range(256)]
    class Data(list):
        num_classes = 8
    scores = S1.linear_probe(Tokenizer(), Data(data), Data(data), 0, "cpu", 0, 1)
    assert scores["probe_z_1.0"] == 1 and scores["probe_z_0.5"] == 1 and scores["probe_z_0.0"] < 0.3


# ---------------------------------------------------------------- trust

def slow(test):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")              # an unregistered mark: there is no configuration file
        test = pytest.mark.slow(test)
    return pytest.mark.skipif("slow" not in sys.argv, reason="minutes long: pytest test_all.py -m slow")(test)


def same_state(a, b, parts=("model", "model_ema", "discriminator", "optimizer", "d_optimizer")):
    def flat(x, path=""):
        items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
        return {path: x} if not items else {k: v for n, y in items for k, v in flat(y, f"{path}/{n}").items()}
    for part in set(parts) & a.keys():
        left, right = flat(a[part]), flat(b[part])
        assert left.keys() == right.keys()
        for name, x in left.items():
            assert torch.equal(x, right[name]) if torch.is_tensor(x) else x == right[name], (part, name)


def log_rows(path):
    columns, *rows = [line.split(",") for line in path.read_text().split()]
    keep = [i for i, c in enumerate(columns) if c not in ("images_per_s", "mfu", "memory_gb")]  # of the clock
    return [[row[i] for i in keep] for row in rows]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 12 PNG in 2 classes whose names have a space and an umlaut, one of them a symlink."""
    root = tmp_path_factory.mktemp("data")
    for i in range(12):
        folder = root / ("two words" if i % 2 else "zürich 東京")
        folder.mkdir(exist_ok=True)
        Image.fromarray(T.Shapes(40, 12)[i][0].permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    (root / "two words/link.png").symlink_to(root / "two words/01.png")
    return str(root)


def test_exact_resume_in_mid_epoch(tmp_path, tiny_teacher, pictures):
    """20 steps at once, or 13, a stop and 7: batches of 8 from 13 images, accumulated 2 by 2; both stages."""
    first = tiny(tiny_teacher, tmp_path / "a", "--data", pictures, "--micro_batch", "4", "--steps", "20",
                 "--features", "none")
    for flags in ([*first, "--stop_at", "13"], first, [*first[:4], str(tmp_path / "b"), *first[5:]]):
        S1.main(flags)
    second = ["--tiny", "--data", pictures, "--tokenizer", str(tmp_path / "a/last.pt"),
              "--out", str(tmp_path / "c"), "--batch", "8", "--micro_batch", "4", "--steps", "20",
              "--eval_num", "96", "--sample_steps", "1"]
    for flags in ([*second, "--stop_at", "13"], second, [*second[:6], str(tmp_path / "d"), *second[7:]]):
        S2.main(flags)
    for one, two in ("ab", "cd"):
        a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in (one, two))
        same_state(a, b)
        assert log_rows(tmp_path / one / "log.csv") == log_rows(tmp_path / two / "log.csv") != []


def test_resumes_on_another_number_of_processes(tmp_path, tiny_teacher):
    flags = tiny(tiny_teacher, tmp_path, "--features", "none")
    S1.main([*flags, "--stop_at", "2"])
    done = run("train_tokenizer.py", *flags, world=2)
    assert done.returncode == 0 and "2 x cpu" in done.stdout and "steps 2 to 4" in done.stdout, done.stderr


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = str(tmp_path / "last.pt")
    S1.save(path, {"step": 1})
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="last.pt.*No space left"):
        S1.save(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1} and os.listdir(tmp_path) == ["last.pt"]


def start_run(script, *flags, world=0):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world else []
    command = [sys.executable, *launch, os.path.join(HERE, script), *map(str, flags)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(path, process, seconds=120):
    for _ in range(seconds * 20):
        if path.exists() or process.poll() is not None:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("world", [0, 2])
def test_a_signal_finishes_the_step_and_saves(tmp_path, tiny_teacher, world):
    """The whole process group is signalled, loader processes too, as torchrun, a terminal or SLURM do."""
    flags = tiny(tiny_teacher, tmp_path, "--features", "none", "--steps", "100000", "--save_every", "5",
                 "--workers", "2")
    process = start_run("train_tokenizer.py", *flags, world=world)
    wait_for(tmp_path / "last.pt", process)
    if world:
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert f"stopped by a signal after step {step}" in out and (process.returncode == 0 or world), out


def test_non_finite_steps_touch_nothing_and_end_the_run(tmp_path, tiny_teacher, monkeypatch):
    flags = tiny(tiny_teacher, tmp_path, "--features", "none", "--steps", "50", "--save_every", "1")
    S1.main([*flags, "--stop_at", "3"])
    before = torch.load(tmp_path / "last.pt", weights_only=True)
    kl, calls = S1.kl_loss, []
    def poisoned(mean, logvar):
        calls.append(1)
        return kl(mean, logvar) * (float("nan") if len(calls) > 1 else 1)      # one good step, then none
    monkeypatch.setattr(S1, "kl_loss", poisoned)
    with pytest.raises(FloatingPointError,
                       match="3 non-finite steps in a row, the last one 6.*kl nan.*last.pt"):
        S1.main(flags)
    after = torch.load(tmp_path / "last.pt", weights_only=True)
    assert len(calls) == 4 and after["step"] == 4  # nothing saved after the good step
    assert not torch.equal(before["model"]["encoder.latent_head.weight"],
                           after["model"]["encoder.latent_head.weight"])
    assert all(w.isfinite().all() for p in ("model", "model_ema", "discriminator") for w in after[p].values())


def test_a_bad_loss_counts_without_a_bad_gradient(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setattr(S1, "semantic_loss", lambda *a, **k: torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="3 non-finite steps.*semantic inf"):
        S1.main(tiny(tiny_teacher, tmp_path, "--features", "none", "--steps", "50", "--w_gan", "0"))


def test_ema_holds_no_graph_and_follows():
    model, ema = small(), small().requires_grad_(False)
    with torch.no_grad():
        model.decoder.mask_token.add_(1)
    before = ema.decoder.mask_token.clone()
    S1.update_ema(ema, model, 0.9)
    assert torch.allclose(ema.decoder.mask_token - before, torch.tensor(0.1), atol=1e-5)
    assert not any(p.requires_grad for p in ema.parameters())


def _gradient(rank, world, file, share):
    """Gradient of RecTok's own losses on a fixed batch with fixed draws, split over processes and passes."""
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file}.sync", rank=rank,
                                             world_size=world)
    args, model = S1.parse(["--tiny"]), small()
    net = S1.RecTokPass(model, args)
    net = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    x, y = noise("x", 8, 3, 32, 32).tanh(), noise("y", 8, 16, 12)
    eps, eta, t = noise("e", 8, 12, 8), noise("n", 8, 12, 8), torch.linspace(0.1, 0.9, 8)
    keep = T.random_keep(8, 16, 0.25, torch.from_numpy(np.random.RandomState(0).rand(8, 16)))
    parts = range(0, 8, share)[rank::world]
    for k, first in enumerate(parts):
        s = slice(first, first + share)
        if world > 1:
            net.require_backward_grad_sync = k == len(parts) - 1
        mean, logvar, predicted, fake = net(x[s], keep[s], eps[s], eta[s], t[s])
        loss = torch.nn.functional.mse_loss(fake, x[s]) + 1e-4 * S1.kl_loss(mean, logvar).mean()
        ((loss + S1.semantic_loss(predicted[0], y[s])) / len(parts)).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, file)
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    grads = []
    for k, (world, share) in enumerate(((1, 8), (2, 4), (2, 2))):  # whole, split, split and accumulated
        file = str(tmp_path / f"{k}.pt")
        if world == 1:
            _gradient(0, 1, file, share)
        else:
            torch.multiprocessing.spawn(_gradient, (world, file, share), nprocs=world)
        grads.append(torch.load(file, weights_only=True))
    for other in grads[1:]:
        for name, g in grads[0].items():
            assert torch.allclose(g, other[name], rtol=1e-4, atol=1e-6 * max(1, g.abs().max())), name


def test_a_dead_rank_takes_the_job_down(tmp_path, tiny_teacher):
    script = tmp_path / "dies.py"
    script.write_text("import os, sys\nsys.path.insert(0, %r)\nimport train_tokenizer as S1\n"
                      "kl = S1.kl_loss\ndef dies(*a):\n"
                      "    assert os.environ['RANK'] == '0', 'rank 1 is gone'\n    return kl(*a)\n"
                      "S1.kl_loss = dies\nS1.main(sys.argv[1:])\n" % HERE)
    began = time.time()
    done = run(str(script), *tiny(tiny_teacher, tmp_path / "out", "--features", "none"), world=2)
    assert done.returncode and "rank 1 is gone" in done.stderr and time.time() - began < 60


def test_all_ranks_decide_alike(tmp_path, tiny_teacher):
    """Only rank 1 sees a loss that is not finite; both skip those steps, and both give up without hanging."""
    script = tmp_path / "nan.py"
    script.write_text("import os, sys\nsys.path.insert(0, %r)\nimport train_tokenizer as S1\n"
                      "kl, bad = S1.kl_loss, os.environ['RANK'] == '1'\n"
                      "S1.kl_loss = lambda *a: kl(*a) * (float('nan') if bad else 1)\n"
                      "try:\n    S1.main(sys.argv[1:])\nexcept FloatingPointError as error:\n"
                      "    open(sys.argv[0] + os.environ['RANK'], 'w').write(str(error))\n" % HERE)
    done = run(str(script), *tiny(tiny_teacher, tmp_path / "out", "--features", "none"), world=2)
    for rank in "01":  # a file each: two ranks' lines on one pipe can interleave
        said = tmp_path / ("nan.py" + rank)
        assert said.exists(), done.stderr
        assert "3 non-finite steps in a row, the last one 2" in said.read_text()
    assert not (tmp_path / "out/last.pt").exists()


def test_stage_two_resumes_on_two_processes(chain, tmp_path):
    flags = ["--tiny", "--tokenizer", chain / "tok/last.pt", "--batch", "8", "--micro_batch", "2", "--steps",
             "3", "--eval_num", "128", "--sample_steps", "1", "--out"]
    for out, *more in (("a", "--stop_at", "2"), ("a",), ("b",)):
        done = run("train_dit.py", *flags, tmp_path / out, *more, world=2)
        assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in "ab")
    same_state(a, b)


def test_no_code_runs_from_files(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"model": Code()}, tmp_path / "bad.pth")
    for load in (T.load_tokenizer, D.load_dit, T.load_teacher):
        with pytest.raises(ValueError, match="bad.pth.*refused"):
            load(str(tmp_path / "bad.pth"))
    np.savez(tmp_path / "bad.npz", arr_0=np.array([Code()], dtype=object))
    with pytest.raises(ValueError, match="bad.npz"):
        M.read(str(tmp_path / "bad.npz"))
    assert not (tmp_path / "owned").exists()
    for name in os.listdir(HERE):
        if name.endswith(".py") and name != "test_all.py":
            source = open(os.path.join(HERE, name)).read()
            assert "weights_only=False" not in source and "allow_pickle=True" not in source
            assert "http://" not in source


def test_hostile_images(tmp_path, tiny_teacher):
    """200 mutations of good files, in a folder of 40 good ones: training goes on, warns, counts."""
    good, rng = T.Shapes(40, 240), np.random.RandomState(0)
    def encoded(i, kind, **kw):
        buffer = io.BytesIO()
        Image.fromarray(good[i][0].permute(1, 2, 0).numpy()).save(buffer, kind, **kw)
        return bytearray(buffer.getvalue())
    for i in range(240):
        data, name = encoded(i, "PNG" if i % 2 else "JPEG"), f"{i:03d}.{'png' if i % 2 else 'jpg'}"
        if 40 <= i < 90:
            data = data[:rng.randint(0, len(data))]                            # truncated, down to nothing
        elif i < 140 and i >= 40:
            for at in rng.randint(0, len(data), 5):
                data[at] ^= 1 << rng.randint(8)                                # bit-flipped
        elif 140 <= i < 170:
            data = bytearray(rng.bytes(500))                                   # wrong content
        elif 170 <= i < 190:
            data[16:24] = (60000).to_bytes(4, "big") * 2  # a PNG that declares 3.6 gigapixels
        elif 190 <= i < 210:
            frames = [Image.fromarray(good[j][0].permute(1, 2, 0).numpy()) for j in (i, i + 1)]
            frames[0].save(tmp_path / f"{i:03d}.webp", save_all=True, append_images=frames[1:])  # animated
            continue
        elif 210 <= i < 225:
            deep = np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40
            Image.fromarray(deep).save(tmp_path / f"{i:03d}.png")
            continue
        elif i >= 225:
            palette = Image.new("P", (40, 40), 3)
            palette.info["transparency"] = 3
            palette.save(tmp_path / f"{i:03d}.png")
            continue
        (tmp_path / name).write_bytes(data)
    data = T.ImageFolder(str(tmp_path), 32)
    with pytest.warns(UserWarning, match="skipped unreadable"):
        images = [data[i][0] for i in range(240)]
    assert all(x.shape == (3, 32, 32) for x in images) and 60 < data.bad < 200
    with pytest.warns(UserWarning, match="skipped unreadable"):
        S1.main(tiny(tiny_teacher, tmp_path / "out", "--data", str(tmp_path), "--steps", "20",
                     "--stop_at", "10", "--features", "none"))
    rows = (tmp_path / "out/log.csv").read_text().split()
    assert int(dict(zip(*[r.split(",") for r in rows]))["unreadable"]) > 10
    (tmp_path / "all bad").mkdir()
    for i in range(3):
        (tmp_path / f"all bad/{i}.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="unreadable images in a row"), pytest.warns(UserWarning):
        T.ImageFolder(str(tmp_path / "all bad"), 32)[0]


@slow
def test_compiled_networks_train_alike_on_two_processes(tmp_path, tiny_teacher):
    """DDP splits the compiled graphs, masks vary, gradients accumulate (traced, in float32: no Inductor)."""
    script = tmp_path / "compiled.py"
    script.write_text("import sys\nsys.path.insert(0, %r)\nimport train_tokenizer as S1, train_dit as S2\n"
                      "if sys.argv.pop(1) == 'compiled':\n"
                      "    S1.compile_on_cuda = S2.compile_on_cuda = lambda device, off, *nets: [\n"
                      "        net.compile(backend='aot_eager') for net in nets]\n"
                      "(S1 if sys.argv.pop(1) == '1' else S2).main(sys.argv[1:])\n" % HERE)
    logs = []
    for way in ("compiled", "plain"):
        tok, dit = tmp_path / way / "tok", tmp_path / way / "dit"
        one = run(str(script), way, 1, *tiny(tiny_teacher, tok, "--features", "none", "--steps", "10",
                                             "--batch", "16", "--micro_batch", "4"), world=2)
        two = run(str(script), way, 2, "--tiny", "--tokenizer", tok / "last.pt", "--out", dit, "--steps", "3",
                  "--batch", "16", "--micro_batch", "4", "--eval_num", "2", "--sample_steps", "1",
                  "--grad_checkpoint", world=2)
        assert one.returncode == two.returncode == 0, one.stderr + two.stderr
        logs.append([[float(x or 0) for x in log_rows(out / "log.csv")[-1]] for out in (tok, dit)])
    for a, b in zip(*logs):
        assert np.allclose(a[:15], b[:15], rtol=1e-3, atol=1e-5), (a, b)


@slow
def test_kill_at_twenty_moments(tmp_path, tiny_teacher):
    """kill -9 at 20 random moments of a run that saves every third step: always resumable, little lost."""
    flags = tiny(tiny_teacher, tmp_path, "--features", "none", "--steps", "100000", "--save_every", "3")
    rng, step = np.random.RandomState(0), 0
    for _ in range(20):
        process = start_run("train_tokenizer.py", *flags)
        before = (tmp_path / "last.pt").stat().st_mtime_ns if step else 0
        while process.poll() is None and not ((tmp_path / "last.pt").exists()
                                              and (tmp_path / "last.pt").stat().st_mtime_ns > before):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        process.kill()
        out, _ = process.communicate()
        last = torch.load(tmp_path / "last.pt", weights_only=True)
        assert f"steps {step} to" in out and last["step"] > step and last["step"] % 3 == 0, out
        step = last["step"]


@slow
def test_memory_does_not_grow(tmp_path, tiny_teacher):
    """300 steps with scores and pictures between: resident memory stays within 10 % of that at step 100."""
    script = tmp_path / "soak.py"
    script.write_text("import sys\nsys.path.insert(0, %r)\nimport train_tokenizer as S1\nlog = S1.log_row\n"
                      "def rss(out, columns, row):\n    log(out, columns, row)\n"
                      "    print('rss', row['step'], open('/proc/self/statm').read().split()[1])\n"
                      "S1.log_row = rss\nS1.main(sys.argv[1:])\n" % HERE)
    done = run(str(script), *tiny(tiny_teacher, tmp_path / "out", "--steps", "300", "--eval_every", "50",
                                  "--save_every", "25"))
    pages = {int(l.split()[1]): int(l.split()[2]) for l in done.stdout.split("\n") if l.startswith("rss")}
    assert pages[300] < 1.1 * pages[100], pages


# ---------------------------------------------------------------- README.md

def readme():
    return open(os.path.join(HERE, "README.md"), encoding="utf-8").read()


def test_readme_points_at_the_right_lines():
    links = re.findall(r"\[`([\w.]+)`[^]]*\]\((\w+\.py)#L(\d+)\)", readme())
    for name, file, line in links:
        text, last = open(os.path.join(HERE, file)).read().split("\n")[int(line) - 1], name.split(".")[-1]
        assert re.search(rf"(def|class) {last}\b|\b{last} = ", text), (name, line, text)
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme(), re.M))
    assert len(links) > 8 and len(counts) == 7
    for file, lines in counts.items():
        assert len(open(os.path.join(HERE, file)).readlines()) == int(lines), file
    for file in re.findall(r"\((assets/[^)]+)\)", readme()):
        assert os.path.exists(os.path.join(HERE, file)), file
    for name in re.findall(r"`(test_\w+)`", readme()):
        assert f"def {name}(" in open(os.path.join(HERE, "test_all.py")).read(), name


def readme_commands(folder):
    """What the README's shell blocks would run: [script, flag, ...] of each python or torchrun call."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", readme(), re.S))
    stub = "pip() { :; }\npython() { printf '%s\\037' \"$@\"; echo; }\ntorchrun() { shift; python \"$@\"; }\n"
    done = subprocess.run(["bash", "-e", "-c", stub + blocks], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [line.split("\037")[:-1] for line in done.stdout.split("\n") if line]


def test_help_of_every_script(capsys):
    for module, says in ((S1, "every draw [0]"), (S2, "dit.PRESETS [XL]"), (X, "149) [49]"), (M, "pt (FD)")):
        with pytest.raises(SystemExit) as left:
            module.parse(["--help"])
        assert left.value.code == 0 and says in " ".join(capsys.readouterr().out.split()), says


def test_readme_commands_are_understood(tmp_path):
    commands = [c for c in readme_commands(tmp_path) if c[0].endswith(".py")]
    for script, *flags in commands:
        {"train_tokenizer.py": S1, "train_dit.py": S2, "sample.py": X, "fid.py": M}[script].parse(flags)
    assert len(commands) > 60 and ["train_dit.py", "--tiny"] in commands       # the tables' loops included


def test_readme_first_command(tmp_path):
    """The tiny commands as they stand, but a few steps long."""
    less = {"train_tokenizer.py": ["--steps", "4", "--batch", "8", "--features", "none"], "train_dit.py": [
        "--steps", "2", "--batch", "8", "--eval_num", "128", "--sample_steps", "1"], "sample.py": []}
    first = [c for c in readme_commands(tmp_path) if c[0] in less][:3]
    assert [c[0] for c in first] == list(less)
    for script, *flags in first:
        command = [sys.executable, os.path.join(HERE, script), *flags, *less[script]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "grid.png").size == (784, 392)


# ---------------------------------------------------------------- python test_all.py --bench

def alternate(ours, theirs):
    """Median seconds of each, run in turn (theirs may be None): a warm-up, then 1 to 9 rounds in a minute."""
    def timed(f):
        began = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def pair():
        return timed(ours), timed(theirs) if theirs else math.nan
    first = pair()
    pairs = [pair() for _ in range(min(9, int(60 / np.nansum(first))))] or [first]
    return [sorted(column)[len(pairs) // 2] for column in zip(*pairs)]


def peer_modules(size, file):
    """The authors' modules with random weights; {} without RECTOK_REF, a checkout of their code (it imports
    einops, timm, transformers, torchdiffeq, torchvision). Their 11 grid points are our 10 steps."""
    if not os.environ.get("RECTOK_REF"):
        return {}
    sys.path.insert(0, os.environ["RECTOK_REF"])
    import models.DDT
    import models.ema
    import models.rectok
    import torchvision
    import utils.losses
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Fidelity
    losses, (vgg, convnext) = utils.losses, (torchvision.models.vgg16, torchvision.models.convnext_small)
    losses.LPIPS.load_from_pretrained = lambda self, **kw: None                # nothing is downloaded
    losses.models.vgg16, losses.models.convnext_small = (lambda **k: vgg()), (lambda **k: convnext())
    return {"tokenizer": models.rectok.rectok_BB(token_channels=128, mask_ratio=0.0, gamma=0.0),
            "masked": models.rectok.rectok_BB(token_channels=128),
            "dit": models.DDT.DiTDDT_models[f"DiTDDT_{size.lower()}"](num_sampling_steps=11),
            "criterion": losses.ReconstructionLoss(discriminator_start_epoch=0),
            "inception": Fidelity("inception", ["2048"], feature_extractor_weights_path=file),
            "ema": models.ema.SimpleEMAModel}


def bench_modules(words, device, batch):
    """Seconds of the parts whose names hold one of `words`."""
    size, x = "XL" if device.type == "cuda" else "B", torch.rand(batch, 3, 256, 256, device=device)
    z, y = torch.randn(batch, 256, 128, device=device), torch.arange(batch, device=device)
    file = write_inception(os.path.join(tempfile.mkdtemp(), M.INCEPTION))
    peer = {name: m.to(device) if name != "ema" else m for name, m in peer_modules(size, file).items()}
    tokenizer = T.RecTok(T.TokenizerConfig(semantic="none")).to(device)
    net, perceptual = D.DiT(D.DiTConfig(**D.PRESETS[size])).to(device), S1.PerceptualLoss("random").to(device)
    S1.compile_on_cuda(device, False, tokenizer.encoder, tokenizer.decoder, net, perceptual)
    inception, photos = M.InceptionV3(file).to(device), (x.repeat(8, 1, 1, 1) * 255).to(torch.uint8)
    mu, (s1, s2) = torch.zeros(2048), (noise(n, 5000, 2048).double() for n in "ab")
    s1, s2 = s1.T @ s1 / 5000, s2.T @ s2 / 5000
    wish = type("Args", (), {"use_auto_guidance": False})
    to_map = lambda z: z.transpose(1, 2).unflatten(2, (16, 16))

    def tokenize():
        mean, logvar = tokenizer.encode(x)
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        tokenizer.decode(z).float().square().mean().backward()
    theirs = peer and peer["criterion"].perceptual_loss
    rows = {
        "tokenizer B/B, forward + backward": (
            tokenize, lambda: peer["tokenizer"].train()(x)[0].float().square().mean().backward()),
        f"DiT-DH-{size}, forward + backward": (
            lambda: D.flow_loss(net, z, y, 2.83).mean().backward(),
            lambda: peer["dit"].train()(to_map(z), y).backward()),
        "perceptual loss, forward + backward": (
            lambda: perceptual(x, x.roll(1, 0).requires_grad_(True)).backward(),
            lambda: theirs(x, x.roll(1, 0).requires_grad_(True)).mean().backward()),
        f"sampling DiT-DH-{size}, 10 steps, CFG": (
            lambda: D.sample(net, z.repeat(2, 1, 1), y.repeat(2), 10, 2.83, cfg=2.0),
            lambda: peer["dit"].eval().generate(2 * batch, y.repeat(2), cfg=2.0, args=wish)),
        "Inception features of 16 images": (
            lambda: inception(photos), lambda: peer["inception"](photos)),
        "Frechet distance of 2048 features": (  # theirs: eigenvalues of a general matrix
            lambda: M.frechet_distance(mu, s1, mu, s2),
            lambda: torch.linalg.eigvals(s1 @ s2).sqrt().real.sum())}
    rate = [alternate(lambda: a @ a, None)[0] for a in (torch.randn(1024, 1024, device=device),
                                                        torch.randn(1024, 1024, device=device).bfloat16())]
    if rate[1] > rate[0]:
        print("bf16 products are slower than float32 ones on this machine: left out")
    for name, pair in rows.items():
        if not any(word in name for word in words):
            continue
        for half in (False, True)[:1 if "features" in name or rate[1] > rate[0] else 2]:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                a, b = alternate(pair[0], pair[1] if peer else None)
            title = name + (", bf16" if half else ", float32")
            print(f"{title:44}{b:10.3f}{a:10.3f}{a / b:8.2f}", flush=True)


def bench_loading(folder):
    """Images/s of one loader process: ours, and the plain way to the same pixels, float and normalised."""
    rng = np.random.RandomState(0)
    for i in range(128):                             # as ImageNet's: 500 x 375 pixels, about 110 kB
        soft = Image.fromarray(rng.randint(0, 256, (24, 32, 3), np.uint8)).resize((500, 375))
        grain = rng.normal(0, 10, (375, 500, 3))
        Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(f"{folder}/{i}.jpg", quality=90)
    data = T.ImageFolder(folder, 256)

    class Plain:
        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            image = Image.open(os.fsdecode(data.paths[i])).convert("RGB").resize((341, 256), Image.BICUBIC)
            pixels = np.array(image)[:, 42:298]      # ADM's crop of 500 x 375, as published
            x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255)
            return (x - 0.5) / 0.5, 0
    assert torch.equal(T.to_float(data[0][0]), Plain()[0][0])
    ours, plain = alternate(*(lambda d=d: list(torch.utils.data.DataLoader(d, 64, num_workers=1))
                              for d in (data, Plain())))
    print(f"{'loading 500 x 375 JPEG, images/s of one core':44}{128 / plain:10.0f}{128 / ours:10.0f}"
          f"{ours / plain:8.2f}   ({os.path.getsize(data.paths[0]) / 1e3:.0f} kB each)", flush=True)


def bench_steps(folder, device, batch):
    """Training steps of both stages, images/s and peak GB: our trainers as they are, data loading and all,
    steps 11 to 20; theirs as their loops take a step, with the images on the device already and our VFM."""
    size = "XL" if device.type == "cuda" else "B"
    flags = ["--batch", batch, "--micro_batch", batch, "--steps", 10 ** 5, "--stop_at", 21]
    os.makedirs(f"{folder}/data")
    for i in range(64):
        Image.fromarray(T.Shapes(256, 64)[i][0].permute(1, 2, 0).numpy()).save(f"{folder}/data/{i}.jpg")
    found = {}
    for script, out, more in (
            ("train_tokenizer.py", "tok", ["--random_weights", "--features", "none", "--gan_start", 0]),
            ("train_dit.py", "dit", ["--tokenizer", f"{folder}/tok/last.pt", "--size", size,
                                     "--sample_steps", 1])):
        command = [sys.executable, os.path.join(HERE, script), "--data", f"{folder}/data", "--out",
                   f"{folder}/{out}", *flags, *more]
        subprocess.run([str(c) for c in command], check=True, stderr=subprocess.DEVNULL)
        columns, _, row = (line.split(",") for line in open(f"{folder}/{out}/log.csv").read().split()[:3])
        found[out] = {k: float(v or "nan") for k, v in zip(columns, row)}
    peer, theirs, memory = peer_modules(size, write_inception(f"{folder}/{M.INCEPTION}")), {}, {}
    x, y = torch.rand(batch, 3, 256, 256, device=device), torch.arange(batch, device=device)
    for out in ("dit", "tok") if peer else ():
        net = peer["masked" if out == "tok" else "dit"].to(device).train()
        optimizer, ema = torch.optim.AdamW(p for p in net.parameters() if p.requires_grad), peer["ema"](net)
        tokenizer = peer["tokenizer"].to(device if out == "dit" else "cpu").eval()
        if out == "tok":
            criterion = peer["criterion"].to(device)
            teacher = T.load_teacher("dinov3_vitl16", "random").to(device)
            d_optimizer = torch.optim.AdamW(criterion.discriminator.parameters())

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                if out == "tok":
                    teacher(x)
                    made, extra = net(x)
                    real, fake = x * 0.5 + 0.5, made * 0.5 + 0.5
                    loss, _ = criterion(real, fake, 0, extra["posteriors"])
                else:
                    with torch.no_grad():
                        z = tokenizer.tokenize(x, sampling=True)
                    loss = net(z, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(net)
            if out == "tok":
                d_loss, _ = criterion(real, fake, 0, mode="discriminator")
                d_loss.backward()
                d_optimizer.step()
                d_optimizer.zero_grad()
            loss.item()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        theirs[out] = batch / alternate(step, None)[0]
        memory[out] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else math.nan
        net.to("cpu")
        optimizer = ema = None                       # nothing of one stage may count in the other's memory
    for out, name in (("tok", "stage 1 step"), ("dit", f"stage 2 step, {size}")):
        a, b = found[out], theirs.get(out, math.nan)
        print(f"{f'{name}, batch {batch}, images/s':44}{b:10.2f}{a['images_per_s']:10.2f}"
              f"{b / a['images_per_s']:8.2f}   (mfu {a['mfu']:.2f}, peak GB {memory.get(out, math.nan):.1f} "
              f"theirs, {a['memory_gb']:.1f} ours)", flush=True)


def bench(words):
    """The speed table, rows whose names hold one of `words`; steps only on CUDA or when asked for by name."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 32 if device.type == "cuda" else 2
    print(f"{device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch} "
          f"(sampling {2 * batch}), seconds\n{'':44}{'theirs':>10}{'ours':>10}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        if any(word in "loading" for word in words):
            bench_loading(a)
        if "step" in words or device.type == "cuda" and "" in words:
            bench_steps(b, device, 64 if device.type == "cuda" else 2)
    if words != ["step"] and words != ["loading"]:
        bench_modules(words, device, batch)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--bench"]:
        sys.exit("pytest test_all.py tests; python test_all.py --bench [WORD ...] prints the speed table")
    bench(sys.argv[2:] or [""])
