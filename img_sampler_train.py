"""Keeps a share (data.train_fraction, 15 %) of every class folder for training.

python img_sampler_train.py                 copies from data.train_original to data.train
python img_sampler_train.py --link          hard links instead of copies: no disk space
python img_sampler_train.py --set data.train_fraction=0.3 --overwrite
"""

from experiment.parameters import read_parameters
from experiment.sampling import images_by_class, sample, share
from experiment.script import run_script, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies")
    parser.add_argument("--overwrite", action="store_true", help="replace a sample of another source, fraction or seed")
    arguments = parser.parse_args()
    data = read_parameters(arguments.parameters or "parameters.json", arguments.set).data

    kept = {
        name: share(images, data.train_fraction, data.seed, name)
        for name, images in images_by_class(data.train_original).items()
    }
    how = {"fraction": data.train_fraction, "seed": data.seed, "link": arguments.link, "overwrite": arguments.overwrite}
    sample(data.train_original, {data.train: kept}, **how)


if __name__ == "__main__":
    run_script(main)
