#!/usr/bin/env bash
# Every network, rival and table of this example, one after another, for a GPU:
#
#     examples/photographs/experiment.sh TRAIN VAL TEST
#
# TRAIN and VAL are folders of photographs without labels, TEST has class folders named by WordNet id. Networks go to
# examples/photographs/output, tables and figures to assets/logs. What may be set before it:
#
#     START, SMALL_START   weights to start from: names that are downloaded, or files
#     TEACHERS             further teachers, as training.more_teachers in a parameters.json: a list
#     STRANGER             arguments of test.py for a classifier that no network met
#     SETTINGS             further settings for every training, such as training.epochs=10
set -euo pipefail
if [ $# -ne 3 ]; then echo "usage: examples/photographs/experiment.sh TRAIN VAL TEST" >&2; exit 2; fi
for folder in "$@"; do  # now, and not after the trainings
    if [ ! -d "$folder" ]; then echo "experiment.sh: $folder: no such folder" >&2; exit 2; fi
done
train=$(realpath "$1") val=$(realpath "$2") test=$(realpath "$3")
cd "$(dirname "$0")/../.."
: "${START:=RealESRGAN_x4plus}" "${SMALL_START:=RealESRGAN_x4plus_anime_6B}" "${STRANGER:=--classifier resnet50}"
out=examples/photographs/output
parameters=(--parameters examples/photographs/parameters_gpu.json --set "darionet.initial_weights=$START" \
    --set "darionet.weights=$out/all_kinds.pt")
if [ -n "${TEACHERS:-}" ]; then parameters+=(--set "training.more_teachers=$TEACHERS"); fi
training=("${parameters[@]}" --set "data.train=$train" --set "data.val=$val")
for setting in ${SETTINGS:-}; do training+=(--set "$setting"); done
testing=("${parameters[@]}" --set "data.test=$test")
set -x
python train_darionet.py "${training[@]}"
python train_darionet.py "${training[@]}" --set "darionet.weights=$out/one_kind.pt" \
    --set transformations.random_reduction=null
python train_darionet.py "${training[@]}" --set "darionet.weights=$out/six_blocks.pt" \
    --set "darionet.initial_weights=$SMALL_START" --set darionet.blocks=6
python examples/adapt_classifier.py "${training[@]}" --output $out/adapted.pth
python examples/adapt_classifier.py "${training[@]}" --output $out/adapted_esrgan.pth --enlarge "$START"
networks=(--weights $out/all_kinds.pt $out/one_kind.pt $out/six_blocks.pt)
python test.py "${testing[@]}" "${networks[@]}" --rival Adapted $out/adapted.pth --rival "Adapted to ESRGAN" $out/adapted_esrgan.pth
# shellcheck disable=SC2086  # several words on purpose
python test.py "${testing[@]}" "${networks[@]}" $STRANGER
python examples/degradation.py "${testing[@]}" --weights $out/all_kinds.pt $out/one_kind.pt \
    --scales 0.5 0.32 0.25 0.2 0.1667
