"""Of ablation.sh: a finished run into ablation.csv, the CSV as tables, and the picture effect.png."""
import csv
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

from tokenizer import Shapes, flow, load_tokenizer, sample_noise, save_grid, to_float

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


LABELS = {"baseline": "baseline, C = 16", "latent": "+ distillation on clean latents", "fsd": "+ FSD", "rad": "+ RAD",
          "ft": "+ decoder fine-tuning", "baseline4": "baseline, C = 4", "baseline8": "C = 8", "baseline32": "C = 32",
          "rad4": "RecTok, C = 4", "rad8": "C = 8", "rad32": "C = 32", "uniform": "uniform", "lognormal": "lognormal"}
GROUPS = [["baseline", "latent", "fsd", "rad", "ft"],
          ["baseline4", "baseline8", "baseline", "baseline32", "rad4", "rad8", "rad", "rad32"],
          ["rad", "uniform", "lognormal"]]


def tables():
    """Mean and standard deviation over the seeds of each row, as Markdown."""
    with open(PATH, newline="") as f:
        rows = list(csv.DictReader(f))
    for group in GROUPS:
        print("\n| row | seeds | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 2) + "|")
        for name in group:
            seeds = [r for r in rows if r["row"] == name]
            if seeds:
                cells = [summary(column, [float(r[column]) for r in seeds if r[column]]) for column in COLUMNS]
                print(f"| {LABELS[name]} | {len(seeds)} | " + " | ".join(cells) + " |")


def summary(column, values):
    """Mean ± standard deviation; shares in percent."""
    if not values:
        return "–"
    share = column.startswith(("probe", "agreement"))
    values = np.array(values) * (100 if share else 1)
    digits = 2 if column == "rFD" else 0 if share else 1
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


COLOURS = torch.tensor([[230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48],
                        [145, 30, 180], [70, 240, 240], [128, 128, 128]], dtype=torch.uint8)


@torch.no_grad()
def picture(*runs):
    """What each token of z_t says: the class that a linear classifier reads from it, as a colour.

    First row: a held-out shape of each class, framed in the colour of its class. Then for each run four
    rows, t = 1, 0.75, 0.5, 0.25. A linear classifier a run and a time (ridge regression on 4,096 drawings).
    """
    shown = Shapes(32, 8, seed=1)
    images = torch.stack([shown[i][0] for i in range(8)])
    framed = COLOURS[:, :, None, None].expand(8, 3, 32, 32).clone()
    framed[:, :, 3:-3, 3:-3] = images[:, :, 3:-3, 3:-3]
    rows = [framed]
    train = Shapes(32, 4096, seed=2)
    train_images = torch.stack([train[i][0] for i in range(4096)])
    labels = F.one_hot(torch.arange(4096) % 8).double()
    for run in runs:
        model = load_tokenizer(f"{run}/last.pt")
        tokens = []
        for part in (train_images, images):
            z, _ = model.encode(to_float(part))
            tokens.append((z, sample_noise(len(part), range(len(part)), *z.shape[1:])))
        for t in TIMES:
            (x, noise), (seen, seen_noise) = tokens
            x = F.pad(flow(x, noise, torch.full((len(x),), t)).double(), (0, 1), value=1.0)
            y = labels[:, None].expand(-1, x.shape[1], -1)
            x, y = x.flatten(0, 1), y.flatten(0, 1)
            solution = torch.linalg.solve(x.T @ x + 1e-3 * (x.T @ x).diagonal().diag(), x.T @ y)
            seen = F.pad(flow(seen, seen_noise, torch.full((len(seen),), t)).double(), (0, 1), value=1.0)
            said = (seen @ solution).argmax(-1)                     # (8, N)
            right = (said == torch.arange(8)[:, None]).double().mean()
            print(f"{run}, t = {t}: {100 * right:.0f} % of the tokens shown name their class")
            tiles = COLOURS[said].transpose(1, 2).unflatten(2, (4, 4))
            rows.append(tiles.repeat_interleave(8, 2).repeat_interleave(8, 3))
    save_grid(os.path.join(os.path.dirname(__file__), "effect.png"), torch.cat(rows), 8)


if __name__ == "__main__":
    {"row": row, "tables": tables, "picture": picture}[sys.argv[1]](*sys.argv[2:])
