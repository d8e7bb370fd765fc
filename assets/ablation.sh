#!/usr/bin/env bash
# Reruns the tables of ablation.md, from the project's root: bash assets/ablation.sh
set -euo pipefail
mkdir -p runs
python -c "from train_tokenizer import fit_teacher as fit; fit('runs/vfm.pt', 32); fit('runs/judge.pt', 32, seed=7)"
stage1() {  # NAME FLAGS...
    name=$1; shift
    python train_tokenizer.py --tiny --channels 64 --steps 1000 --batch 32 --teacher runs/vfm.pt \
        --features runs/judge.pt --seed $seed --out runs/$name-$seed "$@"
}
stage2() {  # TOKENIZER NAME FLAGS...
    from=$1; name=$2; shift 2
    python train_dit.py --tiny --steps 600 --batch 32 --sample_steps 8 --features runs/judge.pt \
        --seed $seed --tokenizer runs/$from-$seed/last.pt --out runs/$name-$seed/dit "$@"
}
base() { name=$1; shift; stage1 $name --distill none --gamma 0 --mask_min 0 --mask_max 0 "$@"; }
for seed in 0 1 2; do
    base baseline;                                                        stage2 baseline baseline
    stage1 latent --distill latent --gamma 0 --mask_min 0 --mask_max 0;   stage2 latent latent
    stage1 fsd --mask_min 0 --mask_max 0;                                 stage2 fsd fsd
    stage1 rad;                                                           stage2 rad rad
    python train_tokenizer.py --tiny --finetune_decoder runs/rad-$seed/last.pt --features runs/judge.pt \
        --seed $seed --out runs/ft-$seed;                                 stage2 ft ft
    for C in 16 256; do
        base base$C --channels $C;                                        stage2 base$C base$C
        stage1 rad$C --channels $C;                                       stage2 rad$C rad$C
    done
    stage1 shift --shift 2.83;                                            stage2 shift shift --shift 2.83
    stage1 lognormal --schedule lognormal;                                stage2 lognormal lognormal --shift 2.83
    stage2 rad uniform --shift 2.83
done
python - <<'EOF'
import csv, glob, os
columns = ["psnr", "rFD", *(f"probe_z_{t}" for t in (1.0, 0.75, 0.5, 0.25)), "probe_semantic_0.25",
           "FD", "agreement", "FD_cfg", "agreement_cfg"]
with open("runs/ablation.csv", "w", newline="") as out:
    table = csv.writer(out)
    table.writerow(["row", "seed", *columns])
    for folder in sorted(glob.glob("runs/*-[0-9]")):
        logs = [f for f in (folder + "/log.csv", folder + "/dit/log.csv") if os.path.exists(f)]
        last = {k: v for f in logs for k, v in list(csv.DictReader(open(f)))[-1].items() if v}
        table.writerow([*os.path.basename(folder).rsplit("-", 1), *(last.get(c, "") for c in columns)])
EOF
