"""Of ablation.sh: a finished run into ablation.csv, the CSV as tables, and as charts."""
import csv
import os
import sys

import numpy as np

from dit import latent_statistics
from fid import linear_probe
from tokenizer import Shapes, load_tokenizer, local_batches, plot
from train_tokenizer import read_log

HERE = os.path.dirname(os.path.abspath(__file__))
PATH = os.path.join(HERE, "ablation.csv")
TIMES = (1.0, 0.75, 0.5, 0.25)
KINDS = ("z", "normalised", "semantic")             # what the linear probe reads
COLUMNS = ["psnr", "rFD", *(f"probe_{kind}_{t}" for kind in KINDS for t in TIMES),
           "FD_250", "FD", "FD_cfg", "agreement", "agreement_cfg"]
GROUPS = [
    {"baseline": "baseline", "latent": "+ distillation on clean latents",
     "latent_ft": "the same, decoder fine-tuned", "fsd": "+ FSD", "rad": "+ RAD", "ft": "+ decoder fine-tuning"},
    {"baseline4": "baseline, C = 4", "baseline": "baseline, C = 16", "baseline32": "baseline, C = 32",
     "baseline64": "baseline, C = 64", "rad4": "RecTok, C = 4", "rad": "RecTok, C = 16",
     "rad32": "RecTok, C = 32", "rad64": "RecTok, C = 64"},
    {"rad": "shift 2", "uniform": "uniform", "lognormal": "lognormal"}]
HEADER = ("| | seeds | PSNR | rFD | probe on z_t, t = 1, 0.75, 0.5, 0.25 | z normalised | on the semantic decoder's "
          "output | gFD at step 250 | 1,000 | with CFG 2 | agreement | with CFG 2 |")


def row(run):
    """The last scores of runs/NAME-SEED and of its DiT, as a line of the CSV."""
    found = dict(zip(("row", "seed"), run.rsplit("-", 1)))
    for folder in (f"runs/{run}", f"runs/{run}/dit"):
        rows = read_log(folder)
        found |= {name: rows[-1][name] for name in COLUMNS if name in rows[-1]}
        found |= {"FD_250": early["FD"] for early in rows if early["step"] == 250 and "FD" in early}
    found |= normalised_probe(f"runs/{run}/last.pt", int(found["seed"]))
    new = not os.path.exists(PATH)
    with open(PATH, "a", newline="") as f:
        table = csv.DictWriter(f, ["row", "seed", *COLUMNS])
        if new:
            table.writeheader()
        table.writerow(found)


def normalised_probe(path, seed):
    """The linear probe on z_t as the DiT sees it: of latents normalised channel by channel. Stage 1 adds its
    unit noise to z as it is, so a tokenizer can keep z_t readable by a large z alone; here it cannot."""
    model = load_tokenizer(path)
    model.config.semantic = "none"                                  # z_t alone
    train = Shapes(32, 4096, seed + 2)                              # as in open_data
    mean, std = latent_statistics(model, local_batches(train))
    encode = model.encode
    model.encode = lambda images: ((encode(images)[0] - mean) / std, None)
    scores = linear_probe(model, train, Shapes(32, 1024, seed=1), seed)
    return {f"probe_normalised_{t}": scores[f"probe_z_{t}"] for t in TIMES}


def seeds_of(name):
    with open(PATH, newline="") as f:
        return [r for r in csv.DictReader(f) if r["row"] == name]


def tables():
    """Mean ± standard deviation over the seeds of each row, as Markdown."""
    for group in GROUPS:
        print(f"\n{HEADER}\n|" + "---|" * 12)
        for name, label in group.items():
            seeds = seeds_of(name)
            if seeds:
                cells = [label, str(len(seeds)), cell(seeds, "psnr"), cell(seeds, "rFD", digits=2)]
                for kind in KINDS:
                    cells.append(cell(seeds, *(f"probe_{kind}_{t}" for t in TIMES), digits=0, factor=100))
                cells += [cell(seeds, column) for column in ("FD_250", "FD", "FD_cfg")]
                cells += [cell(seeds, column, digits=0, factor=100) for column in ("agreement", "agreement_cfg")]
                print("| " + " | ".join(cells) + " |")


def cell(seeds, *columns, digits=1, factor=1):
    """The mean over the seeds that have it of each column, and the largest standard deviation of them."""
    seeds = [seed for seed in seeds if seed[columns[0]]]
    if not seeds:
        return "–"
    values = np.array([[float(seed[column]) for column in columns] for seed in seeds]) * factor
    means = " ".join(f"{mean:.{digits}f}" for mean in values.mean(0))
    if len(seeds) == 1:
        return means
    return f"{means} ± {values.std(0, ddof=1).max():.{digits}f}"


def with_range(x, values):
    """The mean at x, and a stroke over the range of the seeds: points of a line for plot()."""
    values = [float(value) for value in values]
    mean = float(np.mean(values))
    return [(x, mean), (x, max(values)), (x, min(values)), (x, mean)]


def charts():
    """What a linear classifier reads along the flow; reconstruction and generation by channels."""
    labels = {"baseline": "baseline", "latent": "clean latents", "fsd": "FSD", "rad": "RecTok"}
    panels = {}
    for kind, title in (("z", "probe on z_t, %, at t = .25 .5 .75 1"), ("normalised", "z normalised as for the DiT")):
        panels[title] = {label: [] for label in labels.values()}
        for name, label in labels.items():
            for t in TIMES:
                scores = [seed[f"probe_{kind}_{t}"] for seed in seeds_of(name)]
                panels[title][label] += with_range(t, [100 * float(score) for score in scores if score])
    for column, title in (("psnr", "PSNR (dB), C = 4 16 32 64"), ("FD_250", "gFD after 250 steps of the DiT, by C"),
                          ("FD", "gFD after 1,000 steps, by C")):
        panels[title] = {}
        for label, names in (("baseline", {4: "baseline4", 16: "baseline", 32: "baseline32", 64: "baseline64"}),
                             ("RecTok", {4: "rad4", 16: "rad", 32: "rad32", 64: "rad64"}),
                             ("fine-tuned", {16: "ft"}), ("clean latents", {16: "latent"})):
            panels[title][label] = []
            for channels, name in names.items():
                panels[title][label] += with_range(channels, [seed[column] for seed in seeds_of(name)])
    plot(os.path.join(HERE, "charts.png"), panels, columns=3, width=400, height=260)


if __name__ == "__main__":
    {"row": row, "tables": tables, "charts": charts}[sys.argv[1]](*sys.argv[2:])
