#!/usr/bin/env bash
# The ten-class results table, from Tiny ImageNet's archive: examples/tiny_imagenet/run.sh tiny-imagenet-200.zip
# (make tiny ARCHIVE=tiny-imagenet-200.zip does the same in the project's own .venv)
set -euo pipefail
archive=$(realpath "${1:?usage: examples/tiny_imagenet/run.sh ARCHIVE}")
cd "$(dirname "$0")/../.."
here=examples/tiny_imagenet
set -x
python -m examples.tiny_imagenet.prepare "$archive"
python img_sampler_train.py --link --parameters $here/parameters.json
python img_sampler_val.py --link --parameters $here/parameters.json
python examples/train_classifier.py --parameters $here/parameters.json --epochs 12 --shift 6
python train_darionet.py --parameters $here/pixels.json
python train_darionet.py --parameters $here/parameters.json
python test.py --parameters $here/parameters.json
