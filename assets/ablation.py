"""Of ablation.sh: a finished run into ablation.csv, the CSV as tables, and the picture effect.png."""
import csv
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

from fid import probe_inputs
from tokenizer import Shapes, load_tokenizer, save_grid, to_float

TIMES = (1.0, 0.75, 0.5, 0.25)
COLUMNS = ["psnr", "rFD", *(f"probe_{kind}_{t}" for kind in ("z", "semantic") for t in TIMES),
           "FD", "agreement", "FD_cfg", "agreement_cfg"]
PATH = os.path.join(os.path.dirname(__file__), "ablation.csv")


def row(run):
    """The last scores of runs/NAME-SEED and of its DiT, as a line of the CSV."""
    found = dict(zip(("row", "seed"), run.rsplit("-", 1)))
    for folder in (f"runs/{run}", f"runs/{run}/dit"):
        with open(f"{folder}/log.csv", newline="") as f:
            last = list(csv.DictReader(f))[-1]
        found |= {name: last[name] for name in COLUMNS if last.get(name)}
    new = not os.path.exists(PATH)
    with open(PATH, "a", newline="") as f:
        table = csv.DictWriter(f, ["row", "seed", *COLUMNS])
        if new:
            table.writeheader()
        table.writerow(found)


GROUPS = [
    {"baseline": "baseline", "latent": "+ distillation on clean latents", "fsd": "+ FSD", "rad": "+ RAD",
     "ft": "+ decoder fine-tuning"},
    {"baseline4": "baseline, C = 4", "baseline8": "baseline, C = 8", "baseline": "baseline, C = 16",
     "baseline32": "baseline, C = 32"},
    {"rad4": "RecTok, C = 4", "rad8": "RecTok, C = 8", "rad": "RecTok, C = 16", "rad32": "RecTok, C = 32"},
    {"rad": "shift 2", "uniform": "uniform", "lognormal": "lognormal"},
    {"fsd_long": "FSD, 8,000 steps", "rad_long": "FSD + RAD, 8,000 steps",
     "rad4_long": "the same, C = 4", "rad32_long": "the same, C = 32"}]
HEADER = ("| | seeds | PSNR | rFD | probe on z_t, t = 1, 0.75, 0.5, 0.25 | on the semantic decoder's output | gFD | "
          "with CFG 2 | agreement | with CFG 2 |")


def tables():
    """Mean ± standard deviation over the seeds of each row, as Markdown."""
    with open(PATH, newline="") as f:
        rows = list(csv.DictReader(f))
    for group in GROUPS:
        print(f"\n{HEADER}\n|" + "---|" * 10)
        for name, label in group.items():
            seeds = [r for r in rows if r["row"] == name]
            if seeds:
                cells = [label, str(len(seeds)), cell(seeds, "psnr"), cell(seeds, "rFD", digits=2)]
                for kind in ("z", "semantic"):
                    cells.append(cell(seeds, *(f"probe_{kind}_{t}" for t in TIMES), digits=0, factor=100))
                cells += [cell(seeds, "FD"), cell(seeds, "FD_cfg")]
                cells += [cell(seeds, name, digits=0, factor=100) for name in ("agreement", "agreement_cfg")]
                print("| " + " | ".join(cells) + " |")


def cell(seeds, *columns, digits=1, factor=1):
    """The mean over seeds of each column, and the largest standard deviation of them."""
    if not seeds[0][columns[0]]:
        return "–"
    values = np.array([[float(seed[column]) for column in columns] for seed in seeds]) * factor
    means = " ".join(f"{mean:.{digits}f}" for mean in values.mean(0))
    if len(seeds) == 1:
        return means
    return f"{means} ± {values.std(0, ddof=1).max():.{digits}f}"


@torch.no_grad()
def picture(*runs):
    """What z_t says, as drawings. For each run: held-out shapes, and below them at t = 1, 0.75, 0.5, 0.25 the
    drawing of the class that a linear classifier reads from z_t, dark where it is wrong.

    The classifier is that of the probe: ridge regression on token means of 4,096 other drawings.
    """
    shown = Shapes(32, 24, seed=1)
    images = torch.stack([shown[i][0] for i in range(24)])          # image i has class i % 8
    rows = []
    train = Shapes(32, 4096, seed=2)
    train_images = torch.stack([train[i][0] for i in range(4096)])
    labels = F.one_hot(torch.arange(4096) % 8).double()
    for run in runs:
        rows.append(images)
        model = load_tokenizer(f"{run}/last.pt")
        read = probe_inputs(model, to_float(train_images), range(4096), seed=0)
        read_shown = probe_inputs(model, to_float(images), range(5000, 5024), seed=0)
        for t in TIMES:
            x, seen = read[f"probe_z_{t}"], read_shown[f"probe_z_{t}"]
            solution = torch.linalg.solve(x.T @ x + 1e-3 * (x.T @ x).diagonal().diag(), x.T @ labels)
            said = (seen @ solution).argmax(-1)
            right = said == torch.arange(24) % 8
            print(f"{run}, t = {t}: {right.sum()} of 24 read right")
            rows.append(images[said] // torch.where(right, 1, 4)[:, None, None, None])
    save_grid(os.path.join(os.path.dirname(__file__), "effect.png"), torch.cat(rows).to(torch.uint8), 24)


if __name__ == "__main__":
    {"row": row, "tables": tables, "picture": picture}[sys.argv[1]](*sys.argv[2:])
