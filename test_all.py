"""The tests: pytest test_all.py. Small, no network, nothing outside this folder.

Golden numbers: the weights are a function of each published tensor's name, so nothing large is stored; the
literals were recorded while this code agreed with the published code to 1e-5 (relative) on these weights.
"""
import math
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import tokenizer as T
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
    plain, decay = S1.optimizer_for(small(), 1e-3).param_groups
    names = {id(p): n for n, p in small().named_parameters()}
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


def test_safetensors(tmp_path):
    import json
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
    assert files == ["config.json", "last.pt", "log.csv", "step_2.png", "step_4.png", "step_4.pt"]
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
    S1.main(tiny(tiny_teacher, tmp_path, "--steps", "2", *flags.split()))
    file = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(w.isfinite().all() for w in file["model"].values())
    columns, *rows = [r.split(",") for r in open(tmp_path / "log.csv").read().split("\n") if r]
    row = dict(zip(columns, rows[-1]))
    assert (float(row["semantic"]) == 0) == (
        flags in ("--distill none", "--target hidden --mask_max 0 --mask_min 0"))
    assert (float(row["gan"]) == 0) == (flags == "--w_gan 0")


def test_several_teachers(tmp_path, tiny_teacher):
    S1.main(tiny(f"{tiny_teacher},{tiny_teacher}", tmp_path, "--steps", "1"))
    assert T.load_tokenizer(str(tmp_path / "last.pt")).config.teacher_dim == (96, 96)


def test_decoder_finetuning(tmp_path, tiny_teacher):
    S1.main(tiny(tiny_teacher, tmp_path / "a"))
    S1.main(["--tiny", "--finetune_decoder", str(tmp_path / "a/last.pt"), "--out", str(tmp_path / "b"),
             "--batch", "8", "--steps", "2"])
    a, b = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in "ab")
    for part in ("model", "model_ema"):
        for name, w in b[part].items():
            assert torch.equal(w, a[part][name]) == name.startswith("encoder"), name
    assert not any(n.startswith("sem_") for n in b["model"])
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
             (["--mask_max", "1.5"], ValueError, "--mask_max 1.5")]
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
