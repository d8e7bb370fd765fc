#!/usr/bin/env bash
# Reruns the tables and charts of ablation.md, from the project's root:
#     rm assets/ablation.csv; bash assets/ablation.sh          # seeds 0 1 2: 6 hours of one slow core; or: ablation.sh 0
# What assets/ablation.csv already holds is not run again, and an interrupted run goes on. Two at once, of
# different seeds, share the work of two cores (OMP_NUM_THREADS=1).
set -euo pipefail
export PYTHONPATH=.
fit() { [ -f runs/$1.pt ] || python -c "from train_tokenizer import fit_teacher as fit; fit('runs/$1.pt', 32, 750, seed=$2)"; }
mkdir -p runs; fit vfm 0; fit judge 7        # the VFM that is distilled; another one, which judges

stage1() {  # NAME FLAGS...
    local name=$1; shift
    python train_tokenizer.py --tiny --steps 1400 --w_gan 0 --shift $shift --teacher runs/vfm.pt \
        --features runs/judge.pt --seed $seed --out runs/$name-$seed "$@"
}
stage1b() {  # FROM NAME
    python train_tokenizer.py --tiny --steps 500 --w_gan 0 --finetune_decoder runs/$1-$seed/last.pt \
        --features runs/judge.pt --seed $seed --out runs/$2-$seed
}
stage2() {  # NAME
    python train_dit.py --tiny --steps 1000 --eval_every 250 --shift $shift --features runs/judge.pt \
        --seed $seed --tokenizer runs/$1-$seed/last.pt --out runs/$1-$seed/dit
    python assets/ablation.py row $1-$seed   # adds it to assets/ablation.csv
}
row() {  # NAME FLAGS...
    grep -qs "^$1,$seed," assets/ablation.csv || { stage1 "$@"; stage2 $1; }
}
tuned() {  # FROM NAME FLAGS...: with the decoder fine-tuned on FROM's latents
    local from=$1 name=$2; shift 2
    grep -qs "^$name,$seed," assets/ablation.csv || { stage1 $from "$@"; stage1b $from $name; stage2 $name; }
}
plain="--gamma 0 --mask_min 0 --mask_max 0"
for seed in ${@:-0 1 2}; do                  # the ablation: 16 channels
    shift=2
    row baseline --distill none $plain
    row latent --distill latent $plain
    row fsd --mask_min 0 --mask_max 0
    row rad
    tuned rad ft
    tuned latent latent_ft --distill latent $plain
done
for seed in ${@:-0 1 2}; do                  # channels, with shift = sqrt(C / 4)
    shift=1;     row baseline4 --channels 4 --distill none $plain;   row rad4 --channels 4
    shift=2.828; row baseline32 --channels 32 --distill none $plain; row rad32 --channels 32
    shift=4;     row baseline64 --channels 64 --distill none $plain; row rad64 --channels 64
done
for seed in ${@:-0 1 2}; do                  # the law of t in the tokenizer
    shift=2
    row uniform --schedule uniform
    row lognormal --schedule lognormal
done
python assets/ablation.py tables
python assets/ablation.py charts
